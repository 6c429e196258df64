"""Batch norm across ranks."""

import contextlib

import torch
import torch.distributed as dist

from engine.system.distributed import all_reduce_sum


def synced_batch_norm(device):
    """Return the class of norms that compute their statistics over all processes; the keys are BatchNorm2d's."""
    return torch.nn.SyncBatchNorm if device.type == "cuda" else CpuSyncBatchNorm2d


class CpuSyncBatchNorm2d(torch.nn.BatchNorm2d):
    """What torch's SyncBatchNorm does, on a CPU, where torch's refuses to train."""

    def forward(self, images):
        """Return the normalised [B, C, H, W]; B may differ between the processes."""
        if not (self.training and dist.is_initialized()):
            return super().forward(images)
        pixels = images.float()
        count = all_reduce_sum(torch.tensor(float(pixels.numel() / pixels.shape[1])))
        mean = _SumOverProcesses.apply(pixels.sum((0, 2, 3))) / count
        centred = pixels - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(images.dtype)

    @torch.no_grad()
    def _follow(self, mean, variance):
        """Take a batch's statistics into the running ones."""
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


SYNCED_NORMS = (torch.nn.SyncBatchNorm, CpuSyncBatchNorm2d)


@contextlib.contextmanager
def local_batch_norm(model):
    """Let the model's synchronised norms ask no other process: they use their running statistics for the time being."""
    norms = [module for module in model.modules() if isinstance(module, SYNCED_NORMS) and module.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class _SumOverProcesses(torch.autograd.Function):
    """The sum of the processes' tensors; what it adds to the loss of each flows back to all."""

    @staticmethod
    def forward(context, tensor):
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(context, gradient):
        return all_reduce_sum(gradient.clone())
