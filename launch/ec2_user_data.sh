#!/bin/bash
# User data of an EC2 spot instance: from a bare machine to a run that ends by switching everything off.
# launch/README.md says what it needs. Fill in the first four lines.
set -euo pipefail
: "${REPOSITORY:=https://github.com/OWNER/NAME.git}"        # where this code is cloned from
: "${IMAGES:=s3://BUCKET/imagenet}"                          # train.arrow, val.arrow and SHA256SUMS, as prepare_data.py writes them
: "${MIRROR:=s3://BUCKET/runs/mild}"                         # where the run is kept
: "${GROUP:=resnet50}"                                       # the Auto Scaling group that starts this instance
: "${FLAGS:=--recipe mild --hours 14 --price-per-hour 0.30}" # 0.30: your spot price; the budget counts the hours of all instances
: "${DISK:=/mnt/nvme}" "${DISKS:=/dev/disk/by-id}"
: "${AMI_DISK:=/opt/dlami/nvme}" # where AWS's Deep Learning AMIs mount the instance store by themselves
: "${METADATA:=http://169.254.169.254/latest}"
: "${BOOT:=/var/lib/cloud/scripts/per-boot}" # what cloud-init runs at every boot; user data it runs at the first one alone

switch_off() { # else the group would start another instance in place of this one
    sleep 10   # where this machine is going away, the programs of this script end before it is told so itself
    rm -f "$BOOT/resnet50"
    aws autoscaling set-desired-capacity --auto-scaling-group-name "$GROUP" --desired-capacity 0 || true
    shutdown -h now
}
status=1
trap 'if [ "$status" -ne 143 ]; then switch_off; fi' EXIT # 143: interrupted; the group starts the next instance
trap 'status=143; exit 143' TERM                          # this machine is going away; bash waits for the program in progress

if [ -d "$BOOT" ] && [ ! "$0" -ef "$BOOT/resnet50" ]; then # else a machine that boots again would idle, and cost
    install -m 755 "$0" "$BOOT/resnet50"
fi

patiently() { # what fails now may go well in a minute; ending here would end the run
    for _ in {1..4}; do
        if "$@"; then return; fi
        sleep 60
    done
    "$@"
}

# The mirror's client takes us-east-1 where nothing names the region, and the AWS CLI may take none.
token=$(patiently curl -sSf -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 300" "$METADATA/api/token")
AWS_REGION=$(patiently curl -sSf -H "X-aws-ec2-metadata-token: $token" "$METADATA/meta-data/placement/region")
export AWS_REGION AWS_DEFAULT_REGION="$AWS_REGION"

for _ in {1..12}; do # its service may still be at it
    if [ ! -d "$AMI_DISK" ] || mountpoint -q "$AMI_DISK"; then break; fi
    sleep 5
done
if mountpoint -q "$AMI_DISK"; then # mkfs would refuse a disk in use
    DISK=$AMI_DISK
else
    device=$(find "$DISKS" -name 'nvme-Amazon_EC2_NVMe_Instance_Storage_*' ! -name '*-ns-*' ! -name '*-part*' | sort | head -n 1)
    [ -n "$device" ] || { echo "no instance store here: choose a type that has one, such as g4dn.2xlarge"; exit; }
    mkfs.ext4 -q -F "$device"
    mkdir -p "$DISK"
    mount "$device" "$DISK"
fi

patiently aws s3 sync --only-show-errors "$IMAGES" "$DISK/imagenet"
(cd "$DISK/imagenet" && sha256sum --check --quiet SHA256SUMS)

rm -rf "$DISK/code" # of an earlier boot
patiently git clone --quiet --depth 1 "$REPOSITORY" "$DISK/code"
if ! python3 -m venv "$DISK/venv"; then # Ubuntu's Python comes without
    patiently apt-get update --quiet
    patiently apt-get install --quiet --yes -o DPkg::Lock::Timeout=300 python3-venv
    python3 -m venv --clear "$DISK/venv"
fi
patiently "$DISK/venv/bin/pip" install --quiet -r "$DISK/code/requirements.txt" obstore

cd "$DISK/code"
failures=0
while true; do
    # shellcheck disable=SC2086 # FLAGS are words
    if "$DISK/venv/bin/python" train.py $FLAGS --data-dir "$DISK/imagenet" --checkpoint-dir "$DISK/run" \
        --log-file "$DISK/training.log" --mirror "$MIRROR" --resume auto --spot-notice true; then status=0; else status=$?; fi
    echo "train.py ended with status $status"
    case $status in
    75) ;;                      # another machine still holds the run, or the mirror has not got the end of it
    0 | 2 | 129 | 130 | 143) break ;; # at its end, no such command line, asked to stop
    *)                          # a storage that does not answer, out of memory: what fails now may go well in a minute
        failures=$((failures + 1))
        [ "$failures" -lt 5 ] || break
        ;;
    esac
    sleep 60
done
