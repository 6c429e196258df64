"""Sources as other programs and systems leave them: read rightly, or refused in a line that names the file and the reason."""

import itertools
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import encoded, photo
from published_forms import (
    ENGLISH,
    ORIGINALS,
    WNIDS,
    image_folder,
    kaggle_tree,
    tiny_imagenet_tree,
    webdataset,
    write_files,
)

from engine.data.splits import open_splits
from engine.preparation import forms
from engine.preparation.archives import tar_listing
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


# A test folder without labels ----------------------------------------------------------------------------------------


def own_classes(folder, *more):
    files = {f"train/{name}/{n}.jpg": SMALL for name in ("cat", "dog") for n in range(5)}
    return write_files(folder, files | dict.fromkeys(more, SMALL))


@pytest.mark.parametrize("test", ["test/1.jpg", "test/images/1.jpg", "test/test/1.jpg"])
def test_a_test_folder_without_labels_is_no_validation_split(test, tmp_path):
    said = []
    splits = open_splits(own_classes(tmp_path, test), log=said.append, val_share=0.2)
    assert {name: len(images) for name, images in splits.items()} == {"train": 8, "val": 2}
    assert "note: test/ is no validation split: its images lie in no folder of a class" in said
    for open_it in (open_splits, forms.open_source):
        with pytest.raises(DataError, match="no images in val/.*test/ is no validation split.*--val-share 0.2") as refused:
            open_it(tmp_path)
        assert "ILSVRC" not in str(refused.value)


def test_a_test_folder_with_labels_is_one_as_before(tmp_path):
    said = []
    splits = open_splits(own_classes(tmp_path, "test/cat/1.jpg", "test/emu/1.jpg"), log=said.append, val_share=0.2)
    assert {name: len(images) for name, images in splits.items()} == {"train": 10, "val": 1}
    assert not any("is no validation split" in line for line in said)
    assert len(open_splits(write_files(tmp_path / "t", {"test/cat/1.jpg": SMALL}), ("val",))["val"]) == 1


def test_imagenets_files_are_named_where_the_classes_are_imagenets_alone(tmp_path):
    own_classes(tmp_path / "own", "val/1.jpg")
    with pytest.raises(DataError, match=r"val/ in .* is flat, .*folders of their classes, .*--val-share 0.2") as refused:
        open_splits(tmp_path / "own")
    assert "ILSVRC" not in str(refused.value) and "LOC_val" not in str(refused.value)
    write_files(tmp_path / "wnids", {f"train/{WNIDS[0]}/1.jpg": SMALL, "val/1.jpg": SMALL})
    with pytest.raises(DataError, match="is flat: its labels are in LOC_val_solution.csv .Kaggle. or ILSVRC2012_devkit"):
        open_splits(tmp_path / "wnids")


# Files with labels and names ------------------------------------------------------------------------------------------

SOLUTION, NAMES, TINY = "LOC_val_solution.csv", "LOC_synset_mapping.txt", "val/val_annotations.txt"
HEADER = "ImageId,PredictionString\n"


@pytest.fixture
def kaggles(tmp_path):
    """A function that returns Kaggle's tree with other bytes in one of its text files."""

    def with_text(file, change):
        folder = kaggle_tree(tmp_path / str(len(list(tmp_path.iterdir()))), ORIGINALS)
        (folder / file).write_bytes(change((folder / file).read_text()))
        return folder

    return with_text


def with_bom(text):
    return text.encode("utf-8-sig")


@pytest.mark.parametrize("file", [SOLUTION, NAMES])
def test_a_byte_order_mark_is_passed_over(file, kaggles):
    source = forms.open_source(kaggles(file, with_bom))
    assert (source.classes, source.class_names, len(source.splits["val"])) == (WNIDS, ENGLISH, 6)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        (SOLUTION, lambda text: text.encode("utf-16"), "is no text in UTF-8"),
        (SOLUTION, lambda text: text.encode("utf-16-le"), "is no text in UTF-8"),
        (SOLUTION, lambda text: text.replace(",", ";").encode(), "line 2: .*ImageId,PredictionString"),
        (SOLUTION, lambda text: f"{HEADER}ILSVRC2012_val_00000001,\n".encode(), "line 2"),
        (SOLUTION, lambda text: f"{HEADER},n01440764 1 2 3 4\n".encode(), "line 2"),
        (SOLUTION, lambda text: f"{HEADER}ILSVRC2012_val_00000001\n".encode(), "line 2"),
        (SOLUTION, lambda text: f"{HEADER}{'x' * 200_000},n01440764\n".encode(), "field larger"),
        (SOLUTION, lambda text: b"\xff\xff", "is no text in UTF-8"),
        (NAMES, lambda text: text.encode("utf-16"), "is no text in UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_that_cannot_be_read_is_refused_by_its_name(file, change, reason, kaggles):
    folder = kaggles(file, change)
    for open_it in (forms.open_source, open_splits):
        with pytest.raises(DataError, match=rf"{file}.* {reason}"):
            open_it(folder)


def test_odd_lines_of_a_list_of_names_are_passed_over(kaggles):
    source = forms.open_source(kaggles(NAMES, lambda text: f"{text}\nn01440764 \n\n \n".encode()))
    assert source.class_names == ENGLISH


def test_annotations_that_cannot_be_read_are_refused_by_their_name(tmp_path):
    tree = tiny_imagenet_tree(tmp_path, ORIGINALS)
    whole = (tree / TINY).read_text()
    for text in (whole.replace("\t", " "), f"{whole}val_9.JPEG\n", f"{whole}val_9.JPEG\t\t1\n"):
        (tree / TINY).write_text(text)
        with pytest.raises(DataError, match=r"val_annotations.txt, line \d: .*a tab and its class"):
            forms.open_source(tree)
    (tree / TINY).write_bytes(with_bom(whole))
    assert len(forms.open_source(tree).splits["val"]) == 6


# Archives ------------------------------------------------------------------------------------------------------------


def zip_of_tree(path, separator="/", system=3, version=20, flags=0, method=zipfile.ZIP_STORED):
    """Write a zip of train/<class>/<image> and val/<class>/<image> as another program would have done."""
    with zipfile.ZipFile(path, "w") as archive:
        for split, name, n in itertools.product(("train", "val"), ("cat", "dog"), range(2)):
            member = zipfile.ZipInfo("/".join((split, name, f"{n}.jpg")))
            member.create_system, member.compress_type = system, method
            archive.writestr(member, SMALL)
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 4), (b"PK\x01\x02", 6)):  # in each header: the version needed, then the flags
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + at] = version
            content[start + at + 2] |= flags
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            content = content.replace(f"{split}/{name}/".encode(), f"{split}{separator}{name}{separator}".encode())
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("separator", "system"), [("/", 0), ("\\", 0), ("\\", 3)])
def test_a_zip_of_windows_with_backslashes_is_a_tree(separator, system, tmp_path):
    source = forms.open_source(zip_of_tree(tmp_path / "set.zip", separator, system))
    assert source.classes == ["cat", "dog"]
    assert [entry.name for entry in source.splits["train"]] == ["0.jpg", "1.jpg"] * 2
    assert {entry.place.read() for entry in source.splits["val"]} == {SMALL}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            {"flags": 1},
            r"no images in train/<class>/ in the zip .*left out of the archive: encrypted: 8 \(train/cat/0.jpg, .*[Uu]npack it",
        ),
        ({"method": zipfile.ZIP_LZMA}, r"left out of the archive: compressed in an unusual way: 8 .*[Uu]npack it"),
        ({"version": 99}, r"set.zip cannot be read here \(zip file version 9.9\): [Uu]npack it"),
    ],
)
def test_a_zip_that_cannot_be_read_says_what_was_refused(how, reason, tmp_path):
    with pytest.raises(DataError, match=f"(?s){reason}"):
        forms.open_source(zip_of_tree(tmp_path / "set.zip", **how))


def test_a_class_all_of_whose_files_were_refused_is_said_with_the_reason(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, method in (("cat", zipfile.ZIP_STORED), ("dog", zipfile.ZIP_LZMA)):
            archive.writestr(f"train/{name}/1.jpg", SMALL, method)
    with pytest.raises(DataError, match="(?s)classes without images: dog.*compressed in an unusual way: 1 .train/dog/1.jpg"):
        forms.open_source(tmp_path / "set.zip")


def test_what_macos_leaves_beside_files_is_none_of_them(tmp_path):
    import pyarrow.parquet

    (tmp_path / "zip").mkdir()
    zip_of_tree(tmp_path / "zip/set.zip")
    write_files(tmp_path / "zip", {"._set.zip": b"junk"})
    assert len(forms.open_source(tmp_path / "zip").splits["train"]) == 4
    table = pyarrow.table({"image": [SMALL], "label": [0]})
    for split in ("train", "val"):
        write_files(tmp_path / "parquet", {f"{split}/._0000.parquet": b"junk"})
        pyarrow.parquet.write_table(table, tmp_path / f"parquet/{split}/0000.parquet")
    assert len(forms.open_source(tmp_path / "parquet").splits["train"]) == 1
    webdataset(tmp_path, ORIGINALS)
    write_files(tmp_path, {"._imagenet1k-train-0000.tar": b"junk"})
    assert len(forms.open_source(tmp_path).splits["train"]) == 15


def test_what_is_left_over_beside_a_whole_tree_does_not_hide_it(tmp_path):
    tree = image_folder(tmp_path, ORIGINALS)
    write_files(tree, {forms.VAL_TAR: b"left over", "train/metadata.parquet": b"of a folder of images"})
    assert len(forms.open_source(tree).splits["train"]) == 15
    shutil.rmtree(tree / "val")
    with pytest.raises(DataError, match=f"holds a part of the official ImageNet; missing: {forms.TRAIN_TAR}"):
        forms.open_source(tree)


@pytest.mark.parametrize("name", ["set.tar", "set.zip", "set.tar.gz"])
def test_what_cannot_be_opened_is_refused_in_words(name, tmp_path):
    path = write_files(tmp_path, {name: b""}) / name
    path.unlink()
    path.symlink_to("/proc/self/mem")  # which gives EIO, whoever reads it
    with pytest.raises(DataError, match=f"{name} cannot be read: Input/output error"):
        forms.open_source(path)
    with pytest.raises(OSError, match="Input/output error"):  # and it is not called a damaged tar
        tar_listing("/proc/self/mem", 0, 1024)


@pytest.mark.skipif(os.geteuid() != 0, reason="somebody else's files need root")
def test_what_may_not_be_read_is_refused_by_name():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("closed", "inside"):
            own_classes(root / name, "val/cat/1.jpg")
        (root / "zip").mkdir()
        locked = [root / "closed", root / "inside/train/dog", zip_of_tree(root / "zip/set.zip")]
        for path in locked:
            path.chmod(0)
        root.chmod(0o755)
        os.seteuid(65534)
        try:
            for path, source in zip(locked, ("closed", "inside", "zip"), strict=True):
                for open_it in (forms.open_source, open_splits):
                    with pytest.raises(DataError, match=f"{path} cannot be read: Permission denied"):
                        open_it(root / source)
        finally:
            os.seteuid(0)
