"""Promise 1 in everyday life: a closed terminal, a broken pipe, an odd file system, a broken ornament, a mistyped resumption.

Real processes, pipes, pseudo-terminals and file-system faults. Two starts are in test_lock.py, damaged files in
test_checkpoint.py and test_checkpoint_folder.py, kills in test_resume.py; docs/accidents.md lists all of them.
"""

import contextlib
import io
import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import (
    REPOSITORY,
    figures,
    finish,
    narrow,
    run_here,
    run_program,
    start_program,
    tiny_run,
    wait_for,
    within_seconds,
)

import train
from engine.cli.command_line import parse_command_line
from engine.cli.keys import ConfigError
from engine.run import checkpoint_files
from engine.system import console
from engine.system.errors import CheckpointError, DataError, UserError
from engine.training.validation import note_best

ONE_EPOCH = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0}


def shell(program, arguments, tail):
    """A shell's command line: the program with its arguments, then the redirection or pipe."""
    return " ".join(map(shlex.quote, [sys.executable, *narrow(program), *map(str, arguments)])) + f" {tail}"


def run_shell(command, **options):
    """Run a command line in bash; return (exit status of its first program, standard output, standard error)."""
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300, cwd=REPOSITORY, **options)
    return done.returncode, done.stdout, done.stderr


def assert_trained(folder, epochs=1):
    assert checkpoint_files.read(folder / "last.pt")["epoch"] == epochs
    assert len(figures(folder)) == epochs
    log = folder.with_suffix(".log").read_text()
    assert f"finished {epochs} epochs" in log
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def trained(image_tree, tmp_path_factory):
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run_here(tiny_run(image_tree, folder, epochs=2, checkpoint_every_epochs=1)) == 0
    return folder


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


# Where the output goes -------------------------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("tail", [slow("| head -1"), ">/dev/full 2>&1", slow(">&- 2>&-")])
def test_a_run_goes_on_wherever_its_output_goes(tail, image_tree, tmp_path):
    status, _, errors = run_shell(shell("train.py", tiny_run(image_tree, tmp_path / "run", **ONE_EPOCH), tail))
    assert status == 0, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors
    assert_trained(tmp_path / "run")
    if tail != ">&- 2>&-":
        assert "note: standard output cannot be written to" in tmp_path.joinpath("run.log").read_text()


@pytest.mark.slow
def test_a_file_name_that_the_output_cannot_show_is_shown_as_an_escape(image_tree, tmp_path):
    folder = tmp_path / "läuft ✓"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = tiny_run(image_tree, folder, **ONE_EPOCH)
    status, output, errors = run_shell(shell("train.py", arguments, ""), env=environment)
    assert status == 0, errors
    assert r"/l\udcc3\udca4uft \udce2\udc9c\udc93/best.pt" in output
    assert checkpoint_files.read(folder / "last.pt")["epoch"] == 1


@pytest.mark.slow
def test_a_name_that_is_no_utf_8_is_an_escape_in_reports_and_pictures(image_tree, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    status, output = run_program("train.py", tiny_run(image_tree, folder, report="true", **ONE_EPOCH))
    assert status == 0 and "WARNING" not in output, output
    assert r"caf\udce9" in (folder / "report.md").read_text()
    evaluated = [folder / "best.pt", "--device=cpu", f"--details={tmp_path}/details"]
    status, output = run_program("evaluate.py", evaluated)
    assert status == 0 and "Traceback" not in output and (tmp_path / "details.png").exists(), output


def in_terminal(arguments, ignore_hangup=False):
    """Start train.py in a pseudo-terminal, as its session's leader; return (process number, the terminal's other end)."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore_hangup else signal.SIG_DFL)  # nohup ignores it
        os.execv(sys.executable, [sys.executable, *narrow("train.py"), *arguments])
    return child, terminal


def read_until(terminal, text, seconds=120):
    seen = b""
    while text not in seen:
        assert select.select([terminal], [], [], seconds)[0], seen
        seen += os.read(terminal, 65536)
    return seen


@pytest.mark.parametrize("ignored", [False, slow(True)], ids=["plainly", "under nohup"])
def test_a_terminal_that_is_closed_saves_the_run_or_under_nohup_lets_it_go_on(ignored, image_tree, tmp_path):
    epochs = 2 if ignored else 1000
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=epochs, warmup_epochs=0, swa_start_epoch=0)
    child, terminal = in_terminal(arguments, ignored)
    read_until(terminal, b"epoch 1/")
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = tmp_path.joinpath("run.log").read_text()
    if ignored:
        assert status == 0, log
        assert_trained(tmp_path / "run", epochs=2)
    else:
        assert status == 129, log
        assert "stopped by SIGHUP in epoch" in log and "; saved. Go on with" in log
        assert (tmp_path / "run/last.pt").exists()


@pytest.mark.slow
def test_ctrl_c_to_a_pipeline_saves_though_its_reader_is_gone(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1000, num_workers=1)
    command = shell("train.py", arguments, f"2>&1 | tee {shlex.quote(str(tmp_path / 'shown'))}")
    process = subprocess.Popen(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists())
    # bash would end on the signal before the two that matter: they get it alone
    for pid in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = pid.read_text().rpartition(")")[2].split()
            if int(fields[2]) == process.pid and int(pid.parent.name) != process.pid:
                os.kill(int(pid.parent.name), signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "stopped by SIGINT" in tmp_path.joinpath("run.log").read_text()
    assert checkpoint_files.read(tmp_path / "run/last.pt")


def test_a_reader_that_stops_reading_does_not_stop_the_program():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(65536))
    os.set_blocking(write_end, True)
    raw = console._Forgiving(write_end, "w", closefd=False)
    stream = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", line_buffering=True)
    console.PATIENCE_MS, patience = 50, console.PATIENCE_MS
    try:
        print("a line " * 1000, file=stream)
        assert raw.lost == "nobody reads it"
        while select.select([read_end], [], [], 0)[0]:
            os.read(read_end, 65536)
        print("heard again", file=stream)
    finally:
        console.PATIENCE_MS = patience
    assert b"heard again" in os.read(read_end, 65536)
    stream.close()
    os.close(write_end)
    os.close(read_end)


def test_sigusr1_saves_and_the_run_goes_on(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1000, checkpoint_every_epochs=0)
    process = start_program("train.py", arguments)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists())
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: "as SIGUSR1 asked" in (tmp_path / "run.log").read_text())
    lines = len(figures(tmp_path / "run"))
    wait_for(lambda: len(figures(tmp_path / "run")) > lines)
    process.send_signal(signal.SIGHUP)
    status, output = finish(process)
    assert status == 129, output
    assert checkpoint_files.newest_good(tmp_path / "run")[2] == []


@pytest.mark.parametrize(
    "program", ["train.py", *map(slow, ["evaluate.py", "lr_finder.py", "report.py", "prepare_data.py", "benchmark.py"])]
)
def test_help_that_nobody_reads_ends_silently(program):
    status, _, errors = run_shell(shell(program, ["--help"], "| true"))
    assert status in (0, 128 + signal.SIGPIPE)
    assert errors == ""


@pytest.mark.slow
def test_evaluate_ends_silently_without_a_reader_and_in_words_on_a_full_disk(trained, image_tree):
    command = [trained / "last.pt", "--device=cpu", f"--data-dir={image_tree}"]
    status, _, errors = run_shell(shell("evaluate.py", command, "| true"))
    assert (status, errors) == (128 + signal.SIGPIPE, "")
    status, _, errors = run_shell(shell("evaluate.py", command, ">/dev/full"))
    assert (status, errors) == (1, "evaluate.py: standard output cannot be written to: No space left on device\n")


@pytest.mark.slow
def test_a_report_is_written_though_nobody_hears_of_it(finished, tmp_path):
    status, _, errors = run_shell(shell("report.py", [finished, f"--output={tmp_path}/r"], ">/dev/full 2>&-"))
    assert (status, errors) == (0, "")
    assert (tmp_path / "r.html").exists()


# Odd file systems ------------------------------------------------------------------------------------------------------

ODD_FILE_SYSTEM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
int fsync(int fd) {
    struct stat about;
    if (fstat(fd, &about) == 0 && S_ISDIR(about.st_mode)) { errno = FSYNC_ERROR; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int link(const char *a, const char *b) { errno = EPERM; return -1; }
int linkat(int c, const char *a, int d, const char *b, int e) { errno = EPERM; return -1; }
ssize_t copy_file_range(int a, off_t *b, int c, off_t *d, size_t e, unsigned f) { errno = EXDEV; return -1; }
"""


@pytest.mark.parametrize("error", [slow("EINVAL"), slow("ENOTSUP")])
def test_a_run_works_where_folders_cannot_be_synced_and_files_not_be_linked(error, image_tree, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("the odd file system needs a C compiler")
    (tmp_path / "odd.c").write_text(ODD_FILE_SYSTEM)
    build = ["cc", "-shared", "-fPIC", f"-DFSYNC_ERROR={error}", "-o", tmp_path / "odd.so", tmp_path / "odd.c", "-ldl"]
    subprocess.run(build, check=True)
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=2, checkpoint_every_epochs=1, tensorboard="true")
    status, output = run_program("train.py", arguments, environment={"LD_PRELOAD": str(tmp_path / "odd.so")})
    assert status == 0, output
    assert "WARNING" not in output
    for name in ("last.pt", "previous.pt", "best.pt", "epoch_001.pt", "epoch_002.pt"):
        assert checkpoint_files.read(tmp_path / "run" / name)
    assert_trained(tmp_path / "run", epochs=2)


def test_each_checkpoint_is_a_file_of_its_own(finished):
    files = [finished / name for name in ("last.pt", "previous.pt", "best.pt", "epoch_001.pt", "epoch_002.pt")]
    assert len({path.stat().st_ino for path in files}) == len(files)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a /dev/shm of its own")
@pytest.mark.parametrize("program", ["train.py", slow("prepare_data.py")])
def test_without_room_for_semaphores_a_program_ends_in_words(program, image_tree, tmp_path):
    flags = (
        tiny_run(image_tree, tmp_path / "run", num_workers=1) if program == "train.py" else [image_tree, tmp_path / "packed"]
    )
    full = "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero >/dev/shm/filling"
    command = ["unshare", "-m", "bash", "-c", f"{full} || exit 99; {shell(program, flags, '')}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode == 99 or done.stderr.startswith("unshare"):
        pytest.skip("mounting a file system needs root")
    assert done.returncode == 1, done.stderr
    assert "worker processes need semaphores, and none can be made in /dev/shm" in done.stderr
    assert "Traceback" not in done.stderr


# Ornaments -------------------------------------------------------------------------------------------------------------


def test_a_notebooks_display_setting_does_not_matter(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", **ONE_EPOCH)
    environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    status, output = run_program("train.py", arguments, environment=environment)
    assert status == 0, output
    assert "WARNING" not in output
    assert (tmp_path / "run/curves.png").exists()


@pytest.mark.parametrize("broken", ["curves.png", "metrics.jsonl", "tensorboard"])
def test_an_ornament_that_fails_costs_a_warning_and_never_the_epoch(broken, image_tree, tmp_path, capfd):
    place = tmp_path / "run" / broken
    if broken == "tensorboard":
        place.parent.mkdir()
        place.write_text("a file where a folder is wanted")
    else:
        place.mkdir(parents=True)
    if broken == "tensorboard":
        pytest.importorskip("tensorboard")
    arguments = tiny_run(image_tree, tmp_path / "run", tensorboard=broken == "tensorboard", **ONE_EPOCH)
    if broken == "metrics.jsonl":  # a folder of that name looks like another run
        arguments.append("--resume=auto")
    assert run_here(arguments) == 0
    said = capfd.readouterr().out
    assert "WARNING" in said and "The run goes on" in said
    assert checkpoint_files.read(tmp_path / "run/last.pt")["epoch"] == 1


def test_the_epoch_is_saved_before_its_ornaments(image_tree, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "engine.run.epoch_records.draw_curves",
        lambda *_: saved.append(checkpoint_files.read(tmp_path / "run/last.pt")["epoch"]),
    )
    assert run_here(tiny_run(image_tree, tmp_path / "run", **ONE_EPOCH)) == 0
    assert saved == [1]


def test_a_record_that_could_not_be_written_is_written_with_the_next(image_tree, tmp_path, monkeypatch, capfd):
    records, filling = tmp_path / "run/metrics.jsonl", []

    def block(*arguments):
        if not filling:
            filling.append(records.rename(tmp_path / "aside"))
            records.mkdir()
        else:
            records.rmdir()
            filling[0].rename(records)
        return original(*arguments)

    original = train.average_and_validate
    monkeypatch.setattr(train, "average_and_validate", block)
    assert run_here(tiny_run(image_tree, tmp_path / "run", epochs=2, swa_start_epoch=0)) == 0
    assert "WARNING: the record of epoch 1 could not be written" in capfd.readouterr().out
    assert [record["epoch"] for record in figures(tmp_path / "run")] == [1, 2]


# Errors of the program itself -------------------------------------------------------------------------------------------


def broken_at(monkeypatch, name, call):
    """Let a function of train.py fail when it is called for the n-th time."""
    original, calls = getattr(train, name), []

    def fail(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise ZeroDivisionError("an accident")
        return original(*arguments, **options)

    monkeypatch.setattr(train, name, fail)


def test_an_unexpected_error_between_two_steps_is_logged_with_its_traceback_and_the_state_saved(
    image_tree, tmp_path, monkeypatch
):
    broken_at(monkeypatch, "average_and_validate", 2)
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=3, swa_start_epoch=0)
    with pytest.raises(ZeroDivisionError):
        run_here(arguments)
    log = tmp_path.joinpath("run.log").read_text()
    assert "Traceback (most recent call last):" in log and "ZeroDivisionError: an accident" in log
    assert "stopped by ZeroDivisionError: an accident in epoch 2 after 7 batches; saved. Go on with:" in log
    saved = checkpoint_files.read(tmp_path / "run/last.pt")
    assert (saved["epoch"], saved["batch"]) == (1, 7)
    monkeypatch.undo()
    assert run_here([*arguments, "--resume=auto"]) == 0
    assert [record["epoch"] for record in figures(tmp_path / "run")] == [1, 2, 3]


def test_an_unexpected_error_within_a_step_saves_nothing_half_done(image_tree, tmp_path, monkeypatch):
    broken_at(monkeypatch, "train_step", 10)
    with pytest.raises(ZeroDivisionError):
        run_here(tiny_run(image_tree, tmp_path / "run", epochs=3, swa_start_epoch=0))
    log = tmp_path.joinpath("run.log").read_text()
    assert "in epoch 2 after 2 batches; NOT saved, in the middle of a step. Go on from the last save with" in log
    assert checkpoint_files.read(tmp_path / "run/last.pt")["epoch"] == 1


@pytest.mark.parametrize("name", ["curves.png", "events.jsonl", "hours.json"])
@pytest.mark.parametrize("flag", ["--resume=auto", "--overwrite"])
def test_a_file_of_ones_own_under_a_name_of_the_runs_is_not_replaced(flag, name, image_tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    refused(CheckpointError, f"{name} is there, but no run that it is of", *tiny_run(image_tree, tmp_path / "run"), flag)
    assert run_here([*tiny_run(image_tree, tmp_path / "run"), "--check"]) == 1
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["mine"]


# Resumptions that cannot be done ----------------------------------------------------------------------------------------


def refused(kind, match, *arguments):
    with pytest.raises(kind, match=match) as caught:
        run_here([str(argument) for argument in arguments])
    assert isinstance(caught.value, UserError)


def test_a_folder_is_resumed_from_its_farthest_good_file(finished, capfd):
    assert run_here([f"--resume={finished}", "--epochs=3"]) == 0
    assert f"resumed {finished}/last.pt, after epoch 2" in capfd.readouterr().out
    assert [record["epoch"] for record in figures(finished)] == [1, 2, 3]


def test_what_cannot_be_resumed_is_refused_in_words(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (finished / "dangling.pt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(finished / "pipe.pt")
    refused(CheckpointError, "holds no checkpoint", f"--resume={tmp_path}/empty")
    refused(CheckpointError, "no checkpoint at .*found last.pt", f"--resume={finished}/lst.pt")
    refused(CheckpointError, "is a link that leads nowhere", f"--resume={finished}/dangling.pt")
    with within_seconds(60):
        refused(CheckpointError, "is no regular file", f"--resume={finished}/pipe.pt")
    refused(ConfigError, "give at least 2", f"--resume={finished}/last.pt", "--epochs=1")
    assert not (finished / "run.lock").exists()


READ_AS_NOBODY = """
import os, sys
sys.path.insert(0, {repository!r})
from engine.run import checkpoint_files
from engine.system.errors import MachineError
os.seteuid(65534)
for path in sys.argv[1:]:
    try:
        checkpoint_files.read(path)
    except MachineError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="somebody else's files need root")
@pytest.mark.slow
def test_a_file_that_may_not_be_read_is_refused_in_words(finished):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(finished / "last.pt", folder)
        os.chmod(f"{folder}/last.pt", 0)
        script = READ_AS_NOBODY.format(repository=str(REPOSITORY))
        paths = [f"{folder}/last.pt", f"{finished}/last.pt"]  # the second lies in a folder that is closed to others
        done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{paths[0]} cannot be read: Permission denied" in done.stdout
    assert f"{paths[1]} cannot be read: Permission denied" in done.stdout


@pytest.mark.parametrize("done", [{"swa_start_epoch": 0}, {"swa_start_epoch": 2}], ids=["without averaging", "averaging"])
def test_fewer_epochs_than_are_done_are_refused_in_words(done, image_tree, tmp_path):
    assert run_here(tiny_run(image_tree, tmp_path / "run", epochs=3, **done)) == 0
    refused(ConfigError, "3 epochs and 0 batches into its run; give at least 3", f"--resume={tmp_path}/run", "--epochs=2")


def test_other_validation_images_are_refused(finished, image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / "fewer")
    next((tmp_path / "fewer/val").glob("*/*.jpg"), next((tmp_path / "fewer/val").glob("*/*"))).unlink()
    refused(DataError, "holds 19 validation images", f"--resume={finished}/last.pt", f"--data-dir={tmp_path}/fewer")


def test_a_class_that_was_renamed_is_named(finished, image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / "renamed")
    was = sorted(folder.name for folder in image_tree.joinpath("train").iterdir())[0]
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / was).rename(tmp_path / "renamed" / split / "new_name")
    refused(DataError, f"classes, with new_name; .* with {was}[.]", f"--resume={finished}", f"--data-dir={tmp_path}/renamed")


def test_as_many_images_with_other_labels_are_refused(finished, image_tree, tmp_path):
    for split, reason in (("train", "as many training images .* their labels are others"), ("val", "holds other validation")):
        others = shutil.copytree(image_tree, tmp_path / split)
        of_each_class = [sorted(folder.iterdir()) for folder in sorted((others / split).iterdir())]
        of_each_class[0][0].rename(of_each_class[1][0].with_name(f"moved{of_each_class[0][0].suffix}"))
        refused(DataError, reason, f"--resume={finished}/last.pt", f"--data-dir={others}")
    older = checkpoint_files.read(finished / "last.pt")
    del older["label_digests"]
    checkpoint_files.write(finished / "last.pt", older, {}, finished / "previous.pt")
    assert run_here([f"--resume={finished}/last.pt", f"--data-dir={others}"]) == 0


def test_a_full_disk_at_the_start_is_refused_in_words(image_tree, tmp_path):
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        (tmp_path / "disk/filling").write_bytes(bytes(4096))
        arguments = tiny_run(image_tree, tmp_path / "disk", log_file=tmp_path / "log")
        refused(CheckpointError, "cannot be written to: No space left on device", *arguments, "--resume=auto")
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_a_run_that_goes_on_elsewhere_ends_with_a_best_pt_that_is_there(finished, tmp_path, capfd):
    assert run_here([f"--resume={finished}/last.pt", f"--checkpoint-dir={tmp_path}/new"]) == 0
    assert f"in {tmp_path}/new/best.pt" in capfd.readouterr().out
    assert checkpoint_files.read(tmp_path / "new/best.pt")["best"] == checkpoint_files.read(finished / "best.pt")["best"]
    assert figures(tmp_path / "new") == figures(finished)


def test_of_equally_good_epochs_and_weights_the_first_stays_the_best():
    class State:
        best, epoch = {"top1": 0.0, "epoch": 0, "weights": "raw"}, 0

    state = State()
    note_best(state, {"raw": {"top1": 40.0}, "averaged": {"top1": 40.0}}, state.best)
    assert state.best == {"top1": 40.0, "epoch": 1, "weights": "raw"}
    state.epoch = 1
    note_best(state, {"raw": {"top1": 40.0}}, state.best)
    assert state.best["epoch"] == 1
    note_best(state, {"raw": {"top1": 40.1}}, state.best)
    assert state.best["epoch"] == 2


def test_what_follows_the_length_is_said(image_tree, tmp_path, capfd):
    arguments = [a for a in tiny_run(image_tree, tmp_path / "other", epochs=3) if "warmup" not in a]
    assert parse_command_line(arguments).config["warmup_epochs"] == pytest.approx(0.3)
    assert run_here(arguments) == 0
    assert "epochs = 3 (the recipe's are 100): warmup_epochs = 0.3 (was 10) follow" in capfd.readouterr().out
    assert json.loads((tmp_path / "other/metrics.jsonl").read_text().splitlines()[0])["epoch"] == 1
