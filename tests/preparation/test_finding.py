"""The same tree gives the same images, labels and order in every program and in torchvision; what is left out is counted."""

import os
import socket
import tarfile
import tempfile
from pathlib import Path

import pytest
import torchvision
from conftest import encoded, finish, photo, start_python, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.splits import open_splits
from engine.preparation import forms
from engine.preparation.names import class_order, name_of, text_of
from engine.preparation.packed import PackedSplit, write_split
from engine.system.errors import DataError

# Random trees --------------------------------------------------------------------------------------------------------

LETTERS = st.sampled_from(
    ["a", "b", "B", "-", " ", "\\", "\\xe9", "é", "ü", "日", "\U0001f600", "\udce9", "\udcff", "'", "0", "10"]
)
STEMS = st.one_of(st.lists(LETTERS, min_size=1, max_size=4).map("".join), st.integers(0, 120).map(str))
FILES = st.tuples(STEMS, st.sampled_from([".jpg", ".JPEG", ".PnG", ".txt", "", ".jpg.part", ".webp"])).map("".join)
FOLDERS = st.recursive(
    st.fixed_dictionaries({"files": st.sets(FILES, max_size=3), "folders": st.just({})}),
    lambda inside: st.fixed_dictionaries(
        {"files": st.sets(FILES, max_size=3), "folders": st.dictionaries(st.one_of(STEMS, FILES), inside, max_size=2)}
    ),
    max_leaves=4,
)
SPLITS = st.fixed_dictionaries(
    {
        "names": st.one_of(
            st.sets(st.integers(0, 30).map(str), min_size=1, max_size=5), st.sets(STEMS, min_size=1, max_size=5)
        ),
        "train": st.lists(FOLDERS, min_size=5, max_size=5),
        "val": st.lists(FOLDERS, min_size=5, max_size=5),
    }
)


def write_tree(path, folder, numbers):
    os.makedirs(path, exist_ok=True)
    for name in folder["files"] - set(folder["folders"]):
        with open(os.path.join(path, os.fsencode(name)), "wb") as file:
            file.write(b"%d" % next(numbers))
    for name, inside in folder["folders"].items():
        write_tree(os.path.join(path, os.fsencode(name)), inside, numbers)


def tar_of(root):
    """A tar of a tree's train and val."""
    path = os.path.join(root, "tree.tar")
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as archive:
        for split in ("train", "val"):
            archive.add(os.path.join(root, split), split)
    return path


@settings(deadline=None, max_examples=60)
@given(SPLITS)
def test_all_programs_and_torchvision_see_the_same_images_labels_and_order(tree):
    pytest.importorskip("pyarrow")
    with tempfile.TemporaryDirectory() as root:
        numbers = iter(range(10**6))
        for split in ("train", "val"):
            for name, folder in zip(sorted(tree["names"]), tree[split], strict=False):
                at = os.path.join(os.fsencode(root), split.encode(), os.fsencode(name))
                write_tree(at, {"files": folder["files"] | {"0.jpg"}, "folders": folder["folders"]}, numbers)
        trained_on = open_splits(root, log=lambda line: None)
        prepared = forms.open_source(root)
        evaluated_on = open_splits(root, ("val",), log=lambda line: None)["val"]
        for split, ours in trained_on.items():
            theirs = torchvision.datasets.ImageFolder(os.path.join(root, split))
            assert ours.classes == [text_of(name) for name in class_order(theirs.classes)]
            samples = [(os.fsencode(path), text_of(theirs.classes[label])) for path, label in theirs.samples]
            samples.sort(key=lambda sample: ours.classes.index(sample[1]))  # stable: only classes that are numbers move
            ours_samples = [
                (os.path.join(ours.folder, os.fsencode(name_of(ours.name(i)))), ours.classes[ours.labels[i]])
                for i in range(len(ours))
            ]
            assert ours_samples == samples
            entries = prepared.splits[split]
            assert prepared.classes == ours.classes
            assert [entry.label for entry in entries] == ours.labels.tolist()
            assert [f"{ours.classes[entry.label]}/{entry.name}" for entry in entries] == [
                ours.name(i) for i in range(len(ours))
            ]
            assert [entry.place.read() for entry in entries] == [ours.read(i) for i in range(len(ours))]
            archived = forms.open_source(tar_of(root)).splits[split]
            assert [(entry.name, entry.label, entry.place.read()) for entry in archived] == [
                (entry.name, entry.label, entry.place.read()) for entry in entries
            ]
            rows = [(entry.place.read(), entry.name, entry.label) for entry in entries]
            write_split(Path(root) / "packed.arrow", rows, prepared.classes)
            packed = PackedSplit(Path(root) / "packed.arrow")
            assert [(packed.name(i), packed.read(i)) for i in range(len(packed))] == [
                (ours.name(i), ours.read(i)) for i in range(len(ours))
            ]
        assert [evaluated_on.name(i) for i in range(len(evaluated_on))] == [ours.name(i) for i in range(len(ours))]
        assert evaluated_on.labels.tolist() == ours.labels.tolist()


@given(st.one_of(st.binary(max_size=20), st.lists(LETTERS, max_size=6).map(lambda parts: os.fsencode("".join(parts)))))
def test_every_name_can_be_stored_and_printed_and_leads_back_to_its_bytes(content):
    name = content.decode("utf-8", "surrogateescape")
    text = text_of(name)
    text.encode()
    assert name_of(text) == name
    if text != name:
        assert "\\x" in text


def test_ordinary_names_are_their_own_text():
    for name in ("n01440764_1.JPEG", "Käfer/日本.jpg", "a\\b.jpg"):
        assert text_of(name) == name
    assert text_of("caf\udce9.jpg") == "caf\\xe9.jpg"
    assert text_of("a\\/\\xe9.jpg") == "a\\/\\x5cxe9.jpg"  # a path's text is its names' texts


# What is no image ----------------------------------------------------------------------------------------------------


def write_files(root, *names, content=b"image"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture
def odd_tree(tmp_path):
    """A tree of 2 classes with 2 images each in either split, and with all that is no image."""
    root = tmp_path / "odd"
    for split in ("train", "val"):
        write_files(root, *(f"{split}/{name}/{n}.jpg" for name in ("cat", "dog") for n in range(2)))
    train = root / "train"
    os.mkfifo(train / "cat/pipe.jpg")
    os.mkfifo(train / "pipe.jpg")
    server = socket.socket(socket.AF_UNIX)
    here = os.open(train / "dog", os.O_RDONLY)  # a socket's whole path may be no longer than about 100 bytes
    server.bind(f"/proc/self/fd/{here}/socket.jpg")
    server.close()
    os.close(here)
    (train / "cat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (train / "lost").symlink_to(tmp_path / "nowhere")
    (train / "dog/around").symlink_to(root)
    (train / "dog/folder.jpg").mkdir()
    write_files(root, "train/outside.jpg", "train/notes.txt", "train/cat/list.csv")
    write_files(root, "train/.ipynb_checkpoints/1.jpg", "train/@eaDir/cat/1.jpg", "train/__MACOSX/cat/._1.jpg")
    write_files(root, "train/cat/._0.jpg", "train/cat/Thumbs.db", "train/dog/@eaDir/0.jpg", "train/dog/.hidden/0.jpg")
    return root


def test_what_is_no_image_is_left_out_and_counted_aloud_by_every_program(odd_tree):
    said = []
    train = open_splits(odd_tree, log=said.append)["train"]
    assert [train.name(i) for i in range(len(train))] == ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]
    lines = {line.split(": ")[2]: line for line in said}
    assert {reason: int(line.split(": ")[3].split(" ")[0]) for reason, line in lines.items()} == {
        "hidden or made by the system": 7,
        "not named as images": 2,
        "not in a class folder": 1,
        "no regular file": 3,
        "a symbolic link that leads nowhere": 2,
        "a symbolic link to a folder around it": 1,
        "a folder that is named as an image": 1,
    }
    assert lines["no regular file"].startswith(
        "WARNING: left out of train: no regular file: 3 (train/pipe.jpg, train/cat/pipe.jpg"
    )
    assert lines["hidden or made by the system"].startswith("note: ")
    source = forms.open_source(odd_tree)
    assert sorted(source.remarks) == sorted(said)
    assert [entry.name for entry in source.splits["train"]] == ["0.jpg", "1.jpg", "0.jpg", "1.jpg"]


def test_links_are_followed_wherever_they_lead(tmp_path):
    write_files(tmp_path, *(f"whole/{split}/n0000000{n}/{n}.jpg" for split in ("train", "val") for n in range(4)))
    for split in ("train", "val"):
        (tmp_path / f"some/{split}").mkdir(parents=True)
        for n in (1, 3):
            (tmp_path / f"some/{split}/n0000000{n}").symlink_to(tmp_path / f"whole/{split}/n0000000{n}")
    write_files(tmp_path, "elsewhere.jpg", content=b"elsewhere")
    (tmp_path / "some/train/n00000001/link.jpg").symlink_to("../../../elsewhere.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "some")
    split = open_splits(tmp_path / "link")["train"]
    assert [split.name(i) for i in range(len(split))] == ["n00000001/1.jpg", "n00000001/link.jpg", "n00000003/3.jpg"]
    assert split.read(1) == b"elsewhere"
    assert [entry.place.read() for entry in forms.open_source(tmp_path / "some").splits["train"]][1] == b"elsewhere"


def test_a_link_round_about_ends(tmp_path):
    write_files(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "other/2.jpg")
    (tmp_path / "train/a/there").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "train/a")
    split = open_splits(tmp_path)["train"]
    assert [split.name(i) for i in range(len(split))] == ["a/1.jpg", "a/there/2.jpg"]


def test_two_trees_side_by_side_are_refused_and_a_single_one_is_found_below(tmp_path):
    write_files(tmp_path, "aa/train/cat/1.jpg", "aa/val/cat/1.jpg")
    for open_it in (open_splits, forms.open_source):
        open_it(tmp_path)
    write_files(tmp_path, "bb/train/cat/1.jpg", "bb/val/cat/1.jpg")
    for open_it in (open_splits, forms.open_source):
        with pytest.raises(DataError, match=r"more than one set of images \(aa/train, bb/train\)"):
            open_it(tmp_path)
    write_files(tmp_path, "aa/validation/cat/1.jpg")
    with pytest.raises(DataError, match=r"more than one set of images \(val, validation\)"):
        open_splits(tmp_path / "aa")


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_the_second_split_are_known_to_every_program_and_said(name, tmp_path):
    write_files(tmp_path, "train/cat/1.jpg", f"{name}/cat/2.jpg")
    said = []
    assert open_splits(tmp_path, log=said.append)["val"].name(0) == "cat/2.jpg"
    assert open_splits(tmp_path, ("val",))["val"].name(0) == "cat/2.jpg"
    assert forms.open_source(tmp_path).splits["val"][0].name == "2.jpg"
    assert said == [f"note: the validation images are those in {name}/"]


def test_a_class_of_one_split_alone_is_said_and_met_the_same_way_by_every_program(tmp_path):
    write_files(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/emu/1.jpg")
    said = []
    splits = open_splits(tmp_path, log=said.append)
    assert splits["val"].classes == splits["train"].classes == ["cat", "dog"]
    assert [splits["val"].name(i) for i in range(len(splits["val"]))] == ["cat/1.jpg"]
    unknown = "WARNING: left out of val: of a class without training images: 1 (val/emu/1.jpg)"
    assert said == [unknown, "WARNING: val has no images of 1 of the 2 classes: dog"]
    source = forms.open_source(tmp_path)
    assert (source.classes, len(source.splits["val"]), source.remarks) == (["cat", "dog"], 1, [unknown])
    assert open_splits(tmp_path, ("val",))["val"].classes == ["cat", "dog"]


def test_numbers_are_sorted_as_numbers_which_is_said(tmp_path):
    write_files(tmp_path, *(f"{split}/{n}/{n}.jpg" for split in ("train", "val") for n in range(12)))
    said = []
    split = open_splits(tmp_path, log=said.append)["val"]
    assert split.classes == [str(n) for n in range(12)]
    assert [split.read(i) and split.name(i) for i in range(12)] == [f"{n}/{n}.jpg" for n in range(12)]
    assert said == ["note: the classes' names are numbers, in the order of numbers: 0, 1, ... 11"]
    assert forms.open_source(tmp_path).classes == split.classes
    write_files(tmp_path, "train/x/1.jpg")
    assert open_splits(tmp_path)["train"].classes == sorted([*split.classes, "x"])


# Names that are not UTF-8, in real processes -------------------------------------------------------------------------

ALL_PROGRAMS = """
from engine.system.console import protect_output

protect_output()
import sys
import evaluate, prepare_data, train
from engine.cli.command_line import parse_command_line
from engine.system.errors import run_program
tree, packed, run, *flags = sys.argv[1:]
print("encoding", sys.stdout.encoding)
command = parse_command_line([*flags, "--data-dir", tree], train.OWN_FLAGS)
assert run_program("train.py", train.main, command) == 0
assert run_program("prepare_data.py", prepare_data.main, prepare_data.parse_arguments([tree, packed, "--num-workers=1"])) == 0
evaluations = [["--data-dir", tree, "--details", f"{run}/details"], ["--data-dir", packed], ["--classify", f"{tree}/val"]]
for arguments, status in zip(evaluations, (0, 0, 1)):
    arguments = evaluate.parse_arguments([f"{run}/last.pt", "--device=cpu", *arguments])
    assert run_program("evaluate.py", evaluate.main, arguments) == status
"""


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [({"LC_ALL": "C", "PYTHONUTF8": "0"}, "ascii"), ({"LC_ALL": "C.UTF-8"}, "utf-8")],
    ids=["ascii", "utf-8"],
)
@pytest.mark.slow
def test_names_of_any_bytes_go_through_every_program_in_any_locale(environment, encoding, tmp_path):
    tree = os.path.join(os.fsencode(tmp_path), b"tr\xe4e")
    classes = ["Käfer".encode(), b"caf\xe9", b"plain"]
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(classes):
            os.makedirs(os.path.join(tree, split.encode(), name))
            for n in range(count):
                with open(os.path.join(tree, split.encode(), name, b"%d\xff\xc3\xa9.jpg" % n), "wb") as file:
                    file.write(encoded(photo(40, 48, seed=10 * number + n)) if n != 3 else b"no image")
    with open(os.path.join(tree, b"val/caf\xe9/notes\xe9.txt"), "wb") as file:
        file.write(b"no image")
    run = tmp_path / "run"
    flags = tiny_run("", run, epochs=1, swa_start_epoch=0, batch_size=4, max_bad_images=9)[1:]
    process = start_python(
        ["-c", ALL_PROGRAMS, os.fsdecode(tree), tmp_path / "packed", run, *flags], environment=environment | {"PYTHONPATH": "."}
    )
    status, output = finish(process)
    assert status == 0, output
    assert f"encoding {encoding}" in output
    assert "Traceback" not in output
    assert "WARNING: left out of train: caf\\xe9/3\\xff" in output
    assert "skipped " in output and "notes\\xe9.txt" in output
    assert "bad image caf\\xe9/3\\xffé.jpg" in run.with_suffix(".log").read_text("utf-8")
    packed = PackedSplit(tmp_path / "packed/val.arrow")
    assert [os.fsencode(name_of(name)) for name in packed.classes] == classes
    assert [os.fsencode(name_of(packed.name(i))) for i in range(len(packed))] == [
        name + b"/%d\xff\xc3\xa9.jpg" % n for name in classes for n in range(2)
    ]
    assert "caf\\xe9" in (run / "details_classes.csv").read_text("utf-8")
