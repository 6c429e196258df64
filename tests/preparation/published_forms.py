"""The published forms of ImageNet and of others, each built small of real files; and one call that prepares them."""

import csv
import io
import json
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
from conftest import encoded, photo
from PIL import Image

import prepare_data
from engine.preparation import forms

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


def make_originals():
    """{'train': {wnid: {name: bytes}}, 'val': ...}, the validation names without their class, as in ImageNet."""
    train = {wnid: {f"{wnid}_{n}.JPEG": original(n + 5 * c) for n in range(5)} for c, wnid in enumerate(WNIDS)}
    val = {wnid: {} for wnid in WNIDS}
    for number, wnid in enumerate([*reversed(WNIDS), *WNIDS], start=1):
        val[wnid][f"ILSVRC2012_val_{number:08d}.JPEG"] = original(100 + number)
    return {"train": train, "val": val}


ORIGINALS = make_originals()


def images_of(split):
    return [(wnid, name, content) for wnid, files in split.items() for name, content in files.items()]


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
