"""Sources as other programs and systems leave them: read rightly, or refused in a line that names the file and the reason."""

import itertools
import json

import pytest
from conftest import encoded, photo
from published_forms import ORIGINALS, WNIDS, webdataset

from engine.preparation import forms
from engine.system.errors import DataError

SMALL = encoded(photo(40, 48), quality=85)


def classes_of(source, split="train"):
    """{file name: class} of a split of a Source."""
    return {entry.name: source.classes[entry.label] for entry in source.splits[split]}


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1", "2", "A"], ["1", "2", "A"]),
        (["007", "7", "x"], ["007", "7", "x"]),
        (["01", "2", "0"], ["1", "2", "0"]),
        (["²", "1", "2"], ["²", "1", "2"]),
        (["٣", "1", "2"], ["٣", "1", "2"]),
        (["9" * 5000, "1", "2"], ["9" * 5000, "1", "2"]),
        (["0", "-1", "1"], ["0", None, "1"]),
        (["cat", "-1", "dog"], ["cat", None, "dog"]),
        ([0, -1, 1], ["0", None, "1"]),
        ([7, "7", "x"], ["7", "7", "x"]),
    ],
)
def test_labels_of_shards_are_numbers_only_where_all_are(labels, classes, tmp_path):
    label_of = dict(zip(WNIDS, labels, strict=True))
    photos = itertools.count()  # no wnids in the names, by which the classes would be known
    originals = {
        split: {wnid: {f"{next(photos)}.JPEG": SMALL for _ in range(2)} for wnid in WNIDS} for split in ("train", "val")
    }

    def label(wnid):
        found = label_of[wnid]
        return ("cls", found.encode()) if isinstance(found, str) else ("json", json.dumps({"label": found}).encode())

    source = forms.open_source(webdataset(tmp_path, originals, label))
    for split in originals:
        expected = {
            name: class_name
            for (wnid, files), class_name in zip(originals[split].items(), classes, strict=True)
            for name in files
            if class_name is not None
        }
        assert classes_of(source, split) == expected


def test_labels_of_both_splits_are_read_alike(tmp_path):
    """Of the training images' labels all are digits, of the validation images' not: '1' is the same class in both."""
    files = {split: {name: {f"{split}{name}.JPEG": SMALL} for name in WNIDS} for split in ("train", "val")}
    labels = iter(["1", "2", "3", "1", "2", "B"])
    source = forms.open_source(webdataset(tmp_path, files, lambda wnid: ("cls", next(labels).encode())))
    assert source.classes == ["1", "2", "3"]
    assert sorted(classes_of(source).values()) == ["1", "2", "3"]
    assert sorted(classes_of(source, "val").values()) == ["1", "2"]
    assert any("no label for it: 1" in line for line in source.remarks)


def test_a_column_of_text_and_one_of_numbers_are_read_alike(tmp_path):
    import pyarrow.parquet

    for split, labels in (("train", ["1", "2", "3"]), ("val", [1, 2, 3])):
        table = pyarrow.table({"image": [SMALL] * 3, "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    source = forms.open_source(tmp_path)
    assert [list(classes_of(source, split).values()) for split in ("train", "val")] == [["1", "2", "3"]] * 2


def test_true_and_false_are_no_labels(tmp_path):
    webdataset(tmp_path, ORIGINALS, label=lambda wnid: ("json", b'{"label": true}'))
    with pytest.raises(DataError, match="a number or a name is expected, not bool"):
        forms.open_source(tmp_path)


# Parquet -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_struct", [True, False])
def test_a_row_group_that_fills_the_workers_memory_is_refused_with_the_cure(in_struct, tmp_path, monkeypatch):
    import pyarrow.parquet

    images = [SMALL + bytes([n]) for n in range(8)]
    column = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)] if in_struct else images
    table = pyarrow.table({"image": column, "label": [0, 1] * 4})
    for split in ("train", "val"):
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet", row_group_size=4)
    source = forms.open_source(tmp_path)
    assert [entry.place.read() for entry in source.splits["train"]] == images
    monkeypatch.setattr("engine.preparation.tables.LARGEST_ROW_GROUP", 20 * len(SMALL))
    forms.open_source(tmp_path)
    monkeypatch.setattr("engine.preparation.tables.LARGEST_ROW_GROUP", 2 * len(SMALL))
    with pytest.raises(DataError, match=r"train.parquet holds a row group of .* MB .* row_group_size=1000"):
        forms.open_source(tmp_path)


def test_labels_that_pandas_calls_categories_are_labels(tmp_path):
    import pyarrow.parquet

    labels = pyarrow.array(["dog", "cat", "dog"]).dictionary_encode()
    for split in ("train", "val"):
        pyarrow.parquet.write_table(pyarrow.table({"image": [SMALL] * 3, "label": labels}), tmp_path / f"{split}.parquet")
    assert list(classes_of(forms.open_source(tmp_path)).values()) == ["dog", "cat", "dog"]
