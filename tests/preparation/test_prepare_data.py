"""Every published form of ImageNet becomes the same two packed files, whatever happens on the way."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import encoded, finish, photo, run_program, start_program
from PIL import Image

import prepare_data
from engine.data.images import decode_rgb, image_size, packed_jpeg
from engine.data.splits import open_splits
from engine.preparation import forms, packing
from engine.preparation.packed import PackedSplit
from engine.system.errors import DataError

datasets = pytest.importorskip("datasets")

ENGLISH = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n01484850": "great white shark"}
WNIDS = sorted(ENGLISH)
HUGGING_FACE_NAMES = sorted(ENGLISH.values())  # its labels need not count in the order of the wnids


def original(number):
    """One of a few kinds of image files: large, small, portrait, CMYK, and a PNG, as ImageNet has one."""
    kind = number % 5
    pixels = photo(*[(400, 500), (120, 100), (500, 380), (90, 130), (370, 360)][kind], seed=number)
    if kind == 3:
        return encoded(Image.fromarray(pixels).convert("CMYK"))
    return encoded(pixels, "PNG" if kind == 4 else "JPEG")


@pytest.fixture(scope="module")
def originals():
    """{'train': {wnid: {name: bytes}}, 'val': ...}, the validation names without their class, as in ImageNet."""
    train = {wnid: {f"{wnid}_{n}.JPEG": original(n + 5 * c) for n in range(5)} for c, wnid in enumerate(WNIDS)}
    val = {wnid: {} for wnid in WNIDS}
    for number, wnid in enumerate([*reversed(WNIDS), *WNIDS], start=1):
        val[wnid][f"ILSVRC2012_val_{number:08d}.JPEG"] = original(100 + number)
    return {"train": train, "val": val}


def images_of(split):
    return [(wnid, name, content) for wnid, files in split.items() for name, content in files.items()]


# The published forms, built small ------------------------------------------------------------------------------------


def add_to_tar(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_devkit(path, originals):
    ids = {wnid: number for number, wnid in enumerate(reversed(WNIDS), start=1)}  # the kit's numbers are not in wnid order
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(ids[wnid], wnid, ENGLISH[wnid], 0) for wnid in WNIDS] + [(1001, "n00001740", "entity", 3)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=fields)})
    wnid_of = {name: wnid for wnid, name, _ in images_of(originals["val"])}
    truth = "".join(f"{ids[wnid_of[name]]}\n" for name in sorted(wnid_of))
    with tarfile.open(path, "w:gz") as archive:
        add_to_tar(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add_to_tar(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


def official(folder, originals):
    with tarfile.open(folder / forms.TRAIN_TAR, "w") as outer:
        for wnid in reversed(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for name, content in originals["train"][wnid].items():
                    add_to_tar(archive, name, content)
            add_to_tar(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / forms.VAL_TAR, "w") as archive:
        for _, name, content in images_of(originals["val"]):
            add_to_tar(archive, name, content)
    write_devkit(folder / forms.DEVKIT, originals)
    return folder


def kaggle_files(originals):
    files = {}
    for wnid, name, content in images_of(originals["train"]):
        files[f"ILSVRC/Data/CLS-LOC/train/{wnid}/{name}"] = content
        files[f"ILSVRC/Annotations/CLS-LOC/train/{wnid}/{name[:-5]}.xml"] = b"<annotation/>"
    for _, name, content in images_of(originals["val"]):
        files[f"ILSVRC/Data/CLS-LOC/val/{name}"] = content
    files["ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG"] = original(0)
    solution = io.StringIO()
    writer = csv.writer(solution)
    writer.writerow(["ImageId", "PredictionString"])
    for wnid, name, _ in images_of(originals["val"]):
        writer.writerow([name[:-5], f"{wnid} 85 1 499 272 {wnid} 3 4 50 60 "])
    files["LOC_val_solution.csv"] = solution.getvalue().encode()
    files["LOC_synset_mapping.txt"] = "".join(f"{wnid} {name}\n" for wnid, name in ENGLISH.items()).encode()
    return files


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def kaggle_tree(folder, originals):
    return write_files(folder, kaggle_files(originals))


def kaggle_zip(folder, originals):
    path = folder / "imagenet-object-localization-challenge.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, content) in enumerate(kaggle_files(originals).items()):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    return path


def tar_of_kaggles_tree(folder, originals):
    path = folder / "tree.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in kaggle_files(originals).items():
            add_to_tar(archive, name, content)
    return path


def image_folder(folder, originals):
    for split in originals:
        write_files(folder, {f"{split}/{wnid}/{name}": content for wnid, name, content in images_of(originals[split])})
    return folder


def flat_val_with_devkit(folder, originals):
    write_files(folder, {f"train/{wnid}/{name}": content for wnid, name, content in images_of(originals["train"])})
    write_files(folder, {f"val/{name}": content for _, name, content in images_of(originals["val"])})
    write_devkit(folder / forms.DEVKIT, originals)
    return folder


def hugging_face(originals):
    """{'train': Dataset, 'validation': Dataset} with classes called by English words, rows in random order."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=HUGGING_FACE_NAMES)})
    made = {}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = images_of(originals[split])
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        columns = {
            "image": [{"bytes": content, "path": name} for _, name, content in rows],
            "label": [HUGGING_FACE_NAMES.index(ENGLISH[wnid]) for wnid, _, _ in rows],
        }
        made[name] = datasets.Dataset.from_dict(columns, features=features)
    return made


def parquet(folder, originals):
    for name, whole in hugging_face(originals).items():
        for part in range(2):
            shard = whole.shard(2, part, contiguous=True)
            shard.to_parquet(folder / f"{name}-{part:05d}-of-00002.parquet", batch_size=3)
    return folder


def saved_by_datasets(folder, originals):
    datasets.DatasetDict(hugging_face(originals)).save_to_disk(folder, num_shards={"train": 2, "validation": 1})
    return folder


def kaggles_patched_tar(folder, originals):
    """The .tar.gz of 2019, with Kaggle's text files beside it."""
    files = kaggle_files(originals)
    beside = {name: content for name, content in files.items() if name.startswith("LOC_")}
    write_files(folder, beside)
    with tarfile.open(folder / "imagenet_object_localization_patched2019.tar.gz", "w:gz") as archive:
        for name in files.keys() - beside.keys():
            add_to_tar(archive, name, files[name])
    return folder


def links_to_class_folders(folder, originals):
    """A subset of ImageNet as it is usually made: a folder of links out of it."""
    image_folder(folder.parent / "whole", originals)
    for split in originals:
        (folder / split).mkdir()
        for wnid in WNIDS:
            (folder / split / wnid).symlink_to(folder.parent / "whole" / split / wnid)
    return folder


def imagenette_tgz(folder, originals):
    image_folder(folder / "imagenette2", originals)
    with tarfile.open(folder / "imagenette2.tgz", "w:gz") as archive:
        archive.add(folder / "imagenette2", "imagenette2")
    shutil.rmtree(folder / "imagenette2")
    return folder / "imagenette2.tgz"


def tiny_files(originals):
    files = {"wnids.txt": "\n".join(reversed(WNIDS)).encode()}
    files["words.txt"] = "".join(f"{wnid}\t{name}\n" for wnid, name in ENGLISH.items()).encode()
    for wnid, name, content in images_of(originals["train"]):
        files[f"train/{wnid}/images/{name}"] = content
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"n.JPEG\t0\t0\t62\t62\n"
    for _, name, content in images_of(originals["val"]):
        files[f"val/images/{name}"] = content
    lines = [f"{name}\t{wnid}\t0\t32\t44\t62\n" for wnid, name, _ in images_of(originals["val"])]
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files["test/images/test_0.JPEG"] = original(0)
    return files


def tiny_imagenet_tree(folder, originals):
    return write_files(folder / "tiny-imagenet-200", tiny_files(originals))


def tiny_imagenet_zip(folder, originals):
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        for name, content in tiny_files(originals).items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return folder


def old_archives_of_the_hub(folder, originals):
    """Flat, in five parts; the wnid stands at the end of each name, in the others' place of the training images' number."""
    train = images_of(originals["train"])
    parts = {f"train_images_{part}.tar.gz": train[part::5] for part in range(5)} | {
        "val_images.tar.gz": images_of(originals["val"])
    }
    for file, images in parts.items():
        with tarfile.open(folder / file, "w:gz") as archive:
            for wnid, name, content in images:
                add_to_tar(archive, name.replace(".JPEG", f"_{wnid}.JPEG"), content)
    return folder


def webdataset(folder, originals, label=lambda wnid: ("cls", str(WNIDS.index(wnid)).encode())):
    for split, name in (("train", "train"), ("val", "validation")):
        images = images_of(originals[split])
        for shard in range(2):
            with tarfile.open(folder / f"imagenet1k-{name}-{shard:04d}.tar", "w") as archive:
                for wnid, file, content in images[shard::2]:
                    extension, text = label(wnid)
                    add_to_tar(archive, file.replace(".JPEG", f".{extension}"), text)
                    add_to_tar(archive, file, content)
    return folder


def webdataset_json(folder, originals):
    return webdataset(folder, originals, lambda wnid: ("json", json.dumps({"label": WNIDS.index(wnid), "width": 5}).encode()))


def parquet_without_metadata(folder, originals):
    """One file a split, as CIFAR-100 names its columns; the second split is called `test`."""
    import pyarrow as pa
    import pyarrow.parquet

    for split, name in (("train", "train"), ("val", "test")):
        images = images_of(originals[split])
        table = pa.table(
            {
                "img": [{"bytes": content, "path": name} for _, name, content in images],
                "fine_label": [WNIDS.index(wnid) for wnid, _, _ in images],
                "coarse_label": [0 for _ in images],
            }
        )
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=4)
    return folder


def converted_parquet(folder, originals):
    """As the Hub converts every data set: default/train/0000.parquet."""
    for name, whole in hugging_face(originals).items():
        (folder / "default" / name).mkdir(parents=True)
        for part in range(2):
            whole.shard(2, part, contiguous=True).to_parquet(folder / "default" / name / f"{part:04d}.parquet")
    return folder


FORMS = [
    official,
    kaggle_tree,
    kaggle_zip,
    tar_of_kaggles_tree,
    kaggles_patched_tar,
    image_folder,
    links_to_class_folders,
    flat_val_with_devkit,
    imagenette_tgz,
    tiny_imagenet_tree,
    tiny_imagenet_zip,
    old_archives_of_the_hub,
    webdataset,
    webdataset_json,
    parquet,
    parquet_without_metadata,
    converted_parquet,
    saved_by_datasets,
]
WITHOUT_ENGLISH = {image_folder, links_to_class_folders, imagenette_tgz, old_archives_of_the_hub, webdataset, webdataset_json}
WITHOUT_ENGLISH |= {parquet_without_metadata}  # they have nowhere to say it
FLAGS = {parquet_without_metadata: ["--image-column=img", "--label-column=fine_label"]}


def prepare(source, destination, *flags):
    return prepare_data.main(prepare_data.parse_arguments([str(source), str(destination), "--num-workers=1", *flags]))


def contents(destination, split):
    """{name: (class, bytes)} of a packed split."""
    packed = PackedSplit(destination / f"{split}.arrow")
    names = [
        re.sub(r"_n\d{8}(?=\.)", "", Path(packed.name(i)).name) for i in range(len(packed))
    ]  # as in the Hub's old archives
    return {name: (packed.classes[packed.labels[i]], packed.read(i)) for i, name in enumerate(names)}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_prepared_into_the_same_labels_and_pixels(form, originals, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    assert prepare(form(tmp_path / "source", originals), tmp_path / "packed", *FLAGS.get(form, [])) == 0
    expected_train = {name: (wnid, packed_jpeg(content, 352)) for wnid, name, content in images_of(originals["train"])}
    assert contents(tmp_path / "packed", "train") == expected_train
    expected_val = {name: (wnid, content) for wnid, name, content in images_of(originals["val"])}
    assert contents(tmp_path / "packed", "val") == expected_val
    packed = PackedSplit(tmp_path / "packed/train.arrow")
    assert packed.classes == WNIDS
    if form not in WITHOUT_ENGLISH:
        assert packed.class_names == ENGLISH
    assert sorted(os.listdir(tmp_path / "packed")) == ["SHA256SUMS", "manifest.json", "train.arrow", "val.arrow"]
    assert "15 training images and 6 validation images of 3 classes" in capsys.readouterr().out


def test_rows_are_sorted_so_that_the_form_of_the_source_changes_no_bit(originals, tmp_path):
    checksums = set()
    for form in (official, kaggle_zip, saved_by_datasets):
        (tmp_path / form.__name__).mkdir()
        prepare(form(tmp_path / form.__name__, originals), tmp_path / f"{form.__name__}_packed")
        checksums.add((tmp_path / f"{form.__name__}_packed/SHA256SUMS").read_text())
    assert len(checksums) == 1


def test_large_training_images_get_the_shorter_side_asked_for_and_small_ones_stay_as_they_are(originals, tmp_path):
    image_folder(tmp_path / "source", originals)
    prepare(tmp_path / "source", tmp_path / "packed", "--shorter-side=112")
    kept = 0
    for name, (wnid, content) in contents(tmp_path / "packed", "train").items():
        before, after = originals["train"][wnid][name], Image.open(io.BytesIO(content))
        if content == before:
            kept += 1
            assert min(after.size) <= 112
        else:
            assert after.format == "JPEG"
            assert min(after.size) == 112
            height, width = decode_rgb(before).shape[:2]
            assert max(after.size) == round(max(height, width) * 112 / min(height, width))
    assert kept == 6


def test_the_packed_file_is_one_that_datasets_reads(originals, tmp_path):
    image_folder(tmp_path / "source", originals)
    prepare(tmp_path / "source", tmp_path / "packed")
    theirs = datasets.Dataset.from_file(str(tmp_path / "packed/train.arrow"))
    assert theirs.features["label"].names == WNIDS
    ours = PackedSplit(tmp_path / "packed/train.arrow")
    assert theirs["label"] == ours.labels.tolist()
    assert [image.size[::-1] for image in theirs["image"]] == [image_size(ours.read(i)) for i in range(len(ours))]
    undecoded = theirs.cast_column("image", datasets.Image(decode=False))["image"]
    assert [image["bytes"] for image in undecoded] == [ours.read(i) for i in range(len(ours))]


@pytest.mark.parametrize("rows_in_batch", [1, 4, 1000])
def test_a_file_that_datasets_wrote_is_a_split(rows_in_batch, originals, tmp_path):
    whole = hugging_face(originals)["train"]
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


def test_bad_images_are_left_out_and_named(originals, tmp_path, capsys):
    image_folder(tmp_path / "source", originals)
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


def test_the_manifest_counts_every_class_and_the_checksums_are_those_of_sha256sum(originals, tmp_path):
    image_folder(tmp_path / "source", originals)
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


def test_members_with_hostile_paths_and_links_are_passed_over_and_nothing_is_written_outside(originals, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/photo.JPEG").write_bytes(original(0))
    hostile = ["../../train/n01440764/up.JPEG", "/train/n01440764/absolute.JPEG", "train/../../n01440764/out.JPEG"]
    hostile += ["C:/train/n01440764/drive.JPEG", "..\\train\\n01440764\\back.JPEG"]
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as archive, tarfile.open(tmp_path / "hostile.tar", "w") as tar:
        for split in originals:
            for wnid, name, content in images_of(originals[split]):
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


def test_what_is_missing_is_said(originals, tmp_path):
    def refused(source, reason):
        with pytest.raises(DataError, match=reason):
            forms.open_source(source)

    refused(tmp_path / "nowhere", "there is no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"(?s)no images in train/<class>/.*knows these forms")
    (tmp_path / "tars").mkdir()
    official(tmp_path / "tars", originals)
    refused(tmp_path / "tars" / forms.TRAIN_TAR, "name the folder that holds them")
    (tmp_path / "tars" / forms.DEVKIT).unlink()
    refused(tmp_path / "tars", f"missing: {forms.DEVKIT}")
    flat_val_with_devkit(tmp_path / "flat", originals)
    (tmp_path / "flat" / forms.DEVKIT).unlink()
    refused(tmp_path / "flat", "is flat: its labels are in LOC_val_solution.csv")
    (tmp_path / "shards").mkdir()
    parquet(tmp_path / "shards", originals)
    (tmp_path / "shards/train-00001-of-00002.parquet").unlink()
    refused(tmp_path / "shards", "1 of the 2 files like train-00000.*; number 1 is missing")
    write_files(tmp_path / "half", {"train/cat/1.JPEG": original(1)})
    refused(tmp_path / "half", "validation images are needed")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "no archive of a known form")


def test_a_damaged_archive_is_said_and_a_damaged_member_is_named(originals, tmp_path):
    (tmp_path / "tars").mkdir()
    official(tmp_path / "tars", originals)
    tar = tmp_path / "tars" / forms.TRAIN_TAR
    tar.write_bytes(tar.read_bytes()[:-60_000])
    with pytest.raises(DataError, match="cut off|damaged"):
        forms.open_source(tmp_path / "tars")
    path = kaggle_zip(tmp_path, originals)
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
def test_a_disk_that_cannot_hold_it_is_refused_before_the_start(originals, tmp_path):
    image_folder(tmp_path / "source", originals)
    source = forms.open_source(tmp_path / "source")
    source.splits["train"] = source.splits["train"] * 2_000_000
    with pytest.raises(DataError, match="free, and about .* GB are needed.*lower --shorter-side"):
        packing.announce(source, packing.Packing(tmp_path, packed_jpeg, 352, 90, 1))


def test_what_a_data_set_says_that_it_holds_must_be_there(originals, tmp_path):
    def refused(source, reason):
        with pytest.raises(DataError, match=reason):
            forms.open_source(source, forms.Options(tmp_path / "scratch"))

    def made(form, *unwanted, **changed):
        folder = tmp_path / f"{form.__name__} {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        form(folder, originals)
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


def test_parquet_columns_are_asked_for_where_they_do_not_tell(originals, tmp_path):
    (tmp_path / "source").mkdir()
    parquet_without_metadata(tmp_path / "source", originals)
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


# Interruptions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_work(tmp_path_factory):
    """An ImageFolder of 2,600 training images, that is 6 pieces; (folder, checksums of its preparation, its destination)."""
    folder = tmp_path_factory.mktemp("long")
    images = [encoded(photo(130, 150, seed), quality=85) for seed in range(20)]
    for split, count in (("train", 1300), ("val", 20)):
        for name in ("cat", "dog"):
            write_files(folder / "source", {f"{split}/{name}/{n:05d}.JPEG": images[n % 20] for n in range(count)})
    assert prepare(folder / "source", folder / "whole", "--shorter-side=96") == 0
    return folder / "source", folder / "whole"


def arguments_for(long_work, destination):
    return [long_work[0], destination, "--shorter-side=96", "--num-workers=2"]


def wait_for_a_piece(process, destination):
    """Wait until the journal of the training images has grown."""
    journal = destination / ".train.arrow.journal"
    size = journal.stat().st_size if journal.exists() else 100
    while not journal.exists() or journal.stat().st_size <= size:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def assert_same_files(destination, long_work):
    for name in ("train.arrow", "val.arrow", "SHA256SUMS"):
        assert (destination / name).read_bytes() == (long_work[1] / name).read_bytes(), name


def test_killed_again_and_again_it_ends_with_the_same_files(long_work, tmp_path):
    destination = tmp_path / "packed"
    for _ in range(3):
        process = start_program("prepare_data.py", arguments_for(long_work, destination), start_new_session=True)
        wait_for_a_piece(process, destination)
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        assert not (destination / "train.arrow").exists()
    status, output = run_program("prepare_data.py", arguments_for(long_work, destination))
    assert status == 0, output
    assert "train: going on after " in output
    assert_same_files(destination, long_work)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_with_a_word_and_the_same_command_goes_on(number, long_work, tmp_path):
    destination = tmp_path / "packed"
    process = start_program("prepare_data.py", arguments_for(long_work, destination), start_new_session=True)
    wait_for_a_piece(process, destination)
    os.killpg(process.pid, number)
    status, output = finish(process)
    assert status == 128 + number, output
    assert "The same command goes on from here" in output
    assert "Traceback" not in output
    assert run_program("prepare_data.py", arguments_for(long_work, destination))[0] == 0
    assert_same_files(destination, long_work)


def test_a_killed_worker_ends_it_with_a_word(long_work, tmp_path):
    destination = tmp_path / "packed"
    process = start_program("prepare_data.py", arguments_for(long_work, destination))
    wait_for_a_piece(process, destination)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    status, output = finish(process)
    assert status == 1, output
    assert "a worker process was killed" in output
    assert "Traceback" not in output


def test_a_full_disk_ends_it_with_a_word_and_the_same_command_goes_on(long_work, tmp_path):
    destination, limit = tmp_path / "packed", (long_work[1] / "train.arrow").stat().st_size // 2
    process = start_program(
        "prepare_data.py",
        arguments_for(long_work, destination),
        file_size_limit=limit,
    )
    status, output = finish(process)
    assert status == 1, output
    assert "File too large" in output
    assert "Traceback" not in output
    assert run_program("prepare_data.py", arguments_for(long_work, destination))[0] == 0
    assert_same_files(destination, long_work)


def test_what_was_prepared_before_is_kept_unless_told_otherwise(originals, long_work, tmp_path, capsys):
    destination = tmp_path / "packed"
    shutil.copytree(long_work[1], destination)
    assert prepare(long_work[0], destination, "--shorter-side=96") == 0
    assert "prepared already" in capsys.readouterr().out
    with pytest.raises(DataError, match="--overwrite"):
        prepare(long_work[0], destination, "--shorter-side=80")
    image_folder(tmp_path / "other", originals)
    with pytest.raises(DataError, match="--overwrite"):
        prepare(tmp_path / "other", destination)
    assert_same_files(destination, long_work)
    assert prepare(tmp_path / "other", destination, "--overwrite") == 0
    assert len(PackedSplit(destination / "train.arrow")) == 15


def test_an_unfinished_preparation_of_other_images_is_not_mixed_with_this_one(originals, long_work, tmp_path):
    destination = tmp_path / "packed"
    process = start_program("prepare_data.py", arguments_for(long_work, destination), start_new_session=True)
    wait_for_a_piece(process, destination)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    with pytest.raises(DataError, match="is being prepared"):
        open_splits(destination)
    image_folder(tmp_path / "other", originals)
    with pytest.raises(DataError, match="another preparation"):
        prepare(tmp_path / "other", destination)


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
def test_facts_of_other_programs_that_cannot_be_understood_are_refused_by_name(content, originals, tmp_path):
    import pyarrow.parquet

    def refused(folder, file):
        with pytest.raises(DataError, match=file):
            forms.open_source(folder)

    folders = {name: tmp_path / name for name in ("state", "info", "parquet", "shards")}
    for folder in folders.values():
        folder.mkdir()
    for name, file in (("state", "train/state.json"), ("info", "train/dataset_info.json")):
        saved_by_datasets(folders[name], originals)
        (folders[name] / file).write_bytes(content)
        refused(folders[name], file)
    table = pyarrow.table({"image": [b"1"], "label": [0]}).replace_schema_metadata({"huggingface": content or b"{"})
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(table, folders["parquet"] / f"{split}-00000-of-00001.parquet")
    refused(folders["parquet"], "train-00000-of-00001.parquet is damaged")
    webdataset(folders["shards"], originals, label=lambda wnid: ("json", content or b"{"))
    no_label = content.startswith(b"{")  # but facts, as some samples have
    refused(folders["shards"], "no train images with a label" if no_label else "0000.tar holds a label that cannot be read")


def test_labels_that_number_something_else_do_not_become_a_thousand_million_classes(originals, tmp_path):
    webdataset(tmp_path, originals, label=lambda wnid: ("cls", str(10**9 + WNIDS.index(wnid)).encode()))
    with pytest.raises(DataError, match="the labels go up to 1000000002: they number something else"):
        forms.open_source(tmp_path)


@pytest.mark.parametrize("label", [[1], {"a": 1}, 1.5])
def test_a_label_that_is_neither_number_nor_name_is_refused(label, originals, tmp_path):
    webdataset(tmp_path, originals, label=lambda wnid: ("json", json.dumps({"label": label}).encode()))
    with pytest.raises(DataError, match="a number or a name is expected, not"):
        forms.open_source(tmp_path)
