"""What a run's configuration takes from the size of its data set: config['size_rule']."""

import contextlib

import numpy as np

from engine.cli.command_line import with_averaging_rate
from engine.cli.keys import ConfigError, config_problems
from engine.data.images import image_size

# BiT-HyperRule (arXiv:1912.11370, section 3.3; google-research/big_transfer, bit_hyperrule.py): steps of BIT_BATCH images,
# those that warm up, and mixup's alpha, below so many training images. The rate's fall is a cosine here, not three drops.
BIT_BATCH = 512
BIT_RULE = ((20_000, 500, 100, 0.0), (500_000, 10_000, 500, 0.1), (float("inf"), 20_000, 500, 0.1))
BIT_SMALL = 96 * 96  # px; images of less are small: resized to 160 px, cropped to 128
SAMPLE = 100  # images that tell the size
MOST_EPOCHS = 100  # each one ends with validation and a checkpoint
ALWAYS_OF_RULE = ("epochs", "warmup_epochs", "mixup_alpha")
OF_RULE = (*ALWAYS_OF_RULE, "learning_rate", "train_resolution", "val_resolution", "val_crop_ratio")
HIGHEST_RATE = 0.1  # per 256 images, of training from scratch (arXiv:1706.02677)


def adapted(command, config, images):
    """Return (config, lines): a new run's configuration with what its size_rule says and no flag does; lines to be logged.

    Args:
        images: the split for training.
    Raises:
        ConfigError: the flags do not go with it.
    """
    if config["size_rule"] == "none":
        return config, []
    _, steps, warmup_steps, mixup = next(row for row in BIT_RULE if len(images) < row[0])
    epochs = min(max(1, round(steps * BIT_BATCH / len(images))), MOST_EPOCHS)
    if "epochs" in command.given:
        epochs = config["epochs"]
    values = {"epochs": epochs, "warmup_epochs": epochs * warmup_steps / steps, "mixup_alpha": mixup}
    if "learning_rate" not in command.given:
        values |= rate_for_length(config, len(images), epochs)
    if median_area(images) < BIT_SMALL:
        values |= {"train_resolution": 128, "val_resolution": 128, "val_crop_ratio": 128 / 160}
    values = {key: value for key, value in values.items() if key not in command.given}
    config = with_averaging_rate(config | values, command.recipe, command.given)
    if problems := config_problems(config):
        raise ConfigError(problems)
    return config, [rule_in_words(command, config, len(images))]


def rule_in_words(command, config, images, by_budget=False):
    """Return a line on what a run has from its size_rule.

    Args:
        config: the run's, final but for a rate that is found.
        images: their number.
        by_budget: whether its epochs are a budget's; given ones are not the rule's either.
    """
    values = {key: config[key] for key in OF_RULE if key in ALWAYS_OF_RULE or config[key] != command.config[key]}
    length = ""
    if by_budget or "epochs" in command.given:
        length = f" in {values.pop('epochs')} epochs"
    shown = ", ".join(f"{key} = {value:.4g}" for key, value in values.items() if key not in command.given)
    return f"size_rule: for {images:,} images{length} {shown} (BiT-HyperRule, arXiv:1912.11370); flags set them otherwise"


def rate_for_length(config, images, epochs):
    """Return {'learning_rate': ...} for a run that is shorter than the rule's; {} for one that is not.

    The product of rate and steps stays the rule's, up to HIGHEST_RATE: weights move by so much that a short run at the rule's
    rate would not get there. This is no part of BiT-HyperRule.

    Args:
        images: their number; epochs: of the run.
    """
    if config["size_rule"] == "none":
        return {}
    steps = next(row[1] for row in BIT_RULE if images < row[0])
    rate = config["learning_rate"] * steps * BIT_BATCH / (epochs * images)
    rate = min(rate, HIGHEST_RATE * (1 if config["scale_learning_rate"] else config["batch_size"] / 256))
    return {"learning_rate": rate} if rate > 1.05 * config["learning_rate"] else {}  # less comes from whole epochs


def median_area(images):
    """Return the median number of pixels of some images of a split, evenly spaced; those that cannot be read are left out."""
    areas = []
    for index in np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int):
        with contextlib.suppress(Exception):  # an unreadable one is named where it is trained on
            height, width = image_size(images.read(index))
            areas.append(height * width)
    return float(np.median(areas)) if areas else float("inf")
