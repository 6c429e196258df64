"""Batch-norm statistics of weights that no step of a training has made."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def norms_of(model):
    """Return the model's batch norms, in order."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@torch.no_grad()
def recompute_bn_stats(averaged_model, device_batches, autocast):
    """Recompute the batch-norm statistics of the averaged weights, as the plain mean over the batches.

    Averaged weights need statistics of their own; a few hundred batches are enough. The same as swa_utils.update_bn, whose
    momentum=None makes each norm read its counter on the device.

    Args:
        device_batches: yields (images, labels) as the network takes them in training.
        autocast: context of the run's precision.
    """
    averaged_model.train()
    norms = [norm for norm in norms_of(averaged_model) if norm.training]  # not frozen
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    try:
        with autocast:
            for number, (images, _) in enumerate(device_batches, 1):
                for norm in norms:
                    norm.momentum = 1 / number  # the mean so far and this batch, each by its share
                averaged_model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    averaged_model.eval()
