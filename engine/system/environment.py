"""What a figure depends on besides the code: date, commit, hardware, versions."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.system.workers import available_cores

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torchvision", "pillow", "simplejpeg", "numpy")


def environment():
    """Return the date, the commit, the hardware and the versions as a dict of plain values."""
    gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
    }


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit():
    """Return the commit measured, with a + if files were changed since; None outside of a git checkout."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name():
    """Return the CPU's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
