"""What the documentation says of speed and recipes is what was measured and kept."""

import argparse
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, children_of, finish, run_program, start_program

import benchmark
from benchmarks.gpu_results import gpu_tables
from benchmarks.gpu_sitting import ON_A_GPU, REHEARSED, in_a_process, newest_sitting, parts_of, parts_to_do
from benchmarks.input_speed import input_tables, read_originals
from benchmarks.measuring import last_words, recorded
from benchmarks.optimizer_evidence import KINDS, OPTIMIZERS, SHARED, best_rate, missing_runs, one_run
from benchmarks.optimizer_results import draw_optimizers, epochs_for_muons_top1, newton_schulz_share, optimizer_tables
from benchmarks.other_pictures import DRAW, TRAIN_FONTS, VAL_FONTS
from benchmarks.recipe_evidence import compute, contenders, recipe_tables
from benchmarks.scaling import PARAMETERS, scaling, scaling_tables
from benchmarks.step_speed import LOOPS, step_tables
from benchmarks.train_speed import train_tables
from benchmarks.transfer import transfer_tables
from config import CONFIG
from engine.cli.keys import config_problems
from engine.data.demo import make_demo_data
from engine.run.records import read_records
from model import build_model


def tables_of_studies():
    """The tables of all studies of recipes on each kind of machine, one after the other."""
    studies = {}
    for run in recorded("recipes"):
        studies.setdefault(json.dumps([run["study"], run["gpu"]]), []).append(run)
    return "\n\n".join("\n".join(recipe_tables(runs)) for runs in studies.values()).split("\n")


TABLES = {
    "input": lambda: input_tables(recorded("input")[-1]),
    "step": lambda: step_tables(recorded("step")[-1]),
    "train": lambda: train_tables(recorded("train")[-1]),
    "scaling": scaling_tables,
    "recipes": tables_of_studies,
    "optimizers": lambda: optimizer_tables(recorded("optimizers")),
}
if TRANSFERS := recorded("transfer"):
    TABLES["transfer"] = lambda: transfer_tables([run for run in TRANSFERS if run["study"] == TRANSFERS[-1]["study"]])
if SITTING := newest_sitting(recorded("gpu")):  # until a card was measured, the documentation has no such table
    TABLES["gpu"] = lambda: gpu_tables(SITTING)
PAGES = dict.fromkeys(TABLES, REPOSITORY / "docs/speed.md")
PAGES |= {"scaling": REPOSITORY / "docs/several_gpus.md", "recipes": REPOSITORY / "docs/recipes.md"}
PAGES["optimizers"] = REPOSITORY / "docs/recipes.md"
PAGES |= {"transfer": REPOSITORY / "docs/finetuning.md"}


def marks(name):
    return (
        f"<!-- {name} benchmark: written by PYTHONPATH=.:tests python tests/test_benchmark.py -->",
        f"<!-- end of {name} benchmark -->",
    )


@pytest.mark.parametrize("name", TABLES)
def test_the_readmes_tables_are_the_newest_measurements(name):
    begin, end = marks(name)
    table = PAGES[name].read_text().split(begin)[1].split(end)[0].strip()
    assert table == "\n".join(TABLES[name]()), "run PYTHONPATH=.:tests python tests/test_benchmark.py"


@pytest.mark.slow
def test_the_input_benchmark_measures_every_contender_on_real_files(tmp_path):
    pytest.importorskip("pyarrow")
    flags = ["input", "--images=8", "--rounds=1", "--resolutions", "64", "--num-workers=1", "--loader-batches=1", "--no-record"]
    status, output = run_program("benchmark.py", flags, cwd=tmp_path)
    assert status == 0, output
    for name in ("torchvision", "ours, originals", "ours, packed", "decode alone, packed", "no loader, originals"):
        assert f"| {name} | " in output
    assert "1.00x" in output


def test_made_originals_resemble_imagenets_in_pixels_and_bytes():
    contents = read_originals(None, 20)
    assert 90_000 < sum(map(len, contents)) / 20 < 130_000  # ImageNet's mean is about 110 kB


# Step and training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_step_benchmark_measures_each_contender_in_a_process_of_its_own(tmp_path):
    flags = ["step", "--device=cpu", "--batch-size=2", "--resolutions", "32", "--rounds=1", "--seconds=1", "--no-record"]
    flags += ["--contenders", "torchvision reference", "ours", "ours, under torchrun"]
    status, output = run_program("benchmark.py", flags, cwd=tmp_path)
    assert status == 0, output
    assert "| torchvision reference | fp32 | " in output
    assert "| ours | " in output
    assert "| ours, under torchrun | " in output and "failed" not in output


@pytest.mark.parametrize("loop", ["reference", "ours"])
def test_the_loops_compared_really_train_their_network(loop):
    job = {"batch_size": 8, "compile": "off", "channels_last": True}
    step = LOOPS[loop](job, torch.device("cpu"), "fp32")
    held = [cell.cell_contents for cell in step.__closure__]
    network = next(getattr(thing, "model", thing) for thing in held if hasattr(getattr(thing, "model", thing), "conv1"))
    before = network.conv1.weight.detach().clone(), network.fc.weight.detach().clone()
    images, labels = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(8)
    step(images, labels)
    assert not torch.equal(network.conv1.weight, before[0])
    assert not torch.equal(network.fc.weight, before[1])


@pytest.mark.slow
def test_training_is_measured_end_to_end_by_train_py_itself(tmp_path):
    pytest.importorskip("pyarrow")
    flags = ["train", "--device=cpu", "--batch-size=4", "--resolution=32", "--steps=2", "--rounds=1", "--seconds=1"]
    status, output = run_program("benchmark.py", [*flags, "--no-record"], cwd=tmp_path)
    assert status == 0, output
    assert "| training, end to end | " in output
    assert "was spent waiting for data" in output


@pytest.mark.slow
def test_what_a_mirror_costs_is_measured_with_train_py_itself(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
    flags = ["mirror", "--device=cpu", "--batch-size=4", "--resolution=32", "--steps=2", "--rounds=2", "--seconds=1"]
    status, output = run_program("benchmark.py", [*flags, f"--mirror={tmp_path / 'mirror'}", "--no-record"], cwd=tmp_path)
    assert status == 0, output
    assert "| with a mirror | " in output and "GB an hour" in output
    assert len(list(tmp_path.glob("mirror/*/last.pt"))) == 2


def test_alone_it_measures_everything_keeps_the_results_and_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = []
    monkeypatch.setattr(benchmark, "record", lambda name, results: kept.append(name))
    for name, (_, tables) in benchmark.MEASURES.items():  # the measuring itself takes a quarter of an hour
        monkeypatch.setitem(benchmark.MEASURES, name, (lambda arguments: recorded(arguments.what)[-1], tables))
    assert benchmark.main(benchmark.parse_arguments([])) == 0
    assert kept == ["input", "step", "train"]
    output = capsys.readouterr().out
    assert "| ours, packed | " in output and "| timm | " in output and "| training, end to end | " in output
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_flags_are_refused():
    for flags in (["input", "--rounds=0"], ["nothing"], ["step", "--contenders", "theirs"], ["train", "--compile=maybe"]):
        with pytest.raises(SystemExit) as ended:
            benchmark.parse_arguments(flags)
        assert ended.value.code == 2


# A card's first half hour ---------------------------------------------------------------------------------------------


def rehearse(results, *parts, minutes=25):
    return run_program("benchmark.py", ["gpu", "--rehearse", f"--results={results}", f"--minutes={minutes}", "--parts", *parts])


def lines_in(results):
    return [json.loads(line) for line in results.read_text().splitlines() if not line.endswith("cut sho")]


@pytest.mark.slow
def test_a_sitting_keeps_each_part_at_once_and_goes_on_with_what_is_missing(tmp_path):
    results = tmp_path / "gpu.jsonl"
    status, output = rehearse(results, "longest batch, memory fast")
    assert status == 0, output
    (first,) = lines_in(results)
    assert first["result"] == {
        "images": 4,
        "resolution": 64,
        "precision": first["precision"],
        "stopped_by": "not above 4 tried",
    }
    results.write_text(results.read_text() + '{"part": "cut sho')  # by a kill
    status, output = rehearse(results, "longest batch, memory fast", "step: torchvision, channels")
    assert status == 0, output
    assert "going on with the sitting" in output and "1 parts are done" in output
    assert "longest batch, memory fast ..." not in output  # it is not measured again
    assert [line["part"] for line in lines_in(results)] == [first["part"], "step: torchvision, channels-last, 64 32 px"]
    assert lines_in(results)[0] == first
    report = output.split("REHEARSAL at a tiny size, no figures")[1]
    assert "by --memory: `fast` 4 (not above 4 tried)" in report
    assert re.search(r"\| torchvision, channels-last \| \d+, 1.00x \| \d+, 1.00x \|", report)


@pytest.mark.slow
def test_a_part_that_takes_too_long_ends_with_all_its_processes():
    assert in_a_process({"do": "tests"}, seconds=3) is None
    assert not [child for child in children_of(os.getpid()) if "gpu_sitting" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 2], ids=["as it starts", "at work"])
def test_a_sitting_that_is_ended_takes_its_part_along(tmp_path, seconds):
    flags = ["gpu", "--rehearse", f"--results={tmp_path / 'r.jsonl'}", "--parts", "second start"]
    sitting = start_program("benchmark.py", flags)
    while not children_of(sitting.pid):
        assert sitting.poll() is None
    (part,) = children_of(sitting.pid)
    time.sleep(seconds)
    sitting.send_signal(signal.SIGTERM)
    assert finish(sitting)[0] == 128 + signal.SIGTERM
    assert not Path(f"/proc/{part}").exists()


@pytest.mark.slow
def test_a_part_that_fails_says_why_and_is_no_end():
    assert "KeyError" in in_a_process({"do": "step"}, seconds=60)["failed"]


@pytest.mark.slow
def test_without_a_gpu_a_sitting_is_refused_with_the_way_to_rehearse_it(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, output = run_program("benchmark.py", ["gpu", f"--results={tmp_path / 'gpu.jsonl'}"])
    assert status == 1
    assert "benchmark.py: PyTorch sees no GPU here; --rehearse" in output
    assert list(tmp_path.iterdir()) == []


def test_of_a_process_that_failed_the_whole_message_is_kept():
    raised = "  Traceback\n\nTraceback (most recent call last):\n  File 'a', line 1\n    f()\nUserError: no GPU\nMend it\n"
    assert last_words(f"Traceback (most recent call last):\nOSError: first\n{raised}") == "UserError: no GPU Mend it"
    assert last_words("one\nTypeError: two\n") == "TypeError: two"
    assert last_words("") == ""


def test_a_sitting_fits_into_its_half_hour_and_the_most_valuable_comes_first():
    parts = parts_of(ON_A_GPU, "cuda")
    assert len({part.name for part in parts}) == len(parts)
    assert [part.name.split(":")[0] for part in parts[:3]] == ["gpu tests", "step", "step"]
    upto_recipe = next(number for number, part in enumerate(parts) if part.name == "recipe mild")
    assert sum(part.minutes for part in parts[: upto_recipe + 1]) <= 25
    assert {"recipe mild", "recipe fast", "recipe seed", "end to end", "second start of a compiled run"} < {
        p.name for p in parts
    }


def test_the_report_of_a_card_shows_figures_ratios_failures_and_what_does_not_fit():
    facts = {"sitting": "1", "rehearsal": False, "card": "Some GPU, 15,360 MiB", "driver": "580.1", "cpu": "a CPU", "cores": 8}
    facts |= {"versions": {"torch": "2"}, "cudnn": 9, "precision": "fp16", "commit": "abc", "date": "2026-01-01"}

    def step(rate, gib):
        return {"precision": "fp16", "figures": {"224": {"images_per_s": rate, "milliseconds": 1, "peak_mib": 1024 * gib}}}

    results = {
        "gpu tests": {"counts": {"passed": 27, "failed": 1}, "not_passed": ["FAILED tests/test_gpu.py::test_a"]},
        "step: torchvision, 224 px": step(200.0, 11),
        "step: ours, 224 px": step(300.0, 10.5),
        "step: ours, memory low, 224 px": {"precision": "fp16", "figures": {"224": None}},
        "recipe fast": {"failed": "no end within 900 s"},
    }
    sitting = [facts | {"part": part, "result": result} for part, result in results.items()]
    report = "\n".join(gpu_tables(sitting))
    assert "Some GPU, 15,360 MiB, driver 580.1" in report and "commit abc" in report
    assert "GPU tests: 27 passed, 1 failed.\nFAILED tests/test_gpu.py::test_a" in report
    assert "| ours | 300, 1.50x, 10.50 GiB |" in report
    assert "| ours, memory low | does not fit |" in report
    assert "Failed: recipe fast: no end within 900 s" in report

    passed = {"counts": {"passed": 28}, "not_passed": []}
    again = [facts | {"commit": "def", "part": "gpu tests", "result": passed}]
    again += [facts | {"commit": "def", "part": "step: ours, 224 px", "result": step(400.0, 10.5)}]
    report = "\n".join(gpu_tables(sitting + again))  # the newest line of a part is the one that holds
    assert "GPU tests: 28 passed." in report and "FAILED" not in report
    assert "| ours | 400, 2.00x, 10.50 GiB |" in report and "300" not in report
    assert "commit abc, def," in report
    assert "commit def," in gpu_tables([sitting[0], again[0]])[0]  # nothing in that table is of the older one


def test_a_part_of_a_sitting_that_failed_is_measured_again_after_those_that_are_missing():
    parts = [part for part in parts_of(REHEARSED, "cpu") if "timm" not in part.name]
    results = {
        parts[0].name: {"counts": {"passed": 35, "failed": 1}, "not_passed": ["FAILED tests/test_gpu.py::test_a"]},
        parts[1].name: {"precision": "fp32", "figures": {"64": None}},
        parts[2].name: {"failed": "no end within 144 s"},
        parts[3].name: {"counts": {"passed": 36}, "not_passed": []},
    }
    arguments = benchmark.parse_arguments(["gpu", "--rehearse"])
    to_do = [part.name for part in parts_to_do(arguments, results, torch.device("cpu")) if "timm" not in part.name]
    assert to_do == [part.name for part in [*parts[4:], parts[0], parts[2]]]


@pytest.mark.slow
def test_the_whole_sitting_can_be_rehearsed_on_a_cpu(tmp_path):
    results = tmp_path / "gpu.jsonl"
    flags = ["gpu", "--rehearse", f"--results={results}", "--minutes=60"]
    status, output = run_program("benchmark.py", flags, timeout=3600)
    assert status == 0, output
    failed = {line["part"]: line["result"]["failed"] for line in lines_in(results) if "failed" in line["result"]}
    assert failed == {}
    assert "no time was left" not in output
    for text in ("GPU tests: ", "| ours, compiled |", "End to end", "| mild | 3 |", "Three compiled steps"):
        assert text in output, text


# Several GPUs --------------------------------------------------------------------------------------------------------


def test_the_calculated_exchange_is_that_of_a_ring():
    assert sum(parameter.numel() for parameter in build_model(CONFIG, 1000).parameters()) == PARAMETERS
    two, eight = scaling(2, 256, 256, 10.0), scaling(8, 256, 256, 10.0)
    assert two.bytes_sent == 4 * PARAMETERS  # half of the gradients there and half of the sums back
    assert eight.bytes_sent == pytest.approx(2 * 7 / 8 * 4 * PARAMETERS)
    assert (two.compute, eight.compute) == (500, 125)
    assert eight.exchange == pytest.approx(1000 * eight.bytes_sent / 10e9)
    assert two.step_in_turn == two.compute + two.exchange
    assert two.compute < two.step_overlapped < two.step_in_turn
    slow = scaling(8, 256, 256, 0.1)  # the link is all that counts
    assert slow.step_overlapped == pytest.approx(slow.exchange + 125 / 3)


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "epochs"), [(64, 10), (128, 16), (224, 16)])
def test_the_recipes_compared_are_sound_and_of_equal_compute(resolution, epochs):
    configs = contenders(resolution, epochs)
    for name, changes in configs.items():
        assert config_problems(CONFIG | changes) == [], name
        assert compute(changes) == pytest.approx(compute(configs["fast"]), rel=0.06), name
    for name, changes in configs.items():
        if name.startswith("fast, "):
            assert changes != configs["fast"], name


def test_at_224_px_the_fast_recipe_compared_is_the_fast_recipe():
    fast = contenders(224, 16)["fast"]
    expected = {"train_resolution": 192, "start_resolution": 160, "val_resolution": 256, "warmup_epochs": 2, "epochs": 16}
    assert {key: fast[key] for key in expected} == expected


def test_the_table_of_recipes_gives_means_spreads_and_paired_differences():
    study = {"resolution": 64, "epochs": 10, "architecture": "resnet18", "train_images": 10, "val_images": 5}
    study |= {"batch_size": 32, "classes": 20}
    facts = {"gpu": None, "cpu": "a CPU", "cores": 2, "date": "2026-01-01", "versions": {"torch": "2"}, "study": study}
    scores = {"fast": {0: 50.0, 1: 54.0}, "seed": {0: 40.0, 1: 47.0}}
    runs = []
    for name, of_seeds in scores.items():
        config = contenders(64, 10)[name]
        for seed, top1 in of_seeds.items():
            figures = {"top1": top1, "flip_top1": top1 + 1, "top1_elsewhere": {"56": top1 - 2}, "config": config}
            runs.append(facts | figures | {"contender": name, "seed": seed, "pixels_per_image": compute(config)})
    lines = recipe_tables(runs)
    deviation = statistics.stdev([40.0, 47.0])
    assert any(line.endswith(f"| 43.50 ± {deviation:.2f} | -8.50 | 2 |") and line.startswith("| seed | ") for line in lines)
    assert any("| 52.00 ± 2.83 |  | 2 |" in line for line in lines)
    assert "with flip 53.00" in lines[-1] and "at 56 px (its training resolution) 50.00" in lines[-1]


@pytest.mark.slow
def test_the_recipe_benchmark_trains_and_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.measuring.RESULTS", tmp_path)
    flags = ["recipes", f"--data-dir={tmp_path / 'images'}", "--architecture=resnet18", "--resolution=32", "--batch-size=16"]
    flags += ["--epochs=3", "--train-images=32", "--val-images=16", "--classes=4", "--num-workers=0", "--device=cpu"]
    arguments = benchmark.parse_arguments([*flags, "--seeds=1", "--contenders", "fast"])
    first = benchmark.recipe_benchmark(arguments)
    assert [run["contender"] for run in first] == ["fast"]
    assert 0 <= first[0]["top1"] <= 100
    assert recorded("recipes") == first
    again = benchmark.recipe_benchmark(arguments)
    assert again == first  # nothing is trained twice


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Muon", "Muon, EMA", "Muon, SWA"])
def test_an_optimizer_is_scored_by_the_average_of_its_weights_where_it_keeps_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.optimizer_evidence.SHARED", SHARED | {"batch_size": 16, "train_resolution": 32})
    classes, draw = KINDS["waves"]
    make_demo_data(tmp_path / "waves", 96, 40, 0, classes, (40, 48), draw)
    arguments = argparse.Namespace(data_dir=tmp_path, device="cpu", precision="fp32")
    kept = {}
    monkeypatch.setattr("benchmarks.optimizer_evidence.read_records", lambda path: kept.setdefault("all", read_records(path)))
    run = one_run(("waves", name, 0.1, 8, 0), {"architecture": "resnet18"}, arguments)
    column = {"Muon": "val", "Muon, EMA": "ema_val", "Muon, SWA": "averaged_val"}[name]
    assert run["top1"][-1] == kept["all"][-1][f"{column}_top1"]
    assert len(run["top1"]) == 8


def test_a_scan_of_rates_widens_until_its_best_one_lies_inside_and_only_then_come_the_seeds():
    arguments = argparse.Namespace(kinds=["waves"], epochs=8, lengths=[16], seeds=2, variants=False)
    runs = []
    for kind, name, rate, epochs, seed in iter(lambda: (missing_runs(runs, arguments) or [None])[0], None):
        top1 = 50 - abs(math.log(rate / 0.9)) + seed  # the best rate is above all of the four that are tried first
        run = {"kind": kind, "optimizer": name, "rate": rate, "epochs": epochs, "seed": seed, "top1": [top1]}
        assert seed == 0 == epochs - 8 or rate == best_rate(runs, kind, name, 8)
        runs.append(run)
    assert best_rate(runs, "waves", "Muon", 8) == 0.9
    assert {run["rate"] for run in runs if run["optimizer"] == "Muon"} == {0.03, 0.1, 0.3, 0.9, 2.7}
    assert len([run for run in runs if (run["optimizer"], run["epochs"]) == ("Muon", 16)]) == 2


def test_the_gain_is_the_epochs_that_another_optimizer_needs_for_muons_top1(tmp_path):
    top1_of = {"AdamW": {4: 10.0, 8: 30.0, 16: 50.0}, "Muon": {4: 20.0, 8: 60.0}}
    study = {"architecture": "resnet18", "train_images": 3_200, "val_images": 1_000}
    facts = {"study": study, "kind": "waves", "seed": 0, "gpu": None, "cpu": "a CPU", "date": "2026-01-01"}
    runs = []
    for name, of_lengths in top1_of.items():
        for rate in OPTIMIZERS[name][1]:
            run = facts | {"versions": {"torch": "2"}, "optimizer": name, "rate": rate}
            best = rate == OPTIMIZERS[name][1][1]
            runs += [run | {"epochs": n, "top1": [top1]} for n, top1 in of_lengths.items() if best]
            runs += [] if best else [run | {"epochs": 8, "top1": [1.0]}]
    needed = epochs_for_muons_top1(runs, "waves", "AdamW")
    assert needed == {4: pytest.approx(math.sqrt(4 * 8)), 8: math.inf}  # halfway in the logarithm; beyond its lengths
    assert "| waves | AdamW | 5.7 (1.41x) | over 16 |" in optimizer_tables(runs)
    assert draw_optimizers(runs, tmp_path / "optimizers.png") == (importlib.util.find_spec("matplotlib") is not None)


def test_newton_schulz_takes_the_share_of_a_step_that_its_products_amount_to():
    assert newton_schulz_share("resnet50", 224, 256) == pytest.approx(0.0264, abs=0.0005)  # 0.164 of 6.2 TFLOP
    assert newton_schulz_share("resnet50", 224, 2048) == pytest.approx(newton_schulz_share("resnet50", 224, 256) / 8)


@pytest.mark.parametrize("kind", DRAW)
def test_pictures_of_a_class_differ_and_letters_are_validated_in_fonts_that_training_never_sees(kind):
    pytest.importorskip("matplotlib")
    classes, draw = DRAW[kind]
    first, second = (draw["val"](classes[0], np.random.default_rng(seed), (60, 72)) for seed in (0, 1))
    assert first.dtype == np.uint8 and first.shape[2] == 3 and 60 <= min(first.shape[:2]) <= max(first.shape[:2]) <= 72
    assert first.std() > 5 and first.tobytes() != second.tobytes()
    assert not set(TRAIN_FONTS) & set(VAL_FONTS)


if __name__ == "__main__":
    for name, table in TABLES.items():
        begin, end = marks(name)
        before, rest = PAGES[name].read_text().split(begin)
        PAGES[name].write_text(f"{before}{begin}\n\n" + "\n".join(table()) + f"\n\n{end}{rest.split(end)[1]}")
    RUNS = recorded("optimizers")
    draw_optimizers([run for run in RUNS if run["study"] == RUNS[0]["study"]], REPOSITORY / "docs/optimizers.png")
