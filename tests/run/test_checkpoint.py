"""The file of a checkpoint: what is written is read back, and whatever else is detected."""

import contextlib
import hashlib
import os
import pickle
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from engine.run import checkpoint_files
from engine.system.errors import CheckpointError, MachineError

CONTENTS = {
    "format": checkpoint_files.FORMAT,
    "epoch": 3,
    "batch": 0,
    "weights": {"a": torch.arange(1000.0), "b": torch.ones(3, 4)},
}


@contextlib.contextmanager
def limit(kind, value):
    """Let this process have less of something."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint_files.write(path, CONTENTS)
    return path


def test_what_is_written_is_read_back(written):
    contents = checkpoint_files.read(written)
    assert contents["epoch"] == 3
    assert torch.equal(contents["weights"]["a"], CONTENTS["weights"]["a"])
    assert [p.name for p in written.parent.iterdir()] == ["last.pt"]


def test_anybody_can_load_it_with_torch_load_weights_only(written):
    assert torch.load(written, weights_only=True)["epoch"] == 3


def test_the_checksum_is_the_archives_comment(written):
    comment = zipfile.ZipFile(written).comment
    covered = written.read_bytes()[: -len(comment) - 2]
    assert comment == b"sha256:" + hashlib.sha256(covered).hexdigest().encode()


def test_every_truncation_is_detected(written):
    whole = written.read_bytes()
    lengths = {0, 1, 2, 72, 73, 74, *range(len(whole) - 120, len(whole)), *range(100, len(whole), 397)}
    for length in sorted(lengths):
        written.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoint_files.read(written)


def test_every_changed_byte_is_detected(written):
    whole = written.read_bytes()
    rng = np.random.default_rng(0)
    places = [0, 1, len(whole) - 1, len(whole) - 72, len(whole) - 73, *rng.integers(len(whole), size=200)]
    accepted = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        written.write_bytes(damaged)
        try:
            checkpoint_files.read(written)
            accepted.append(place)
        except CheckpointError:
            pass
    assert accepted == []


def test_a_missing_checkpoint_is_said_with_what_is_there(written):
    checkpoint_files.write(written.parent / "epoch_005.pt", CONTENTS)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*lst\.pt; found last\.pt, epoch_005\.pt there|epoch_005"):
        checkpoint_files.read(written.parent / "lst.pt")


def test_weights_alone_are_refused_with_what_to_do_instead(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"holds weights alone.*resume from a last\.pt"):
        checkpoint_files.read(tmp_path / "weights.pt")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "last.pt").write_bytes(os.urandom(5000))
    with pytest.raises(CheckpointError, match="checksum is missing"):
        checkpoint_files.read(tmp_path / "last.pt")


def test_another_programs_checkpoint_is_not_called_damaged(tmp_path):
    torch.save({"model": {"conv1.weight": torch.zeros(3)}, "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="other.pt was saved by another program, or saved again: .*--initial-weights"):
        checkpoint_files.read(tmp_path / "other.pt")


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("sealed", [True, False])
def test_an_unpickling_attack_does_nothing(tmp_path, sealed):
    path, target = tmp_path / "last.pt", str(tmp_path / "attacked")
    if sealed:
        checkpoint_files.write(path, CONTENTS | {"attack": Attack(target)})
    else:
        path.write_bytes(pickle.dumps(Attack(target)))
    with pytest.raises(CheckpointError):
        checkpoint_files.read(path)
    assert not os.path.exists(target)
    with path.open("rb"):  # the same file does attack whoever loads it without care
        if sealed:
            torch.load(path, weights_only=False)
            assert os.path.exists(target)


LITTLE_MEMORY = """
import resource, sys
from engine.run import checkpoint_files
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (4096 * pages + 2**25, resource.RLIM_INFINITY))
checkpoint_files.newest_good(sys.argv[1])
"""


@pytest.mark.parametrize("lacking", [pytest.param("memory", marks=pytest.mark.slow), "open files"])
def test_a_last_pt_that_the_machine_cannot_read_now_is_not_passed_over_for_an_earlier_one(lacking, tmp_path):
    checkpoint_files.write(tmp_path / "last.pt", CONTENTS | {"weights": torch.zeros(2**24 if lacking == "memory" else 1)})
    checkpoint_files.write(tmp_path / "epoch_001.pt", CONTENTS | {"epoch": 1})
    if lacking == "memory":
        done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
        assert "MachineError" in done.stderr and "last.pt is whole, but cannot be read" in done.stderr
    else:
        with limit(resource.RLIMIT_NOFILE, 3):
            with pytest.raises(MachineError, match="last.pt cannot be read: Too many open files"):
                checkpoint_files.read(tmp_path / "last.pt")
            with pytest.raises(MachineError, match="cannot be looked into"):  # else a new run would begin, and delete this one
                checkpoint_files.newest_good(tmp_path)
    assert checkpoint_files.newest_good(tmp_path)[0].name == "last.pt"


def test_a_checkpoint_that_is_out_of_reach_is_not_said_to_be_missing(tmp_path):
    with pytest.raises(MachineError, match="cannot be read: File name too long"):
        checkpoint_files.read(tmp_path / ("a" * 300))


def test_a_damaged_last_is_passed_over_for_the_newest_good_one(tmp_path):
    for number, name in enumerate(("epoch_005.pt", "epoch_010.pt", "last.pt")):
        checkpoint_files.write(tmp_path / name, CONTENTS | {"epoch": number})
        os.utime(tmp_path / name, (1000 + number, 1000 + number))
    assert checkpoint_files.newest_good(tmp_path)[0].name == "last.pt"
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-500])
    path, contents, problems = checkpoint_files.newest_good(tmp_path)
    assert (path.name, contents["epoch"]) == ("epoch_010.pt", 1)
    assert "last.pt is damaged" in problems[0]
    for name in ("epoch_005.pt", "epoch_010.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"):
        checkpoint_files.newest_good(tmp_path)
    assert checkpoint_files.newest_good(tmp_path / "empty") == (None, None, [])


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    checkpoint_files.write(tmp_path / "last.pt", CONTENTS | {"version": checkpoint_files.VERSION + 1})
    with pytest.raises(CheckpointError, match="written by a newer version of this program"):
        checkpoint_files.read(tmp_path / "last.pt")
