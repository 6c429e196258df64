"""Everything worth knowing of a card from one sitting: in parts, the most valuable first, each kept as soon as it is measured.

Each part runs in a process of its own, `python -m benchmarks.gpu_sitting PART`, so that one that crashes or hangs costs only
itself. When it is called again, a sitting goes on with the parts that are missing, and at last with those that failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import recipe_evidence, step_speed, train_speed
from benchmarks.input_speed import packed_rows_of, read_originals
from benchmarks.measuring import REPOSITORY, RESULTS, installed_timm, last_words, run_quietly
from engine.data import images
from engine.data.demo import make_demo_data
from engine.preparation.packed import write_split
from engine.run.records import read_records
from engine.system.device import AUTOCAST_DTYPES, choose_device, choose_precision, describe_device
from engine.system.environment import environment
from engine.system.errors import UserError, first_line
from engine.system.workers import available_cores

FILE, REHEARSAL_FILE = RESULTS / "gpu.jsonl", RESULTS / "gpu_rehearsal.jsonl"
RESERVE_SECONDS = 5.0  # kept for the report
GIB_OF_TESTS = 24  # of GPU memory that a process of the GPU tests may need
MOST_TIMES_LONGER = 3  # than calculated: then a part is taken to hang, and the sitting goes on
PLAIN = {
    "torchvision": {"loop": "reference"},
    "torchvision, channels-last": {"loop": "reference", "channels_last": True},
    "ours": {"loop": "ours", "compile": "off"},
    "timm": {"loop": "timm"},
    "timm, channels-last": {"loop": "timm", "channels_last": True},
    "ours, memory low": {"loop": "ours", "compile": "off", "memory": "low"},
    "ours, memory lowest": {"loop": "ours", "compile": "off", "memory": "lowest"},
    "ours, Muon": {"loop": "ours", "compile": "off", "changes": {"optimizer": "muon"}},
    "ours, deterministic": {"loop": "ours", "compile": "off", "deterministic": True},
}
COMPILED = {
    "ours, compiled": {"loop": "ours", "compile": "on"},
    "timm, channels-last, compiled": {"loop": "timm", "channels_last": True, "compile": True},
    "ours, compiled, memory low": {"loop": "ours", "compile": "on", "memory": "low"},
}


class Sizes(NamedTuple):
    """How large the parts are."""

    batch_size: int
    resolutions: tuple  # px, the most valuable first
    seconds: float  # of measuring a step
    largest_batch: int  # that is tried
    train_steps: int  # of an epoch, end to end
    recipe_images: tuple  # for training, for validation
    recipe_classes: int
    recipe_resolution: int  # px, in place of 224
    recipe_epochs: int
    recipe_architecture: str


ON_A_GPU = Sizes(256, (224, 160, 192, 128), 2.5, 4096, 60, (20_000, 5_000), 100, 128, 16, "resnet50")
REHEARSED = Sizes(2, (64, 32), 0.1, 4, 2, (32, 16), 4, 32, 3, "resnet18")


class Part(NamedTuple):
    """One measurement."""

    name: str
    minutes: float  # that it needs on a T4, calculated; with less left it is not begun
    job: dict  # its function's name under 'do', and what that needs


def parts_of(sizes, device):
    """Return the Parts of a sitting in order."""
    shared = {
        "device": device,
        "precision": "auto",
        "batch_size": sizes.batch_size,
        "seconds": sizes.seconds,
        "warmup_steps": 10 if device == "cuda" else 1,
        "steps_at_once": 5 if device == "cuda" else 1,
    }

    def step(name, job, resolutions, minutes):
        at = " ".join(map(str, resolutions))
        return Part(f"step: {name}, {at} px", minutes, shared | job | {"do": "step", "resolutions": list(resolutions)})

    first, others = sizes.resolutions[:1], sizes.resolutions[1:]
    plain = [step(name, job, sizes.resolutions, 0.8) for name, job in PLAIN.items()]
    compiled = {name: step(name, job, first, 2.0) for name, job in COMPILED.items()}
    largest = shared | {"do": "largest", "resolution": first[0], "most": sizes.largest_batch}
    return [
        Part("gpu tests", 3.0, {"do": "tests"}),
        *plain[:3],
        compiled["ours, compiled"],
        *plain[3:],
        *(
            Part(f"longest batch, memory {memory}", 1.0, largest | {"memory": memory, "loop": "ours", "compile": "off"})
            for memory in ("fast", "low", "lowest")
        ),
        Part("end to end", 4.0, shared | {"do": "train", "resolution": first[0], "steps": sizes.train_steps}),
        *(
            Part(f"recipe {name}", 5.0, {"do": "recipe", "contender": name, "device": device, "sizes": sizes._asdict()})
            for name in ("mild", "medium", "fast", "seed")
        ),
        Part("second start of a compiled run", 3.0, shared | {"do": "restart", "resolution": first[0]}),
        *(step("ours, compiled", COMPILED["ours, compiled"], (px,), 2.0) for px in others),
        *list(compiled.values())[1:],
    ]


# A sitting -----------------------------------------------------------------------------------------------------------


def sit(arguments):
    """Measure what is missing of the card's sitting as far as the time goes; return the sitting's lines."""
    ends = time.monotonic() + 60 * arguments.minutes - RESERVE_SECONDS
    device = choose_device({"device": "cpu" if arguments.rehearse else "auto"}, in_this_process=False)
    if device.type == "cpu" and not arguments.rehearse:
        raise UserError("PyTorch sees no GPU here; --rehearse goes through everything at a tiny size on the CPU")
    path = arguments.results or (REHEARSAL_FILE if arguments.rehearse else FILE)
    facts = facts_of(device) | {"rehearsal": arguments.rehearse}
    sitting = [] if arguments.anew else newest_sitting(lines_of(path), facts["card"], arguments.rehearse)
    number = sitting[0]["sitting"] if sitting else time.strftime("%Y-%m-%dT%H:%M:%S")
    results = newest_results(sitting)
    if sitting:
        done = sum(map(succeeded, results.values()))
        again = f", {len(results) - done} failed and are measured again" if done < len(results) else ""
        print(f"going on with the sitting begun at {number}: {done} parts are done{again}", flush=True)
    left = []
    for part in parts_to_do(arguments, results, device):
        seconds = ends - time.monotonic()
        if seconds < (1 if arguments.rehearse else 60 * part.minutes):
            left.append(part.name)
            continue
        print(f"{part.name} ...", flush=True)
        began = time.monotonic()
        result = result_of(part, seconds)
        if result is None:
            print("  the time is up", flush=True)
            left.append(part.name)
            continue
        took = round(time.monotonic() - began, 1)
        line = environment() | facts | {"sitting": number, "part": part.name, "seconds": took, "result": result}
        append_line(path, line)
        sitting.append(line)
        print(f"  {took:.0f} s: {json.dumps(result)[:300]}", flush=True)
    if left:
        print(f"no time was left for: {', '.join(left)}. The same command goes on with them.", flush=True)
    return sitting


def newest_results(sitting):
    """Return {part: its result} of a sitting's lines; of a part that was measured again, the last one."""
    return {line["part"]: line["result"] for line in sitting}


def succeeded(result):
    """Return whether a part's result says that all of it was measured, and each of its tests passed."""
    return "failed" not in result and not result.get("not_passed")


def parts_to_do(arguments, results, device):
    """Yield the Parts that are asked for, not done and possible here, at last those that failed; print which lack a package."""
    parts = parts_of(REHEARSED if arguments.rehearse else ON_A_GPU, device.type)
    for part in sorted(parts, key=lambda part: part.name in results):  # those in it have failed, and may do so again
        done = part.name in results and succeeded(results[part.name])
        if done or (arguments.parts and not any(part.name.startswith(name) for name in arguments.parts)):
            continue
        if "timm" in part.name and not installed_timm():
            print(f"{part.name}: timm is not installed (pip install timm); left out", flush=True)
            continue
        yield part


def result_of(part, seconds):
    """Return the result of a Part, {'failed': why}, or None if the seconds that are left were too few."""
    longest = 60 * MOST_TIMES_LONGER * part.minutes
    result = in_a_process(part.job, min(seconds, longest))
    if result is None and longest < seconds:
        return {"failed": f"no end within {longest:.0f} s"}
    return result


def facts_of(device):
    """Return what a sitting's figures depend on besides environment()."""
    return {
        "card": describe_device(device),
        "driver": driver_version(),
        "precision": choose_precision({"precision": "auto"}, device),
        "cores": available_cores(),
    }


def driver_version():
    """Return the version of NVIDIA's driver, or None where there is none to ask."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no nvidia-ml-py, no driver: the figure does without
        return None


def lines_of(path):
    """Return the lines of a results file; one cut short is passed over."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append_line(path, line):
    """Append a line to a results file, behind one that a kill cut short."""
    cut = Path(path).exists() and not Path(path).read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(line) + "\n")


def newest_sitting(lines, card=None, rehearsal=False):
    """Return the newest sitting's lines, of a card if it is named; none if there is no sitting."""
    lines = [line for line in lines if line["rehearsal"] == rehearsal and card in (None, line["card"])]
    return [line for line in lines if line["sitting"] == lines[-1]["sitting"]]


def in_a_process(job, seconds):
    """Do a part's job in a process of its own; return its result, {'failed': why}, or None if it took too long."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        with open(log, "w", encoding="utf-8") as output:
            command = [sys.executable, "-m", "benchmarks.gpu_sitting", json.dumps(job | {"answer": str(answer)})]
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            unblock = partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            child = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True, preexec_fn=unblock
            )
            try:
                unblock()  # a signal that came while it started, too, takes it along
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if child.poll() is None:  # with all that it has started
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if child.returncode == 0:
            return json.loads(answer.read_text(encoding="utf-8"))
        why = last_words(log.read_text(encoding="utf-8", errors="replace"))
        return {"failed": why or f"exit status {child.returncode}"}


# The jobs ------------------------------------------------------------------------------------------------------------


def gpu_tests(job):
    """Return the outcomes of the tests that need a GPU: how many passed, failed, were skipped, and the names of the failed."""
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0
    processes = min(int(gib / GIB_OF_TESTS), available_cores() // 4) if gib >= 2 * GIB_OF_TESTS else 0
    flags = ["-m", "gpu", "-n", processes, "-q", "-rfE", "--no-header", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *map(str, flags)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    counts = {name.rstrip("s"): int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1])}
    if not counts:
        raise RuntimeError(f"pytest: {lines[-1]}")
    bad = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"counts": counts, "not_passed": bad}


def step(job):
    """Return step_speed's figures of a loop: images/s, milliseconds and peak memory at each resolution."""
    return step_speed.measure(job)


def largest_batch(job):
    """Return the largest batch whose train step fits into the card's memory, to within a factor of 1.05, and what ended it."""
    device = choose_device(job)
    precision = choose_precision(job, device)
    most, px = job["most"], job["resolution"]
    stopped_by = f"not above {most} tried"

    def fits(batch_size):
        nonlocal stopped_by
        step = None
        try:
            step = step_speed.our_step(job | {"batch_size": batch_size}, device, precision)
            images = torch.randn(batch_size, 3, px, px, device=device).to(AUTOCAST_DTYPES[precision])
            images = images.to(memory_format=torch.channels_last)
            labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
            for _ in range(2):
                step(images, labels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return True
        except RuntimeError as error:  # out of memory is said in several ways
            stopped_by = f"{type(error).__name__}: {first_line(error)[:200]}"
        finally:
            step = images = labels = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return False

    fitting, too_many = 0, None
    batch_size = min(32, most)
    while True:
        if fits(batch_size):
            fitting = batch_size
        else:
            too_many = batch_size
        if fitting == most or (too_many and too_many - fitting <= max(fitting // 20, 1)):
            break
        batch_size = min(2 * fitting, most) if too_many is None else (fitting + too_many) // 2
    return {"images": fitting, "resolution": px, "precision": precision, "stopped_by": stopped_by}


def end_to_end(job):
    """Return train_speed's figures: images/s from packed JPEGs, beside the bare step, and the share of time spent waiting."""
    flags = {key: job[key] for key in ("device", "precision", "batch_size", "resolution", "steps", "seconds")}
    return train_speed.train_benchmark(argparse.Namespace(**flags, data_dir=None, rounds=1, compile="off"))


def recipe(job):
    """Return one run of a recipe on the hard data set, its images made first if they are not there."""
    sizes = Sizes(**{key: tuple(value) if isinstance(value, list) else value for key, value in job["sizes"].items()})
    folder = REPOSITORY / "data" / ("hard" if sizes == ON_A_GPU else "hard_rehearsal")  # that of benchmark.py recipes
    sides = (round(1.25 * sizes.recipe_resolution), 2 * sizes.recipe_resolution)
    make_demo_data(folder, *sizes.recipe_images, 0, recipe_evidence.some_classes(sizes.recipe_classes), sides)
    study = {
        "architecture": sizes.recipe_architecture,
        "batch_size": min(256, sizes.recipe_images[0] // 2),
        "min_crop_area": 0.25,
    }
    arguments = argparse.Namespace(data_dir=folder, device=job["device"], num_workers="auto")
    of_all = recipe_evidence.contenders(sizes.recipe_resolution, sizes.recipe_epochs, sizes.recipe_images[0])
    changes = of_all[job["contender"]]
    run = recipe_evidence.one_run(changes | {"compile": "off"}, 0, study, arguments)
    return {key: run[key] for key in ("top1", "flip_top1", "train_loss", "seconds")} | {
        "epochs": changes["epochs"],
        "images": sizes.recipe_images[0],
        "resolution": sizes.recipe_resolution,
    }


def second_start(job):
    """Return the seconds of a run of three compiled steps on fresh ground, and of the same run beside the first one's cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        folder, count = Path(folder), 3 * job["batch_size"]
        contents = [images.packed_jpeg(content, 352) for content in read_originals(None, 8)]
        write_split(folder / "train.arrow", packed_rows_of(contents, count), ["a", "b"])
        write_split(folder / "val.arrow", packed_rows_of(contents, 8), ["a", "b"])
        flags = {key: job[key] for key in ("device", "precision", "batch_size")} | {
            "data_dir": folder,
            "checkpoint_dir": folder / "run",
            "log_file": folder / "log",
            "train_resolution": job["resolution"],
            "val_resolution": job["resolution"],
            "epochs": 1,
            "warmup_epochs": 0,
            "swa_start_epoch": 0,
            "compile": "on",
        }
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        for again in ([], ["--overwrite"]):
            started = time.monotonic()
            run_quietly([sys.executable, REPOSITORY / "train.py", *(f"--{k}={v}" for k, v in flags.items()), *again])
            seconds.append(round(time.monotonic() - started, 1))
        loss = read_records(folder / "run/metrics.jsonl")[-1]["train_loss"]
        cached = sum(file.stat().st_size for file in (folder / "run/compiler_cache").rglob("*") if file.is_file())
    return {"first": seconds[0], "second": seconds[1], "train_loss": loss, "cache_mib": round(cached / 2**20, 1)}


JOBS = {
    "tests": gpu_tests,
    "step": step,
    "largest": largest_batch,
    "train": end_to_end,
    "recipe": recipe,
    "restart": second_start,
}


if __name__ == "__main__":
    JOB = json.loads(sys.argv[1])
    RESULT = JOBS[JOB["do"]](JOB)
    Path(JOB["answer"]).write_text(json.dumps(RESULT), encoding="utf-8")
