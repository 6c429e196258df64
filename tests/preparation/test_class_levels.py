"""Folders that are no classes are not trained on as classes: one around all, or a split of another name, is refused."""

import shutil

import pytest
from conftest import run_here, tiny_run

from engine.data.splits import open_splits
from engine.system.errors import DataError


def write_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"image")
    return root


CLASSES = [f"{name}/{number}.jpg" for name in ("ant", "bee", "cat") for number in range(4)]


def below(*folders):
    return [f"{folder}/{path}" for folder in folders for path in CLASSES]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (below("photos"), r"one folder around them: --data-dir \S*/photos$"),
        ([*below("a/b"), "notes/read.me", "__MACOSX/a/1.jpg"], r"one folder around them: --data-dir \S*/a/b$"),
        (below("Train", "Test"), r"Test, Train look like splits, not classes: .* to train and val"),
        (below("TRAIN", "Val"), "TRAIN, Val look like splits"),
        (below("training", "testing"), "testing, training look like splits"),
        (below("a/Train", "a/Valid"), r"--data-dir \S*/a$"),
        ([*CLASSES, *below("Test")], "Test looks like a split"),
        (["train/1.jpg", "train/2.jpg", "val/3.jpg", "val/4.jpg", "labels.csv"], "outside of class folders"),
        (["Train/1.jpg", "Train/2.jpg", "Test/3.jpg", "Test/4.jpg"], r"Test, Train look like splits.*: sort .* train/<class>/"),
        (below("part1", "part2"), r"all 2 folders \(part1, part2\) hold folders alone \(part1/ant, .*\): .* a folder train"),
    ],
)
def test_folders_around_class_folders_are_not_taken_as_classes(files, reason, tmp_path):
    write_files(tmp_path / "W", *files)
    for share in (0.2, 0.0):  # without a share the advice would be to give one
        with pytest.raises(DataError, match=reason):
            open_splits(tmp_path / "W", val_share=share)


def test_a_split_under_another_name_beside_train_is_not_passed_over(tmp_path):
    write_files(tmp_path, *below("train", "Val"))
    with pytest.raises(DataError, match="Val looks like a split"):
        open_splits(tmp_path, val_share=0.2)


def test_nested_classes_that_the_rules_promise_are_read_as_before(tmp_path):
    cases = {
        "tiny-imagenet's": [path.replace("/", "/images/") for path in CLASSES],
        "mixed": [*CLASSES, "dog/old/1.jpg", "dog/new/1.jpg", "train of thought/1.jpg", "Test/1.jpg"],
        "said by train/": [f"train/{path}" for path in below("part1", "part2")],
    }
    counts = {"tiny-imagenet's": 3, "mixed": 6, "said by train/": 2}
    for name, files in cases.items():
        splits = open_splits(write_files(tmp_path / name, *files), log=lambda line: None, val_share=0.25)
        assert len(splits["train"].classes) == counts[name]
        assert len(splits["train"]) + len(splits["val"]) == len(files)


def test_a_run_on_one_class_is_refused_and_the_check_says_so(image_tree, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(image_tree / split, tmp_path / "W" / split / "photos")
    arguments = tiny_run(tmp_path / "W", tmp_path / "run")
    with pytest.raises(DataError, match="images of one class alone, 'photos': there is nothing to tell apart"):
        run_here(arguments)
    assert run_here([*arguments, "--check"]) == 1
    assert "of one class alone" in capsys.readouterr().out
    assert len(open_splits(tmp_path / "W", ("val",))["val"]) == 20  # a test set may be of one class


def test_a_runs_own_folders_are_refused_among_the_class_folders_before_they_are_made(image_tree, tmp_path, capsys, monkeypatch):
    images, away = shutil.copytree(image_tree / "train", tmp_path / "U"), tmp_path / "run"
    for key, value in (("checkpoint_dir", images / "run"), ("log_file", images / "logs/1.log"), ("mirror", images / "mirror")):
        arguments = tiny_run(images, away, val_share=0.2) + [f"--{key}={value}"]
        with pytest.raises(DataError, match=f"{key} = '{value}' lies among the class folders .*--{key.replace('_', '-')}$"):
            run_here(arguments)
        assert run_here([*arguments, "--check"]) == 1
        assert "this run would fail: folders" in capsys.readouterr().out
    monkeypatch.chdir(images)
    with pytest.raises(DataError, match="checkpoint_dir = 'checkpoints' lies among"):
        run_here(["--recipe=finetune", "--data-dir=."])
    assert sorted(path.name for path in images.iterdir()) == sorted(path.name for path in (image_tree / "train").iterdir())
    tree = shutil.copytree(image_tree, tmp_path / "tree")
    with pytest.raises(DataError, match="among the class folders"):
        run_here(tiny_run(tree, tree / "train/run", epochs=1, swa_start_epoch=0, log_file=tree / "1.log"))
    for _ in range(2):  # beside train/ and val/ there is room
        assert run_here([*tiny_run(tree, tree / "run", epochs=1, swa_start_epoch=0), "--overwrite"]) == 0
