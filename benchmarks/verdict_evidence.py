"""Whether the live verdict is to be trusted: faults injected into small runs, and healthy runs, and what it said of each.

python tests/narrow.py benchmarks/verdict_evidence.py FOLDER           all, one after the other: ten minutes on two idle cores
python tests/narrow.py benchmarks/verdict_evidence.py FOLDER NAME ...  some of them

Each run is train.py's own, in a process of its own, with a narrow ResNet-18 on made pictures. A line for each goes to
benchmarks/verdict.jsonl.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import torch

import train
from benchmarks.mislabels import mislabel
from engine.cli.command_line import parse_command_line
from engine.data import augmentation, loader
from engine.data.demo import make_demo_data
from engine.preparation.finding import ImageFolder
from engine.run import verdict
from engine.run.events import EVENTS, read_events
from engine.run.telemetry import GpuFigures
from engine.run.verdict import Verdict
from engine.system.environment import environment

RESULTS = Path(__file__).with_name("verdict.jsonl")
TRAIN_IMAGES, VAL_IMAGES = 1500, 200
USUAL = {  # of every run; 46 steps an epoch
    "architecture": "resnet18",
    "batch_size": 32,
    "epochs": 24,
    "train_resolution": 40,
    "start_resolution": 0,
    "val_resolution": 40,
    "min_crop_area": 0.5,
    "warmup_epochs": 1,
    "learning_rate": 0.004,
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 1,
    "log_every_steps": 2,
    "checkpoint_every_epochs": 0,
}
ADAMW = {"recipe": "seed", "swa_start_epoch": 20, "swa_anneal_epochs": 1, "swa_batch_norm_batches": 20}
ADAMW |= {"swa_learning_rate": 0.00025}  # as measured, before it followed learning_rate
FAST = {"recipe": "fast", "learning_rate": 0.10625}
MILD = {"recipe": "mild", "learning_rate": 0.256}
RUNS = {  # name: (flags, the alarms that are right, one of which must be raised); of some wrong labels there is none
    "healthy: seed's recipe": (ADAMW, []),
    "healthy: seed's recipe, other seed": (ADAMW | {"seed": 1}, []),
    "healthy: fast": (FAST, []),
    "healthy: fast, other seed": (FAST | {"seed": 1}, []),
    "healthy: mild": (MILD, []),
    "healthy: mild, other seed": (MILD | {"seed": 1}, []),
    "healthy: medium": (MILD | {"recipe": "medium"}, []),
    "healthy: muon": (ADAMW | {"optimizer": "muon", "learning_rate": 0.02}, []),
    "healthy: randaugment, mixup, cutmix": (
        ADAMW | {"augmentation": "randaugment", "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "num_workers": 2},
        [],
    ),
    "healthy: step schedule, growing resolution": (
        FAST | {"schedule": "step", "step_epochs": 10, "start_resolution": 32, "resolution_step": 8},
        [],
    ),
    "slow disk": (ADAMW | {"epochs": 2, "swa_start_epoch": 0}, ["waiting for data"]),
    "one worker, heavy augmentation": (
        ADAMW | {"epochs": 1, "swa_start_epoch": 0, "warmup_epochs": 0.5, "augmentation": "randaugment", "randaugment_ops": 14},
        ["waiting for data"],
    ),
    "labels wrong: all": (ADAMW, ["nothing learned", "training above validation"]),
    "labels wrong: 40 %": (ADAMW, ["wrong labels"]),
    "normalisation missing in validation": (ADAMW, ["training above validation"]),
    "rate ten times larger: AdamW": (ADAMW | {"learning_rate": 0.04}, []),
    "rate a hundred times too large: AdamW": (ADAMW | {"learning_rate": 0.4}, ["nothing learned"]),
    "rate ten times too large: SGD": (FAST | {"learning_rate": 1.0625}, ["nothing learned"]),
    "rate a hundred times too large: SGD": (FAST | {"learning_rate": 10.625}, ["nothing learned"]),
    "stopped reader": (ADAMW | {"epochs": 3, "swa_start_epoch": 0}, ["no batch"]),
    "NVML: too hot": (ADAMW | {"epochs": 8, "swa_start_epoch": 0}, ["throttled"]),
    "NVML: power limit lowered": (ADAMW | {"epochs": 8, "swa_start_epoch": 0}, ["throttled"]),
    "NVML: at its own power limit": (ADAMW | {"epochs": 8, "swa_start_epoch": 0}, []),
    "NVML: memory full": (ADAMW | {"epochs": 8, "swa_start_epoch": 0}, ["memory nearly full"]),
}


def fake_nvml(reasons=0, hot=70, limit=70_000, used_mib=11_701):
    """Return a module in pynvml's place, of one GPU with 15,360 MiB and a power limit of 70 W of its own."""
    memory = types.SimpleNamespace(used=used_mib << 20, total=15_360 << 20)
    return types.SimpleNamespace(
        nvmlDeviceGetMemoryInfo=lambda handle: memory,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=98),
        nvmlDeviceGetPowerUsage=lambda handle: limit,
        nvmlDeviceGetTemperature=lambda handle, sensor: hot,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
        nvmlDeviceGetPowerManagementLimit=lambda handle: limit,
        nvmlDeviceGetPowerManagementDefaultLimit=lambda handle: 70_000,
    )


FAKE_GPUS = {
    "NVML: too hot": {"reasons": 0x20, "hot": 93},
    "NVML: power limit lowered": {"reasons": 0x4, "limit": 50_000},
    "NVML: at its own power limit": {"reasons": 0x4},
    "NVML: memory full": {"used_mib": 15_200},
}


def inject(name, records):
    """Put the fault of a run into this process; `records` is where its metrics.jsonl will be."""
    if name == "slow disk":
        read = ImageFolder.read

        def slow_read(self, index):
            time.sleep(0.03)
            return read(self, index)

        ImageFolder.read = slow_read
    elif name == "one worker, heavy augmentation":
        augmented = augmentation.augmented

        def heavy(view, transform, rng):
            for _ in range(3):
                view = augmented(view, transform, rng)
            return view

        sys.modules["engine.data.batches"].augmented = heavy
    elif name == "normalisation missing in validation":
        validation = loader.BatchLoader.validation

        def unnormalised(self, resolution=None):
            std = torch.tensor(loader.IMAGENET_STD).view(1, 3, 1, 1)
            mean = torch.tensor(loader.IMAGENET_MEAN).view(1, 3, 1, 1)
            for images, labels in validation(self, resolution):
                yield images * std + mean, labels

        loader.BatchLoader.validation = unnormalised
    elif name == "stopped reader":
        threading.Thread(target=stop_a_worker, args=(records,), daemon=True).start()
    elif name in FAKE_GPUS:

        def __init__(self, device):
            self._handle, self._nvml = 1, fake_nvml(**FAKE_GPUS[name])

        GpuFigures.__init__ = __init__


def stop_a_worker(records):
    """Stop the data worker for 80 seconds, once an epoch is recorded."""
    while not records.exists():
        time.sleep(0.1)
    (worker,) = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    os.kill(int(worker), signal.SIGSTOP)
    time.sleep(80)
    os.kill(int(worker), signal.SIGCONT)


def record_windows(windows):
    """Let every window that a Verdict judges be added to {'loss': list, 'norm': list, 'wait': list}."""

    def recording(key, judge):
        def judge_and_record(self, value):
            windows[key].append(round(value.waited / value.seconds if key == "wait" else value, 4))
            return judge(self, value)

        return judge_and_record

    for key, method in (("loss", "_judge_loss"), ("norm", "_judge_gradient"), ("wait", "_judge_waiting")):
        setattr(Verdict, method, recording(key, getattr(Verdict, method)))


def run_here(name, folder):
    """Train in this process with the fault of a run; leave what was judged and what was said in said.json."""
    flags, _ = RUNS[name]
    tree = folder / ("data_wrong_all" if name == "labels wrong: all" else "data_wrong" if "labels wrong" in name else "data")
    if not tree.exists():
        make_demo_data(tree, TRAIN_IMAGES, VAL_IMAGES)
        if tree.name != "data":
            mislabel(tree, 0.9 if name == "labels wrong: all" else 0.4)  # of 10 classes all labels are chance at 0.9
    windows = {"loss": [], "norm": [], "wait": []}
    verdict.WAITING_SECONDS, verdict.GPU_SAMPLES = 10.0, 10  # more windows than in a run, and shorter ones
    record_windows(windows)
    inject(name, folder / "run/metrics.jsonl")
    run = folder / "run"
    config = USUAL | flags | {"data_dir": tree, "checkpoint_dir": run, "log_file": folder / "run.log"}
    train.main(parse_command_line([f"--{key}={value}" for key, value in config.items()] + ["--overwrite"], train.OWN_FLAGS))
    events = [event for event in read_events(run / EVENTS) if event["event"] == "verdict"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    apart = [r["train_top1"] - max(r["val_top1"], r.get("averaged_val_top1", 0), r.get("ema_val_top1", 0)) for r in records]
    said = [{key: event[key] for key in ("name", "begins", "text", "epoch", "batch") if key in event} for event in events]
    figures = {"alarms": said, "windows": windows, "apart": [round(points, 2) for points in apart]}
    (folder / "said.json").write_text(json.dumps(figures | {"val_top1": [record["val_top1"] for record in records]}))


def main(folder, *names):
    """Run them one after the other, each in a process of its own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or RUNS:
        started = time.time()
        process = multiprocessing.get_context("fork").Process(target=run_here, args=(name, folder))
        process.start()
        process.join()
        figures = {"failed": process.exitcode} if process.exitcode else json.loads((folder / "said.json").read_text())
        said = environment() | {"run": name, "expected": RUNS[name][1], "seconds": round(time.time() - started)}
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(said | figures) + "\n")
        print(name, [alarm["name"] for alarm in figures.get("alarms", []) if alarm["begins"]], figures.get("failed", ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
