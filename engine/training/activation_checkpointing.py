"""Less GPU memory for more time: what of a residual block is computed again in the backward pass instead of being kept."""

import contextlib

import torch
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from engine.inference.batch_norm import norms_of


def with_activation_checkpointing(block_class, memory):
    """Return the residual block's class as config['memory'] wants it, with the same parameters, keys and results.

    fast: everything is kept. low: the block's input and what its first two convolutions give are kept, and its norms,
    activations and the convolutions that widen are computed again. lowest: the whole block is computed again from its input,
    as at low a block whose forward() is not torchvision's. Gradients and batch-norm statistics are the same to the last bit.
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
            if memory == "lowest" or block_class.forward not in (BasicBlock.forward, Bottleneck.forward):  # or one of its own
                return _recomputed(self, super().forward, images)
            first = self.conv1(images)
            second = _recomputed(self.bn1, self._second_convolution, first)
            return _recomputed(self, self._end, second, images)

        def _second_convolution(self, first):  # its own product is not computed again: nothing in here needs it
            return self.conv2(self.relu(self.bn1(first)))

        def _end(self, second, images):
            out = self.bn2(second)
            if isinstance(self, Bottleneck):
                out = self.bn3(self.conv3(self.relu(out)))
            out += images if self.downsample is None else self.downsample(images)
            return self.relu(out)

    return Recomputing


def _recomputed(module, function, *inputs):
    """Return function(*inputs), of which the backward pass computes again what it needs; the module has its batch norms."""

    def contexts():
        return contextlib.nullcontext(), frozen_bn_stats(module)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


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
