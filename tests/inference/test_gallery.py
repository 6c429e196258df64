"""The gallery: which images it shows, that it finds wrong labels, and that a browser shows names at a click."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from conftest import run_here, run_with_a_hostile_class, tiny_run

import evaluate
import report
from engine.data.splits import open_splits
from engine.inference.gallery import names_of, reliability, suspicion_of
from engine.report.galleries import blocks_of_galleries
from engine.run import checkpoint_files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on pictures of which one class has a hostile name, its details of both splits, and its report."""
    folder = run_with_a_hostile_class(tmp_path_factory.mktemp("gallery"), train_images=60, val_images=40)
    for split in ("val", "train"):
        arguments = [str(folder / "best.pt"), "--weights=raw", f"--split={split}", f"--details={folder}/{split}"]
        assert evaluate.main(evaluate.parse_arguments(arguments)) == 0
    assert report.main(report.parse_arguments([str(folder)])) == 0
    return folder


@pytest.fixture
def short_run(image_tree, tmp_path):
    """A run of an epoch."""
    assert run_here(tiny_run(image_tree, tmp_path / "run", epochs=1, swa_start_epoch=0)) == 0
    return tmp_path / "run"


def evaluated(*arguments):
    assert evaluate.main(evaluate.parse_arguments([*map(str, arguments), "--device=cpu"])) == 0


def headings_of(folder):
    return [block["text"] for block in blocks_of_galleries(folder) if block["kind"] == "heading"]


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_lists_hold_every_image_once_with_what_the_network_saw(run):
    for split, count in (("train", 60), ("val", 40)):
        rows = rows_of(run / f"{split}_images.csv")
        assert sorted(row["image"] for row in rows) == sorted(names_of(open_splits(run.parent / "tree")[split]))
        assert len(rows) == count and all(row["image"].startswith(row["class"] + "/") for row in rows)
        suspicion = [float(row["suspicion"]) for row in rows]
        assert suspicion == sorted(suspicion, reverse=True)
        wrong = sum(row["class"] != row["predicted"] for row in rows)
        classes = rows_of(run / f"{split}_classes.csv")
        assert sum(int(row["correct"]) for row in classes) == count - wrong


@pytest.mark.slow
def test_the_sections_show_what_they_say(run):
    gallery = json.loads((run / "val_gallery.json").read_text())
    shots = {section["title"]: section["shots"] for section in gallery["sections"]}
    errors = shots["The most confident errors"]
    confidence = [shot["best"][0][1] for shot in errors]
    assert confidence == sorted(confidence, reverse=True)
    assert all(not shot["right"] and shot["best"][0][0] != shot["label"] for shot in errors)
    assert all(shot["right"] and shot["best"][0][0] == shot["label"] for shot in shots.get("The least confident hits", []))
    assert "Likely mislabels" not in shots
    pairs = [
        (title.removeprefix("Confused: ").split(" and "), of) for title, of in shots.items() if title.startswith("Confused")
    ]
    assert pairs
    for pair, of_pair in pairs:
        assert all({shot["label"], shot["best"][0][0]} == set(pair) for shot in of_pair)
    training = json.loads((run / "train_gallery.json").read_text())
    assert training["sections"][0]["title"] == "Likely mislabels"
    listed = [row["image"] for row in rows_of(run / "train_images.csv")]
    shown = [shot["name"] for shot in training["sections"][0]["shots"]]
    assert shown and shown == listed[: len(shown)]


def test_suspicion_and_reliability_are_those_of_their_definitions():
    shares, classes = np.array([[0.7, 0.2], [0.7, 0.2], [0.5, 0.5]]), np.array([[1, 0], [1, 0], [2, 1]])
    assert np.allclose(suspicion_of(shares, classes, np.array([0.7, 0.2, 0.0]), np.array([1, 0, 0])), [0.2 - 0.7, 0.5, 0.5])
    bins, error = reliability(np.array([0.95, 0.99, 0.1, 1.0]), np.array([True, False, False, True]))
    assert bins == [[0.1, 0.0, 1], [0.98, pytest.approx(2 / 3, abs=1e-4), 3]]
    assert error == pytest.approx(0.75 * (0.98 - 2 / 3) + 0.25 * 0.1, abs=1e-4)


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_no_name_in_it_is_markup(run):
    page = (run / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=" in page
    assert re.findall(r"""(?:src|href)=["'](?!data:image/jpeg;base64,|#)""", page) == [] and "<script" not in page
    assert page.count("<details") >= 8 and "Pictures: validation images" in page and "Pictures: training images" in page


@pytest.mark.slow
def test_pictures_of_another_network_than_the_folders_are_headed_with_what_they_are_of(short_run, image_tree, tmp_path):
    best = short_run / "best.pt"
    evaluated(best, "--weights=raw", f"--details={short_run}/val")
    evaluated(best, "--weights=raw", "--split=train", f"--details={short_run}/train")
    assert headings_of(short_run) == ["Pictures: validation images", "Pictures: training images"]
    shutil.copytree(short_run, tmp_path / "moved")
    assert headings_of(tmp_path / "moved") == headings_of(short_run)

    checkpoint_files.write(best, checkpoint_files.read(best) | {"epoch": 2})  # as a run that goes on does
    earlier = "of an earlier best.pt (epoch 1)"
    assert headings_of(short_run) == [f"Pictures: validation images, {earlier}", f"Pictures: training images, {earlier}"]
    best.rename(tmp_path / "kept.pt")
    assert headings_of(short_run)[0] == "Pictures: validation images, of best.pt (epoch 1), which is not there any more"
    (tmp_path / "kept.pt").rename(best)

    evaluated(best, "--weights=raw", f"--details={short_run}/val")
    assert headings_of(short_run)[0] == "Pictures: validation images"
    torch.save(checkpoint_files.read(best)["model"], tmp_path / "weights.pt")
    (short_run / "train_gallery.json").unlink()
    other, last = tmp_path / "moved/best.pt", short_run / "last.pt"
    for networks, said in (
        ([other], ", of ../moved/best.pt (epoch 1)"),
        ([last, other], ", of last.pt (epoch 1) and ../moved/best.pt (epoch 1)"),
        ([last, best], ""),
        ([last, best, "--average"], ""),
    ):
        evaluated(*networks, "--weights=raw", f"--details={short_run}/val")
        assert headings_of(short_run) == [f"Pictures: validation images{said}"]
    checkpoint_files.write(last, checkpoint_files.read(last) | {"batch": 1})
    both = "of an earlier last.pt (epoch 1) and best.pt (epoch 2)"
    assert headings_of(short_run) == [f"Pictures: validation images, {both}"]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(checkpoint_files.read(best)["classes"]))
    flags = "--architecture=resnet18", "--resolution=32", f"--data-dir={image_tree}", f"--classes={names}"
    evaluated(tmp_path / "weights.pt", *flags, f"--details={short_run}/val")
    assert headings_of(short_run) == [f"Pictures: images of {image_tree}, of ../weights.pt"]

    gallery = json.loads((short_run / "val_gallery.json").read_text())
    old = {key: value for key, value in gallery.items() if key not in ("images", "checkpoints")}
    (short_run / "val_gallery.json").write_text(json.dumps(old))
    assert headings_of(short_run) == ["Pictures: of which images and checkpoint is not recorded"]


def test_a_network_that_was_replaced_while_it_was_scored_is_told_from_the_new_one(short_run, monkeypatch):
    best, scored = short_run / "best.pt", evaluate.open_matching_splits

    def replaced(*arguments):
        checkpoint_files.write(best, checkpoint_files.read(best) | {"epoch": 2})
        return scored(*arguments)

    monkeypatch.setattr(evaluate, "open_matching_splits", replaced)
    evaluated(best, "--weights=raw", f"--details={short_run}/val")
    assert headings_of(short_run) == ["Pictures: validation images, of an earlier best.pt (epoch 1)"]


@pytest.mark.slow
def test_deleting_a_run_deletes_the_details_of_its_networks_and_no_others(short_run, image_tree, tmp_path):
    shutil.copytree(short_run, tmp_path / "other")
    checkpoint_files.write(tmp_path / "other/best.pt", checkpoint_files.read(tmp_path / "other/best.pt") | {"epoch": 7})
    before = {path.name for path in short_run.iterdir()}
    evaluated(short_run / "best.pt", "--weights=raw", f"--details={short_run}/val")
    evaluated(short_run / "best.pt", "--weights=raw", "--split=train", "--resolution", 32, 48, f"--details={short_run}/")
    assert len({path.name for path in short_run.iterdir()} - before) == 6 + 2 * 5
    (short_run / "val_confusions.csv").write_bytes(b"")  # of a network that confuses nothing
    (short_run / "val.png").write_bytes(b"my picture")
    (short_run / "val_classes.csv").write_text("class,remark\n")
    (short_run / "val_reviewed.csv").write_bytes((short_run / "val_images.csv").read_bytes())
    (short_run / "my_gallery.json").write_text("{}")
    kept = {"val.png", "val_classes.csv", "val_reviewed.csv", "my_gallery.json"}
    evaluated(tmp_path / "other/best.pt", "--weights=raw", f"--details={short_run}/baseline")  # of another run
    kept |= {path.name for path in short_run.glob("baseline*")}
    assert run_here([*tiny_run(image_tree, short_run, epochs=1, swa_start_epoch=0), "--overwrite"]) == 0
    assert {path.name for path in short_run.iterdir()} - before == kept
    assert headings_of(short_run) == ["Pictures: validation images, of ../other/best.pt (epoch 7)"]


def test_details_of_another_test_set_name_it_and_have_one_rule_for_its_classes(short_run, image_tree, tmp_path, capsys):
    for name in sorted(path.name for path in (image_tree / "val").iterdir())[2:4]:
        shutil.copytree(image_tree / "val" / name, tmp_path / "sub" / name)
    evaluated(short_run / "best.pt", "--weights=raw", f"--data-dir={tmp_path}/sub", f"--details={short_run}/sub")
    said = capsys.readouterr().out.splitlines()
    of_present, _, calibrated = [line for line in said if re.match("calibration:|.*best.pt, raw weights: ", line)]
    heading, paragraph, *_ = blocks_of_galleries(short_run)
    evaluated(short_run / "best.pt", "--weights=raw", f"--details={short_run}/val")
    assert headings_of(short_run) == ["Pictures: validation images", f"Pictures: images of {tmp_path}/sub"]
    rule = "logits of the 2 classes present alone"
    assert heading["text"] == f"Pictures: images of {tmp_path}/sub"
    assert rule in paragraph["text"] and of_present.endswith(rule) and calibrated.endswith(rule)
    assert re.search(r"top-1 [\d.]+ %, .* on 4 images of 2 classes", of_present)[0] in paragraph["text"]
    gallery = json.loads((short_run / "sub_gallery.json").read_text())
    assert 100 * gallery["calibration_error"] == pytest.approx(float(re.search(r"error ([\d.]+) %", calibrated)[1]), abs=0.02)
    seen = {name for section in gallery["sections"] for shot in section["shots"] for name, _ in shot["best"]}
    assert seen == {name for name, *_ in gallery["classes"]} and len(seen) == 2
    right = sum(int(row["correct"]) for row in rows_of(short_run / "sub_classes.csv"))
    assert f"top-1 {25 * right:.2f} %" in of_present


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_names_at_a_click_on_any_width_in_light_and_dark(run, tmp_path):
    moved = tmp_path / "elsewhere" / "page.html"
    moved.parent.mkdir()
    shutil.copy(run / "report.html", moved)  # alone: nothing beside it
    shot = json.loads((run / "val_gallery.json").read_text())["sections"][0]["shots"][0]
    visible = "[...document.querySelectorAll('.shots li')].filter(e => e.checkVisibility()).map(e => e.innerText)"
    with browser(tmp_path / "profile") as page:
        colours = set()
        for width in (1280, 400):
            for dark in (False, True):
                page.open(moved.as_uri(), width=width, dark=dark)
                assert page.value("document.title").startswith("Training report")  # no name has run as a script
                assert page.value("document.documentElement.scrollWidth") <= width
                assert page.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
                assert page.value(visible) == []
                page.click(".shots summary")
                assert len(page.value(visible)) == 5 and page.value(visible)[0].startswith(shot["best"][0][0])
                assert shot["name"] in page.value("document.querySelector('.shots details[open]').innerText")
                page.click(".shots summary")
                assert page.value(visible) == []
                colours.add(page.value("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2
