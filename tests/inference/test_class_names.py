"""Classes are called what their folders are called, in every picture, page and card; only descriptions are cut at a comma."""

import io
import json
import os
import warnings

import matplotlib
import numpy as np
import pytest
from conftest import encoded, photo, run_here, tiny_run
from PIL import Image
from test_evaluate import evaluated

from engine.data.demo import make_demo_data
from engine.inference.class_names import class_in_short, class_in_words
from engine.inference.classify import Prediction, write_contact_sheet
from engine.run.curves import as_written, new_figure, save_figure
from engine.training.preview import sheet

NAMES = ["cats, brown", "cats, white", "$", "under_$5_", "over_$5_", "$100_bill$", "line\nbreak", r"\$ \frac$"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in whose data set eight classes have such names."""
    folder = tmp_path_factory.mktemp("$names$")
    make_demo_data(folder / "tree", train_images=60, val_images=20)
    for split in ("train", "val"):
        for old, name in zip(sorted((folder / "tree" / split).iterdir()), NAMES, strict=False):
            old.rename(old.with_name(name))
    assert run_here(tiny_run(folder / "tree", folder / "run", epochs=1, swa_start_epoch=0)) == 0
    return folder / "run"


def test_only_descriptions_are_cut_at_a_comma_and_all_are_one_line():
    described = {"n1": "tench, Tinca tinca", "own, name": "own, name"}
    assert [class_in_short(name, described) for name in ("n1", "own, name", *NAMES[:2])] == ["tench", "own, name", *NAMES[:2]]
    assert [class_in_words(name, described) for name in ("n1", "line\nbreak")] == ["tench, Tinca tinca", "line break"]


def test_matplotlib_draws_names_as_they_are():
    figure, _ = new_figure(1, 1, (8, 8))
    for number, name in enumerate(NAMES):
        figure.text(0.1, 0.1 * number, as_written(name.replace("\n", " ")))
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    assert [name for name in NAMES if f">{name}</text>" not in file.getvalue().replace("line break", "line\nbreak")] == []


def test_details_sheet_preview_and_card_call_classes_by_their_names(run, tmp_path, monkeypatch):
    assert evaluated(run / "last.pt", "--weights=raw", "--details", tmp_path / "d") == 0
    assert len(list(tmp_path.iterdir())) == 6
    gallery = json.loads((tmp_path / "d_gallery.json").read_text())
    expected = {name.replace("\n", " ") for name in NAMES}
    assert expected <= {name for name, *_ in gallery["classes"]}
    pictures = sorted((run.parent / "tree/val").rglob("*.jpg"))
    assert evaluated(run / "last.pt", "--classify", *pictures, "--contact-sheet", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 500
    monkeypatch.chdir(tmp_path)
    for mixing in ({}, {"mixup_alpha": 0.2}):
        assert run_here([*tiny_run(run.parent / "tree", tmp_path / "new", **mixing), "--preview"]) == 0
    assert evaluated(run / "last.pt", "--export", tmp_path / "net.pt") == 0
    (classes,) = [line for line in (tmp_path / "net.md").read_text().splitlines() if line.startswith("Classes: ")]
    assert all(name in classes for name in expected)


def test_letters_of_other_alphabets_are_drawn_and_those_that_no_font_has_give_no_warning(tmp_path):
    (tmp_path / "1.png").write_bytes(encoded(photo(40, 40), "PNG"))
    pages, sheets = set(), set()
    for name in ("Bär", "Bör", "Bκr", "Bжr"):  # boxes would be alike
        pages.add(sheet(np.zeros((1, 40, 40, 3), np.uint8), [name], "one"))
        predictions = [Prediction("1.png", os.fsencode(tmp_path / "1.png"), [(name, 1.0)])]
        write_contact_sheet(tmp_path / "sheet.png", predictions, {})
        sheets.add((tmp_path / "sheet.png").read_bytes())
    assert len(pages) == len(sheets) == 4
    figure, axes = new_figure(1, 1, (2, 2))
    axes[0, 0].set_title("\N{DOG FACE} \N{CJK UNIFIED IDEOGRAPH-72AC}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "1.png")
