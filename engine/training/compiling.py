"""torch.compile for the network: where a measurement says that it pays, and never silently not."""

import math
import os
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from engine.data.batches import resolution_of_epoch
from engine.system.device import AUTOCAST_DTYPES, describe_device
from engine.system.distributed import all_gather_object, any_process, broadcast_from_rank0, largest_shard, rank, size
from engine.system.micro_batches import network_px

LEAST_CAPABILITY = (7, 0)  # that Inductor compiles for: torch/_dynamo/device_interface.py, torch 2.11 to 2.14
SHAPES = 64  # that may be compiled: a run's resolutions, each with its micro-batches
MEMORY_BUDGETS = {"fast": 1.0, "low": 0.7, "lowest": 0.3}  # share of the activations that the compiler may keep
CACHE_FOLDER = "compiler_cache"  # in the folder of the checkpoints
EXPECTED_SECONDS = 60.0  # of compiling for one size, as long as it is not known: a guess; on an H200 with all else 70
MOST_SIZES = 5  # of a compiled run whose resolution grows
FAILED = "it could not be compiled"
WARMUP_STEPS, STEPS_AT_ONCE = 3, 4
TRIAL_SECONDS = 3.0  # of the steps timed, each way

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


def choose_compile(config, device):
    """Return (how, why) for config['compile']: 'on', 'off', or 'measure' where only a measurement can tell."""
    if config["deterministic"] and device.type == "cuda":
        return "off", "deterministic, and the compiler chooses its kernels by measurement"
    if config["compile"] != "auto":
        return config["compile"], "as asked for"
    if device.type != "cuda":
        return "off", "on a CPU that takes minutes before the first step"
    capability = torch.cuda.get_device_capability(device)
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return "off", f"{name}, and the compiler needs {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "off", "Triton is not installed"
    return "measure", name


def compile_network(model, memory):
    """Compile the network in place: its keys stay, and every shape gets code of its own.

    What cannot be compiled as a whole, and more shapes than SHAPES, raise one of COMPILE_ERRORS instead of running uncompiled.
    """
    torch._dynamo.config.recompile_limit = SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.activation_memory_budget = MEMORY_BUDGETS[memory]
    model.compile(dynamic=False, fullgraph=True)


def is_compiled(model):
    """Return whether a network runs compiled code."""
    return model._compiled_call_impl is not None


def eager_mode():
    """Return a context in which compiled networks run as written: for passes that are too short or too varied."""
    return torch.compiler.set_stance("force_eager")


def fall_back_to_eager(model):
    """Let a compiled network run as written from now on."""
    model._compiled_call_impl = None


def keep_compiled_code_in(folder, create=True):
    """Let the compiler keep what it makes in folder/CACHE_FOLDER, so that a restarted run does not wait for it again.

    The compiler checks that code fits before it takes it: another GPU, PyTorch or network compiles anew, beside the old.
    TORCHINDUCTOR_CACHE_DIR in the environment rules. To be called before anything is compiled.

    Args:
        create: the folder, if it is not there; without it nothing is kept there then.
    """
    cache = Path(folder, CACHE_FOLDER).resolve()
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():  # PyTorch itself sets the default
        return
    try:
        if create:
            cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # whoever saves a checkpoint there says so
    if cache.is_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)


# Sizes ---------------------------------------------------------------------------------------------------------------


def coarser_step(config):
    """Return the resolution_step with which a growing resolution takes at most MOST_SIZES sizes: each is compiled anew.

    The first and the last size stay: it is the smallest multiple of the step that leads from one to the other in whole steps.
    """
    start, end, step = config["start_resolution"], config["train_resolution"], config["resolution_step"]
    if not 0 < start < end:
        return step
    steps = [multiple for multiple in range(step, end - start + 1, step) if (end - start) % multiple == 0]
    return next(multiple for multiple in steps if (end - start) // multiple < MOST_SIZES)


def work_left(config, epochs_done, steps_per_epoch):
    """Return (px, steps, sizes): the size that most of the rest of the run goes into, how many steps at it are as much
    work as that rest, and how many sizes the rest has."""
    epochs_of = Counter(resolution_of_epoch(config, epoch) for epoch in range(epochs_done, config["epochs"]))
    pixels = {px: epochs * px**2 for px, epochs in epochs_of.items()}
    most = max(pixels, key=pixels.get, default=config["train_resolution"])
    return most, steps_per_epoch * sum(pixels.values()) / most**2, max(len(pixels), 1)


# The measurement -----------------------------------------------------------------------------------------------------


def measured_choice(
    step,
    start_compiling,
    compiled_still,
    wait,
    steps_left,
    sizes,
    seconds_left=math.inf,
    however_short=False,
    clock=time.perf_counter,
):
    """Take steps as written, then compiled, and return the figures and which of the two the run goes on with.

    Args:
        step: takes a step.
        start_compiling: lets the next steps run compiled code; the first one compiles.
        compiled_still: returns False once compiling has failed and the step runs as written.
        wait: returns when the device has done all that it was given.
        steps_left, seconds_left: of the run, at most; sizes: px that it has left, as a count. Each is compiled anew.
        however_short: measure in a run, too, that is shorter than compiling.
    Returns:
        dict, the same in all ranks: `compiled`, `why`, and in seconds `step_as_written`, and `step_compiled` and `compilation`
        (of one size), which are None where nothing was compiled.
    """
    as_written = seconds_of_a_step(step, wait, clock)
    figures = {"compiled": False, "step_as_written": as_written, "step_compiled": None, "compilation": None}
    rest = min(steps_left * as_written, seconds_left)
    if not however_short and rest < sizes * EXPECTED_SECONDS:
        return figures | {"why": f"the {rest:.0f} s that the steps will take are shorter than compiling"}
    started = clock()
    start_compiling()
    step()
    wait()
    compilation = max(all_gather_object(clock() - started))
    if any_process(not compiled_still()):
        return figures | {"why": FAILED}
    compiled = seconds_of_a_step(step, wait, clock)
    why_not = does_not_pay(compiled / as_written, rest, sizes, 0.0 if however_short else compilation)
    figures |= {"step_compiled": compiled, "compilation": compilation}
    return figures | {"compiled": why_not is None, "why": why_not or "it is faster compiled"}


def does_not_pay(ratio, rest, sizes, compilation):
    """Return why a network is not compiled for the rest of a run, or None if it is.

    Args:
        ratio: time of a compiled step over that of one as written.
        rest: seconds that the rest takes as written.
        sizes: as a count; the code of one is in the cache by now.
        compilation: seconds for one size.
    """
    if ratio >= 1:
        return "it is not faster compiled"
    saved = rest * (1 - ratio)
    if saved <= (sizes - 1) * compilation:
        return f"compiling for {sizes} sizes would take longer than the {saved:.0f} s that it saves"
    return None


def seconds_of_a_step(step, wait, clock):
    """Return the median seconds of a step, that of the slowest rank; arguments as of measured_choice."""
    for _ in range(WARMUP_STEPS):
        step()
    wait()
    begun, groups = clock(), []
    while len(groups) < 3 or not any_process(clock() - begun > TRIAL_SECONDS):
        started = clock()
        for _ in range(STEPS_AT_ONCE):
            step()
        wait()
        groups.append((clock() - started) / STEPS_AT_ONCE)
    return max(all_gather_object(statistics.median(groups)))


def choose_compiled(config, checkpoint, own_step, train_images, hours, trials):
    """Return (config, choice, remarks): whether the network of a run is compiled, and the sizes that this suits.

    Args:
        checkpoint: to go on from, or None. Its choice holds as long as the circumstances are the same, and so does a failure.
        own_step: whether resolution_step must stay as it is.
        train_images: their number.
        hours: that the run may take.
        trials: Trials, which take the steps that are measured: on random images, before the run's own random numbers are drawn.
    Returns:
        choice: dict of plain values with at least `compiled`; for the checkpoints.
    """
    coarse = config if own_step else config | {"resolution_step": coarser_step(config)}
    how, why = broadcast_from_rank0(choose_compile(config, trials.device))
    choice = {"compiled": how == "on"}
    if how == "measure":
        circumstances = circumstances_of(config, trials)
        known = known_choice(checkpoint or {})
        if known and circumstances.items() <= known.items():
            again = "; --compile on tries again" if known["why"] == FAILED else ""
            choice, why = known, f"{in_words(known)} (measured when the run began{again})"
        else:
            work = work_left(coarse, checkpoint["epoch"] if checkpoint else 0, train_images // config["batch_size"])
            choice = circumstances | _measured(config, work, 3600 * hours, trials)
            why = in_words(choice)
    remarks = [f"the network is {'compiled' if choice['compiled'] else 'not compiled'}: {why}"]
    if choice["compiled"] and coarse != config:
        remarks.append(
            f"resolution_step = {coarse['resolution_step']} in place of {config['resolution_step']}, as each resolution is "
            f"compiled anew; --resolution-step {config['resolution_step']} keeps it"
        )
        config = coarse
    return config, choice, remarks


def known_choice(checkpoint):
    """Return the choice of a checkpoint's contents, or {} where it says nothing of compiled code."""
    choice = checkpoint.get("compile_choice", {})
    if checkpoint.get("compile_failed"):
        return choice | {"compiled": False, "why": FAILED, "step_compiled": None}
    return choice if choice.get("step_compiled") or choice.get("why") == FAILED else {}


def circumstances_of(config, trials):
    """Return what a measurement holds for, as a dict of plain values."""
    return {
        "hardware": broadcast_from_rank0(f"{size()} times {describe_device(trials.device)}"),
        "torch": str(torch.__version__),  # itself a class of its own, which no checkpoint may hold
        "precision": trials.precision,
        "batch_size": config["batch_size"],
        "memory": config["memory"],
    }


def _measured(config, work, seconds_left, trials):
    """Return measured_choice's figures for the steps of this run, of which work_left has told the `work`."""
    resolution, steps_left, sizes = work
    if rank() == 0:
        print(f"measuring the step at {resolution} px as written and compiled, which takes minutes ...", flush=True)
    state, device = trials.scratch_state(config), trials.device
    state.ddp_model.train()
    images, labels = random_batch(config, resolution, trials)

    def start_compiling():
        compile_network(state.model, config["memory"])
        state.probed_resolutions.clear()  # what was tried out was not compiled

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    figures = measured_choice(
        lambda: trials.step(state, images, labels, config),
        start_compiling,
        lambda: is_compiled(state.model),
        wait,
        steps_left,
        sizes,
        seconds_left,
        however_short=config["compile"] == "measure",
    )
    fall_back_to_eager(state.model)
    state = images = labels = None  # the memory is the run's from here on
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return figures | {"resolution": resolution}


def random_batch(config, resolution, trials):
    """Return (images [B, 3, H, W] in the autocast dtype and channels-last, labels int64 [B]) of a rank's shard, as the network
    sees one of so many px."""
    generator = torch.Generator(trials.device).manual_seed(0)
    px = network_px(config, resolution)
    shape = largest_shard(config["batch_size"]), 3, px, px
    images = torch.randn(shape, device=trials.device, generator=generator).to(AUTOCAST_DTYPES[trials.precision])
    labels = torch.zeros(len(images), dtype=torch.int64, device=trials.device)
    return images.to(memory_format=torch.channels_last), labels


def in_words(choice):
    """Return a measured choice as a phrase: both figures and the reason."""

    def rate(seconds):
        return f"{choice['batch_size'] / seconds:,.0f} images/s"

    text = f"{choice['why']}; as written {rate(choice['step_as_written'])} at {choice['resolution']} px"
    if choice["step_compiled"] is None:
        return text
    return f"{text}, compiled {rate(choice['step_compiled'])}, compiling took {choice['compilation']:.0f} s"
