"""Labels count in the order of the network's outputs where that is certain; else the order is asked for."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import encoded, photo, run_here, run_program, tiny_run
from conftest import figures as run_figures
from test_evaluate import evaluated, figures

from engine.inference.class_matching import match_classes, read_class_file
from engine.preparation import finding
from engine.preparation.finding import ImageFolder, Labelled
from engine.preparation.names import class_order
from engine.system.errors import DataError

WNIDS = [f"n{number:08d}" for number in range(1_440_764, 1_441_764)]


def images_of(classes):
    """A split with one image of each class, in the order in which files are found."""
    classes = class_order(classes)
    return ImageFolder("nowhere", Labelled(classes, [f"{name}/1.jpg" for name in classes], list(range(len(classes)))))


def outputs_of(images, known, outputs, said=None):
    """{class's folder: the output that its image counts for}"""
    match_classes(images, known, outputs, "w.pt", "data", (said if said is not None else []).append)
    return {images.name(i).split("/")[0]: int(images.labels[i]) for i in range(len(images))}


def test_classes_of_the_same_names_are_matched_by_name():
    said = []
    assert outputs_of(images_of(["cat", "dog"]), ["dog", "emu", "cat"], 3, said) == {"cat": 2, "dog": 0}
    assert said == ["note: data holds images of 2 of the 3 classes that w.pt tells apart"]
    with pytest.raises(DataError, match=r"unknown: yak.*--classes FILE"):
        outputs_of(images_of(["cat", "yak"]), ["dog", "emu", "cat"], 3)


def test_weights_without_names_are_matched_where_it_is_certain():
    said = []
    numbers = [str(n) for n in range(12)]
    assert outputs_of(images_of(numbers), None, 12, said) == {name: int(name) for name in numbers}
    assert outputs_of(images_of(WNIDS), None, 1000, said) == {wnid: n for n, wnid in enumerate(WNIDS)}
    assert outputs_of(images_of([f"{n:03d}" for n in range(1000)]), None, 1000, said)["010"] == 10
    assert [("numbers" in line, "sorted wnids" in line) for line in said] == [(True, False), (False, True), (True, False)]


def test_imagenets_wnids_and_its_numbers_are_each_others():
    numbers = [str(n) for n in range(1000)]
    assert outputs_of(images_of(numbers), WNIDS, 1000)["999"] == 999
    assert outputs_of(images_of(WNIDS), numbers, 1000)[WNIDS[10]] == 10
    text_order = sorted(numbers)  # of a run that was trained when numbers were sorted as text
    assert outputs_of(images_of(numbers), text_order, 1000)["10"] == text_order.index("10")


@pytest.mark.parametrize(
    ("classes", "outputs"),
    [
        (["cat", "dog"], 2),
        ([str(n) for n in range(1, 13)], 12),
        ([str(n) for n in range(12)], 1000),
        (WNIDS[:12], 12),
        (WNIDS[:10], 1000),
    ],
    ids=["words", "numbers from 1", "some numbers", "wnids of a subset", "a subset"],
)
def test_what_is_not_certain_is_refused_with_a_way_out(classes, outputs):
    with pytest.raises(DataError, match="--classes FILE"):
        outputs_of(images_of(classes), None, outputs)


def test_a_file_of_classes_must_name_every_output_once(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("Käfer\n\ncat\n", "utf-8")
    assert read_class_file(path, 2) == ["Käfer", "cat"]
    path.write_text("Käfer\ncat\n", "utf-8-sig")  # as Windows' editors save it
    assert read_class_file(path, 2) == ["Käfer", "cat"]
    for text, reason in (("a\n", "names 1 classes; the network has 2"), ("a\na\n", "names 2 classes, 1 of them different")):
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            read_class_file(path, 2)
    with pytest.raises(DataError, match="cannot be read"):
        read_class_file(tmp_path / "nowhere", 2)


# On real images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def always_10(tmp_path_factory):
    """(weights of a network that always says 10 of 12, a folder with val/0 to val/11: 5 of 16 images are in val/10)."""
    folder = tmp_path_factory.mktemp("always")
    network = torchvision.models.resnet18(num_classes=12)
    torch.nn.init.zeros_(network.fc.weight)
    with torch.no_grad():
        network.fc.bias.copy_(torch.eye(12)[10])
    torch.save(network.state_dict(), folder / "always_10.pt")
    for name, count in zip(range(12), np.where(np.arange(12) == 10, 5, 1), strict=True):
        (folder / f"val/{name}").mkdir(parents=True)
        for n in range(count):
            (folder / f"val/{name}/{n}.jpg").write_bytes(encoded(photo(40, 48, seed=n)))
    return folder / "always_10.pt", folder


@pytest.mark.usefixtures("whole_network")
def test_numbered_folders_are_scored_as_numbers_without_training_images(always_10, capsys):
    weights, folder = always_10
    for where in (folder, folder / "val"):  # the folder of class folders itself will do, too
        assert evaluated(weights, "--architecture=resnet18", "--resolution=32", f"--data-dir={where}") == 0
        said = capsys.readouterr().out
        assert figures(said)[0] == 31.25
        assert "numbers in" in said


@pytest.mark.usefixtures("whole_network")
def test_a_file_of_classes_decides(always_10, tmp_path, capsys):
    weights, folder = always_10
    names = [str(n) for n in range(12)]
    names[10], names[3] = names[3], names[10]  # output 10 is the class 3
    (tmp_path / "classes.txt").write_text("\n".join(names))
    flags = ["--architecture=resnet18", "--resolution=32", f"--data-dir={folder}", f"--classes={tmp_path / 'classes.txt'}"]
    assert evaluated(weights, *flags) == 0
    assert figures(capsys.readouterr().out)[0] == 6.25
    assert evaluated(weights, *flags, "--classify", folder / "val/10/0.jpg") == 0
    assert re.search(r": [\d.]+ % (\w+);", capsys.readouterr().out)[1] == "3"


def test_a_run_that_began_with_numbers_in_the_order_of_text_goes_on_with_the_same_bits(tmp_path, monkeypatch, capsys):
    for split, count in (("train", 2), ("val", 1)):
        for name in range(12):
            (tmp_path / f"images/{split}/{name}").mkdir(parents=True)
            for n in range(count):
                (tmp_path / f"images/{split}/{name}/{n}.jpg").write_bytes(encoded(photo(40, 48, seed=100 * name + n)))
    with monkeypatch.context() as before:
        before.setattr(finding, "class_order", sorted)
        changes = {"epochs": 2, "swa_start_epoch": 0, "checkpoint_every_epochs": 1}
        assert run_here(tiny_run(tmp_path / "images", tmp_path / "old", **changes)) == 0
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "old/epoch_001.pt", tmp_path / "new")
    assert run_here(["--resume", str(tmp_path / "new/epoch_001.pt"), f"--log-file={tmp_path / 'new.log'}"]) == 0
    assert "the classes stay in the order that the run recorded" in capsys.readouterr().out
    old, new = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("old", "new"))
    assert old["classes"] == new["classes"] == sorted(str(n) for n in range(12))
    assert all(torch.equal(old["model"][key], new["model"][key]) for key in old["model"])
    assert run_figures(tmp_path / "old")[1] == run_figures(tmp_path / "new")[0]
    assert evaluated(tmp_path / "new/last.pt", "--weights=raw") == 0  # by the recorded order as well
    top1 = run_figures(tmp_path / "new")[0]["val_top1"]
    assert figures(capsys.readouterr().out.splitlines()[-1])[0] == pytest.approx(top1, abs=0.01)


@pytest.mark.usefixtures("whole_network")
def test_networks_that_order_their_classes_differently_have_no_ensemble(always_10, tmp_path, capsys):
    pytest.importorskip("safetensors")
    weights, folder = always_10
    names = [str(n) for n in range(12)]
    (tmp_path / "first.txt").write_text("\n".join(names))
    flags = ["--architecture=resnet18", "--resolution=32", f"--data-dir={folder}"]
    named = [weights, "--architecture=resnet18", "--export"]
    assert evaluated(*named, tmp_path / "named.safetensors", f"--classes={tmp_path / 'first.txt'}") == 0
    assert evaluated(weights, tmp_path / "named.safetensors", *flags) == 0  # one is certain, one named: the same
    assert "ensemble of 2: top-1 31.25 %" in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("\n".join(names[::-1]))
    assert evaluated(*named, tmp_path / "other.safetensors", f"--classes={tmp_path / 'other.txt'}") == 0
    with pytest.raises(DataError, match="know other classes, or in another order"):
        evaluated(weights, tmp_path / "other.safetensors", *flags)


@pytest.mark.usefixtures("whole_network")
def test_evaluation_without_images_names_what_is_missing(always_10, tmp_path):
    weights, _ = always_10
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="neither val.arrow nor a folder val"):
        evaluated(weights, "--architecture=resnet18", f"--data-dir={tmp_path}")


@pytest.mark.usefixtures("whole_network")
def test_classifying_nothing_is_no_success(always_10, tmp_path):
    weights, folder = always_10
    (tmp_path / "empty/.hidden").mkdir(parents=True)
    (tmp_path / "empty/.hidden/1.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    flags = [weights, "--architecture=resnet18", "--resolution", 32, "--device=cpu", "--classify"]
    status, output = run_program("evaluate.py", [*flags, tmp_path / "empty", tmp_path / "pipe.jpg"])
    assert status == 1
    assert "no image was classified in" in output
    assert "hidden or made by the system: 1" in output
    assert f"skipped {tmp_path / 'pipe.jpg'} (no regular file)" in output
