import itertools
import json
import math
import os
import re

import numpy as np
import pytest
from conftest import run_here, run_program, tiny_run

import lr_finder
import train
from engine.cli.command_line import parse_command_line
from engine.cli.keys import ConfigError
from engine.data.demo import make_demo_data
from engine.inference import outputs
from engine.system import errors
from engine.system.errors import TrainingStopped
from engine.training.range_test import USUAL_RANGE, range_test, suggest


def falling_and_rising(rates, best):
    """A loss that falls most at `best` and explodes a decade later."""
    return [2.3 / (1 + (rate / best) ** 1.5) + (rate / (10 * best)) ** 3 for rate in rates]


def geometric(lowest=1e-5, highest=1.0, steps=100):
    return np.geomspace(lowest, highest, steps).tolist()


@pytest.mark.parametrize("best", [3e-4, 3e-3, 3e-2])
def test_the_suggestion_lies_where_the_loss_falls_fastest(best):
    rates = geometric()
    found = suggest(rates, falling_and_rising(rates, best))
    assert best / 2 < found["suggestion"] < best * 2
    assert found["divergence"] > found["suggestion"]
    assert found["reason"]


def test_noise_between_batches_does_not_move_the_suggestion_far():
    rates = geometric()
    rng = np.random.default_rng(0)
    clean = falling_and_rising(rates, 3e-3)
    suggestions = [suggest(rates, clean + rng.normal(0, 0.1, 100))["suggestion"] for _ in range(20)]
    assert max(suggestions) / min(suggestions) < 5


def test_a_loss_that_never_rises_has_no_divergence_point():
    rates = geometric()
    found = suggest(rates, [2.3 / (1 + (rate / 1e-3)) for rate in rates])
    assert found["divergence"] is None


def test_the_suggestion_keeps_its_distance_from_the_cliff():
    rates = geometric()
    cliff = [2.3 if rate < 0.01 else 0.5 if rate < 0.06 else 3.0 for rate in rates]
    found = suggest(rates, cliff)
    assert found["suggestion"] <= found["divergence"] / 3.9
    assert "quarter" in found["reason"]


HARDEST_FIRST = """
.0545 .0096 .0056 .0118 .0151 .0011 .0006 .0090  .0444 .0084 .0055 .0102 .0134 .0010 .0006 .0071
.0296 .0065 .0058 .0075 .0102 .0008 .0005 .0041  .0118 .0040 .0062 .0041 .0058 .0006 .0004 .0018
.0037 .0024 .0046 .0017 .0026 .0004 .0003 .0009  .0011 .0006 .0011 .0006 .0012 .0002 .0003 .0005
.0003 .0002 .0010 .0002 .0006 .0001 .0001 .0002  .0001 .0001 .0001 .0001 .0002 .0000 .0000 .0001
"""  # the demo's ResNet-18 after its training, AdamW from 1e-5 to 1 in 100 steps; a row has two laps of 8 batches


def test_the_order_of_unlike_batches_changes_the_suggestion_little():
    rates, losses = geometric(), np.zeros(100)
    losses[:64] = np.array(HARDEST_FIRST.split(), dtype=float)
    suggestions = []
    for order in [range(8), range(7, -1, -1), *(np.random.default_rng(seed).permutation(8) for seed in range(10))]:
        reordered = losses.copy()
        reordered[:96] = losses[:96].reshape(12, 8)[:, list(order)].ravel()
        suggestions.append(suggest(rates, reordered)["suggestion"])
    assert min(suggestions) > 8e-5 and max(suggestions) < 2.5 * min(suggestions)
    assert suggestions[0] == 1.1e-4


def test_the_hardness_of_batches_changes_the_suggestion_little():
    rates = geometric()
    clean = np.array(falling_and_rising(rates, 3e-3))
    expected = suggest(rates, clean)["suggestion"]
    for seed in range(10):
        hardness = np.tile(np.random.default_rng(seed).uniform(0.1, 1.9, 8), 13)[:100]
        assert expected / 1.6 < suggest(rates, clean * hardness)["suggestion"] < expected * 1.6


LOWER = "--lowest-rate 1e-07"
RISES, VARIES = ("the loss only rises", LOWER), ("the loss falls by no more than it varies", "more images")
EARLY = "the loss falls at the lowest rate already"


@pytest.mark.parametrize(
    ("loss_of_step", "expected"),
    [
        (lambda n, noise: 2.3, VARIES),
        (lambda n, noise: 0.0, VARIES),
        (lambda n, noise: 2.3 + 0.01 * noise, VARIES),
        (lambda n, noise: (0.02, 0.03, 0.01, 0.02, 0.05, 0.3, 0.2, 0.15)[n % 8], VARIES),
        (lambda n, noise: 2 + n / 50, RISES),
        (lambda n, noise: 2 + math.exp(n / 8) + 0.01 * noise, RISES),
        (lambda n, noise: 0.1 + 2.2 * math.exp(-n / 20) + 0.005 * noise, (f"{EARLY} as fast as anywhere", LOWER)),
        (lambda n, noise: 4 - n / 50, (f"{EARLY} as fast as anywhere", LOWER)),
        (lambda n, noise: 2.3 - 0.1 * min(n, 9) + max(n - 12, 0), (f"{EARLY} and rises soon", LOWER)),
    ],
)
def test_a_curve_that_tells_nothing_suggests_nothing_and_says_why(loss_of_step, expected):
    noise = np.random.default_rng(0).normal(size=100)
    steps = itertools.count()
    found = range_test(lambda rate, batch: (loss_of_step(n := next(steps), noise[n]), True), range(1000), 1e-5, 1.0, 100)
    assert (found["suggestion"], found["reason"]) == (None, expected[0])
    assert expected[1] in found["advice"]
    assert (found["steepest"] is None) == (found["valley"] is None) == (expected in (RISES, VARIES))


def test_the_rate_rises_exponentially_and_the_test_stops_on_divergence():
    seen = []

    def step(rate, batch):
        seen.append(rate)
        return (1.0 if rate < 0.01 else 1.0 + 500 * rate), True

    result = range_test(step, range(1000), 1e-5, 1.0, 100)
    assert seen[0] == pytest.approx(1e-5)
    assert np.allclose(np.diff(np.log(seen)), math.log(1e5) / 99)
    assert 0.01 < seen[-1] < 0.1
    assert len(result["rates"]) == len(result["losses"]) == len(result["smoothed_losses"]) == len(seen)


def test_steps_that_amp_skips_are_taken_again_at_the_same_rate():
    seen, taken = [], []

    def step(rate, batch):
        seen.append(rate)
        taken.append(batch)
        return 1.0 / (1 + rate), len(seen) > 16  # a loss scale of 2**16 that has to come down first

    result = range_test(step, range(1000), 1e-5, 1.0, 30)
    assert seen[:17] == [1e-5] * 17
    assert taken == [0] * 16 + list(range(30))  # so that a lap has each batch once
    assert len(result["rates"]) == 30


def test_a_loss_that_is_never_finite_stops_the_test_with_advice():
    with pytest.raises(TrainingStopped, match="--precision fp32"):
        range_test(lambda rate, batch: (math.nan, False), range(1000), 1e-5, 1.0, 100)


def test_it_writes_picture_and_json_and_touches_no_run(image_tree, tmp_path):
    arguments = [a for a in tiny_run(image_tree, tmp_path / "run") if "log_file" not in a]
    status, output = run_program("lr_finder.py", [*arguments, "--steps=30", "--grad-clip-value=inf"], cwd=tmp_path)
    assert status == 0, output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lr_finder.json", "lr_finder.png"]
    found = json.loads((tmp_path / "lr_finder.json").read_text(), parse_constant=pytest.fail)
    assert found["config"]["grad_clip_value"] == "inf"
    assert f"suggested learning_rate: {found['suggestion']:g}" in output
    for name in ("steepest descent", "valley", "divergence"):
        assert name in output
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    kinds = outputs.RANGE_TEST_MARK, outputs.picture_mark(outputs.RANGE_TEST_SOURCE)
    outputs.claim("output", dict(zip((tmp_path / "lr_finder.json", tmp_path / "lr_finder.png"), kinds, strict=True)))
    assert len(found["rates"]) == len(found["losses"]) >= 10


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--steps=3", "from 20 to 100000 steps"),
        ("--lowest-rate=0", "must be above 0 and rise"),
        ("--lowest-rate=2", "must be above 0 and rise"),
        ("--highest-rate=x", "--highest-rate x: not a number"),
    ],
)
def test_impossible_ranges_are_refused(flag, reason):
    command = parse_command_line([flag], lr_finder.OWN_FLAGS)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        lr_finder.range_from(command.options, command.config)


def test_a_refusal_is_one_line_and_status_2(image_tree, tmp_path):
    status, output = run_program("lr_finder.py", [*tiny_run(image_tree, tmp_path / "run"), "--steps=3"])
    assert (status, output) == (2, "lr_finder.py: --steps 3: from 20 to 100000 steps tell a curve\n")


def test_the_range_is_the_one_asked_for(image_tree, tmp_path):
    flags = ["--lowest-rate=1e-5", "--highest-rate", "1e-2", "--steps=20", f"--output={tmp_path / 'found'}"]
    status, output = run_program("lr_finder.py", [*tiny_run(image_tree, tmp_path / "run"), *flags])
    assert status == 0, output
    rates = json.loads((tmp_path / "found.json").read_text())["rates"]
    np.testing.assert_allclose(rates, np.geomspace(1e-5, 1e-2, 20)[: len(rates)])


def test_files_that_cannot_or_must_not_be_written_are_refused_before_the_test(image_tree, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "lr.json").write_text("{}")
    monkeypatch.setattr(lr_finder, "with_initial_weights", lambda command: pytest.fail("it began"))
    for output, said in (
        ("/proc/x/lr", "lr_finder.py: --output /proc/x/lr.json could not be written: "),
        (f"{tmp_path}/file/lr", "could not be written: "),
        (f"{tmp_path}/lr", "lr.json is there and was not written by this flag"),
        (f"{tmp_path}/", "is a folder: name the files in it, such as "),
    ):
        command = parse_command_line([*tiny_run(image_tree, tmp_path / "run"), f"--output={output}"], lr_finder.OWN_FLAGS)
        assert errors.run_program("lr_finder.py", lr_finder.main, command) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line


def test_the_suggestion_is_said_where_the_files_cannot_be_written_any_more(image_tree, tmp_path, monkeypatch, capfd):
    find = lr_finder.find_learning_rate

    def then_a_pipe_comes(*arguments):
        os.mkfifo(tmp_path / "lr.json")
        return find(*arguments)

    monkeypatch.setattr(lr_finder, "find_learning_rate", then_a_pipe_comes)
    flags = [*tiny_run(image_tree, tmp_path / "run"), "--steps=20", f"--output={tmp_path}/lr"]
    command = parse_command_line(flags, lr_finder.OWN_FLAGS)
    assert errors.run_program("lr_finder.py", lr_finder.main, command) == 1
    printed = capfd.readouterr()
    assert "suggested learning_rate: " in printed.out and "no regular file" in printed.err
    assert (tmp_path / "lr.json").is_fifo()


def test_a_real_test_that_tells_nothing_ends_with_status_1_and_honest_files(image_tree, tmp_path, capfd):
    flags = [
        *tiny_run(image_tree, tmp_path / "run"),
        "--lowest-rate=1e-9",
        "--highest-rate=1e-8",
        "--steps=20",
        f"--output={tmp_path}/lr",
    ]
    command = parse_command_line(flags, lr_finder.OWN_FLAGS)
    assert errors.run_program("lr_finder.py", lr_finder.main, command) == 1
    said = "lr_finder.py: no learning_rate is suggested: the loss falls by no more than it varies; try more images"
    printed = capfd.readouterr()
    assert printed.err.startswith(said) and "wrote " in printed.out and "suggested learning_rate" not in printed.out
    found = json.loads((tmp_path / "lr.json").read_text())
    assert [found[name] for name in ("suggestion", "steepest", "valley", "divergence")] == [None] * 4
    assert found["reason"] in said and len(found["losses"]) == 20
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


def test_learning_rate_auto_stops_before_the_training_where_the_test_tells_nothing(image_tree, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(USUAL_RANGE, "adamw", (1e-9, 1e-8, 20))
    command = parse_command_line(tiny_run(image_tree, tmp_path / "run", learning_rate="auto"), train.OWN_FLAGS)
    assert errors.run_program("train.py", train.main, command) == 1
    printed = capfd.readouterr().err
    assert "train.py: --learning-rate auto: no learning_rate is suggested: the loss falls by no more than it varies" in printed
    assert "without --learning-rate the recipe's rate" in printed
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.slow
def test_the_suggestion_trains_better_than_a_rate_30_times_smaller_or_larger(tmp_path):
    make_demo_data(tmp_path / "images", 160, 20)
    changes = {"train_resolution": 48, "min_crop_area": 0.6, "batch_size": 16, "swa_start_epoch": 0, "epochs": 10}
    assert run_here(tiny_run(tmp_path / "images", tmp_path / "auto", **changes, learning_rate="auto")) == 0
    suggestion = float((tmp_path / "auto.log").read_text().split("suggested learning_rate: ")[1].split()[0])
    losses = [last_training_loss(tmp_path / "auto")]
    for name, rate in (("smaller", suggestion / 30), ("larger", suggestion * 30)):
        assert run_here(tiny_run(tmp_path / "images", tmp_path / name, **changes, learning_rate=rate)) == 0
        losses.append(last_training_loss(tmp_path / name))
    assert losses[0] < 0.9 * min(losses[1:])


def last_training_loss(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["train_loss"]
