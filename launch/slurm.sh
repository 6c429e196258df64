#!/bin/bash
# sbatch launch/slurm.sh: a run in jobs of at most 8 hours. Each ends in time by itself and asks for the next one, until the run has
# come to its end. Submit it in the folder of train.py.
# 3 minutes before a limit that comes sooner than --stop-after-hours the step gets SIGHUP, is saved, and the next job is asked for.
# scancel and a preemption send SIGTERM: saved, and no other job is asked for; a preempted one is put back into the queue.
#SBATCH --job-name=resnet50
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=HUP@180
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
set -euo pipefail
: "${PYTHON:=.venv/bin/python}" "${RUN:=checkpoints/mild}" "${DATA:=data/imagenet}"

exec 3>&1
status=0
# Slurm signals what srun has started, not this script and its other programs.
output=$(srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" "$PYTHON" train.py --recipe mild --data-dir "$DATA" \
    --checkpoint-dir "$RUN" --resume auto --stop-after-hours 7.8 | tee >(cat >&3) | tail -n 50) || status=$?
if [ "$status" -eq 129 ] || grep -q "stopped by --stop-after-hours" <<<"$output"; then
    sbatch "$0"
fi
exit "$status"
