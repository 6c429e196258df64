"""Where a folder lies: on which kind of file system, whether that stays, and how much room there is."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from engine.system.files import in_the_way

IN_MEMORY = ("tmpfs", "ramfs")
INSTANCE_STORE = "Amazon EC2 NVMe Instance Storage"  # model that such a disk states; EBS: Amazon Elastic Block Store


class Mount(NamedTuple):
    """A mounted file system."""

    point: str
    kind: str  # ext4, tmpfs, nfs4
    device: str  # /dev/nvme1n1, or what stands for it


def existing(path):
    """Return the Path itself, or the nearest folder above it that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def mount_of(path, root="/"):
    """Return the Mount that a path lies on, or None where the system does not tell.

    Args:
        root: folder below which /proc and /sys lie.
    """
    place, found = os.path.realpath(existing(path)), None
    try:
        lines = Path(root, "proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        device, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)  # a space is written \040
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and (found is None or len(point) >= len(found.point)):
            found = Mount(point, kind, device)
    return found


def why_it_goes_away(path, root="/"):
    """Return in words why what lies at a path is lost with the machine, or None where nothing says so."""
    mount = mount_of(path, root)
    if mount is None:
        return None
    if mount.kind in IN_MEMORY:
        return f"{mount.point} lies in main memory ({mount.kind}) and is lost when the machine stops"
    disk = re.sub(r"(?<=\d)p\d+$", "", Path(mount.device).name)  # nvme1n1p1: its first partition
    try:
        model = Path(root, "sys/block", disk, "device/model").read_text().strip()
    except OSError:
        return None
    if model == INSTANCE_STORE:
        return f"{mount.point} is an instance store, the machine's own disk, which is emptied when the instance stops"
    return None


def free_bytes(path):
    """Return the bytes that may still be written at a path, or where it will be made."""
    return shutil.disk_usage(existing(path)).free


def why_not_writable(path):
    """Return what is against a new file in a folder, or where that will be made; None if it can be written."""
    if obstacle := in_the_way(path):
        return obstacle
    try:
        tempfile.TemporaryFile(dir=existing(path)).close()
    except OSError as error:
        return str(error)
    return None
