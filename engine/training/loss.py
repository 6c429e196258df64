"""The training loss."""

import math

import torch.nn.functional as F


def training_loss(logits, targets, config, class_weights=None):
    """Return the mean loss of a batch, a scalar on its device.

    Args:
        logits: float32 [B, C].
        targets: int64 [B], or float [B, C] where images were mixed.
        config: `loss` cross_entropy, or bce: a yes-or-no question for each class, summed over the classes (arXiv:2110.00476);
            `label_smoothing` spreads that share of each target evenly over all classes.
        class_weights: float32 [C], what an image of each class counts, a mixed one by its shares; None: all the same.
    """
    if class_weights is not None:
        counts = class_weights[targets] if targets.ndim == 1 else targets.to(logits.dtype) @ class_weights
        return (_losses(logits, targets, config) * counts).mean()
    if config["loss"] == "cross_entropy":
        return F.cross_entropy(logits, targets, label_smoothing=config["label_smoothing"])
    shares = _smoothed_shares(logits, targets, config)
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="sum") / len(logits)


def _losses(logits, targets, config):
    """Return the loss of each image, [B]; arguments as of training_loss."""
    if config["loss"] == "cross_entropy":
        return F.cross_entropy(logits, targets, label_smoothing=config["label_smoothing"], reduction="none")
    shares = _smoothed_shares(logits, targets, config)
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="none").sum(dim=1)


def _smoothed_shares(logits, targets, config):
    num_classes = logits.shape[1]
    shares = F.one_hot(targets, num_classes).to(logits.dtype) if targets.ndim == 1 else targets.to(logits.dtype)
    return shares * (1 - config["label_smoothing"]) + config["label_smoothing"] / num_classes


def start_bias_for(loss, num_classes):
    """Return the last layer's first bias: under bce each class begins at a probability of about one in num_classes."""
    return -math.log(num_classes) if loss == "bce" else 0.0


def main_class(targets):
    """Return the class that each target is most about, int64 [B]."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)
