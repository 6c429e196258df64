"""Losses and mixing do what their sources say, on real tensors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from config import CONFIG
from engine.cli.command_line import parse_command_line
from engine.training.loss import build_mixing, main_class, training_loss
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


def numbered_batch():
    """Eight images, each of one value, with as many labels."""
    labels = torch.arange(8)
    return (10.0 ** -labels.float()).view(8, 1, 1, 1).expand(8, 3, 32, 32).contiguous(), labels


def test_without_mixing_the_batch_stays_as_it_is():
    images, labels = numbered_batch()
    assert build_mixing(CONFIG, 8)(images, labels) == (images, labels)


def test_mixup_blends_images_as_it_blends_labels():
    torch.manual_seed(0)
    images, labels = numbered_batch()
    mixed, targets = build_mixing(CONFIG | {"mixup_alpha": 1.0}, 8)(images, labels)
    expected = torch.einsum("bc,cdhw->bdhw", targets, images)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert (targets > 0).sum(1).tolist() == [2] * 8


@pytest.mark.parametrize("key", ["mixup_alpha", "cutmix_alpha"])
def test_mixing_gives_torchvisions_values_and_keeps_channels_last(key):
    kind = {"mixup_alpha": v2.MixUp, "cutmix_alpha": v2.CutMix}[key]
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(8)
    results = []
    for mix in (build_mixing(CONFIG | {key: 0.7}, 8), v2.RandomChoice([kind(alpha=0.7, num_classes=8)])):
        torch.manual_seed(2)
        results.append([mix(images, labels) for _ in range(3)])
    for (ours, our_targets), (theirs, their_targets) in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(our_targets, their_targets)
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_pastes_a_box_whose_area_is_the_labels_share():
    torch.manual_seed(1)
    images, labels = numbered_batch()
    shares = set()
    for _ in range(10):
        mixed, targets = build_mixing(CONFIG | {"cutmix_alpha": 1.0}, 8)(images, labels)
        for number in range(8):
            own = mixed[number] == images[number]
            assert own.float().mean().item() == pytest.approx(targets[number, number].item(), abs=1e-5)
            other = (~own[0]).nonzero()
            if len(other):
                (top, left), (bottom, right) = other.min(0).values.tolist(), other.max(0).values.tolist()
                assert len(other) == (bottom - top + 1) * (right - left + 1)  # one whole box
        shares.add(targets[0, 0].item())
    assert len(shares) > 3


def test_with_both_each_batch_gets_one_of_them():
    torch.manual_seed(0)
    images, labels = numbered_batch()
    mix = build_mixing(CONFIG | {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}, 8)
    pasted = [torch.isin(mix(images, labels)[0], images).all().item() for _ in range(40)]
    assert 8 < sum(pasted) < 32


def test_top1_counts_the_class_that_a_mixed_image_is_most_about():
    assert main_class(torch.tensor([[0.4, 0.6], [0.9, 0.1]])).tolist() == [1, 0]
    assert main_class(torch.tensor([3, 1])).tolist() == [3, 1]


@pytest.mark.parametrize("flags", [["--nesterov=true"], ["--nesterov=true", "--optimizer=sgd", "--momentum=0"]])
def test_nesterov_without_sgds_momentum_is_refused(flags):
    with pytest.raises(ValueError, match="nesterov = True"):
        parse_command_line(flags)
