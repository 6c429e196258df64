"""The part of a network that is not trained, and what is saved by that: config['freeze'].

Frozen is everything from the images up to and including a part. No gradient flows there and so nothing is kept for one; frozen
norms normalise by the statistics that they came with.
"""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

# Of a forward pass, the share of multiply-adds up to and including each part, at any resolution.
PARTS = ("stem", "layer1", "layer2", "layer3", "layer4")
SHARES = {
    "resnet18": (0.065, 0.320, 0.547, 0.773, 1.0),
    "resnet34": (0.032, 0.222, 0.460, 0.825, 1.0),
    "resnet50": (0.029, 0.192, 0.444, 0.802, 0.999),
    "resnet101": (0.015, 0.101, 0.232, 0.896, 1.0),
}


class FrozenBatchNorm2d(torch.nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode."""

    def train(self, mode=True):
        """Stay in evaluation mode."""
        return super().train(False)


def freeze(model, config):
    """Freeze the part of a network that config['freeze'] names, in place; its state-dict keys stay."""
    for part in PARTS[: _parts_frozen(config)]:
        for module in (model.conv1, model.bn1) if part == "stem" else (getattr(model, part),):
            module.requires_grad_(False)
            for norm in module.modules():
                if isinstance(norm, _BatchNorm):
                    norm.__class__ = FrozenBatchNorm2d  # hooks and tensors stay; several processes have nothing to agree on
                    norm.eval()


def least_frozen(configs):
    """Return the configuration, of several, that freezes the smallest part."""
    return min(configs, key=_parts_frozen)


def work_of_a_step(config):
    """Return the work of a training step in forward passes: 3 where nothing is frozen, as a backward pass counts for two."""
    parts = _parts_frozen(config)
    return 3 - 2 * SHARES[config["architecture"]][parts - 1] if parts else 3


def _parts_frozen(config):
    return 0 if config["freeze"] == "none" else PARTS.index(config["freeze"]) + 1
