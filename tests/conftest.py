"""What the tests share: small trees of real JPEG files, tiny runs of train.py in this process or in one of their own."""

import contextlib
import http.server
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side; torch reads it when it is imported

import numpy as np
import torch
import torch.nn.functional as F
from fork_server import ForkServer, can_fork
from narrow import WHOLE, narrow_build_model
from PIL import Image

import evaluate
import lr_finder
import train
from engine.cli.command_line import parse_command_line
from engine.data.demo import make_demo_data
from engine.run import checkpoint_files
from engine.system import distributed
from engine.training.optim import build_optimizer, build_schedule
from engine.training.state import new_state
from model import build_model

REPOSITORY = Path(__file__).resolve().parent.parent
train.build_model = evaluate.build_model = lr_finder.build_model = narrow_build_model()  # for runs in this process
NOTICE = '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'  # a spot instance's
NOT_REPEATABLE = ("images_per_s", "seconds", "time", "data_wait_share")


@pytest.fixture
def whole_network(monkeypatch):
    """Let runs have the whole ResNet-18, for tests that compare with torchvision's."""
    monkeypatch.setenv(WHOLE, "1")


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory):
    """An ImageFolder tree of 60 training and 20 validation pictures in 10 classes."""
    folder = tmp_path_factory.mktemp("images") / "tree"
    make_demo_data(folder, train_images=60, val_images=20)
    return folder


@pytest.fixture
def tiny_arguments(image_tree, tmp_path):
    """The command line of a run of 3 epochs of 7 steps on a CPU in fp32, with averaging, in a folder of its own."""
    return tiny_run(image_tree, tmp_path / "run")


def tiny_run(image_tree, folder, **changes):
    settings = {
        "data_dir": image_tree,
        "checkpoint_dir": folder,
        "log_file": folder.with_suffix(".log"),
        "architecture": "resnet18",
        "train_resolution": 32,
        "val_resolution": 32,
        "batch_size": 8,
        "epochs": 3,
        "warmup_epochs": 1,
        "swa_start_epoch": 2,
        "swa_anneal_epochs": 1,
        "swa_batch_norm_batches": 3,
        "device": "cpu",
        "precision": "fp32",
        "num_workers": 0,
        "log_every_steps": 2,
        "report": "false",  # half a second of drawing
    } | changes
    return [f"--{key}={value}" for key, value in settings.items()]


HOSTILE = "<img src=x onerror=document.title='hacked'>"


def run_with_a_hostile_class(folder, **images):
    """Train for an epoch on pictures in folder/tree of which one class is called HOSTILE; return the run's folder."""
    make_demo_data(folder / "tree", **images)
    for split in ("train", "val"):
        (folder / "tree" / split / "waves_ring").rename(folder / "tree" / split / HOSTILE)
    assert run_here(tiny_run(folder / "tree", folder / "run", epochs=1, swa_start_epoch=0)) == 0
    return folder / "run"


class WithoutBatchNorm(torch.nn.Module):
    """A network whose images do not see each other, so that micro-batches must add up exactly; always the same weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, images):
        return self.fc(F.relu(self.norm(self.conv(images))).mean((2, 3)))


def fresh_state(config, precision="fp32", num_classes=5, steps_per_epoch=10, device="cpu"):
    """The state at the start of a run."""
    model = build_model(config, num_classes, device)
    return new_state(model, config, steps_per_epoch, precision, compiled=config["compile"] == "on")


def state_of(network, config):
    """The state at the start of a run of another network, 10 steps an epoch on a CPU in fp32."""
    state = fresh_state(config)
    state.model, state.ddp_model = network, distributed.wrap_ddp(network)
    state.optimizer = build_optimizer(network, config)
    state.schedule = build_schedule(state.optimizer, config, 10)
    return state


def photo(height=375, width=500, seed=0):
    """A picture with smooth colours and with detail of brightness at every scale, uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)

    def layer(cells, channels):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, channels), dtype=np.uint8).squeeze())
        return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=float).reshape(height, width, channels)

    return (0.6 * layer(4, 3) + 0.25 * layer(16, 1) + 0.15 * layer(64, 1)).astype(np.uint8)


def encoded(pixels, kind="JPEG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def run_here(arguments):
    """Run train.py's main in this process; return its exit status."""
    return train.main(parse_command_line(arguments, train.OWN_FLAGS))


FORK_SERVER = ForkServer()


def narrow(program):
    """The words after `python` that start one of the programs with the narrow network, or a file of the tests as it is."""
    return [*([] if "/" in program else [str(REPOSITORY / "tests/narrow.py")]), str(REPOSITORY / program)]


def start_python(arguments, cwd=REPOSITORY, environment=None, **options):
    """Start Python in a process of its own, its output piped as text.

    Ctrl-C and SIGHUP reach it even where the tests run in the background or under nohup, which ignore them and hand that down.
    """
    everything = os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {})
    if can_fork(arguments, environment, options):
        return FORK_SERVER.start(arguments, cwd, everything, **options)
    limit = options.pop("file_size_limit", None)

    def in_the_child():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    if Path(arguments[0]).parent == REPOSITORY:
        arguments = [*narrow(Path(arguments[0]).name), *arguments[1:]]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=everything,
        preexec_fn=in_the_child,
        **options,
    )


def start_program(program, arguments, **options):
    """Start one of the scripts in a process of its own."""
    return start_python([REPOSITORY / program, *arguments], **options)


def finish(process, timeout=300):
    """Wait for a process that start_python started; return (exit status, output). One that does not end is killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


# train.py in a process of its own that sends itself a signal when it enters `function` of `module` for the n-th time with
# `about` among its arguments, and that writes down each step it takes.
DRIVER = """
import importlib, os, signal, sys, time
BEGUN = time.perf_counter()
sys.path.insert(0, {repository!r})
import train
from engine.cli.command_line import parse_command_line
from engine.system.console import protect_output
from engine.system.errors import run_program

protect_output()

def wrap(module, function, before):
    module = importlib.import_module(module)
    original = getattr(module, function)
    def wrapped(*args, **kwargs):
        before(*args)
        return original(*args, **kwargs)
    setattr(module, function, wrapped)

steps = os.open({steps!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
wrap("train", "train_step", lambda state, *rest: os.write(steps, f"{{state.epoch * 7 + state.batch}}\\n".encode()))
calls = []
def send(*args):
    calls.extend([1] if {about!r} in str(args) else [])
    if len(calls) == {call}:
        for number in {signals!r}:
            os.kill(os.getpid(), number)
if {function!r}:
    wrap({module!r}, {function!r}, send)
sys.exit(run_program("train.py", train.main, parse_command_line(sys.argv[1:], train.OWN_FLAGS), BEGUN))
"""


def start_driver(arguments, steps, at=(None, None), call=1, signals=(signal.SIGTERM,), about="", first="", **options):
    """Start DRIVER; `first` is source code that it runs before anything else of the project."""
    source = DRIVER.format(
        repository=str(REPOSITORY),
        steps=str(steps),
        module=at[0],
        function=at[1],
        call=call,
        signals=[int(s) for s in signals],
        about=about,
    )
    if first:
        source = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{first}{source}"
    return start_python(["-c", source, *arguments], **options)


def run_program(program, arguments, timeout=300, **options):
    """Run one of the scripts to its end; return (exit status, output)."""
    return finish(start_program(program, arguments, **options), timeout)


def figures(folder):
    """The figures of a run's epochs that do not depend on the machine's speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in NOT_REPEATABLE} for line in lines]


def assert_same_run(folder, reference):
    """Compare two finished runs bit by bit: weights, averages, optimizer state, best, and every repeatable figure."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = checkpoint_files.read(folder / name), checkpoint_files.read(reference / name)
        for contents in (ours, theirs):
            assert contents.pop("ledger")["saves"] > 0  # the hours of a run that was interrupted are others
            contents["config"] = {
                k: v
                for k, v in contents["config"].items()
                if k not in ("checkpoint_dir", "log_file", "num_workers", "checkpoint_minutes")
            }
        assert_same(ours, theirs, name)
    assert figures(folder) == figures(reference)


def assert_same(ours, theirs, where):
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert ours == theirs, where


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextlib.contextmanager
def within_seconds(seconds):
    """Fail a test in a block that takes longer, which would wait without end."""

    def give_up(*_):
        pytest.fail(f"not done within {seconds} s")  # no Exception, which the block may catch

    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_torchrun(processes, arguments, program="train.py", restarts=0, meeting=("--standalone",), **options):
    """Start one of the scripts in so many processes that torchrun looks after."""
    launcher = ["-m", "torch.distributed.run", *meeting, f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return start_python([*launcher, *narrow(program), *arguments], **options)


def run_torchrun(processes, arguments, **options):
    return finish(start_torchrun(processes, arguments, **options))


class MetadataService(http.server.BaseHTTPRequestHandler):
    """IMDSv2 as EC2 answers: a token by PUT, 401 without it, 404 while there is no notice."""

    notice = None

    def do_PUT(self):
        self._answer(
            200 if self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, "secret"
        )

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "secret":
            return self._answer(401, "")
        if self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            return self._answer(404, "")
        return self._answer(200, self.server.notice)

    def _answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata_service():
    """EC2's instance metadata service; `notice` is its spot instance action."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MetadataService)
    server.notice = None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A Writer in the folder run/, mirrored in mirror/, that soon tries again what fails."""
    from mirrored_run import Writer

    from engine.run import mirror

    monkeypatch.chdir(tmp_path)  # a log would lie there
    monkeypatch.setattr(mirror, "RETRY_SECONDS", (0.05, 0.1))
    made = Writer(tmp_path / "run", tmp_path / "mirror")
    yield made
    made.mirror.close()
