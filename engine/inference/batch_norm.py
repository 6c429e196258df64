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
    momentum=None makes each norm read its counter on the device; but a batch that overflows is left out, as a step that does
    is skipped. Where all do, the statistics stay what they were.

    Args:
        device_batches: yields (images, labels) as the network takes them in training.
        autocast: context of the run's precision.
    Returns:
        (batches left out, an int64 scalar on the device, which is not waited for; batches).
    """
    averaged_model.train()
    norms = [norm for norm in norms_of(averaged_model) if norm.training]  # not frozen
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    momenta, number = [norm.momentum for norm in norms], 0
    mean = torch.cat(statistics) if norms else torch.zeros(0)
    counted = torch.zeros((), dtype=torch.int64, device=mean.device)
    try:
        with autocast:
            for number, (images, _) in enumerate(device_batches if norms else (), 1):
                for norm in norms:
                    norm.momentum = 1 / number  # the mean so far and this batch, each by its share
                averaged_model(images)
                mean, counted = _counting_if_finite(torch.cat(statistics), mean, counted, number)
                torch._foreach_copy_(statistics, mean.split([len(tensor) for tensor in statistics]))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm in norms:
        norm.num_batches_tracked.copy_(counted)
    averaged_model.eval()
    return number - counted, number


def remark_on_left_out(left_out, batches):
    """Return the lines to log on batches that recompute_bn_stats has left out."""
    if not left_out:
        return []
    none = ": they keep those that they had, and score badly" if left_out == batches else ""
    return [
        f"WARNING: {left_out:,} of {batches:,} batches overflow in the averaged weights, and are left out of their batch-norm "
        f"statistics{none}; --precision fp32 or bf16 reaches further than fp16"
    ]


def _counting_if_finite(now, mean, counted, number):
    """Return the mean and the number of the batches counted so far, a further one among them if it is finite.

    Args:
        now: the statistics after batch `number` was taken for the number-th to be counted; to the bit where it is.
        mean, counted: before it.
    """
    rightly = torch.where(counted + 1 == number, now, torch.lerp(mean, now, number / (counted + 1)))
    finite = torch.isfinite(now).all()
    return torch.where(finite, rightly, mean), counted + finite
