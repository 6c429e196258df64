"""The device of a run and the precision of its arithmetic."""

import os

import torch

from engine.system.errors import UserError, first_line
from engine.system.gpu_absence import TorchBuild, absence_of_gpu, cure_of, runs_on, without_code
from engine.system.torchrun import launched

TORCH = TorchBuild(torch.__version__, torch.version.cuda)
NEVER = 2**31 - 1  # steps until a loss scale grows
FIRST_WITH_TF32 = (8, 0)  # compute capability
REPEATING_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS gives the same bits each time, by its documentation
WITHOUT_GPU = "--device cpu does without a GPU, many times slower"
AUTOCAST_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(config, in_this_process=True):
    """Return the torch.device that config['device'] asks for; 'auto' is a CPU only on a machine without a GPU.

    Args:
        in_this_process: False where only others will compute on it: a process that has begun on a GPU holds some of its
            memory, and in exclusive mode keeps it from all others.
    Raises:
        UserError: PyTorch sees no GPU, and one is asked for or the machine has one, or it cannot use the one that it sees;
            with the reason and its cure.
    """
    if config["device"] == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        if not launched():  # else distributed.process_group, which chooses each process's own
            require_usable_gpu(in_this_process)
        return torch.device("cuda")
    seen, causes = absence_of_gpu(TORCH)
    if not seen and config["device"] == "auto":
        return torch.device("cpu")
    lines = [f"device = {config['device']!r}: PyTorch sees no GPU, and this machine shows none of NVIDIA's"]
    if seen:
        lines = [f"device = {config['device']!r}: this machine has a GPU ({seen}), but PyTorch sees none"]
        if not causes:
            complaint = _complaint_of_torch()
            causes = [(f"PyTorch says: {complaint}", cure_of(complaint))]
        lines += [f"{reason}. Mend it with: {command}" for reason, command in causes]
    raise UserError("\n".join([*lines, WITHOUT_GPU]))


def require_usable_gpu(begin=True):
    """Raise UserError, with the reason and its cure, unless PyTorch can compute on its present GPU.

    Args:
        begin: find out by computing something; otherwise only whether PyTorch has code for it.
    """
    if trouble := _trouble_with_gpu(begin):
        reason, command = trouble
        lines = ["this machine has a GPU, but PyTorch cannot use it", f"{reason}. Mend it with: {command}", WITHOUT_GPU]
        raise UserError("\n".join(lines))


def _trouble_with_gpu(begin):
    """Return (reason, command that mends it), or None."""
    try:
        capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        if not runs_on(capability, architectures):
            return without_code(torch.cuda.get_device_name(), capability, architectures, TORCH)
        if begin:
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()  # some errors show only here
    except RuntimeError as error:
        complaint = first_line(error)
        return f"PyTorch says: {complaint}", cure_of(complaint)
    return None


def _complaint_of_torch():
    """Return what PyTorch says when it is told to use a GPU that it does not see, in a line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        return first_line(error)
    return "no CUDA GPUs are available"


def choose_precision(config, device):
    """Return 'fp32', 'fp16' or 'bf16' for config['precision']; 'auto' takes what the hardware computes natively.

    A T4 emulates bf16, and torch.cuda.is_bf16_supported() says True there unless emulation is excluded.
    """
    if config["precision"] != "auto":
        if config["precision"] == "fp16" and device.type == "cpu":
            raise UserError("precision = 'fp16' on a CPU: a CPU trains in fp32 or bf16; leave --precision auto")
        return config["precision"]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older releases: fp32 is always right
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def precision_remarks(precision, device):
    """Return what is to be said of a precision on a GPU, in lines: what it costs, or that it is less than its name says."""
    if device.type != "cuda":
        return []
    capability = torch.cuda.get_device_capability(device)
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return [
            f"WARNING: bf16 is emulated on compute capability {capability[0]}.{capability[1]}, without channels-last: slow; "
            "--precision fp16 is what this GPU computes natively"
        ]
    if precision == "fp32" and capability >= FIRST_WITH_TF32 and torch.backends.cudnn.allow_tf32:
        return [
            "note: convolutions in fp32 run in TF32 (10 bits of mantissa) on this GPU, as PyTorch has it; "
            "NVIDIA_TF32_OVERRIDE=0 in the environment forbids it"
        ]
    return []


def set_up_arithmetic(config, device):
    """Let cuDNN choose its algorithms by trial; or, with config['deterministic'], let a GPU give the same bits each time.

    To be called before the first product of matrices on the GPU: cuBLAS reads its variable once. On a CPU all bits repeat
    as it is.
    """
    repeats = config["deterministic"] and device.type == "cuda"
    torch.backends.cudnn.benchmark = not repeats  # each size is tried out once
    if repeats:
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)  # an operator that has none raises
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in REPEATING_WORKSPACES:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPEATING_WORKSPACES[0]


def autocast(device, precision):
    """Return the autocast context of a precision; for fp32 it changes nothing."""
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32")


def build_scaler(device, precision):
    """Return a GradScaler: for fp16 it finds the loss scale; otherwise the scale is and stays 1.

    It is enabled in every precision, for it also skips a step whose gradient is not finite without asking the host. One
    such gradient in bf16 or fp32 would otherwise end the run.
    """
    if precision == "fp16":
        return torch.amp.GradScaler(device.type)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=NEVER)
    scaler.set_backoff_factor(1.0)  # its constructor refuses that; a skipped step would halve the scale, and nothing double it
    return scaler


def load_scaler(scaler, saved, precision):
    """Take over a checkpoint's state of the GradScaler, unless just one of them is of fp16: it would tell nothing."""
    if (precision == "fp16") != (saved["growth_interval"] != NEVER):
        return
    still_1 = {} if precision == "fp16" else {"scale": 1.0, "backoff_factor": 1.0}  # checkpoints of old had halved it
    scaler.load_state_dict(saved | still_1)


def rebuilt_scaler(scaler, device, precision):
    """Return a GradScaler that goes on where another one was, except that it knows nothing of a step that was broken off.

    Only update() lets a GradScaler forget such a step, and that comes after the weights were changed.
    """
    rebuilt = build_scaler(device, precision)
    rebuilt.load_state_dict(scaler.state_dict())
    return rebuilt


def skip_unless_finite(scaler, optimizer, grad_norm):
    """Have a step skipped whose gradient's norm is not finite, too; between unscale_() and step(), without asking the host.

    GradScaler looks at each number of the gradient, and finite ones can have a norm that overflows. To be clipped by
    infinity such a gradient would be multiplied by inf / inf.
    """
    for found_inf in scaler._found_inf_per_device(optimizer).values():  # there is no public way to say it
        found_inf.masked_fill_(~torch.isfinite(grad_norm), 1.0)


def describe_device(device):
    """Return one line about the device, for the log."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return (
            f"{properties.name}, {properties.total_memory / 2**20:,.0f} MiB, compute capability "
            f"{properties.major}.{properties.minor}"
        )
    return f"CPU, {torch.get_num_threads()} threads"
