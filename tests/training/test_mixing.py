"""What a batch goes through as a whole does what its sources say, on real tensors."""

import pytest
import torch
from torchvision.transforms import v2

from config import CONFIG
from engine.training.compiling import random_batch
from engine.training.mixing import build_mixing, draw_kept_runs
from engine.training.trials import Trials


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


# ColOut --------------------------------------------------------------------------------------------------------------


def coordinates(height, width):
    """One image in channels-last whose channels hold each pixel's row and column, and a second one with 1000 added."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, rows]).float()
    return torch.stack([image, image + 1000]).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("share", "height", "width"), [(0.05, 176, 104), (0.5, 64, 64), (0.29, 100, 33)])
def test_colout_keeps_a_share_of_rows_and_columns_in_their_order_the_same_in_all_images(share, height, width):
    torch.manual_seed(0)
    images, labels = coordinates(height, width), torch.tensor([3, 1])
    mixed, targets = build_mixing(CONFIG | {"colout": share}, 8)(images, labels)
    assert targets is labels
    assert mixed.shape == (2, 3, int((1 - share) * height), int((1 - share) * width))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    rows, columns = mixed[0, 0, :, 0].long(), mixed[0, 1, 0].long()
    assert (rows.diff() > 0).all() and (columns.diff() > 0).all()
    assert torch.equal(mixed, images[:, :, rows[:, None], columns])
    again, _ = build_mixing(CONFIG | {"colout": share}, 8)(images, labels)
    assert not torch.equal(again, mixed)


def test_the_trial_of_the_compiler_is_of_the_size_that_the_step_gets():
    config = CONFIG | {"colout": 0.05, "batch_size": 4}
    images, labels = random_batch(config, 72, Trials(None, None, 10, torch.device("cpu"), "fp32"))
    mixed, _ = build_mixing(config, 8)(torch.zeros(4, 3, 72, 72).contiguous(memory_format=torch.channels_last), labels)
    assert (images.shape, images.stride()) == (mixed.shape, mixed.stride())


def test_colout_drops_each_row_equally_often():
    torch.manual_seed(0)
    kept = torch.zeros(20)
    for _ in range(2000):
        for first, length in draw_kept_runs(20, 15):
            kept[first : first + length] += 1
    assert kept.sum() == 2000 * 15
    assert (kept / 2000 - 0.75).abs().max() < 0.05  # five standard deviations


def test_colout_comes_before_mixup_and_draws_from_torchs_random_state():
    images, labels = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.arange(8)
    torch.manual_seed(5)
    fewer, _ = build_mixing(CONFIG | {"colout": 0.1}, 8)(images, labels)
    expected, expected_targets = build_mixing(CONFIG | {"mixup_alpha": 0.7}, 8)(fewer, labels)
    torch.manual_seed(5)
    mixed, targets = build_mixing(CONFIG | {"colout": 0.1, "mixup_alpha": 0.7}, 8)(images, labels)
    assert torch.equal(mixed, expected) and torch.equal(targets, expected_targets)
