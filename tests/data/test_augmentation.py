"""Augmentations are those of their sources, and each image's are a pure function of (seed, epoch, index)."""

import numpy as np
import pytest
import torch
from conftest import photo
from torchvision.transforms import InterpolationMode, v2

from config import CONFIG
from engine.data.augmentation import augmented, build_augmentation
from engine.data.batches import training_requests
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.system.interruption import StopRequest

VIEW = photo(64, 64)
KINDS = {
    "randaugment": {"augmentation": "randaugment"},
    "composer_randaugment": {"augmentation": "composer_randaugment"},
    "trivialaugment": {"augmentation": "trivialaugment"},
    "jitter": {"color_jitter": 0.4},
    "erasing": {"random_erasing": 0.5},
    "everything": {"augmentation": "randaugment", "color_jitter": 0.4, "random_erasing": 0.25},
}


def test_without_augmentation_there_is_none():
    assert build_augmentation(CONFIG) is None


@pytest.mark.parametrize("kind", KINDS)
def test_augmented_views_are_uint8_of_the_same_size_and_differ_by_image(kind):
    transform = build_augmentation(CONFIG | KINDS[kind])
    views = [augmented(VIEW, transform, np.random.default_rng(seed)) for seed in range(12)]
    assert all((view.shape, view.dtype) == (VIEW.shape, np.uint8) for view in views)
    assert len({view.tobytes() for view in views}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_view_whatever_torchs_random_state(kind):
    transform = build_augmentation(CONFIG | KINDS[kind])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augmented(VIEW, transform, np.random.default_rng(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(augmented(VIEW, transform, np.random.default_rng(5)), first)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({"augmentation": "randaugment", "randaugment_ops": 3, "randaugment_magnitude": 12}, v2.RandAugment(3, 12)),
        ({"augmentation": "trivialaugment"}, v2.TrivialAugmentWide()),
        ({"color_jitter": 0.3}, v2.ColorJitter(0.3, 0.3, 0.3)),
    ],
)
def test_they_are_torchvisions_transforms(config, theirs):
    ours = build_augmentation(CONFIG | config)
    if hasattr(theirs, "interpolation"):
        theirs.interpolation = InterpolationMode.BILINEAR
    image = torch.from_numpy(VIEW).permute(2, 0, 1)
    for seed in range(10):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)


def test_erasing_paints_a_box_in_the_mean_colour_with_its_probability():
    transform = build_augmentation(CONFIG | {"random_erasing": 0.3})
    views = [augmented(VIEW, transform, np.random.default_rng(seed)) for seed in range(300)]
    erased = [view for view in views if not np.array_equal(view, VIEW)]
    assert 60 < len(erased) < 120
    for view in erased:
        rows, columns = np.nonzero((view != VIEW).any(axis=2))
        box = view[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == [124, 116, 104]).all()


@pytest.mark.parametrize("kind", ["everything", "composer_randaugment"])
def test_augmented_batches_do_not_depend_on_num_workers(kind, image_tree):
    changes = KINDS[kind] | {"train_resolution": 32, "batch_size": 8}
    seen = []
    for workers in (0, 1, 2):
        config = CONFIG | changes | {"num_workers": workers}
        server = BatchLoader(open_splits(image_tree), config, torch.device("cpu"), torch.float32, StopRequest(), print)
        requests = training_requests(server.splits["train"], config, epoch=1)
        seen.append(torch.cat([batch.images.clone() for batch in server.iterate(requests)]))
        server.close()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_validation_is_not_augmented(image_tree):
    plain, changed = (CONFIG | {"val_resolution": 32, "num_workers": 0} | changes for changes in ({}, KINDS["everything"]))
    batches = []
    for config in (plain, changed):
        server = BatchLoader(open_splits(image_tree), config, torch.device("cpu"), torch.float32, StopRequest(), print)
        batches.append(torch.cat([images for images, _ in server.validation()]))
    assert torch.equal(*batches)
