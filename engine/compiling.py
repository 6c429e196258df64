"""torch.compile for the network: where, and never silently not."""

import torch

LEAST_CAPABILITY = (8, 0)  # that auto compiles for: Triton calls anything older unsupported
SHAPES = 64  # that may be compiled: a run's resolutions, each with its micro-batches
MEMORY_BUDGETS = {"fast": 1.0, "low": 0.7, "lowest": 0.3}  # share of the activations that the compiler may keep

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


def choose_compile(config, device):
    """Return (whether to compile the network, why) for config['compile']."""
    if config["deterministic"] and device.type == "cuda":
        return False, "deterministic, and the compiler chooses its kernels by measurement"
    if config["compile"] != "auto":
        return config["compile"] == "on", "as asked for"
    if device.type != "cuda":
        return False, "on a CPU that takes minutes before the first step"
    capability = torch.cuda.get_device_capability(device)
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return False, f"{name}, which Triton does not support; --compile on tries it"
    try:
        import triton  # noqa: F401
    except ImportError:
        return False, "Triton is not installed"
    return True, name


def compile_network(model, memory):
    """Compile the network in place: its keys stay, and every shape gets code of its own.

    What cannot be compiled as a whole, and more shapes than SHAPES, raise one of COMPILE_ERRORS instead of running uncompiled.
    """
    torch._dynamo.config.recompile_limit = SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.activation_memory_budget = MEMORY_BUDGETS[memory]
    model.compile(dynamic=False, fullgraph=True)


def uncompiled():
    """Return a context in which compiled networks run as written: for passes that are too short or too varied."""
    return torch.compiler.set_stance("force_eager")


def give_up_compiling(model):
    """Let a compiled network run as written from now on."""
    model._compiled_call_impl = None
