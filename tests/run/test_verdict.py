"""The live verdict: what it raises, what it lets pass, and that it is said once, with what to do, and again when it ends."""

import json
import os
import signal
import statistics
import time

import pytest
import torch
from conftest import REPOSITORY, children_of, finish, run_here, start_python, tiny_run, wait_for

from config import CONFIG, RECIPES
from engine.preparation.finding import ImageFolder
from engine.preparation.trees import IMAGENET_COUNTS
from engine.report.figures import read_run
from engine.report.one_run import report_of_run
from engine.report.page import as_markdown
from engine.run import verdict as rules
from engine.run.events import EVENTS, read_events
from engine.run.monitor import Monitor
from engine.run.published import FFCV_16_CURVE
from engine.run.throughput import Throughput
from engine.run.verdict import NOTHING, Data, Sums, Verdict, Work, blame, loss_of_guessing, sums_of
from engine.training.loss import training_loss
from engine.training.metrics import TrainingMetrics

CPU = torch.device("cpu")
DATA = Data(workers=2, cores=2, packed=True, on_gpu=True)


def verdict_of(recipe="seed", classes=10, images=2000, **changes):
    return Verdict(CONFIG | RECIPES[recipe] | changes, recipe, classes, images, DATA, 100 / classes)


def window(loss=1.0, norm=1.0, steps=50, skipped=0, seconds=60.0, waited=0.0, work=(1.0, 0.1, 0.9)):
    counted = steps - skipped
    return Sums(steps, skipped, loss * counted, norm * counted, seconds, waited, Work(*work))


def told(verdict, windows):
    """Return the Changes of an epoch whose windows are these."""
    changes, so_far = verdict.read(0, NOTHING, 0.1), NOTHING
    for each in windows:
        so_far = so_far.plus(each)
        changes += verdict.read(0, so_far, 0.1)
    return changes


def names(changes):
    return [(change.name, change.begins) for change in changes]


def events_of(folder):
    return [event for event in read_events(folder / EVENTS) if event["event"] == "verdict"]


# What is said of figures ---------------------------------------------------------------------------------------------


def test_waiting_for_data_is_said_once_and_again_when_it_ends():
    shares = (0.02, 0.3, 0.4, 0.08, 0.01, 0.01)
    changes = told(verdict_of(), [window(waited=60 * share) for share in shares])
    assert names(changes) == [("waiting for data", True), ("waiting for data", False)]
    assert changes[0].text.startswith("30% of the time the device waits for data; 2 data workers spent 10% of the time reading")


@pytest.mark.parametrize("on_gpu, waited, begun", [(True, 20, True), (False, 20, False), (False, 40, True)])
def test_workers_that_wait_for_a_core_are_a_fault_unless_it_is_the_training_that_has_it(on_gpu, waited, begun):
    judged = Verdict(CONFIG, "seed", 10, 2000, DATA._replace(on_gpu=on_gpu), 10.0)
    changes = told(judged, [window(waited=waited, work=(1.0, 0.1, 0.3))])
    assert names(changes) == ([("waiting for data", True)] if begun else [])


@pytest.mark.parametrize(
    "work, data, said",
    [
        (Work(10, 8, 1), DATA, "the disk is to blame; put the images on a faster disk"),
        (Work(10, 8, 1), DATA._replace(packed=False), "or pack them with python prepare_data.py"),
        (Work(10, 1, 9), DATA._replace(workers=1), "too few workers; --num-workers 2"),
        (Work(10, 1, 2), DATA, "waited for a core otherwise: see with top who else takes the 2 cores"),
        (Work(10, 1, 9), DATA, "decoding is to blame; less --augmentation"),
        (
            Work(10, 1, 9),
            DATA._replace(workers=0),
            "without data workers, spent 10% of the time reading files and 90%",
        ),
    ],
)
def test_the_shares_of_the_workers_time_tell_who_is_to_blame(work, data, said):
    assert said in blame(work, data)


def test_the_loss_of_guessing_is_that_of_a_network_which_gives_every_class_the_same_probability():
    for loss, logits in (("cross_entropy", torch.zeros(4, 7)), ("bce", torch.full((4, 7), 1 / 7).logit())):
        config = {"loss": loss, "label_smoothing": 0.0}
        guessed = training_loss(logits, torch.tensor([0, 3, 6, 1]), config).item()
        assert loss_of_guessing(loss, 7) == pytest.approx(guessed, rel=1e-5)


def learning(top1s, loss, images=256 * 200, val_images=500):
    """The Changes of a run of 200 steps an epoch whose validation gives these figures."""
    judged = verdict_of(images=images)
    records = [
        {"epoch": epoch, "train_loss": loss, "train_top1": top1, "val_top1": top1, "val_images": val_images}
        for epoch, top1 in enumerate(top1s, start=1)
    ]
    return [change for record in records for change in judged.judge_epoch(record)]


def test_a_network_that_learns_nothing_is_said_after_1000_steps_and_two_epochs_and_one_that_learns_late_ends_it():
    chance = loss_of_guessing("cross_entropy", 10)
    assert learning([10.0] * 5, chance) == []
    changes = learning([10.0] * 7 + [20.0], chance)
    assert names(changes) == [("nothing learned", True), ("nothing learned", False)]
    assert (
        changes[0].text.startswith("after 1,200 steps validation top-1 is 10.00 %, that of guessing")
        and "--preview" in changes[0].text
    )
    assert learning([10.0] * 5 + [14.1] * 5, chance) == []  # more than 3 standard deviations: 4.02 points of 500 images
    assert names(learning([13.9] * 10, chance)) == [("nothing learned", True)]
    assert learning([10.0] * 10, 0.9 * chance) == []  # training learns: its distance to validation is another alarm's


def test_a_loss_that_rises_for_two_windows_is_said_and_a_single_bump_is_not():
    falling = [window(loss=loss) for loss in (2.0, 1.5, 1.0)]
    assert told(verdict_of(), [*falling, window(loss=2.2), window(loss=1.0)]) == []
    changes = told(verdict_of(), [*falling, window(loss=2.2), window(loss=2.2), window(loss=1.0)])
    assert names(changes) == [("loss rising", True), ("loss rising", False)]
    assert "from 1.000 to 2.200 at rate 0.1" in changes[0].text


def test_a_gradient_that_explodes_is_said_and_one_that_grows_is_not():
    assert told(verdict_of(), [window(norm=1.3**n) for n in range(15)]) == []
    changes = told(verdict_of(), [window(norm=norm) for norm in (1, 2, 1, 2, 40, 40, 2)])
    assert names(changes) == [("gradient exploding", True), ("gradient exploding", False)]


def test_the_steps_that_a_loss_scale_skips_while_it_is_found_are_no_alarm_and_more_are():
    assert told(verdict_of(), [window(skipped=16), window(skipped=0)]) == []
    changes = told(verdict_of(), [window(skipped=25), window(skipped=0)])
    assert names(changes) == [("skipped steps", True), ("skipped steps", False)]
    assert "25 of 50 steps skipped" in changes[0].text
    assert names(told(verdict_of(), [window(skipped=50)])) == [("skipped steps", True)]


def test_the_sums_of_an_epoch_are_those_of_its_metrics():
    metrics = TrainingMetrics(2.0, 25.0, 0.5, 320, skipped_steps=2, skipped_in_a_row=0, longest_skipped_row=1)
    assert sums_of(metrics, 32, 9.0, 1.0, Work(3, 2, 1)) == Sums(10, 2, 16.0, 4.0, 9.0, 1.0, Work(3, 2, 1))
    nothing = TrainingMetrics(float("nan"), float("nan"), float("nan"), 64, 2, 2, 2)
    assert sums_of(nothing, 32, 9.0, 1.0, Work()).loss == 0


def gpu_samples(**figures):
    usual = {"memory_mib": 11_701, "memory_total_mib": 15_360, "throttled": [], "temperature_c": 70}
    return [usual | figures] * rules.GPU_SAMPLES


def test_a_clock_held_down_by_heat_or_a_lowered_limit_is_said_and_a_card_at_its_own_limit_is_not():
    assert verdict_of().judge_gpu(gpu_samples(throttled=["power cap"])) == []
    assert verdict_of().judge_gpu(gpu_samples(throttled=["power cap"], power_limits_w=(70.0, 70.0))) == []
    (lowered,) = verdict_of().judge_gpu(gpu_samples(throttled=["power cap"], power_limits_w=(50.0, 70.0)))
    assert "sudo nvidia-smi -pl 70" in lowered.text
    judged = verdict_of()
    hot = gpu_samples(throttled=["thermal, hardware", "power cap"], temperature_c=93)
    (begun,) = judged.judge_gpu(hot)
    assert "100% of the time the GPU's clock is held down (thermal, hardware at up to 93 °C)" in begun.text
    assert judged.judge_gpu(hot) == []
    assert names(judged.judge_gpu(gpu_samples())) == [("throttled", False)]


def test_memory_that_the_allocator_keeps_for_itself_is_not_full():
    full = gpu_samples(memory_mib=15_200)
    assert verdict_of().judge_gpu(full, allocated_mib=9_000, reserved_mib=14_000) == []
    judged = verdict_of()
    (begun,) = judged.judge_gpu(full, allocated_mib=13_950, reserved_mib=14_000)
    assert "210 of 15,360 MiB are left" in begun.text
    assert names(judged.judge_gpu(gpu_samples(), 9_000, 14_000)) == [("memory nearly full", False)]


def record_of(epoch, top1, val_images=IMAGENET_COUNTS[1], **changes):
    return (
        {"epoch": epoch, "train_top1": top1, "val_top1": top1 - 1, "val_flip_top1": top1, "val_images": val_images}
        | {"val_resolution": 256}
        | changes
    )


def test_validation_far_below_the_published_curve_is_said_for_imagenet_and_the_recipe_alone():
    imagenet = {"recipe": "fast", "classes": 1000, "images": IMAGENET_COUNTS[0]}

    def said(top1_of, **changes):
        judged = verdict_of(**imagenet | changes)
        return [
            change for epoch, top1 in FFCV_16_CURVE.items() for change in judged.judge_epoch(record_of(epoch, top1_of(top1)))
        ]

    assert said(lambda top1: top1) == []
    assert said(lambda top1: max(top1 - 9, 1)) == []
    late = dict(zip(FFCV_16_CURVE.values(), [1, *FFCV_16_CURVE.values()], strict=False))  # an epoch late all the time
    assert said(late.get) == []
    begun, *_ = said(lambda top1: 0.6 * top1)
    assert begun.name == "below the published curve"
    assert "points below the 38.8 % published after epoch 5 (FFCV, 16 epochs)" in begun.text
    assert "at 256 px, with flip" in begun.text
    assert said(lambda top1: 0.6 * top1, images=2000) == []
    assert said(lambda top1: 0.6 * top1, epochs=17) == []
    assert said(lambda top1: 0.6 * top1, architecture="resnet18") == []
    assert said(lambda top1: 0.6 * top1, recipe="medium") == []


def test_training_far_above_validation_must_last_and_the_best_weights_count():
    judged = verdict_of()
    apart = [record_of(1, 80.0, val_top1=20.0, val_flip_top1=None)] * 3
    assert [names(judged.judge_epoch(record)) for record in apart] == [[], [("training above validation", True)], []]
    averaged = [record | {"averaged_val_top1": 70.0} for record in apart]
    assert names(judged.judge_epoch(averaged[0])) == [("training above validation", False)]
    assert all(verdict_of().judge_epoch(record) == [] for record in averaged)


# In real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_slow_disk_is_named_in_log_events_and_report(image_tree, tmp_path, monkeypatch, capsys):
    read = ImageFolder.read

    def slow_read(self, index):
        time.sleep(0.004)
        return read(self, index)

    monkeypatch.setattr(ImageFolder, "read", slow_read)
    monkeypatch.setattr(rules, "WAITING_SECONDS", 0.05)
    assert run_here(tiny_run(image_tree, tmp_path / "run", epochs=1, swa_start_epoch=0)) == 0
    (begun, *_) = events_of(tmp_path / "run")
    assert begun["name"] == "waiting for data" and begun["begins"] and begun["epoch"] == 0 and begun["batch"] > 0
    assert "the disk is to blame" in begun["text"]
    assert f"verdict: {begun['text']}" in (tmp_path / "run.log").read_text()
    assert capsys.readouterr().out.count("verdict: ") == 1
    page = as_markdown(*report_of_run(read_run(tmp_path / "run", CONFIG)))
    assert begun["text"] in page.split("## Verdict")[1].split("## ")[0]


def test_an_active_alarm_stands_in_the_plain_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("engine.run.monitor.PLAIN_LINE_SECONDS", 0.0)
    judged, loader = verdict_of(batch_size=32), type("Loader", (), {"work": (1.0, 0.9, 0.1)})
    judged.active = {"waiting for data": None, "throttled": None}
    with Monitor(None, CPU) as monitor:
        monitor.judge_with(judged, loader)
        monitor.start("epoch 1/2", 10, epoch=0)
        monitor.advance(TrainingMetrics(1.5, 25.0, 0.3, 64, 0, 0, 0), 0.001, Throughput(CPU, 32))
    assert "img/s 0, verdict waiting for data and throttled\n" in capfd.readouterr().out


@pytest.mark.slow
def test_a_stopped_data_worker_is_named_with_the_command_that_lets_it_go_on(image_tree, tmp_path):
    folder = tmp_path / "run"
    source = (
        "import sys\n"
        "from engine.run import monitor, verdict\n"
        "monitor.STALLED_SECONDS = verdict.STALLED_SECONDS = 2.0\n"
        "import train\n"
        "from engine.cli.command_line import parse_command_line\n"
        "sys.exit(train.main(parse_command_line(sys.argv[1:], train.OWN_FLAGS)))\n"
    )
    (tmp_path / "quick.py").write_text(source)
    arguments = tiny_run(image_tree, folder, epochs=300, swa_start_epoch=0, num_workers=1)
    process = start_python([tmp_path / "quick.py", *arguments], environment={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"})
    wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") > 1)
    (worker,) = children_of(process.pid)
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: events_of(folder))
    assert f"data worker {worker} is stopped" in events_of(folder)[0]["text"]
    assert f"kill -CONT {worker}" in events_of(folder)[0]["text"]
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: len(events_of(folder)) == 2)
    assert events_of(folder)[1]["text"] == "over: no batch (one came)"
    process.terminate()
    status, output = finish(process)
    assert status == 143, output


# Where a phase is ----------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """A heartbeat that beats and speaks often."""
    monkeypatch.setattr("engine.run.heartbeat.BEAT_SECONDS", 0.02)
    monkeypatch.setattr("engine.run.monitor.PLAIN_LINE_SECONDS", 0.05)


def test_phases_without_figures_say_where_they_are(impatient, tmp_path, capfd):
    with Monitor(str(tmp_path / "log"), CPU) as monitor:
        monitor.start("learning-rate range test", 100)
        for _ in monitor.watch(range(3)):
            time.sleep(0.15)
        monitor.start("measuring this machine", None)
        time.sleep(0.2)
        monitor.finish()
        said = len(capfd.readouterr().out.splitlines())
        time.sleep(0.2)
    assert capfd.readouterr().out == ""  # between two phases there is nothing to say
    log = (tmp_path / "log").read_text()
    assert "learning-rate range test: batch 2/100, 0 s so far" in log
    assert "measuring this machine: 0 s so far" in log
    assert said == len(log.splitlines())


def test_a_phase_whose_figures_come_in_time_says_nothing_else(impatient, capfd, monkeypatch):
    monkeypatch.setattr("engine.run.monitor.PLAIN_LINE_SECONDS", 0.5)
    figures, speed = TrainingMetrics(1.5, 25.0, 0.3, 64, 0, 0, 0), Throughput(CPU, 32)
    with Monitor(None, CPU) as monitor:
        monitor.start("epoch 1/2", 100, epoch=0)
        for _ in range(8):
            time.sleep(0.1)
            monitor.advance(figures, 0.001, speed)
    lines = capfd.readouterr().out.splitlines()
    assert lines and all(", loss 1.500, " in line for line in lines)


def test_a_healthy_run_says_nothing_and_names_its_phases(image_tree, tmp_path, monkeypatch, capsys):
    started, start = [], Monitor.start

    def noting(self, what, *arguments, **options):
        started.append(what)
        return start(self, what, *arguments, **options)

    monkeypatch.setattr(Monitor, "start", noting)
    assert run_here(tiny_run(image_tree, tmp_path / "run", epochs=2)) == 0
    assert started[-3:] == [
        "epoch 2/2",
        "epoch 2: batch-norm statistics of the averaged weights",
        "epoch 2: validation at 32 px",
    ]
    assert events_of(tmp_path / "run") == []
    assert "verdict" not in capsys.readouterr().out
    assert "No alarm was raised." in as_markdown(*report_of_run(read_run(tmp_path / "run", CONFIG)))


# What it was right about ---------------------------------------------------------------------------------------------

PAGE, EVIDENCE = REPOSITORY / "docs/verdict.md", REPOSITORY / "benchmarks/verdict.jsonl"
BEGIN = "<!-- verdict: written by PYTHONPATH=.:tests python tests/run/test_verdict.py -->"
END = "<!-- end of verdict -->"


def largest_rise(losses, guessing):
    """The largest share of what a loss had fallen that a window gave back, once that was enough to judge."""
    rises = [0.0]
    for number, loss in enumerate(losses[1:], start=1):
        lowest = min(losses[:number])
        if guessing - lowest > rules.FALLEN * guessing:
            rises.append((loss - lowest) / (guessing - lowest))
    return max(rises)


def largest_growth(norms):
    """The largest gradient norm of a window over the median of those before."""
    first = rules.USUAL_WINDOWS
    return max((norms[k] / statistics.median(norms[:k]) for k in range(first, len(norms))), default=0.0)


def evidence():
    """The page's part on what the verdict said of runs with a fault and of healthy ones."""
    rows = [json.loads(line) for line in EVIDENCE.read_text(encoding="utf-8").splitlines()]
    raised = {row["run"]: list(dict.fromkeys(alarm["name"] for alarm in row["alarms"] if alarm["begins"])) for row in rows}
    right = sum(name in row["expected"] for row in rows for name in raised[row["run"]])
    false = sum(len(names) for names in raised.values()) - right
    missed = sum(not set(row["expected"]) & set(raised[row["run"]]) for row in rows if row["expected"])
    healthy = [row for row in rows if row["run"].startswith("healthy")]
    lines = ["| run | steps | one of these is right | raised |", "|---|---|---|---|"]
    for row in rows:
        wanted, got = (", ".join(names) or "none" for names in (row["expected"], raised[row["run"]]))
        lines.append(f"| {row['run']} | {46 * len(row['val_top1']):,} | {wanted} | {got} |")

    def guessing(row):
        return loss_of_guessing("bce" if "mild" in row["run"] or "medium" in row["run"] else "cross_entropy", 10)

    rise = max(largest_rise(row["windows"]["loss"], guessing(row)) for row in healthy)
    growth = max(largest_growth(row["windows"]["norm"]) for row in healthy)
    wait = max(share for row in healthy for share in row["windows"]["wait"])
    apart = max(points for row in healthy for points in row["apart"])
    like_guessing = [
        rules.LEARNING_STEPS * number
        for row in healthy
        for number, loss in enumerate(row["windows"]["loss"], start=1)
        if loss >= rules.LEARNED_NOTHING * guessing(row)
    ]
    first, faults = rows[0], sum(bool(row["expected"]) for row in rows)
    machine = f"{first['cpu']}, {first['cores']} cores, shared with other work"
    where = f"{machine}, PyTorch {first['versions']['torch']}, {first['date']}"
    precision, recall = right / (right + false), 1 - missed / faults
    counts = f"Alarms raised {right + false}, right {right}, false {false} (precision {precision:.2f}); "
    counts += f"faults {faults}, missed {missed} (recall {recall:.2f})."
    margins = (
        f"In the {len(healthy)} healthy runs the loss gave back at most {rise:.0%} of what it had fallen, the gradient's norm "
        f"was at most {growth:.1f} times the median before, training was at most {apart:.1f} points above validation, the "
        f"waiting at most {wait:.0%}, and the loss was like that of guessing for at most {max(like_guessing)} steps."
    )
    return "\n".join(
        [
            f"{len(rows)} runs of a narrow ResNet-18 on synthetic images of 10 classes, each once; {where}; "
            "`benchmarks/verdict_evidence.py`. Windows were 10 s and 10 samples instead of a minute.",
            "",
            *lines,
            "",
            f"{counts} {margins}",
        ]
    )


def test_the_page_has_the_evidence_as_it_was_measured():
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0].strip() == evidence()


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{evidence()}\n\n{END}{rest.split(END)[1]}")
