#!/bin/bash
# sbatch launch/slurm.sh: a run in jobs of at most 8 hours. Each ends in time by itself and asks for the next one, until the run has
# come to its end. Submit it in the folder of train.py.
#SBATCH --job-name=resnet50
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@180
#SBATCH --output=slurm-%j.out
set -euo pipefail
: "${PYTHON:=.venv/bin/python}" "${RUN:=checkpoints/mild}" "${DATA:=data/imagenet}"

exec 3>&1
output=$("$PYTHON" train.py --recipe mild --data-dir "$DATA" --checkpoint-dir "$RUN" --resume auto --stop-after-hours 7.8 \
    | tee /dev/fd/3 | tail -n 50)
if grep -q "stopped by --stop-after-hours" <<<"$output"; then
    sbatch "$0"
fi
