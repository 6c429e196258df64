"""The recipe finetune: a folder of one's own classes, split once and for all, and a run that suits its size."""

import hashlib
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import encoded, photo, run_here, tiny_run

import evaluate
import train
from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line, stretching_in_words
from engine.data.splits import open_splits
from engine.preparation.finding import ImageFolder, Labelled
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.system.errors import DataError
from engine.training import settling
from engine.training.size_rule import adapted, rate_for_length
from engine.training.trials import Trials


@pytest.fixture
def own_images(image_tree, tmp_path):
    """The class folders of the demo's training pictures alone: 6 of each of 10 classes."""
    return shutil.copytree(image_tree / "train", tmp_path / "my_images")


def names_of(split):
    return {split.name(index) for index in range(len(split))}


def test_a_share_of_each_class_validates_chosen_by_the_hash_of_its_names_alone(own_images, tmp_path):
    said = []
    splits = open_splits(own_images, log=said.append, val_share=0.3)
    everything = {f"{path.parent.name}/{path.name}" for path in own_images.glob("*/*")}
    train, val = names_of(splits["train"]), names_of(splits["val"])
    assert train | val == everything and not train & val
    assert "of its 60 images 20, val_share = 0.3 of each class" in said[0]
    for name in splits["val"].classes:
        of_class = sorted((hashlib.sha256(each.encode()).digest(), each) for each in everything if each.startswith(f"{name}/"))
        assert {each for _, each in of_class[:2]} == {each for each in val if each.startswith(f"{name}/")}  # 1.8 of 6
    shutil.rmtree(own_images / "dots_star")
    elsewhere = shutil.copytree(own_images, tmp_path / "elsewhere/train")
    fewer = open_splits(elsewhere.parent, log=said.append, val_share=0.3)  # another place, a class less, a folder train/
    assert names_of(fewer["val"]) == {name for name in val if not name.startswith("dots_star/")}


def test_a_class_of_one_image_trains_and_one_of_two_gives_one(own_images):
    for name, kept in (("dots_star", 1), ("dots_disc", 2)):
        for path in sorted((own_images / name).iterdir())[kept:]:
            path.unlink()
    said = []
    splits = open_splits(own_images, log=said.append, val_share=0.9)
    counts = {
        split: dict(zip(images.classes, np.bincount(images.labels, minlength=10), strict=True))
        for split, images in splits.items()
    }
    assert (counts["train"]["dots_star"], counts["val"]["dots_star"]) == (1, 0)
    assert (counts["train"]["dots_disc"], counts["val"]["dots_disc"]) == (1, 1)
    assert any("val has no images of 1 of the 10 classes: dots_star" in line for line in said)


def test_validation_images_of_its_own_are_never_mixed_with_the_others(image_tree, tmp_path):
    said = []
    mine, plain = open_splits(image_tree, log=said.append, val_share=0.5), open_splits(image_tree)
    assert [names_of(mine[split]) for split in mine] == [names_of(plain[split]) for split in plain]
    assert "val_share is not used" in said[0]
    shutil.copytree(image_tree / "val", tmp_path / "only/val")
    with pytest.raises(DataError, match="neither train.arrow nor a folder train"):
        open_splits(tmp_path / "only", val_share=0.5)


def test_a_folder_of_class_folders_without_a_share_is_refused_with_the_key(own_images):
    with pytest.raises(DataError, match="holds class folders alone: --val-share 0.2"):
        open_splits(own_images)


def test_evaluation_scores_the_split_off_images_alone_and_refuses_what_it_cannot_tell_apart(own_images, tmp_path, capsys):
    changes = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0, "val_share": 0.2}
    assert run_here(tiny_run(own_images, tmp_path / "run", **changes)) == 0
    (record,) = read_records(tmp_path / "run/metrics.jsonl")
    assert record["val_images"] == 10 and checkpoint_files.read(tmp_path / "run/last.pt")["train_images"] == 50

    def evaluated(*flags):
        capsys.readouterr()
        assert evaluate.main(evaluate.parse_arguments([str(tmp_path / "run/last.pt"), "--device=cpu", *map(str, flags)])) == 0
        return capsys.readouterr().out

    moved = shutil.copytree(own_images, tmp_path / "moved")
    for flags in ((), (f"--data-dir={moved}",)):
        said = evaluated(*flags)
        assert "never trained on" in said and "on 10 images" in said
        assert float(re.search(r"loss ([\d.]+)", said)[1]) == pytest.approx(record["val_loss"], abs=1e-4)
    (moved / "dots_star/new.jpg").write_bytes(encoded(photo(40, 48)))
    assert (
        "are scored, but the run's own" in (said := evaluated(f"--data-dir={moved}")) and "on 61 images" in said
    )  # another folder: a test set
    (own_images / "dots_star/new.jpg").write_bytes(encoded(photo(40, 48)))
    with pytest.raises(DataError, match="holds other images than when .* was trained"):
        evaluated()


# The size ------------------------------------------------------------------------------------------------------------


def command_of(*arguments):
    return parse_command_line(["--recipe=finetune", *arguments])


def images_like(count, tmp_path, side):
    """A split of so many images, all of them one file."""
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a/1.jpg").write_bytes(encoded(photo(side, side)))
    return ImageFolder(tmp_path, Labelled(["a"], ["a/1.jpg"] * count, [0] * count))


@pytest.mark.parametrize(
    ("count", "steps", "warmup_steps", "mixup"),
    [(10_000, 500, 100, 0.0), (100_000, 10_000, 500, 0.1), (500_000, 20_000, 500, 0.1)],
)
def test_the_length_warmup_and_mixup_are_those_of_bits_rule(count, steps, warmup_steps, mixup, tmp_path):
    command = command_of()
    config, (line,) = adapted(command, command.config, images_like(count, tmp_path, 96))
    assert config["epochs"] * count == pytest.approx(512 * steps, rel=0.05)
    assert config["warmup_epochs"] / config["epochs"] == pytest.approx(warmup_steps / steps)
    assert config["mixup_alpha"] == mixup
    assert config["train_resolution"] == config["val_resolution"] == 224
    assert f"epochs = {config['epochs']}" in line and "1912.11370" in line
    rate = config["learning_rate"] * config["batch_size"] / 256
    assert rate == pytest.approx(0.003 * config["batch_size"] / 512)


def test_small_images_are_cropped_at_128_of_160_px_and_flags_come_before_the_rule(tmp_path):
    command = command_of()
    config, _ = adapted(command, command.config, images_like(100, tmp_path, 95))
    assert (config["train_resolution"], config["val_resolution"], config["val_crop_ratio"]) == (128, 128, 0.8)
    assert (config["epochs"], config["warmup_epochs"]) == (100, 20)  # not 2,560
    assert config["learning_rate"] == pytest.approx(0.0015 * 25.6)
    command = command_of("--epochs=5", "--mixup-alpha=0.3", "--val-resolution=160")
    config, _ = adapted(command, command.config, images_like(100, tmp_path, 95))
    assert config["learning_rate"] == 0.1  # the highest: BiT's movement of the weights in 500 images is out of reach
    given = {"epochs": 5, "warmup_epochs": 1, "mixup_alpha": 0.3, "val_resolution": 160, "train_resolution": 128}
    assert {key: config[key] for key in given} == given
    for rate in ("auto", "0.02"):
        command = command_of(f"--learning-rate={rate}")
        assert str(adapted(command, command.config, images_like(100, tmp_path, 95))[0]["learning_rate"]) == rate
    assert adapted(command, CONFIG, images_like(100, tmp_path, 95)) == (CONFIG, [])


def test_a_shorter_run_gets_a_rate_in_proportion_and_a_given_one_stays():
    command = command_of()
    assert rate_for_length(command.config, 2_000, 64) == {"learning_rate": pytest.approx(0.003)}  # half of 256,000 images
    assert rate_for_length(command.config, 2_000, 128) == rate_for_length(command.config, 2_000, 500) == {}
    assert rate_for_length(CONFIG, 2_000, 1) == {}


@pytest.mark.parametrize(("count", "share"), [(300, 0.2), (30_000, 0.05), (600_000, 0.025)])
@pytest.mark.parametrize("flags", [["--hours=1.5"], ["--hours=1.5", "--warmup-epochs=0.5", "--learning-rate=0.01"]])
def test_a_budgets_epochs_keep_the_rules_share_of_warm_up_and_the_log_says_what_takes_place(count, share, flags, tmp_path):
    command = parse_command_line(["--recipe=finetune", "--images-per-s=282", "--device=cpu", *flags], train.OWN_FLAGS)
    splits, trials = (
        {"train": images_like(count, tmp_path, 96), "val": range(60)},
        Trials(None, None, 1, torch.device("cpu"), ""),
    )
    config, _, lines = settling.settle(command, command.config, None, splits, trials, None, 0.0)
    (line,) = (line for line in lines if line.startswith("size_rule"))
    assert f" in {config['epochs']} epochs " in line and "epochs = 100" not in line
    for key, value in (("warmup_epochs", share * config["epochs"]), ("learning_rate", None)):
        assert config[key] == command.given.get(key, pytest.approx(value or config[key]))
        told = key not in command.given and config[key] != command.config[key]
        assert (f" {key} = {config[key]:.4g}" in line) == told


def test_the_averaging_rate_follows_the_rate_of_the_size_rule(tmp_path):
    command, images = command_of("--epochs=10", "--swa-start-epoch=8"), images_like(100, tmp_path, 96)
    config, _ = adapted(command, command.config, images)
    assert config["swa_learning_rate"] == pytest.approx(config["learning_rate"] / 2) == pytest.approx(0.05)


def test_what_is_said_of_a_given_length_is_the_rule_alone(own_images, capsys):
    assert run_here(["--recipe=finetune", "--plan", "--images-per-s=9", "--hours=0.02", f"--data-dir={own_images}"]) == 0
    said = capsys.readouterr().out
    epochs = int(re.search(r"plan: (\d+) epochs", said)[1])
    assert f"images in {epochs} epochs warmup_epochs = {epochs / 5:.4g}, mixup_alpha = 0, learning_rate = 0.1" in said
    command = command_of("--epochs=40")
    assert stretching_in_words(command.recipe, command.config, command.given) is None


def test_what_a_newcomer_types_is_enough(own_images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    first = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0, "val_share": 0.2}
    assert run_here(tiny_run(own_images, tmp_path / "first", **first)) == 0
    export = [str(tmp_path / "first/last.pt"), "--export", "w.safetensors", "--device=cpu"]
    assert evaluate.main(evaluate.parse_arguments(export)) == 0
    for name in ("dots_disc", "dots_star", "waves_ring"):
        shutil.rmtree(own_images / name)
    capsys.readouterr()
    quick = ["--epochs=2", "--train-resolution=32", "--val-resolution=32", "--num-workers=0", "--device=cpu"]  # for this test
    assert run_here(["--recipe=finetune", f"--data-dir={own_images}", "--initial-weights=w.safetensors", *quick]) == 0
    said = capsys.readouterr().out
    assert "architecture = 'resnet18', as the initial weights have it" in said
    assert "the last layer begins anew (10 classes there, 7 here)" in said
    assert "recipe finetune: resnet18 on 35 images of 7 classes" in said
    checkpoint = torch.load("checkpoints/last.pt", weights_only=True)
    assert checkpoint["config"]["size_rule"] == RECIPES["finetune"]["size_rule"] == "bit"
    assert len(checkpoint["model"]["fc.weight"]) == 7
