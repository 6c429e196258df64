"""The train step on data that lies on the device, beside the loops that people use today.

Every contender runs in a process of its own, `python -m benchmarks.step_speed JOB`, which prints its figures as JSON; the
contenders take turns in rounds. One step does all that the loop does with a batch, its meters included.
"""

import subprocess
import sys
import time

import torch

from benchmarks.measuring import REPOSITORY, installed_timm, last_words, rate_cell
from config import CONFIG, RECIPES
from engine.run.telemetry import GpuFigures
from engine.system import distributed
from engine.system.device import AUTOCAST_DTYPES, autocast, choose_device, choose_precision, set_up_arithmetic
from engine.system.gpu_memory import is_out_of_memory
from engine.system.host_memory import keep_freed_memory
from engine.system.plain_json import from_json, to_json

# torchvision's classification reference as users run it: AMP on a GPU, SGD, contiguous images, .item() for its meters.
REFERENCE = "torchvision reference"
CONTENDERS = {
    REFERENCE: {"loop": "reference"},
    "torchvision reference, channels-last": {"loop": "reference", "channels_last": True},
    "timm": {"loop": "timm"},
    "timm, channels-last": {"loop": "timm", "channels_last": True},
    "timm, channels-last, compiled": {"loop": "timm", "channels_last": True, "compile": True},
    "ours": {"loop": "ours", "compile": "off"},
    "ours, under torchrun": {"loop": "ours", "compile": "off", "torchrun": True},  # one process: what the exchange costs
    "ours, memory low": {"loop": "ours", "compile": "off", "memory": "low"},
    "ours, memory lowest": {"loop": "ours", "compile": "off", "memory": "lowest"},
    "ours, frozen to layer2": {"loop": "ours", "compile": "off", "freeze": "layer2"},
    "ours, frozen to layer4": {"loop": "ours", "compile": "off", "freeze": "layer4"},
    "ours, as in fast": {"loop": "ours", "compile": "off", "recipe": "fast"},
    "ours, as in mild": {"loop": "ours", "compile": "off", "recipe": "mild"},
    "ours, as in medium": {"loop": "ours", "compile": "off", "recipe": "medium", "steps_at_once": 10},  # one of them with SAM
    "ours, Muon": {"loop": "ours", "compile": "off", "changes": {"optimizer": "muon"}},
    "ours, deterministic": {"loop": "ours", "compile": "off", "deterministic": True},
    "ours, compiled": {"loop": "ours", "compile": "on"},
    "ours, compiled, memory low": {"loop": "ours", "compile": "on", "memory": "low"},
}
FROZEN = ("ours, frozen to layer2", "ours, frozen to layer4")
OF_RECIPES = ("ours, as in fast", "ours, as in mild", "ours, as in medium")
ON_CPU = (
    REFERENCE,
    "torchvision reference, channels-last",
    "timm",
    "ours, fp32",
    "ours",
    "ours, under torchrun",
    "ours, Muon",
    "ours, ResNet-18",
    "ours, ResNet-18, Muon",
    *FROZEN,
    *OF_RECIPES,
)
RESNET18 = {"architecture": "resnet18"}
CPU_CONTENDERS = CONTENDERS | {
    "ours, fp32": {"loop": "ours", "compile": "off", "precision": "fp32"},
    "ours, ResNet-18": {"loop": "ours", "compile": "off", "changes": RESNET18},
    "ours, ResNet-18, Muon": {"loop": "ours", "compile": "off", "changes": RESNET18 | {"optimizer": "muon"}},
}
NUM_CLASSES = 1000
LEARNING_RATE = 0.01


# The loops -----------------------------------------------------------------------------------------------------------


def reference_step(job, device, precision):
    """Return (step, channels_last) of torchvision's reference; step(images, labels) trains and reads its meters."""
    from torchvision.models import resnet50

    model = resnet50().to(device)
    if job.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    model.train()
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(images, labels):
        with autocast(device, precision):
            output = model(images)
            loss = criterion(output, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        hits = output.topk(5, dim=1).indices == labels[:, None]
        return loss.item(), hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()

    return step


def timm_step(job, device, precision):
    """Return the step of timm's training script: its model, optimizer and scaler; its meter is read at each 50th step."""
    import timm.optim
    import timm.utils

    model = timm.create_model("resnet50", num_classes=NUM_CLASSES).to(device)
    if job.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    model.train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    scaler = timm.utils.NativeScaler() if precision == "fp16" and device.type == "cuda" else None
    criterion = torch.nn.CrossEntropyLoss()
    network = torch.compile(model) if job.get("compile") else model
    taken = 0

    def step(images, labels):
        nonlocal taken
        with autocast(device, precision):
            loss = criterion(network(images), labels)
        optimizer.zero_grad()
        if scaler is not None:
            scaler(loss, optimizer, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        taken += 1
        if taken % 50 == 0:
            loss.item()

    return step


def our_step(job, device, precision):
    """Return train.py's own train_step, with clipping, schedule, sums, and what processes ask each other at each step."""
    from engine.training.mixing import build_mixing
    from engine.training.state import new_state
    from model import build_model
    from train import train_step

    config = CONFIG | {"optimizer": "sgd", "learning_rate": LEARNING_RATE} | RECIPES.get(job.get("recipe"), {})
    config |= job.get("changes", {}) | {
        "batch_size": job["batch_size"],
        "swa_start_epoch": 0,
        "compile": job["compile"],
        "memory": job.get("memory", "fast"),
        "freeze": job.get("freeze", "none"),
    }
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    model = build_model(config, NUM_CLASSES, device)
    state = new_state(model, config, 100_000, precision, compiled=config["compile"] == "on")
    state.model.train()
    mix = build_mixing(config, NUM_CLASSES)

    def step(images, labels):
        distributed.gather_events(None)
        result = train_step(state, *mix(images, labels), config)
        distributed.any_process(False)
        state.count_step(result, config)

    return step


LOOPS = {"reference": reference_step, "timm": timm_step, "ours": our_step}


# One process ---------------------------------------------------------------------------------------------------------


def measure(job):
    """Return {px: {'images_per_s', 'milliseconds', 'peak_mib', 'clock_mhz'}} of one contender; None where it does not fit."""
    device = choose_device(job)
    with distributed.process_group(device):
        return measure_on(device, job)


def measure_on(device, job):
    """Return measure()'s figures, inside of the process group that torchrun asks for, if it does."""
    precision = choose_precision(job, device)
    if device.type == "cpu" and job["loop"] != "ours":
        precision = "fp32"  # as their scripts run there
    set_up_arithmetic({"deterministic": job.get("deterministic", False)}, device)
    gpu = GpuFigures(device)
    figures = {}
    step = LOOPS[job["loop"]](job, device, precision)
    dtype = AUTOCAST_DTYPES[precision] if job["loop"] == "ours" else torch.float32  # as each loop's loader hands them over
    channels_last = job["loop"] == "ours" or job.get("channels_last")
    for resolution in job["resolutions"]:
        images = torch.randn(job["batch_size"], 3, resolution, resolution, device=device).to(dtype)
        images = images.to(memory_format=torch.channels_last) if channels_last else images
        labels = torch.randint(NUM_CLASSES, (job["batch_size"],), device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            figures[resolution] = timed(lambda images=images, labels=labels: step(images, labels), job, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            figures[resolution] = None
            break
        figures[resolution] |= {"clock_mhz": gpu.clock_mhz()}
    return {"precision": precision, "figures": figures}


def timed(step, job, device):
    """Return the figures of as many steps as fill the job's seconds, after a few that warm up."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(job["warmup_steps"]):
        step()
    wait()
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < job["seconds"] or steps < 2:
        for _ in range(job["steps_at_once"]):
            step()
        steps += job["steps_at_once"]
        wait()
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return {"images_per_s": round(job["batch_size"] / seconds, 1), "milliseconds": round(1000 * seconds, 2), "peak_mib": peak}


# All of them ---------------------------------------------------------------------------------------------------------


def step_benchmark(arguments):
    """Return the results of all contenders that can run here, in rounds."""
    device = choose_device({"device": arguments.device}, in_this_process=False)
    on_cpu = device.type == "cpu"
    names = arguments.contenders or (ON_CPU if on_cpu else CONTENDERS)
    names = [name for name in names if "timm" not in name or installed_timm()]
    shared = {
        "device": device.type,
        "precision": arguments.precision,
        "resolutions": arguments.resolutions,
        "batch_size": arguments.batch_size,
        "seconds": arguments.seconds,
        "warmup_steps": 1 if on_cpu else 10,
        "steps_at_once": 1 if on_cpu else 10,
    }
    rates = {name: {str(resolution): [] for resolution in arguments.resolutions} for name in names}
    peaks, precisions, failed = {name: {} for name in names}, {}, {}
    for number in range(arguments.rounds):
        for name in names:
            print(f"round {number + 1} of {arguments.rounds}: {name} ...", flush=True)
            done = run_job(shared | CPU_CONTENDERS[name])
            if isinstance(done, str):
                failed[name] = done
                print(f"  failed: {done}", flush=True)
                continue
            precisions[name] = done["precision"]
            for resolution, figures in done["figures"].items():
                if figures is not None:
                    rates[name][resolution].append(figures["images_per_s"])
                    peaks[name][resolution] = figures["peak_mib"]
                    print(f"  {resolution} px: {figures}", flush=True)
    return shared | {"rounds": arguments.rounds, "rates": rates, "peaks": peaks, "precisions": precisions, "failed": failed}


def run_job(job):
    """Measure in a process of its own; return measure()'s figures, or why there are none."""
    command = ["-m", "benchmarks.step_speed", to_json(job)]
    if job.get("torchrun"):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *command]
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        return last_words(done.stderr) or f"exit status {done.returncode}"
    return from_json(done.stdout.splitlines()[-1])


def step_tables(results):
    """Return the results as lines of Markdown: images/s, the ratio to the reference loop in the same round, peak memory."""
    where = results["gpu"] or f"{results['cpu']}, {results['cores']} cores"
    resolutions = [str(resolution) for resolution in results["resolutions"]]
    lines = [
        f"ResNet-50, batches of {results['batch_size']}, {where}, PyTorch {results['versions']['torch']}, {results['date']}; "
        f"images/s, median of {results['rounds']} rounds (lowest to highest), and the median ratio to torchvision's reference "
        "loop in the same round; on a GPU also the peak of memory that PyTorch allocated.",
        "",
        "| train step | precision | " + " | ".join(f"{resolution} px" for resolution in resolutions) + " |",
        "|---" * (2 + len(resolutions)) + "|",
    ]
    for name, rates in results["rates"].items():
        if name in results["failed"]:
            lines.append(f"| {name} | failed: {results['failed'][name]} |" + " |" * len(resolutions))
            continue
        cells = []
        for resolution in resolutions:
            cell = "does not fit"
            reference = results["rates"].get(REFERENCE, rates)[resolution]
            if rates[resolution]:
                cell = rate_cell(rates[resolution], reference if len(reference) == len(rates[resolution]) else None)
                peak = results["peaks"][name][resolution]
                cell += f", {peak / 1024:.2f} GiB" if peak is not None else ""
            cells.append(cell)
        lines.append(f"| {name} | {results['precisions'][name]} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print(to_json(measure(from_json(sys.argv[1]))))
