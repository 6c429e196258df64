"""The device of a run and the precision of its arithmetic."""

import torch

from engine.errors import UserError

AUTOCAST_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(config):
    """Return the torch.device that config['device'] asks for.

    Raises:
        UserError: a GPU is asked for and PyTorch sees none.
    """
    if config["device"] == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device = 'cuda': PyTorch sees no GPU. nvidia-smi should list one, with a driver of 580 or newer for "
            "PyTorch's CUDA 13 wheels; --device cpu trains without"
        )
    return torch.device(config["device"])


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


def autocast(device, precision):
    """Return the autocast context of a precision; for fp32 it changes nothing."""
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32")


def build_scaler(device, precision):
    """Return a GradScaler: for fp16 it finds the loss scale; otherwise the scale is 1.

    It is enabled in every precision, for it also skips a step whose gradient is not finite without asking the host. One
    such gradient in bf16 or fp32 would otherwise end the run.
    """
    if precision == "fp16":
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


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
