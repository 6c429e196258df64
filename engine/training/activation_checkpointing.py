"""Less GPU memory for more time: what of a residual block is computed again in the backward pass instead of being kept."""

import contextlib
import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engine.inference.batch_norm import norms_of


def with_activation_checkpointing(block_class, memory):
    """Return the residual block's class as config['memory'] wants it, with the same parameters, keys and results.

    fast: everything is kept. low: norms, activations and the convolutions that widen are computed again from the outputs of
    the others. lowest: the whole block is computed again from its input. Gradients and batch-norm statistics are the same to
    the last bit.
    """
    if memory == "fast":
        return block_class

    class Recomputing(block_class):
        def forward(self, images):
            """Return the block's output [B, C', H', W'] of [B, C, H, W]."""
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # the compiler has a budget of its own
                return super().forward(images)
            if not (images.requires_grad or any(weight.requires_grad for weight in self.parameters())):  # frozen
                return super().forward(images)
            contexts = functools.partial(_contexts, self, memory)
            return checkpoint(super().forward, images, use_reentrant=False, context_fn=contexts)

    return Recomputing


def _contexts(block, memory):
    """Return the contexts of the first and of the second computation."""
    if memory == "lowest":
        return contextlib.nullcontext(), frozen_bn_stats(block)
    first, second = create_selective_checkpoint_contexts(_keeps)
    return first, _both(frozen_bn_stats(block), second)  # in this order: `second` knows the block's own operations alone


def _keeps(context, operation, *arguments, **options):
    """Keep what a convolution gives that does not widen: it costs the most to compute and the least to keep."""
    if operation is torch.ops.aten.convolution.default:
        weight, stride = arguments[1], arguments[3]
        if weight.shape[0] <= weight.shape[1] * max(stride) ** 2:  # channels out, in; a stride leaves fewer pixels
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def frozen_bn_stats(network):
    """Keep the network's batch norms from counting the same batch twice (pytorch issue 96136); they normalise as before."""
    norms = [norm for norm in norms_of(network) if norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield
