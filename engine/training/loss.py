"""The training loss, and the mixing of a batch's images that changes its targets."""

import math

import torch.nn.functional as F
from torchvision.transforms import v2


def training_loss(logits, targets, config):
    """Return the mean loss of a batch, a scalar on its device.

    Args:
        logits: float32 [B, C].
        targets: int64 [B], or float [B, C] where images were mixed.
        config: `loss` cross_entropy, or bce: a yes-or-no question for each class, summed over the classes (arXiv:2110.00476);
            `label_smoothing` spreads that share of each target evenly over all classes.
    """
    if config["loss"] == "cross_entropy":
        return F.cross_entropy(logits, targets, label_smoothing=config["label_smoothing"])
    num_classes = logits.shape[1]
    shares = F.one_hot(targets, num_classes).to(logits.dtype) if targets.ndim == 1 else targets.to(logits.dtype)
    shares = shares * (1 - config["label_smoothing"]) + config["label_smoothing"] / num_classes
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="sum") / len(logits)


def start_bias_for(loss, num_classes):
    """Return the last layer's first bias: under bce each class begins at a probability of about one in num_classes."""
    return -math.log(num_classes) if loss == "bce" else 0.0


def build_mixing(config, num_classes):
    """Return the function (images [B, 3, H, W], labels int64 [B]) -> (images, targets) that a batch goes through.

    Mixup (arXiv:1710.09412) blends each image with another, cutmix (arXiv:1905.04899) pastes a box of another into it; with
    both, each batch gets one of them by chance. Targets become float [B, C]. It draws from torch's random state on the CPU,
    which checkpoints keep, and never waits for the device. Without either, labels stay as they are.
    """
    mixers = []
    if config["mixup_alpha"]:
        mixers.append(_in_channels_last(v2.MixUp(alpha=config["mixup_alpha"], num_classes=num_classes)))
    if config["cutmix_alpha"]:
        mixers.append(v2.CutMix(alpha=config["cutmix_alpha"], num_classes=num_classes))
    if not mixers:
        return lambda images, labels: (images, labels)
    return v2.RandomChoice(mixers)


def _in_channels_last(mixup):
    """Return mixup for images [B, 3, H, W] in channels-last: its roll would lay them out anew, so it gets [B, H, W, 3]."""

    def mix(images, labels):
        mixed, targets = mixup(images.permute(0, 2, 3, 1), labels)
        return mixed.permute(0, 3, 1, 2), targets

    return mix


def main_class(targets):
    """Return the class that each target is most about, int64 [B]."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)
