"""The report says what the raw records say, of a real interrupted run; every figure here is computed anew."""

import html
import json
import os
import re
import signal
import statistics
import time
from datetime import datetime

import pytest
import torch
from browser import CHROMIUM, browser
from conftest import finish, run_here, run_program, start_program, tiny_run

import evaluate
import report
from config import CONFIG
from engine.report import one_run, side_by_side
from engine.report.charts import SERIES, VARIABLES, chart
from engine.report.figures import read_run, why_not_comparable
from engine.report.history import SILENT_END, interruptions, read_sessions
from engine.report.one_run import report_of_run
from engine.report.page import as_html, as_markdown, heading, paragraph, table
from engine.report.writing import write_report
from engine.run.checkpoint_files import delete_run
from engine.run.monitor import Monitor
from engine.run.telemetry import GpuFigures, GpuSampler, summary_of
from engine.run.throughput import Throughput
from engine.system.errors import run_program as run_main
from engine.training.metrics import TrainingMetrics


@pytest.fixture(scope="module")
def run_folder(image_tree, tmp_path_factory):
    """A run of 12 epochs with averaging from the ninth, stopped by SIGTERM, killed by SIGKILL, and finished."""
    folder = tmp_path_factory.mktemp("report") / "run"
    arguments = tiny_run(image_tree, folder, epochs=12, swa_start_epoch=9, checkpoint_minutes=0.01)
    for number, epochs in ((signal.SIGTERM, 2), (signal.SIGKILL, 5)):
        process = start_program("train.py", arguments, start_new_session=True)
        while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < epochs:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        os.killpg(process.pid, number)
        finish(process)
        arguments = [f"--resume={folder}/last.pt"]
    status, output = run_program("train.py", arguments)
    assert status == 0, output
    return folder


def cells(markdown):
    """Return {first cell: the others} of all tables of a page."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1:] for row in rows}


def raw_records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reported(*arguments, folder):
    output = folder / "page"
    assert report.main(report.parse_arguments([*map(str, arguments), f"--output={output}"])) == 0
    return output.with_suffix(".md").read_text(), output.with_suffix(".html").read_text()


def test_the_reports_figures_are_those_of_the_raw_records(run_folder, tmp_path):
    markdown, page = reported(run_folder, f"--log={run_folder}.log", "--price-per-hour=36", folder=tmp_path)
    found, records = cells(markdown), raw_records(run_folder)
    scores = [(r[key], -r["epoch"], key) for r in records for key in ("val_top1", "averaged_val_top1") if key in r]
    top1 = max(score for score, _, _ in scores)
    epoch = min(-epoch for score, epoch, _ in scores if score == top1)
    assert found["best validation top-1"][0].startswith(f"{top1:.2f} %, epoch {epoch}, ")
    assert "32 px, no test-time augmentation" in found["best validation top-1"][0]
    assert found["last epoch, raw weights"] == [f"{records[-1]['val_top1']:.2f} %"]
    assert found["last epoch, averaged weights"] == [f"{records[-1]['averaged_val_top1']:.2f} %"]
    speeds = [r["images_per_s"] for r in records]
    speed = f"{statistics.mean(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
    assert found["images/s in training, mean of the epochs (lowest to highest)"] == [speed]
    wait = 100 * statistics.mean(r["data_wait_share"] for r in records)
    assert found["share of training spent waiting for data"] == [f"{wait:.1f} %"]

    first = [r["val_top1"] for r in records[:8]]
    assert found["first ten epochs"][:4] == ["1 to 8", f"{first[0]:.2f} %", f"{first[-1]:.2f} %", f"{max(first):.2f} %"]
    best_of_both = [max(r["val_top1"], r["averaged_val_top1"]) for r in records[8:]]
    assert found["averaging phase"][:4] == [
        "9 to 12",
        *(f"{v:.2f} %" for v in (best_of_both[0], best_of_both[-1], max(best_of_both))),
    ]

    log = run_folder.with_suffix(".log").read_text()
    stamps = [datetime.strptime(line[:24], "%Y-%m-%dT%H:%M:%S%z") for line in log.splitlines()]
    starts = [number for number, line in enumerate(log.splitlines()) if " environment: " in line]
    assert len(starts) == 3
    ends = [*(start - 1 for start in starts[1:]), len(stamps) - 1]
    seconds = sum((stamps[end] - stamps[start]).total_seconds() for start, end in zip(starts, ends, strict=True))
    assert f"| cost | {seconds / 100:,.2f} at 36 per hour |" in markdown  # 36 an hour are 0.01 a second
    assert found["hours"][0] == f"{seconds / 3600:.2f}"
    assert "Sessions: 3; interruptions: 2." in markdown
    away = sum((stamps[start] - stamps[start - 1]).total_seconds() for start in starts[1:])
    assert f"the run stood still for {away:.0f} seconds" in markdown
    of_sessions = cells(markdown.split("## Course")[1].split("## Machine")[0])
    assert of_sessions["1"][-2] == "stopped by SIGTERM, saved"
    assert of_sessions["2"][-2] == SILENT_END
    assert of_sessions["3"][-2] == "finished"
    assert of_sessions["3"][3] == "end of epoch 12"


def test_the_sessions_positions_are_those_of_the_log(run_folder):
    sessions = read_sessions(run_folder.with_suffix(".log"))
    log = run_folder.with_suffix(".log").read_text()
    (stopped,) = re.findall(r"stopped by SIGTERM in epoch (\d+) after (\d+) batches; saved", log)
    assert sessions[0].last_position == (int(stopped[0]) - 1, int(stopped[1]))
    resumed = re.findall(r"after epoch (\d+)(?: and (\d+) batches)? \(best so far", log)
    assert [s.first_position for s in sessions[1:]] == [(int(epochs), int(batches or 0)) for epochs, batches in resumed]
    assert interruptions(sessions)[0].steps_lost == 0  # a run that is asked to stop loses nothing
    assert all(session.steps_per_epoch == 7 and session.images == 60 and session.classes == 10 for session in sessions)
    assert sessions[0].config["epochs"] == 12
    assert sessions[0].environment["versions"]["torch"] == torch.__version__


def on_imagenet(run, **changes):
    """The Run as if it were a ResNet-50's on ImageNet-1K, but for the changes of session, config and records."""
    facts = {"images": 1_281_167, "classes": 1000, "recipe": run.recipe} | changes
    sessions = [session._replace(**{key: facts[key] for key in ("images", "classes", "recipe")}) for session in run.sessions]
    config = run.config | {key: facts.get(key, default) for key, default in (("architecture", "resnet50"), ("epochs", 12))}
    records = [record | {"val_images": facts.get("val_images", 50_000)} for record in run.records]
    return run._replace(records=records, sessions=sessions, config=config)


def test_another_network_and_other_images_are_not_compared_with_what_was_published(run_folder):
    run = read_run(run_folder, CONFIG)
    for changes, said in (
        ({}, None),
        ({"architecture": "resnet18"}, "of a resnet18"),
        ({"val_images": 10_000}, "not on ImageNet-1K's 50,000 validation images"),
        ({"images": 100_000}, "not trained on ImageNet-1K's images"),
        ({"classes": 100}, "not trained on ImageNet-1K's images"),
    ):
        assert why_not_comparable(on_imagenet(run, **changes)) == said
    title, blocks = report_of_run(on_imagenet(run, architecture="resnet18"))
    page = as_markdown(title, blocks) + html.unescape(as_html(title, blocks))
    assert "This run is of a resnet18: the accuracies cannot be compared." in page
    assert "Published for this recipe" not in page and "published: " not in page


def test_another_data_set_is_not_compared_with_imagenet(run_folder, tmp_path):
    markdown, _ = reported(run_folder, f"--log={run_folder}.log", folder=tmp_path)
    assert "the accuracies cannot be compared" in markdown
    assert "published:" not in markdown
    records = raw_records(run_folder)
    for record in records:
        record["val_images"] = 50_000
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    log = run_folder.with_suffix(".log").read_text().replace(str(run_folder), str(tmp_path / "imagenet"))
    log = re.sub(r"resnet18 on 60 images of 10 classes", "resnet50 on 1,281,167 images of 1000 classes", log)
    log = log.replace('"architecture": "resnet18"', '"architecture": "resnet50"')
    (tmp_path / "imagenet/training.log").write_text(log)
    markdown, page = reported(tmp_path / "imagenet", folder=tmp_path)
    assert "cannot be compared" not in markdown
    assert "Published for this recipe at 12 epochs: 59.21 % (the run that this project set out to beat" in markdown
    assert "published: the seed&#39;s run" in page


def test_a_run_that_still_goes_on_and_damaged_lines_are_reported_as_far_as_they_go(run_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], '{"epoch": 2, "val_to', "\x00\x00", lines[2]]) + "\n")
    log = run_folder.with_suffix(".log").read_bytes().split(b" finished 12 epochs")[0]
    (tmp_path / "training.log").write_bytes(log.replace(b"stopped by SIGTERM", b"\xff\xfe\x00st") + b"\n2026-11-2")
    markdown, _ = reported(folder, folder=tmp_path)
    assert "3 of 12 epochs are done" in markdown
    assert SILENT_END in markdown
    found = cells(markdown)
    assert found["last epoch, raw weights"] == [f"{json.loads(lines[2])['val_top1']:.2f} %"]
    (folder / "metrics.jsonl").unlink()
    markdown, _ = reported(folder, folder=tmp_path)
    assert "No epoch has been validated yet." in markdown


@pytest.mark.parametrize(
    ("key", "value"),
    [("config", None), ("config", "none"), ("environment", 3), ("images", "many"), ("classes", []), ("time", 1e300)],
)
def test_an_event_that_is_none_costs_itself_and_no_traceback(key, value, run_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes((run_folder / "metrics.jsonl").read_bytes())
    events = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    number = next(n for n, event in reversed(list(enumerate(events))) if event["event"] == "start")
    events[number] |= {key: value}
    events.append({"event": "save", "time": float("nan")})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    markdown, _ = reported(folder, folder=tmp_path)
    assert "Sessions: 2;" in markdown and "Finished after 12 epochs" in markdown


@pytest.mark.parametrize("top1", [None, 0.0])
def test_a_run_without_a_validated_epoch_or_without_a_hit_is_reported(top1, run_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for record in raw_records(run_folder)[:2]:
            kept = {name: value for name, value in record.items() if not name.startswith(("val_", "averaged_", "ema_"))}
            file.write(json.dumps(kept | ({} if top1 is None else {"val_top1": top1, "val_top5": top1})) + "\n")
    (folder / "val_gallery.json").write_text('{"title": "cut short by hand", "sections": []}')
    for folders in ([folder], [folder, folder]):
        markdown, _ = reported(*folders, "--price-per-hour=1", folder=tmp_path)
        if len(folders) == 1:
            assert ("No epoch has been validated yet." in markdown) == (top1 is None)
            assert "cost of a point" not in markdown and "cut short by hand" not in markdown


def test_each_of_many_lines_can_be_told_from_the_others():
    drawn = chart("Accuracy", [(f"run {number}", {1: 1.0, 2: number}) for number in range(16)], "%")
    assert len({(colour, style) for _, colour, style in drawn["names"]}) == 16
    assert len(re.findall(r"<path d=[^>]*stroke: var\(--series-\d\)[^>]*stroke-width: 1.8", drawn["svg"])) == 16
    some = chart("Accuracy", [("nothing yet", {}), ("another", {1: 1.0, 2: 2.0})], "%")
    assert some["names"][0][1:] == drawn["names"][1][1:]  # a run has one colour in all charts


@pytest.mark.parametrize(
    ("points", "counted", "numbers"),
    [({7: 12.5}, "epoch", ["7"]), ({1: 0.0, 2: 50.0}, "classes", ["1", "2"])],
)
def test_what_is_counted_is_drawn_at_whole_numbers(points, counted, numbers):
    drawn = chart("Accuracy", [("validation", points)], "%", x_label=counted)
    of_axis = re.search(r'<g id="matplotlib.axis_1">.*<g id="matplotlib.axis_2">', drawn["svg"], re.DOTALL)[0]
    assert re.findall(r"<text [^>]*>([^<]*)</text>", of_axis) == [*numbers, counted]


def test_without_a_log_the_records_alone_are_reported_and_without_records_it_is_said(run_folder, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/metrics.jsonl").write_bytes((run_folder / "metrics.jsonl").read_bytes())
    markdown, _ = reported(tmp_path / "alone", folder=tmp_path)
    assert "12 epochs are recorded; there is no log of the run" in markdown
    assert re.search(r"interruptions +\| unknown: no log", markdown)
    compared, _ = reported(tmp_path / "alone", tmp_path / "alone", folder=tmp_path)
    assert re.search(r"interruptions +\| unknown: no log +\| unknown: no log", compared)
    (tmp_path / "empty").mkdir()
    status, output = run_program("report.py", [tmp_path / "empty"], cwd=tmp_path)
    assert status == 1
    assert "holds no metrics.jsonl" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_shared_log_gives_each_run_its_own_sessions_and_a_replaced_run_is_forgotten(image_tree, tmp_path):
    log = f"--log_file={tmp_path / 'training.log'}"
    for name, more in (("a", []), ("b", []), ("a", ["--overwrite"])):
        arguments = [flag for flag in tiny_run(image_tree, tmp_path / name, epochs=2) if not flag.startswith("--log_file")]
        assert run_here([*arguments, log, *more]) == 0
    assert len(read_sessions(tmp_path / "training.log")) == 3
    runs = [read_run(tmp_path / name, CONFIG) for name in "ab"]
    assert [len(run.sessions) for run in runs] == [1, 1]
    assert runs[0].sessions[0].begun >= runs[1].sessions[0].last_word
    markdown, page = reported(tmp_path / "a", tmp_path / "b", folder=tmp_path)
    assert "# 2 runs compared" in markdown
    found = cells(markdown)
    for number, run in enumerate(runs):
        best = max(max(r["val_top1"], r.get("averaged_val_top1", 0)) for r in run.records)
        assert found["best top-1"][number].startswith(f"{best:.2f} % (epoch ")
    assert page.count("<svg") >= 3


def test_a_comparison_says_what_each_run_was_validated_on_and_where_that_differs(run_folder):
    run = read_run(run_folder, CONFIG)
    px = {"config": run.config | {"val_crop_ratio": 0.9}}
    other_classes = [session._replace(classes=7) for session in run.sessions]
    elsewhere = run._replace(config=run.config | {"data_dir": "elsewhere"})
    alone = run._replace(sessions=[], config=dict(CONFIG))  # no log: what it was validated on is known in part
    for other, said, cell in (
        (run, None, "20 images of 10 classes, 32 px, crop ratio 0.875"),
        (run._replace(**px), "on the same (crop ratio)", "20 images of 10 classes, 32 px, crop ratio 0.9"),
        (run._replace(sessions=other_classes), "on the same (number of classes)", "20 images of 7 classes, 32 px"),
        (on_imagenet(run), "on the same (number of images, number of classes)", "50,000 images of 1,000 classes, 32 px"),
        (elsewhere, "whether their images are the same is not recorded", "20 images of 10 classes, 32 px"),
        (alone, None, "20 images, 32 px"),
    ):
        of_each = next(row for row in side_by_side.result_rows([run, other], None) if row[0] == "validated on")[1:]
        assert str(of_each[0]) == "20 images of 10 classes, 32 px, crop ratio 0.875" and str(of_each[1]).startswith(cell)
        assert len(side_by_side.remarks([run, other])) == (said is not None)
        assert said is None or said in side_by_side.remarks([run, other])[0]
    assert side_by_side.remarks([run._replace(records=[]), on_imagenet(run)]) == []
    page = as_markdown(*side_by_side.report_of_runs([run, on_imagenet(run)]))
    assert "number of classes): the accuracies cannot be compared." in page
    assert cells(page)["validated on"][1] == "50,000 images of 1,000 classes, 32 px, crop ratio 0.875"


def test_a_comparison_leaves_the_first_runs_own_report_alone(run_folder, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.jsonl").write_bytes((run_folder / "metrics.jsonl").read_bytes())
    assert report.main(report.parse_arguments([f"{tmp_path}/a"])) == 0
    own = {path.name: path.read_bytes() for path in folders[0].iterdir()}
    assert report.main(report.parse_arguments([str(folder) for folder in folders])) == 0
    assert {path.name: path.read_bytes() for path in folders[0].iterdir() if path.name in own} == own
    assert (folders[0] / "compared.md").read_text().startswith("# 2 runs compared")
    assert "<title>2 runs compared" in (folders[0] / "compared.html").read_text()
    (folders[1] / "compared.md").write_text("# My notes\n")
    for folder in folders:
        delete_run(folder)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["b/compared.md"]


def test_progress_in_the_log_tells_how_far_a_killed_session_came(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run.monitor.PLAIN_LINE_SECONDS", 0.0)
    log = tmp_path / "log"
    figures = TrainingMetrics(1.5, 25.0, 0.3, 64, 0, 0, 0)
    for start in ((0, 0), (2, 10)):
        with Monitor(str(log), torch.device("cpu")) as monitor:
            monitor.log_to_file("environment: {}")
            monitor.log_to_file(f"configuration: {json.dumps(CONFIG)}")
            monitor.log_to_file("recipe seed: resnet50 on 25,600 images of 5 classes, 100 steps an epoch; CPU")
            if start != (0, 0):
                monitor.log(f"resumed last.pt, after epoch {start[0]} and {start[1]} batches (best so far 1.00 %)")
            monitor.start("epoch 3/100", 100, start[1])
            for _ in range(40 - start[1]):
                monitor.advance(figures, 0.001, Throughput(torch.device("cpu"), 8))
    first, second = read_sessions(log)
    assert (first.last_position, second.first_position) == ((2, 40), (2, 10))
    (one,) = interruptions([first, second])
    assert (one.steps_lost, one.images_lost) == (30, 30 * 256)


def test_a_start_after_the_end_of_a_run_is_no_interruption(run_folder, tmp_path):
    run = read_run(run_folder, CONFIG)
    stopped, killed, finished = run.sessions
    of = {"begun": finished.last_word, "last_word": finished.last_word, "first_position": (12, 0), "last_position": (12, 0)}
    again, again_killed = finished._replace(**of), finished._replace(**of, ended=SILENT_END)
    longer = finished._replace(**of | {"config": finished.config | {"epochs": 15}, "last_position": (13, 2)}, ended=SILENT_END)
    resumed = longer._replace(first_position=(13, 0), last_position=(15, 0), ended="finished")
    for sessions, expected in (
        ([stopped, killed, finished], 2),
        ([finished, again, again], 0),  # as --resume auto does at every boot
        ([finished, again_killed, again], 0),  # with nothing left to do
        ([stopped, finished, longer, resumed], 2),  # by --epochs: the extension itself was killed
    ):
        assert len(interruptions(sessions)) == expected
        seen = run._replace(sessions=sessions)
        course = as_markdown("", one_run.sessions(seen, None))
        assert f"Sessions: {len(sessions)}; interruptions: {expected}." in course
        assert ("stood still" in course) == (expected > 0)
        assert ("interruptions", expected, expected) in side_by_side.result_rows([seen, seen], None)
        rows = next(block["rows"] for block in one_run.published_figures(seen, None) if block["kind"] == "table")
        assert ["interruptions", expected, 2] in rows


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside_and_escapes_what_it_shows(run_folder, tmp_path):
    _, page = reported(run_folder, f"--log={run_folder}.log", folder=tmp_path)
    outside = [link for link in re.findall(r"https?://[^\s\"'<>)]+", page) if "w3.org" not in link and "purl.org" not in link]
    outside = [link for link in outside if not link.startswith(("http://creativecommons.org", "https://matplotlib.org"))]
    assert outside == []
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert not any(colour in page for colour in VARIABLES)
    assert page.count("<svg") >= 6
    hostile = as_html("<b>", [heading("<i>"), paragraph("a & <script>"), table(("<th>",), [("x", "<td>")])])
    assert "<script>" not in hostile
    assert html.escape("<td>") in hostile


def test_no_report_takes_the_place_of_another_file_and_what_cannot_be_written_is_said_before(tmp_path, monkeypatch, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"epoch": 1, "val_top1": 5.0, "seconds": 1.0, "learning_rate": 0.1}\n')
    (tmp_path / "file").write_text("notes")
    (tmp_path / "mine.md").write_text("# My notes\n")
    for _ in range(2):
        reported(tmp_path / "run", folder=tmp_path)
        reported(tmp_path / "run", tmp_path / "run", folder=tmp_path)
    monkeypatch.setattr(report, "report_of", lambda arguments: pytest.fail("it began"))
    for flags, said in (
        ([f"--output={tmp_path}/file/a"], "file/a.html could not be written: "),
        ([f"--output={tmp_path}/mine"], "mine.md is there and was not written by this flag"),
        ([f"--output={tmp_path}/"], "is a folder: name the files in it, such as "),
        ([f"--log-file={tmp_path}"], "is a folder: name a file"),
    ):
        assert run_main("report.py", report.main, report.parse_arguments([f"{tmp_path}/run", *flags])) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line
    monkeypatch.undo()
    assert run_main("report.py", report.main, report.parse_arguments([f"{tmp_path}/typo"])) == 1
    assert not (tmp_path / "typo").exists() and (tmp_path / "mine.md").read_text() == "# My notes\n"


def test_a_users_own_report_md_beside_the_checkpoints_is_neither_replaced_nor_deleted(tmp_path):
    (tmp_path / "report.md").write_text("# My notes on the run\n")
    with pytest.raises(OSError, match="report.md is there and is no report of a run; python report.py --output"):
        write_report(tmp_path / "report", "Training report: mild", [paragraph("text")])
    assert not (tmp_path / "report.html").exists()
    write_report(tmp_path / "own/report", "Training report: mild", [paragraph("text")])
    for folder in (tmp_path, tmp_path / "own"):
        delete_run(folder)
    assert (tmp_path / "report.md").read_text() == "# My notes on the run\n"
    assert not list((tmp_path / "own").iterdir())


@pytest.mark.parametrize("price", ["nan", "-1", "0", "inf", "x"])
def test_a_price_is_a_number_above_0_as_for_training(price, capsys):
    for parse in (report.parse_arguments, lambda flags: evaluate.parse_arguments([*flags, "--export=a.pt"])):
        with pytest.raises(SystemExit) as ended:
            parse([f"--price-per-hour={price}"])
        assert ended.value.code == 2
        assert f"argument --price-per-hour: {price}: must be a number above 0" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_long_name_pushes_no_column_out_of_sight(tmp_path):
    name = "n" * 200
    blocks = [table(("class", "top-1"), [(name, "10.00 %"), ("short", "20.00 %")]), table(("", name, name), [("top-1", 1, 2)])]
    (tmp_path / "page.html").write_text(as_html("Report", blocks))
    with browser(tmp_path / "profile") as page:
        page.open((tmp_path / "page.html").as_uri(), width=1100)
        assert page.value("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
        assert page.value("document.querySelectorAll('td:last-child')[1].clientHeight") < 45  # a line
        assert name in page.value("document.body.innerText")


def test_a_report_that_is_served_has_no_output(capsys):
    with pytest.raises(SystemExit) as ended:
        report.parse_arguments(["--serve", "--output=page"])
    assert ended.value.code == 2 and "--output: --serve writes no file" in capsys.readouterr().err


def test_both_writers_show_every_block():
    drawn = chart("Accuracy", [("a", {1: 10.0, 2: None, 3: 20.0}), ("b", {}), ("c", {1: 1.0}, "dotted")], "%")
    rows = [("x", 1), ("gone", None), ("pipe", "a|b"), ("tag", "train/<class>")]
    blocks = [heading("Head"), paragraph("Text <i>"), table(("k", "v"), rows), drawn, None]
    markdown, page = as_markdown("Title", blocks), as_html("Title", blocks)
    for text in ("Title", "Head", "Text \\<i>", "| x | 1 |", "a\\|b", "train/\\<class>"):
        assert text in markdown
    for text in (
        "Title",
        "Head",
        "Text",
        "<td>x</td><td>1</td>",
        "a|b",
        "Accuracy",
        f"var(--{VARIABLES[SERIES[0]]})",
        ">c</span>",
    ):
        assert text in page
    assert "gone" not in markdown + page
    assert chart("Nothing", [("a", {1: None})], "%") is None


# The GPU's figures ---------------------------------------------------------------------------------------------------


def test_samples_amount_to_means_peaks_energy_and_shares_of_throttling():
    def sample(instant, busy, power, hot, throttled):
        figures = {"memory_mib": 100 * busy, "utilization_percent": busy, "power_w": power, "temperature_c": hot}
        return instant, figures | {"throttled": throttled}

    samples = [sample(0, 50, 60, 40, []), sample(10, 100, 80, 50, ["power cap"]), sample(40, 90, 70, 45, ["power cap"])]
    summary = summary_of([*samples, (50, {})])
    assert summary["gpu_utilization_percent"] == 80
    assert summary["gpu_utilization_lowest_percent"] == 50
    assert summary["gpu_memory_used_mib"] == 10_000
    assert summary["gpu_temperature_highest_c"] == 50
    assert summary["gpu_power_w"] == 70
    assert summary["gpu_energy_wh"] == pytest.approx((10 * 70 + 30 * 75) / 3600)
    assert summary["gpu_throttled_share"] == {"power cap": pytest.approx(2 / 3)}


def test_the_sampler_samples_in_its_own_thread_and_hands_each_second_out_once():
    gpu = GpuFigures(torch.device("cpu"))
    idle = GpuSampler(gpu)
    idle.start()
    assert idle.summary() == {}
    assert idle._thread is None  # no GPU, no thread
    idle.stop()
    watts = iter(range(10, 10_000))

    class Card:
        available = True

        def read_all(self):
            return {"power_w": next(watts)}

    sampler = GpuSampler(Card(), seconds=0.01)
    sampler.start()
    time.sleep(0.2)
    first = sampler.summary()
    time.sleep(0.2)
    second = sampler.summary()
    sampler.stop()
    assert first["gpu_power_w"] < second["gpu_power_w"]
    assert first["gpu_energy_wh"] > 0 and second["gpu_energy_wh"] > 0


def test_the_energies_of_the_epochs_add_up_to_that_of_the_run():
    sampler = GpuSampler(GpuFigures(torch.device("cpu")))
    samples = [(float(instant), {"power_w": 60.0 + instant}) for instant in range(0, 60, 10)]
    energy = 0
    for piece in (samples[:2], samples[2:3], samples[3:]):
        sampler._samples += piece
        energy += sampler.summary()["gpu_energy_wh"]
    assert energy == pytest.approx(summary_of(samples)["gpu_energy_wh"])


def test_the_use_of_a_gpu_is_reported_from_its_records(run_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    records = raw_records(run_folder)
    for number, record in enumerate(records):
        record |= {"gpu_utilization_percent": 90 + number % 3, "gpu_utilization_lowest_percent": 50 + number}
        record |= {"gpu_memory_used_mib": 11_000 + number, "gpu_temperature_highest_c": 60 + number, "gpu_power_w": 65.0}
        record |= {"gpu_energy_wh": 70.5, "gpu_throttled_share": {"power cap": number / 100}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    markdown, page = reported(folder, folder=tmp_path)
    found = cells(markdown)
    assert found["GPU utilisation, mean and lowest"] == ["91 %, 50 %"]
    assert found["GPU memory, peak as NVML counts it"] == ["11,011 MiB"]
    assert found["GPU temperature, highest"] == ["71 °C"]
    assert found["GPU energy of the recorded epochs"] == [f"{12 * 70.5 / 1000:.3f} kWh"]
    assert found["clock held down, worst epoch"] == ["power cap 11%"]
    assert "GPU power" in page


# TensorBoard ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_gets_every_epochs_figures_once_even_after_a_resumption(image_tree, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    assert run_here(tiny_run(image_tree, folder, epochs=3, tensorboard=True, checkpoint_every_epochs=2)) == 0
    assert run_here([f"--resume={folder}/epoch_002.pt", "--epochs=5"]) == 0  # the third epoch is trained once more
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert written == [(r["epoch"], pytest.approx(r["val_loss"])) for r in raw_records(folder)]
    assert len(written) == 5


@pytest.mark.slow
def test_a_run_without_tensorboard_says_what_to_install(image_tree, tmp_path):
    (tmp_path / "without/tensorboard").mkdir(parents=True)
    (tmp_path / "without/tensorboard/__init__.py").write_text("raise ImportError('not here')")
    arguments = tiny_run(image_tree, tmp_path / "run", tensorboard=True)
    status, output = run_program("train.py", arguments, environment={"PYTHONPATH": str(tmp_path / "without")})
    assert status == 1
    assert "pip install tensorboard" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("recipe", "epochs", "said", "curve"),
    [
        ("mild", 60, "Published for this recipe at 60 epochs: 78.1 % (an end of the range", "published: the last epoch alone"),
        (
            "medium",
            120,
            "Nothing is published for this recipe at 120 epochs; interpolated between 60 and 240 epochs: 78.80 % (",
            "published: the last epoch alone, interpolated between 60 and 240 epochs",
        ),
        pytest.param("hot", 270, None, None, marks=pytest.mark.slow),
    ],
)
def test_what_was_published_for_the_recipe_and_its_length_is_shown_and_interpolation_is_marked(
    recipe, epochs, said, curve, run_folder, tmp_path
):
    run = on_imagenet(read_run(run_folder, CONFIG), recipe=recipe, epochs=epochs)
    page = as_markdown(*report_of_run(run)) + html.unescape(as_html(*report_of_run(run)))
    assert said is None or said in page
    assert curve is None or curve in page
    if said is None:
        assert "published for this recipe" not in page.lower()
        assert "published: " not in page
