"""The preview shows what the network sees: the run's own first batch, pixel by pixel, with the names of its labels."""

import io

import numpy as np
import pytest
import torch
from conftest import run_here, tiny_run
from PIL import Image

import train
from engine.cli.command_line import parse_command_line
from engine.cli.keys import ConfigError
from engine.data.splits import open_splits
from engine.system.errors import TrainingStopped, UserError
from engine.training.preview import first_batch, label_in_words, pixels_of

MIXED = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "augmentation": "randaugment"}


def batch_of_the_run(arguments, monkeypatch, epoch=1):
    """The first batch that train_step gets in an epoch."""
    seen, step = [], train.train_step

    def first_step(state, images, targets, *rest):
        if state.epoch == epoch - 1:
            seen.append((images.clone(), targets.clone()))
            raise TrainingStopped("far enough")
        return step(state, images, targets, *rest)

    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        patch.setattr(train, "train_step", first_step)
        run_here(arguments)
    return seen[0]


@pytest.mark.parametrize("changes", [{}, MIXED, {"colout": 0.2, "train_resolution": 48}], ids=["plain", "mixed", "colout"])
def test_the_preview_is_the_first_batch_that_the_step_gets(image_tree, tmp_path, monkeypatch, changes):
    arguments = tiny_run(image_tree, tmp_path / "run", **changes)
    images, targets = batch_of_the_run(arguments, monkeypatch)
    config = parse_command_line(arguments, train.OWN_FLAGS).config
    shown, labels = first_batch(config, 1, open_splits(image_tree))
    assert torch.equal(shown, images) and torch.equal(labels, targets)


def test_the_picture_holds_the_batchs_pixels(image_tree, tmp_path, monkeypatch, capsys):
    arguments = tiny_run(image_tree, tmp_path / "run")
    images, _ = batch_of_the_run(arguments, monkeypatch, epoch=2)
    monkeypatch.chdir(tmp_path)
    assert run_here([*arguments, "--preview=2"]) == 0
    assert "wrote preview.png: epoch 2 of 3, first batch, 8 images: 32 px" in capsys.readouterr().out
    page = np.asarray(Image.open(io.BytesIO((tmp_path / "preview.png").read_bytes())))
    for image in pixels_of(images):
        corner = (page[:, :, None] == image[0, 0]).all(-1).squeeze()
        found = [page[y : y + 32, x : x + 32] for y, x in np.argwhere(corner)]
        assert any(cut.shape == image.shape and (cut == image).all() for cut in found)


def test_a_picture_that_cannot_or_must_not_be_written_is_refused_before_the_images_are_read(image_tree, tmp_path, monkeypatch):
    arguments = [*tiny_run(image_tree, tmp_path / "run"), "--preview"]
    monkeypatch.chdir(tmp_path)
    assert run_here(arguments) == run_here(arguments) == 0
    monkeypatch.setattr("engine.training.preview.open_images", lambda *arguments: pytest.fail("it began"))
    (tmp_path / "preview.png").write_text("my own")
    with pytest.raises(UserError, match="preview.png is there and was not written by this flag"):
        run_here(arguments)
    assert (tmp_path / "preview.png").read_text() == "my own"
    monkeypatch.chdir("/proc/self")
    with pytest.raises(UserError, match="--preview preview.png could not be written"):
        run_here(arguments)


def test_labels_have_names_and_mixed_ones_their_shares():
    classes = ["n1", "dog", "fox, red"], {"n1": "cat, tabby"}
    assert label_in_words(torch.tensor(1), *classes) == "dog"
    assert label_in_words(torch.tensor(0), *classes) == "cat, tabby"
    assert label_in_words(torch.tensor([0.7, 0.0, 0.3]), *classes) == "70 % cat\n30 % fox, red"
    assert label_in_words(torch.tensor([0.0, 1.0, 0.0]), *classes) == "dog"


@pytest.mark.parametrize(
    "flags", [["--preview=4"], ["--preview=0"], ["--preview=x"], ["--preview", "--resume=auto"], ["--check", "--preview"]]
)
def test_an_epoch_that_the_run_has_not_is_refused(image_tree, tmp_path, flags):
    with pytest.raises(ConfigError, match="--preview"):
        run_here([*tiny_run(image_tree, tmp_path / "run"), *flags])
