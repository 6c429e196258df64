"""The gallery: which images it shows, that it finds wrong labels, and that a browser shows names at a click."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from browser import CHROMIUM, browser
from conftest import run_with_a_hostile_class

import evaluate
import report
from engine.data.splits import open_splits
from engine.inference.gallery import names_of, reliability, suspicion_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on pictures of which one class has a hostile name, its details of both splits, and its report."""
    folder = run_with_a_hostile_class(tmp_path_factory.mktemp("gallery"), train_images=60, val_images=40)
    for split in ("val", "train"):
        arguments = [str(folder / "best.pt"), "--weights=raw", f"--split={split}", f"--details={folder}/{split}"]
        assert evaluate.main(evaluate.parse_arguments(arguments)) == 0
    assert report.main(report.parse_arguments([str(folder)])) == 0
    return folder


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
