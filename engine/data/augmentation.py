"""What changes an image's colours and shapes in training, beyond crop and flip."""

import torch
from torchvision.transforms import InterpolationMode, v2

from engine.data.composer_randaugment import ComposerRandAugment
from engine.system.random_state import drawing_from

IMAGENET_MEAN_COLOUR = [124, 116, 104]  # which the normalisation turns into zeros


def build_augmentation(config):
    """Return the transform of a training view, uint8 [3, H, W] to the same, or None where the configuration names none.

    In the order of torchvision's reference: the policy (RandAugment arXiv:1909.13719, or MosaicML's; TrivialAugment
    arXiv:2103.10158), then colour jitter, then random erasing (arXiv:1708.04896).
    """
    transforms = []
    if config["augmentation"] == "randaugment":
        transforms.append(
            v2.RandAugment(
                num_ops=config["randaugment_ops"],
                magnitude=config["randaugment_magnitude"],
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    elif config["augmentation"] == "composer_randaugment":
        transforms.append(ComposerRandAugment(config["randaugment_ops"], config["randaugment_magnitude"]))
    elif config["augmentation"] == "trivialaugment":
        transforms.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    if jitter := config["color_jitter"]:
        transforms.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    if config["random_erasing"]:
        transforms.append(v2.RandomErasing(p=config["random_erasing"], value=IMAGENET_MEAN_COLOUR))
    return v2.Compose(transforms) if transforms else None


def augmented(view, transform, rng):
    """Return the view, uint8 [H, W, 3], after the transform, whose chances follow from the image's own generator.

    torch's random state stays as it was.
    """
    with drawing_from(int(rng.integers(2**63))):
        image = transform(torch.from_numpy(view).permute(2, 0, 1))
    return image.permute(1, 2, 0).numpy()
