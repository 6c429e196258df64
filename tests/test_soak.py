"""A run that meets with one accident after another ends with the bits of the run that nobody disturbed."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import assert_same_run, finish, run_program, start_driver, start_program, tiny_run, wait_for

from engine.run import checkpoint_files
from engine.system import lock

ROUNDS = int(os.environ.get("SOAK_ROUNDS", 100))
EPOCHS, STEPS = 8, 7  # the latter of an epoch


def flip_a_bit(path, rng):
    with open(path, "r+b") as file:
        position = rng.randrange(path.stat().st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


class Soak:
    """One run, its accidents, and what they cost."""

    def __init__(self, image_tree, folder, rng):
        self.folder, self.rng = folder, rng
        self.steps = folder.with_suffix(".steps")
        changes = {"epochs": EPOCHS, "checkpoint_minutes": 0.005, "checkpoint_every_epochs": 1, "swa_start_epoch": 2}
        self.arguments = [*tiny_run(image_tree, folder, **changes), "--resume=auto"]
        self.happened, self.steps_lost = {}, []

    def start(self, **options):
        self.steps.unlink(missing_ok=True)
        process = start_driver(self.arguments, self.steps, **options)
        wait_for(lambda: self.steps.exists() or process.poll() is not None)
        time.sleep(self.rng.uniform(0, 2.0))
        return process

    def position(self):
        """Steps that the farthest whole checkpoint has behind it."""
        contents = checkpoint_files.newest_good(self.folder)[1] if self.folder.exists() else None
        return contents["epoch"] * STEPS + contents["batch"] if contents else 0

    def taken(self):
        """Steps that the last process has taken, at least."""
        lines = self.steps.read_text().split() if self.steps.exists() else []
        return int(lines[-1]) + 1 if lines else 0

    # Each accident returns the steps that it cost.

    def kill(self):
        process = self.start()
        process.kill()
        process.communicate()
        return max(0, self.taken() - self.position())

    def two_starts(self):
        first = self.start()
        second = start_program("train.py", self.arguments)
        status, output = finish(second)
        if first.poll() is None or status == 75:
            assert status == 75 and "is in use by process" in output, output
        return self._stopped(first, signal.SIGTERM)

    def _stopped(self, process, number):
        """Ask a process to stop by a signal; it saves, or it had ended or not yet begun."""
        process.send_signal(number)
        output = "" if process.stdout.closed else finish(process)[1]
        assert process.wait(300) in (128 + number, 0, -number), output
        return max(0, self.taken() - self.position())

    def hang_up(self):
        return self._stopped(self.start(), signal.SIGHUP)

    def ctrl_c(self):
        return self._stopped(self.start(), signal.SIGINT)

    def closed_output(self):
        process = self.start()
        process.stdout.close()
        time.sleep(self.rng.uniform(0, 1))
        return self._stopped(process, signal.SIGTERM)

    def full_disk(self):
        process = self.start(file_size_limit=2_000_000)  # the log fits, a checkpoint does not
        process.send_signal(signal.SIGTERM)
        code, output = finish(process)
        assert code in (143, 1, -signal.SIGTERM), output
        return max(0, self.taken() - self.position())

    def flipped_bit(self):
        files = (
            [path for path in checkpoint_files.checkpoints_in(self.folder) if path.is_file()] if self.folder.exists() else []
        )
        if not files:
            return 0
        before = self.position()
        flip_a_bit(self.rng.choice(files), self.rng)
        return before - self.position()

    def shuffled_times(self):
        for path in self.folder.glob("*.pt"):
            instant = self.rng.uniform(1e9, 2e9)
            os.utime(path, (instant, instant))
        return 0

    def deleted_file(self):
        files = checkpoint_files.checkpoints_in(self.folder)
        before = self.position()
        if len(files) > 3:  # as many whole ones as the promise speaks of
            self.rng.choice(files[:3]).unlink()
        return before - self.position()

    def copied_elsewhere(self):
        if self.folder.exists():
            subprocess.run(["cp", "-r", self.folder, f"{self.folder}.copy"], check=True)
            shutil.rmtree(self.folder)
            os.rename(f"{self.folder}.copy", self.folder)
        return 0

    def asked_to_save(self):
        process = self.start()
        for _ in range(3):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.2)
        process.kill()
        process.communicate()
        return max(0, self.taken() - self.position())

    def round(self):
        accidents = [
            self.kill,
            self.two_starts,
            self.hang_up,
            self.ctrl_c,
            self.closed_output,
            self.full_disk,
            self.flipped_bit,
        ]
        accidents += [self.shuffled_times, self.deleted_file, self.copied_elsewhere, self.asked_to_save]
        accident = self.rng.choice(accidents)
        self.happened[accident.__name__] = self.happened.get(accident.__name__, 0) + 1
        lost = accident()
        self.steps_lost.append((lost, accident.__name__))
        print(len(self.steps_lost), accident.__name__, "steps lost:", lost, flush=True)
        if self.position() >= EPOCHS * STEPS:  # it has come to its end: begin anew, there are accidents left
            self.compare()
            shutil.rmtree(self.folder)

    def finish(self):
        status, output = run_program("train.py", self.arguments, timeout=1200)
        assert status == 0, output
        assert not (self.folder / lock.LOCK).exists()
        return output


@pytest.mark.slow
def test_a_run_that_meets_with_a_hundred_accidents_ends_with_the_same_bits(image_tree, tmp_path):
    rng = random.Random(14)
    reference = Soak(image_tree, tmp_path / "reference", rng)
    reference.finish()
    soak = Soak(image_tree, tmp_path / "run", rng)
    soak.compare = lambda: (soak.finish(), assert_same_run(soak.folder, reference.folder))
    for _ in range(ROUNDS):
        soak.round()
    soak.finish()
    assert_same_run(soak.folder, reference.folder)
    print(soak.happened, "steps lost at most:", max(soak.steps_lost))
