"""Every published form of ImageNet becomes the same two packed files, whatever they hold."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import run_program
from PIL import Image
from published_forms import (
    ENGLISH,
    FLAGS,
    FORMS,
    HUGGING_FACE_NAMES,
    ORIGINALS,
    WITHOUT_ENGLISH,
    WNIDS,
    add_to_tar,
    converted_parquet,
    datasets,
    flat_val_with_devkit,
    hugging_face,
    image_folder,
    images_of,
    kaggle_tree,
    kaggle_zip,
    official,
    old_archives_of_the_hub,
    original,
    parquet,
    parquet_without_metadata,
    prepare,
    saved_by_datasets,
    tiny_imagenet_tree,
    webdataset,
    write_files,
)

from engine.data.images import decode_rgb, image_size, packed_jpeg
from engine.data.splits import open_splits
from engine.preparation import forms, packing
from engine.preparation.packed import PackedSplit
from engine.system.errors import DataError


def contents(destination, split):
    """{name: (class, bytes)} of a packed split."""
    packed = PackedSplit(destination / f"{split}.arrow")
    names = [
        re.sub(r"_n\d{8}(?=\.)", "", Path(packed.name(i)).name) for i in range(len(packed))
    ]  # as in the Hub's old archives
    return {name: (packed.classes[packed.labels[i]], packed.read(i)) for i, name in enumerate(names)}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_prepared_into_the_same_labels_and_pixels(form, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    assert prepare(form(tmp_path / "source", ORIGINALS), tmp_path / "packed", *FLAGS.get(form, [])) == 0
    expected_train = {name: (wnid, packed_jpeg(content, 352)) for wnid, name, content in images_of(ORIGINALS["train"])}
    assert contents(tmp_path / "packed", "train") == expected_train
    expected_val = {name: (wnid, content) for wnid, name, content in images_of(ORIGINALS["val"])}
    assert contents(tmp_path / "packed", "val") == expected_val
    packed = PackedSplit(tmp_path / "packed/train.arrow")
    assert packed.classes == WNIDS
    if form not in WITHOUT_ENGLISH:
        assert packed.class_names == ENGLISH
    assert sorted(os.listdir(tmp_path / "packed")) == ["SHA256SUMS", "manifest.json", "train.arrow", "val.arrow"]
    assert "15 training images and 6 validation images of 3 classes" in capsys.readouterr().out


def test_rows_are_sorted_so_that_the_form_of_the_source_changes_no_bit(tmp_path):
    checksums = set()
    for form in (official, kaggle_zip, saved_by_datasets):
        (tmp_path / form.__name__).mkdir()
        prepare(form(tmp_path / form.__name__, ORIGINALS), tmp_path / f"{form.__name__}_packed")
        checksums.add((tmp_path / f"{form.__name__}_packed/SHA256SUMS").read_text())
    assert len(checksums) == 1


def test_large_training_images_get_the_shorter_side_asked_for_and_small_ones_stay_as_they_are(tmp_path):
    image_folder(tmp_path / "source", ORIGINALS)
    prepare(tmp_path / "source", tmp_path / "packed", "--shorter-side=112")
    kept = 0
    for name, (wnid, content) in contents(tmp_path / "packed", "train").items():
        before, after = ORIGINALS["train"][wnid][name], Image.open(io.BytesIO(content))
        if content == before:
            kept += 1
            assert min(after.size) <= 112
        else:
            assert after.format == "JPEG"
            assert min(after.size) == 112
            height, width = decode_rgb(before).shape[:2]
            assert max(after.size) == round(max(height, width) * 112 / min(height, width))
    assert kept == 6


def test_the_packed_file_is_one_that_datasets_reads(tmp_path):
    image_folder(tmp_path / "source", ORIGINALS)
    prepare(tmp_path / "source", tmp_path / "packed")
    theirs = datasets.Dataset.from_file(str(tmp_path / "packed/train.arrow"))
    assert theirs.features["label"].names == WNIDS
    ours = PackedSplit(tmp_path / "packed/train.arrow")
    assert theirs["label"] == ours.labels.tolist()
    assert [image.size[::-1] for image in theirs["image"]] == [image_size(ours.read(i)) for i in range(len(ours))]
    undecoded = theirs.cast_column("image", datasets.Image(decode=False))["image"]
    assert [image["bytes"] for image in undecoded] == [ours.read(i) for i in range(len(ours))]


@pytest.mark.parametrize("rows_in_batch", [1, 4, 1000])
def test_a_file_that_datasets_wrote_is_a_split(rows_in_batch, tmp_path):
    whole = hugging_face(ORIGINALS)["train"]
    with datasets.arrow_writer.ArrowWriter(
        path=str(tmp_path / "train.arrow"), features=whole.features, writer_batch_size=rows_in_batch
    ) as writer:
        for row in whole.cast_column("image", datasets.Image(decode=False)):
            writer.write(row)
        writer.finalize()
    split = PackedSplit(tmp_path / "train.arrow")
    assert split.classes == HUGGING_FACE_NAMES
    assert len(split) == 15
    for index, row in enumerate(whole.cast_column("image", datasets.Image(decode=False))):
        assert split.read(index) == row["image"]["bytes"]
        assert split.labels[index] == row["label"]
        assert split.name(index).endswith(row["image"]["path"])


# The manifest --------------------------------------------------------------------------------------------------------


def test_bad_images_are_left_out_and_named(tmp_path, capsys):
    image_folder(tmp_path / "source", ORIGINALS)
    bad = tmp_path / "source/train/n01443537"
    (bad / "empty.JPEG").write_bytes(b"")
    (bad / "cut.JPEG").write_bytes(original(0)[:5000])
    (bad / "small_cut.JPEG").write_bytes(original(1)[:-500])  # one that would be kept byte for byte
    (bad / "text.JPEG").write_bytes(b"not found" * 100)
    prepare(tmp_path / "source", tmp_path / "packed")
    manifest = json.loads((tmp_path / "packed/manifest.json").read_text())
    assert {name for name, _ in manifest["splits"]["train"]["bad_images"]} == {
        "n01443537/empty.JPEG",
        "n01443537/cut.JPEG",
        "n01443537/small_cut.JPEG",
        "n01443537/text.JPEG",
    }
    assert manifest["splits"]["train"]["images"] == 15
    assert "left out of train: n01443537/cut.JPEG" in capsys.readouterr().out


def test_the_manifest_counts_every_class_and_the_checksums_are_those_of_sha256sum(tmp_path):
    image_folder(tmp_path / "source", ORIGINALS)
    prepare(tmp_path / "source", tmp_path / "packed")
    manifest = json.loads((tmp_path / "packed/manifest.json").read_text())
    for split, each in (("train", 5), ("val", 2)):
        facts = manifest["splits"][split]
        assert facts["images_per_class"] == dict.fromkeys(WNIDS, each)
        content = (tmp_path / "packed" / facts["file"]).read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "packed", capture_output=True).returncode == 0
    assert sorted(os.listdir(tmp_path / "packed")) == ["SHA256SUMS", "manifest.json", "train.arrow", "val.arrow"]


def test_it_is_said_whether_this_is_the_whole_imagenet():
    def summary(train, val, imagenet=True, classes=1000):
        splits = {
            name: {"images": n, "images_of_imagenet_1k": of, "file": "f", "bytes": 1, "bad_images": [], "images_per_class": {}}
            for name, n, of in (("train", train, 1_281_167), ("val", val, 50_000))
        }
        manifest = {"splits": splits, "remarks": [], "is_imagenet_1k": imagenet, "classes": classes}
        return packing.summary(manifest, Path("d"))

    assert "NOT the whole" not in "\n".join(summary(1_281_167, 50_000))
    last = summary(1_281_166, 50_000)[-1]
    assert last == "WARNING: this is NOT the whole ImageNet-1K: 1,281,166 of 1,281,167 train images"
    assert summary(1_281_167, 50_000, classes=999)[-1].endswith("ImageNet-1K: 999 of 1,000 classes")
    assert "another data set" in "\n".join(summary(1_281_167, 50_000, imagenet=False))


def test_imagenets_english_names_are_known_where_the_source_has_none():
    wnids = [f"n{number:08d}" for number in range(1_500_000, 1_500_998)]
    source = forms.Source("test", ["n01440764", *wnids, "n15075141"], {})
    packing.add_known_class_names(source)
    assert source.class_names["n01440764"] == "tench"
    assert source.class_names["n15075141"] == "toilet tissue"


# Hostile and incomplete sources --------------------------------------------------------------------------------------


def test_members_with_hostile_paths_and_links_are_passed_over_and_nothing_is_written_outside(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/photo.JPEG").write_bytes(original(0))
    hostile = ["../../train/n01440764/up.JPEG", "/train/n01440764/absolute.JPEG", "train/../../n01440764/out.JPEG"]
    hostile += ["C:/train/n01440764/drive.JPEG", "..\\train\\n01440764\\back.JPEG"]
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as archive, tarfile.open(tmp_path / "hostile.tar", "w") as tar:
        for split in ORIGINALS:
            for wnid, name, content in images_of(ORIGINALS[split]):
                archive.writestr(f"{split}/{wnid}/{name}", content)
                add_to_tar(tar, f"{split}/{wnid}/{name}", content)
        for name in hostile:
            archive.writestr(name, original(0))
            add_to_tar(tar, name, original(0))
        link = zipfile.ZipInfo("train/n01440764/link.JPEG")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path / "secret/photo.JPEG"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("train/n01440764/link.JPEG")
            member.type, member.linkname = kind, str(tmp_path / "secret/photo.JPEG")
            tar.addfile(member)
    (tmp_path / "work").mkdir()
    before = set(tmp_path.rglob("*"))
    for name, links in (
        ("hostile.zip", "a symbolic link in an archive: 1"),
        ("hostile.tar", "a special file in an archive: 3"),
    ):
        destination = tmp_path / "work" / name
        prepare(tmp_path / name, destination)
        assert len(contents(destination, "train")) == 15, name
        remarks = "\n".join(json.loads((destination / "manifest.json").read_text())["remarks"])
        assert links in remarks
        assert "left out of the archive: a path out of the archive: 5" in remarks
    assert {path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(tmp_path / "work")} == set()


def test_what_is_missing_is_said(tmp_path):
    def refused(source, reason):
        with pytest.raises(DataError, match=reason):
            forms.open_source(source)

    refused(tmp_path / "nowhere", "there is no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"(?s)no images in train/<class>/.*knows these forms")
    (tmp_path / "tars").mkdir()
    official(tmp_path / "tars", ORIGINALS)
    refused(tmp_path / "tars" / forms.TRAIN_TAR, "name the folder that holds them")
    (tmp_path / "tars" / forms.DEVKIT).unlink()
    refused(tmp_path / "tars", f"missing: {forms.DEVKIT}")
    flat_val_with_devkit(tmp_path / "flat", ORIGINALS)
    (tmp_path / "flat" / forms.DEVKIT).unlink()
    refused(tmp_path / "flat", "is flat: its labels are in LOC_val_solution.csv")
    (tmp_path / "shards").mkdir()
    parquet(tmp_path / "shards", ORIGINALS)
    (tmp_path / "shards/train-00001-of-00002.parquet").unlink()
    refused(tmp_path / "shards", "1 of the 2 files like train-00000.*; number 1 is missing")
    write_files(tmp_path / "half", {"train/cat/1.JPEG": original(1)})
    refused(tmp_path / "half", "validation images are needed")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "no archive of a known form")


def test_a_damaged_archive_is_said_and_a_damaged_member_is_named(tmp_path):
    (tmp_path / "tars").mkdir()
    official(tmp_path / "tars", ORIGINALS)
    tar = tmp_path / "tars" / forms.TRAIN_TAR
    tar.write_bytes(tar.read_bytes()[:-60_000])
    with pytest.raises(DataError, match="cut off|damaged"):
        forms.open_source(tmp_path / "tars")
    path = kaggle_zip(tmp_path, ORIGINALS)
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    prepare(path, tmp_path / "packed")
    manifest = json.loads((tmp_path / "packed/manifest.json").read_text())
    assert len(manifest["splits"]["train"]["bad_images"]) == 1
    path.write_bytes(content[:-3000])
    with pytest.raises(DataError):
        forms.open_source(path)


@pytest.mark.slow
def test_a_disk_that_cannot_hold_it_is_refused_before_the_start(tmp_path):
    image_folder(tmp_path / "source", ORIGINALS)
    source = forms.open_source(tmp_path / "source")
    source.splits["train"] = source.splits["train"] * 2_000_000
    with pytest.raises(DataError, match="free, and about .* GB are needed.*lower --shorter-side"):
        packing.announce(source, packing.Packing(tmp_path, packed_jpeg, 352, 90, 1))


def test_what_a_data_set_says_that_it_holds_must_be_there(tmp_path):
    def refused(source, reason):
        with pytest.raises(DataError, match=reason):
            forms.open_source(source, forms.Options(tmp_path / "scratch"))

    def made(form, *unwanted, **changed):
        folder = tmp_path / f"{form.__name__} {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        form(folder, ORIGINALS)
        for pattern in unwanted:
            for path in folder.rglob(pattern):
                path.unlink() if path.is_file() else shutil.rmtree(path)
        for name, content in changed.items():
            path = folder / name.replace("__", ".")
            path.write_text(content if isinstance(content, str) else content(path.read_text()))
        return folder

    refused(made(kaggle_tree, "ILSVRC2012_val_00000002.JPEG"), r"1 of the 6 that LOC_val_solution.csv lists are missing")
    refused(made(kaggle_tree, "CLS-LOC/train/n01443537"), r"1 of the 3 classes that LOC_synset_mapping.txt lists")
    boxes = "ImageId,PredictionString\nn01440764_0,n01440764 1 2 3 4\nn01440764_9,n01440764 1 2 3 4\n"
    folder = made(kaggle_tree, LOC_train_solution__csv=boxes)
    refused(folder, r"1 of the 2 that LOC_train_solution.csv lists are missing \(n01440764_9\)")
    folder = made(kaggle_tree)
    write_files(folder, {"ILSVRC/ImageSets/CLS-LOC/train_cls.txt": b"n01440764/n01440764_0 1\nn01440764/n01440764_7 2\n"})
    refused(folder, r"1 of the 2 that ImageSets/CLS-LOC/train_cls.txt lists")
    with pytest.raises(DataError, match="train_cls.txt"):
        open_splits(folder)
    refused(made(tiny_imagenet_tree, "ILSVRC2012_val_00000003.JPEG"), "1 of the 6 that val_annotations.txt lists")
    refused(made(tiny_imagenet_tree, "n01484850"), "1 of the 3 classes that wnids.txt lists")
    refused(
        made(webdataset, "imagenet1k-train-0000.tar"), "1 of the 2 files like imagenet1k-train-0001.tar; number 0 is missing"
    )
    refused(made(converted_parquet, "train/0000.parquet"), "number 0 is missing")
    refused(made(old_archives_of_the_hub, "train_images_3.tar.gz"), "missing: train_images_3.tar.gz")
    refused(made(old_archives_of_the_hub, "val_images.tar.gz"), "missing: val_images.tar.gz")
    refused(made(saved_by_datasets, "validation/data-*"), "no such file|cannot be|No such file")
    folder = made(parquet)
    card = "dataset_info:\n  splits:\n  - name: train\n    num_bytes: 5\n    num_examples: 16\n  - name: validation\n"
    (folder / "README.md").write_text(card)
    refused(folder, "holds 15 rows of train, .*README.md promises 16")


def test_parquet_columns_are_asked_for_where_they_do_not_tell(tmp_path):
    (tmp_path / "source").mkdir()
    parquet_without_metadata(tmp_path / "source", ORIGINALS)
    source = forms.open_source(tmp_path / "source")  # `img` and `fine_label` are usual names
    assert source.classes == WNIDS
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"picture": [b"1", b"2"], "kind": ["dog", "cat"], "label": [0, 1], "labels": [0, 1]})
    for name in ("train", "valid"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    with pytest.raises(
        DataError, match=r"which column holds the labels \(several could be it: label, labels\).*--label-column"
    ):
        forms.open_source(tmp_path)
    with pytest.raises(DataError, match="--label-column nonsense: .* no such column.*picture, kind"):
        forms.open_source(tmp_path, forms.Options(label_column="nonsense"))
    source = forms.open_source(tmp_path, forms.Options(label_column="kind"))
    assert source.classes == ["cat", "dog"]
    assert [(entry.label, entry.place.read()) for entry in source.splits["val"]] == [(1, b"1"), (0, b"2")]
    write_files(tmp_path / "tree", {"train/cat/1.jpg": b"1", "val/cat/1.jpg": b"1"})
    with pytest.raises(DataError, match="--image-column is for parquet files"):
        forms.open_source(tmp_path / "tree", forms.Options(image_column="img"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train-00000-of-01024", "TFRecord"),
        ("imagenet.tfrecord-00001-of-00008", "TFRecord"),
        ("shard.00000.mds", "MDS"),
        ("train.beton", "FFCV"),
        ("train.rec", "RecordIO"),
        ("data.mdb", "LMDB"),
        ("train_data_batch_1", "64 x 64"),
        ("train.h5", "HDF5"),
    ],
)
def test_binary_forms_are_refused_by_name_with_a_way_to_get_the_images_out(name, kind, tmp_path):
    write_files(tmp_path, {name: b"something"})
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"(?s)holds .*{kind}.*Write the images out.*knows these forms"):
            forms.open_source(path)
    with pytest.raises(DataError, match=rf"{kind}.*Write the images out"):
        open_splits(tmp_path)


@pytest.mark.parametrize("flags", [["--shorter-side=-1"], ["--quality=101"], ["--num-workers=0"], ["--qualty=90"], []])
def test_an_impossible_flag_ends_with_status_2(flags, tmp_path):
    source = [tmp_path] if not flags else [tmp_path, tmp_path]
    status, output = run_program("prepare_data.py", [*source, *flags])
    assert status == 2
    assert "Traceback" not in output


NO_FACTS = (
    b"",
    b"[",
    b"3",
    b"[]",
    b'{"info": 1, "splits": 1}',
    b'{"splits": [1], "_data_files": [1]}',
    b"\xff",
    b"[" * 100_000,
)


@pytest.mark.parametrize("content", NO_FACTS, ids=lambda content: repr(content[:9]))
def test_facts_of_other_programs_that_cannot_be_understood_are_refused_by_name(content, tmp_path):
    import pyarrow.parquet

    def refused(folder, file):
        with pytest.raises(DataError, match=file):
            forms.open_source(folder)

    folders = {name: tmp_path / name for name in ("state", "info", "parquet", "shards")}
    for folder in folders.values():
        folder.mkdir()
    for name, file in (("state", "train/state.json"), ("info", "train/dataset_info.json")):
        saved_by_datasets(folders[name], ORIGINALS)
        (folders[name] / file).write_bytes(content)
        refused(folders[name], file)
    table = pyarrow.table({"image": [b"1"], "label": [0]}).replace_schema_metadata({"huggingface": content or b"{"})
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(table, folders["parquet"] / f"{split}-00000-of-00001.parquet")
    refused(folders["parquet"], "train-00000-of-00001.parquet is damaged")
    webdataset(folders["shards"], ORIGINALS, label=lambda wnid: ("json", content or b"{"))
    no_label = content.startswith(b"{")  # but facts, as some samples have
    refused(folders["shards"], "no train images with a label" if no_label else "0000.tar holds a label that cannot be read")


def test_labels_that_number_something_else_do_not_become_a_thousand_million_classes(tmp_path):
    webdataset(tmp_path, ORIGINALS, label=lambda wnid: ("cls", str(10**9 + WNIDS.index(wnid)).encode()))
    with pytest.raises(DataError, match="the labels go up to 1000000002: they number something else"):
        forms.open_source(tmp_path)


@pytest.mark.parametrize("label", [[1], {"a": 1}, 1.5])
def test_a_label_that_is_neither_number_nor_name_is_refused(label, tmp_path):
    webdataset(tmp_path, ORIGINALS, label=lambda wnid: ("json", json.dumps({"label": label}).encode()))
    with pytest.raises(DataError, match="a number or a name is expected, not"):
        forms.open_source(tmp_path)
