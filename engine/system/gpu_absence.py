"""Why PyTorch sees no GPU on a machine that has one, or cannot use the one that it sees, and the command that mends it.

Looks at what the system shows, without torch: nvidia-smi, /proc/driver/nvidia, the PCI devices, /dev.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

WSL_FOLDER = "usr/lib/wsl/lib"  # which is not on the PATH of each shell there
SMI_SECONDS = 20  # a broken driver lets nvidia-smi hang
NVIDIA, DISPLAY = "0x10de", "0x03"  # PCI vendor; PCI class of display and 3D controllers, its first two digits
LEAST_DRIVERS = {11: 450, 12: 525, 13: 580}  # CUDA's major version: NVIDIA's driver branch (CUDA's compatibility guide)
GIVEN_BY_SLURM = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
VERSION = r"(\d{3,}\.\d+(?:\.\d+)?)"  # of a driver
INSTALL_TORCH = "pip install --force-reinstall torch torchvision"
INSTALL_TORCH_FOR_CUDA_12 = f"{INSTALL_TORCH} --index-url https://download.pytorch.org/whl/cu126"
LEAST_CAPABILITIES = {12: (5, 0), 13: (7, 5)}  # of PyTorch's wheels by CUDA's major version: torch.cuda, 2.14
INSTALL_DRIVER = "sudo apt-get install --yes nvidia-driver-580 && sudo reboot"
LOST = ("GPU is lost", "Unable to determine the device handle", "fallen off the bus", "Xid")  # by nvidia-smi, of a broken GPU
CURES = {  # of what PyTorch says, by words in it, where nothing else explains it
    "busy or unavailable": "sudo nvidia-smi -c 0, which lets several processes use it; nvidia-smi lists the one that has it",
    "out of memory": "nvidia-smi, which lists the processes that hold its memory, and kill PID",
    "ECC": "sudo nvidia-smi --gpu-reset, or else sudo reboot; if it comes back, the card is failing",
    "no kernel image": INSTALL_TORCH,
    "MPS": "nvidia-cuda-mps-control -d, which starts the daemon; or do without: unset CUDA_MPS_PIPE_DIRECTORY",
    "too old": INSTALL_DRIVER,
    "no NVIDIA driver": "sudo ldconfig, so that the driver's libcuda.so.1 is found; in a container: docker run --gpus all "
    f"-e NVIDIA_DRIVER_CAPABILITIES=compute,utility ...; in WSL: export LD_LIBRARY_PATH=/{WSL_FOLDER}",
    "unsupported display driver": "sudo reboot",  # the driver was updated while its old half was loaded
    "not yet initialized": "sudo systemctl restart nvidia-fabricmanager",
    "forward compatibility": "unset LD_LIBRARY_PATH, which leads to CUDA's compat libraries",
    "unknown error": "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm",  # as after a suspension
    "": 'python -c "import torch; torch.zeros(1).cuda()", which says more',
}


class System(NamedTuple):
    """Where to look."""

    root: Path = Path("/")  # of dev, proc and sys
    environment: Mapping = os.environ


class TorchBuild(NamedTuple):
    """What PyTorch is built for."""

    version: str  # 2.14.1+cu130
    cuda: str | None  # 13.0; None without CUDA


class Evidence(NamedTuple):
    """What a system shows of NVIDIA's GPUs."""

    names: list  # of the GPUs that nvidia-smi lists
    uuids: list  # of these and of their MIG instances; without nvidia-smi, of those whose driver tells it
    smi: str | None  # what nvidia-smi printed instead, if it failed; None where there is no nvidia-smi
    mig_alone: bool  # whether all these GPUs are in MIG mode and none has an instance
    known_to_driver: list  # PCI addresses in /proc/driver/nvidia/gpus
    on_bus: list  # PCI addresses of NVIDIA's display controllers
    bound_to: list  # kernel drivers of those: nvidia, nouveau, vfio-pci
    driver: str | None  # version of NVIDIA's, 550.54.15

    def in_words(self):
        """Return what shows that there is a GPU, or '' where nothing does."""
        if self.names:
            return f"nvidia-smi lists {', '.join(self.names)}"
        if self.is_lost():
            return f"nvidia-smi says: {self.smi}"
        if self.known_to_driver:
            return f"/proc/driver/nvidia/gpus has {', '.join(self.known_to_driver)}"
        return f"PCI device {', '.join(self.on_bus)} is one of NVIDIA's" if self.on_bus else ""

    def is_lost(self):
        """Return whether nvidia-smi speaks of a GPU that no longer answers."""
        return any(words in (self.smi or "") for words in LOST)


def look_for_gpus(system):
    """Return the Evidence of a System."""
    names, uuids, smi, mig_alone, driver = _ask_nvidia_smi(system)
    proc = system.root / "proc/driver/nvidia"
    for path in (proc / "version", system.root / "sys/module/nvidia/version"):
        driver = driver or _first(VERSION, _text(path))
    devices = [device for device in _entries(system.root / "sys/bus/pci/devices") if _is_nvidia_gpu(device)]
    bound_to = sorted({(device / "driver").resolve().name for device in devices if (device / "driver").exists()})
    known = _entries(proc / "gpus")
    uuids = uuids or [uuid for gpu in known if (uuid := _first(r"(GPU-[0-9a-f-]+)", _text(gpu / "information")))]
    on_bus = [device.name for device in devices]
    return Evidence(names, uuids, smi, mig_alone, [gpu.name for gpu in known], on_bus, bound_to, driver)


def _entries(folder):
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path):
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _first(pattern, text):
    found = re.search(pattern, text)
    return found[1] if found else None


def _is_nvidia_gpu(device):
    return _text(device / "vendor") == NVIDIA and _text(device / "class").startswith(DISPLAY)


def _ask_nvidia_smi(system):
    """Return (names, UUIDs, complaint or None, whether MIG is alone, version of the driver or None), as Evidence has them."""
    environment = system.environment
    folders = environment.get("PATH", os.defpath), str(system.root / WSL_FOLDER)
    program = shutil.which("nvidia-smi", path=os.pathsep.join(folders))
    if program is None:
        return [], [], None, False, None
    works, listing = _output(program, ["-L"], environment)
    names = _names_in(listing) if works else []
    complaints = [line for line in listing.splitlines() if not names or any(words in line for words in LOST)]
    complaint = " ".join(" ".join(complaints).split())
    if not names:
        return [], [], complaint, False, None

    def ask(field):
        return _output(program, [f"--query-gpu={field}", "--format=csv,noheader"], environment)[1]

    driver = _first(rf"(?m)(?:^|, *|Driver Version: *){VERSION}(?:$|\s)", ask("driver_version"))
    uuids = re.findall(r"UUID: ([\w/-]+)", listing)
    has_instances = any(uuid.startswith("MIG-") for uuid in uuids)
    return names, uuids, complaint, not has_instances and set(ask("mig.mode.current").split()) == {"Enabled"}, driver


def _names_in(listing):
    """Return the names in what nvidia-smi -L prints: a line for each GPU, indented ones for the parts of it."""
    if "NVIDIA-SMI" in listing:  # a program in its place that knows no flags, and prints its table
        return re.findall(r"(?m)^\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|", listing)
    others = ("No devices", *LOST)
    lines = [line for line in listing.splitlines() if line.strip() and not line[0].isspace()]
    lines = [line for line in lines if not any(words in line for words in others)]
    return [re.sub(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", r"\1", line) for line in lines]


def _output(program, arguments, environment):
    """Return (whether nvidia-smi succeeded, what it printed)."""
    try:
        done = subprocess.run(
            [program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SMI_SECONDS,
            env=dict(environment),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout


def absence_of_gpu(torch_build, system=None):
    """Return (what shows a GPU, [(reason, command that mends it), ...]) where PyTorch sees none.

    Returns:
        ('', []) where the machine has no GPU of NVIDIA's; no reasons where nothing here explains it.
    """
    system = system or System()
    evidence = look_for_gpus(system)
    if not evidence.in_words():
        return "", []
    causes = [
        *_of_the_build(torch_build),
        *_with_slurms_cure(system.environment, _of_the_environment(system.environment, evidence)),
        *_of_the_driver(evidence, torch_build),
        *_with_slurms_cure(system.environment, _of_the_device_files(evidence, system)),
    ]
    return evidence.in_words(), causes


def cure_of(complaint):
    """Return the command for what PyTorch says."""
    return next(cure for words, cure in CURES.items() if words in complaint)


def runs_on(capability, architectures):
    """Return whether code for the architectures, as torch.cuda.get_arch_list() has them, runs on a compute capability.

    Machine code (sm_86) runs on the later minor versions of its major one, PTX (compute_86) on all that are later. With an a
    (sm_90a) both run on that capability alone, with an f on its family: NVIDIA's CUDA Programming Guide.
    """
    known = [code for name in architectures if (code := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name))]
    return not known or any(_runs(capability, *code.groups()) for code in known)


def _runs(capability, kind, major, minor, feature):
    built_for = int(major), int(minor)
    if feature == "a":
        return capability == built_for
    return capability >= built_for and (capability[0] == built_for[0] or (kind == "compute" and not feature))


def without_code(gpu, capability, architectures, torch_build):
    """Return (reason, command that mends it) where a PyTorch has no code for a GPU of that name and compute capability."""
    has = f"PyTorch {torch_build.version} has code for {', '.join(architectures)} and none for"
    reason = f"{has} the {gpu} of compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITIES[12]:
        return f"{reason}; nor has any that this program takes", "a GPU of compute capability 5.0 or newer"
    return reason, INSTALL_TORCH_FOR_CUDA_12 if capability < LEAST_CAPABILITIES[13] else INSTALL_TORCH


def _of_the_build(torch_build):
    if torch_build.cuda is None:
        yield f"PyTorch {torch_build.version} is no CUDA build", INSTALL_TORCH


def _with_slurms_cure(environment, causes):
    """Yield causes of a hidden GPU; the cure is Slurm's in one of its jobs that was given none, from which it hides all."""
    given_none = "SLURM_JOB_ID" in environment and not any(environment.get(name) for name in GIVEN_BY_SLURM)
    for reason, cure in causes:
        if given_none:
            yield f"Slurm has given this job no GPU: {reason}", "sbatch --gres=gpu:1 ...; srun and salloc take the same flag"
        else:
            yield reason, cure


def _of_the_environment(environment, evidence):
    """Yield how CUDA_VISIBLE_DEVICES hides all GPUs: CUDA shows those before the first one that does not exist."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    first = visible.split(",")[0].strip() if visible is not None else "0"
    count = len(evidence.names or evidence.known_to_driver or evidence.on_bus)
    if first == "":
        yield "CUDA_VISIBLE_DEVICES is set to nothing, which hides every GPU", "unset CUDA_VISIBLE_DEVICES"
    elif first.isdigit():
        if int(first) >= count:
            there = "the only GPU has the number 0" if count == 1 else f"the GPUs have the numbers 0 to {count - 1}"
            yield f"CUDA_VISIBLE_DEVICES = {visible!r}, but {there}", "unset CUDA_VISIBLE_DEVICES"
    elif not _may_name_a_gpu(first, evidence, count):
        yield f"CUDA_VISIBLE_DEVICES = {visible!r} names no GPU of this machine", "unset CUDA_VISIBLE_DEVICES"


def _may_name_a_gpu(word, evidence, count):
    """Return whether a word of CUDA_VISIBLE_DEVICES is the beginning of a UUID that is there, or that is not known here."""
    if not word.startswith(("GPU-", "MIG-")):
        return False
    all_known = evidence.names if word.startswith("MIG-") else len(evidence.uuids) >= count
    return not all_known or any(uuid.startswith(word) for uuid in evidence.uuids)


def _of_the_driver(evidence, torch_build):
    """Yield that a GPU or NVIDIA's driver is not at work, that the driver is too old for PyTorch's CUDA, or MIG alone."""
    if evidence.mig_alone:
        cure = "sudo nvidia-smi mig -cgi 0 -C, which makes one of the whole GPU; or sudo nvidia-smi -mig 0, without MIG"
        yield "MIG is on, and there is no instance", cure
    if evidence.smi and ("mismatch" in evidence.smi or evidence.is_lost()):
        yield f"nvidia-smi says: {evidence.smi}", "sudo reboot"
    if evidence.driver is None:
        if other := [name for name in evidence.bound_to if name != "nvidia"]:
            yield f"the GPU is in the hands of the driver {other[0]}, not of NVIDIA's", INSTALL_DRIVER
        elif not (evidence.names or evidence.known_to_driver):
            yield "NVIDIA's driver is not loaded", "sudo modprobe nvidia" if evidence.smi is not None else INSTALL_DRIVER
        return
    here, major = int(evidence.driver.split(".")[0]), int(torch_build.cuda.split(".")[0]) if torch_build.cuda else 0
    least = LEAST_DRIVERS.get(major, 0)
    if here < least:
        cure = INSTALL_DRIVER
        if major > 12 and here >= LEAST_DRIVERS[12]:
            cure += f"; or, where the driver must stay: {INSTALL_TORCH_FOR_CUDA_12}"
        needs = f"CUDA {torch_build.cuda} of PyTorch {torch_build.version} needs {least} or newer"
        yield f"NVIDIA's driver {evidence.driver} is too old: {needs}", cure


def _of_the_device_files(evidence, system):
    """Yield what is missing of /dev/nvidia*, and what this user may not open."""
    root = system.root
    if evidence.driver is None or (root / "dev/dxg").exists():  # WSL has none of them
        return
    cards = sorted((root / "dev").glob("nvidia[0-9]*"))
    control, memory = root / "dev/nvidiactl", root / "dev/nvidia-uvm"
    if not cards and not evidence.names:
        if "KUBERNETES_SERVICE_HOST" in system.environment:
            cure = "resources: {limits: {nvidia.com/gpu: 1}} in the container's part of the pod's file"
            yield "this pod was started without the GPU: it has no /dev/nvidia0", cure
        elif any((root / name).exists() for name in (".dockerenv", "run/.containerenv")):
            yield "this container was started without the GPU: it has no /dev/nvidia0", "docker run --gpus all ..."
        else:
            yield "there is no /dev/nvidia0", "sudo nvidia-modprobe -u -c 0"
    elif cards and not memory.exists():
        yield "there is no /dev/nvidia-uvm, which CUDA needs", "sudo nvidia-modprobe -u -c 0"
    closed = [path for path in (control, memory, *cards) if path.exists() and not _opens(path)]
    if closed:
        names = " ".join(f"/{path.relative_to(root)}" for path in closed)
        yield f"this user may not open {names}", f"sudo chmod a+rw {names}"


def _opens(path):
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return False
    except OSError:  # another trouble than permissions
        return True
    return True
