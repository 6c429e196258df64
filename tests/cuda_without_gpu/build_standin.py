"""Building the stand-in for a CUDA device, and the environment in which a process meets it."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent / "standin"
LIBRARIES = {  # file: sources
    "libcudart_standin.so": ("cudart.c", "capture.c"),
    "libcuda.so.1": ("cuda.c",),
    "libnvidia-ml.so.1": ("nvml.c",),
}


def why_not():
    """Return why the stand-in cannot be built here, or None."""
    if torch.version.cuda is None:
        return "this PyTorch is no CUDA build"
    if shutil.which("cc") is None:
        return "no C compiler (cc)"
    if len(_header_folders()) < 2:
        return "no headers of the CUDA runtime (torch's CUDA wheels bring them, with triton)"
    return None


def _header_folders():
    """Return the folders of cuda_runtime_api.h and of what it includes, as the wheels lay them down."""
    found = []
    for package, header in (("nvidia", "*/include/cuda_runtime_api.h"), ("triton", "backends/nvidia/include/cuda.h")):
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec is not None else ()
        found += [str(path.parent) for place in places for path in sorted(Path(place).glob(header))][:1]
    return found


def build(folder):
    """Build the libraries in the folder."""
    includes = [f"-I{headers}" for headers in _header_folders()]
    for library, sources in LIBRARIES.items():
        command = ["cc", "-shared", "-fPIC", "-O1", "-w", *includes, f"-Wl,-soname,{library}", *sources, "-o", folder / library]
        subprocess.run(command, cwd=SOURCES, check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # what Triton's helper is linked to


def environment(folder, capability):
    """Return the environment of a process that sees the stand-in of a compute capability, 60, 75, 80 or 90."""
    hidden = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return hidden | {
        "LD_PRELOAD": str(folder / "libcudart_standin.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "STANDIN_CAPABILITY": str(capability),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
