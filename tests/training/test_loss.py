"""Losses do what their sources say, on real tensors."""

import math

import pytest
import torch
import torch.nn.functional as F

from config import CONFIG
from engine.cli.command_line import parse_command_line
from engine.training.loss import main_class, training_loss
from model import build_model


@pytest.mark.parametrize("smoothing", [0.0, 0.08])
def test_bce_asks_each_class_a_question_and_sums_over_the_classes(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for number, logit in enumerate(row):
            share = (1 - smoothing) * (number == label) + smoothing / 5
            probability = 1 / (1 + math.exp(-logit))
            expected -= share * math.log(probability) + (1 - share) * math.log(1 - probability)
    config = CONFIG | {"loss": "bce", "label_smoothing": smoothing}
    assert training_loss(logits, labels, config).item() == pytest.approx(expected / 6, rel=1e-5)
    assert training_loss(logits, F.one_hot(labels, 5).float(), config).item() == pytest.approx(expected / 6, rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_mixed_targets_give_the_mixture_of_the_losses(loss):
    torch.manual_seed(0)
    logits, first, second = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.randint(0, 5, (6,))
    config = CONFIG | {"loss": loss, "label_smoothing": 0.1}
    mixed = 0.3 * F.one_hot(first, 5) + 0.7 * F.one_hot(second, 5)
    expected = 0.3 * training_loss(logits, first, config) + 0.7 * training_loss(logits, second, config)
    torch.testing.assert_close(training_loss(logits, mixed, config), expected)


def test_bce_starts_with_each_class_at_about_one_in_as_many():
    assert build_model(CONFIG | {"loss": "bce"}, 1000).fc.bias.tolist() == pytest.approx([-math.log(1000)] * 1000)
    assert build_model(CONFIG, 1000).fc.bias.tolist() == [0.0] * 1000


def test_top1_counts_the_class_that_a_mixed_image_is_most_about():
    assert main_class(torch.tensor([[0.4, 0.6], [0.9, 0.1]])).tolist() == [1, 0]
    assert main_class(torch.tensor([3, 1])).tolist() == [3, 1]


@pytest.mark.parametrize("flags", [["--nesterov=true"], ["--nesterov=true", "--optimizer=sgd", "--momentum=0"]])
def test_nesterov_without_sgds_momentum_is_refused(flags):
    with pytest.raises(ValueError, match="nesterov = True"):
        parse_command_line(flags)
