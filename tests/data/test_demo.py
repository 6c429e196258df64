"""The demo's pictures have to be learned: a ResNet learns them, a linear classifier on the pixels does not."""

import os
import signal

import numpy as np
import pytest
import torch
from conftest import finish, run_program, start_program
from narrow import WHOLE
from PIL import Image

from engine.data.demo import CLASSES, COMPLETE, HARD_CLASSES, make_demo_data, picture
from engine.data.images import validation_view
from engine.data.splits import open_splits
from engine.system.errors import DataError


@pytest.fixture(scope="module")
def small_copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "images"
    make_demo_data(folder, 1500, 300)
    return folder


def test_it_is_a_balanced_image_folder_of_real_jpeg_files(small_copy):
    splits = open_splits(small_copy)
    assert splits["train"].classes == sorted(CLASSES)
    assert len(CLASSES) == 10
    assert set(np.bincount(splits["train"].labels)) == {150}
    assert set(np.bincount(splits["val"].labels)) == {30}
    with Image.open(small_copy / "train" / splits["train"].name(0)) as image:
        assert image.format == "JPEG"
        assert min(image.size) >= 80


def test_it_is_made_once_and_the_same_each_time(small_copy, tmp_path):
    assert make_demo_data(small_copy) is False
    make_demo_data(tmp_path / "again", 20, 10)
    for path in (tmp_path / "again/train").rglob("*.jpg"):
        assert path.read_bytes() == (small_copy / "train" / path.relative_to(tmp_path / "again/train")).read_bytes()


def test_the_hard_set_has_all_100_pairs_of_10_shapes_and_10_textures_of_any_size(tmp_path):
    assert len(set(HARD_CLASSES)) == 100
    make_demo_data(tmp_path / "hard", 200, 100, classes=HARD_CLASSES, sides=(40, 48))
    splits = open_splits(tmp_path / "hard")
    assert splits["train"].classes == sorted(HARD_CLASSES)
    assert set(np.bincount(splits["train"].labels)) == {2}
    with Image.open(tmp_path / "hard/val" / splits["val"].name(5)) as image:
        assert 40 <= min(image.size) <= max(image.size) <= 48


def test_no_two_classes_of_the_hard_set_are_drawn_alike():
    pictures = [picture(name, np.random.default_rng(0), (64, 64)).astype(int) for name in HARD_CLASSES]  # the same dice
    nearest = min(np.abs(a - b).mean() for n, a in enumerate(pictures) for b in pictures[:n])
    assert nearest > 0.1


def test_an_interrupted_making_leaves_nothing_half_done(tmp_path):
    folder = tmp_path / "images"
    unfinished = tmp_path / ".images.unfinished"
    (unfinished / "train").mkdir(parents=True)
    (unfinished / "train/remains.jpg").write_bytes(b"half")
    make_demo_data(folder, 10, 10)
    assert (folder / COMPLETE).exists()
    assert not unfinished.exists()
    assert not (folder / "train/remains.jpg").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="--data-dir"):
        make_demo_data(tmp_path / "mine")


def test_no_two_pictures_are_alike():
    first, second = (picture("dots_disc", np.random.default_rng(seed)) for seed in (1, 2))
    assert first.shape != second.shape or not np.array_equal(first, second)


def best_top1_of_a_linear_classifier(folder):
    """Return the best validation top-1, in percent, of linear classifiers on the pixels with several weight decays."""
    pixels, labels = {}, {}
    for name, split in open_splits(folder).items():
        views = [validation_view(split.read(i), 24, 0.875) for i in range(len(split))]
        pixels[name] = torch.from_numpy(np.stack(views)).flatten(1).float() / 127.5 - 1
        labels[name] = torch.from_numpy(split.labels)
    best = 0.0
    for weight_decay in (1e-3, 1e-1, 1.0):
        torch.manual_seed(0)
        linear = torch.nn.Linear(pixels["train"].shape[1], 10)
        optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3, weight_decay=weight_decay)
        for _ in range(300):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(pixels["train"]), labels["train"]).backward()
            optimizer.step()
        best = max(best, 100 * (linear(pixels["val"]).argmax(1) == labels["val"]).float().mean().item())
    return best


def best_top1_of_the_demo(arguments, cwd):
    """Return the best validation top-1, in percent, of a run of the demo recipe with the whole network on every core."""
    whole = {WHOLE: "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    status, output = run_program("train.py", ["--recipe", "demo", *arguments], cwd=cwd, timeout=1200, environment=whole)
    assert status == 0, output
    return float(output.split("best validation top-1 ")[1].split(" %")[0])


@pytest.mark.slow
def test_a_linear_classifier_on_the_raw_pixels_stays_below_40_percent(small_copy):
    assert best_top1_of_a_linear_classifier(small_copy) < 40


@pytest.mark.slow
def test_on_a_smaller_copy_a_network_reaches_80_percent_and_a_linear_classifier_stays_below_40(small_copy, tmp_path):
    arguments = [f"--data-dir={small_copy}", "--architecture=resnet18", "--epochs=14", "--swa-start-epoch=12"]
    assert best_top1_of_the_demo([*arguments, "--learning-rate=0.002", "--swa-learning-rate=0.0003"], tmp_path) >= 80
    assert best_top1_of_a_linear_classifier(small_copy) < 40


@pytest.mark.slow
def test_resnet50_learns_the_demo_to_80_percent(tmp_path):
    assert best_top1_of_the_demo([], tmp_path) >= 80


def test_ctrl_c_while_the_pictures_are_made_ends_with_one_line(tmp_path):
    process = start_program("train.py", ["--recipe", "demo"], cwd=tmp_path, start_new_session=True)
    while not list(tmp_path.glob("data/.demo.unfinished/train/*/*.jpg")):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    status, output = finish(process)
    assert status == 130, output
    assert "stopped before there was anything to save" in output
    assert "Traceback" not in output
    assert not (tmp_path / "data/demo").exists()
