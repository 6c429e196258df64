"""The batch-norm statistics that a step began with, to be put back where it is broken off or skipped."""

import torch

from engine.inference.batch_norm import norms_of


class StatisticsSnapshot:
    """A copy of a model's batch-norm statistics and of their counters, one tensor each. A GPU is not waited for.

    As a context it puts everything back as it was where the block fails.
    """

    def __init__(self, model):
        norms = norms_of(model)
        self._statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        self._counters = [norm.num_batches_tracked for norm in norms]
        self._before = self._joined()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self._take(self._before)

    def restore_unless(self, finite):
        """Put everything back as it was if a step's gradient is not finite; otherwise no bit changes.

        Args:
            finite: bool scalar on the device, which is not waited for; the same in all ranks.
        """
        now = self._joined()
        self._take([torch.where(finite, new, old) for new, old in zip(now, self._before, strict=True)])

    def _joined(self):
        return [torch.cat(self._statistics), torch.stack(self._counters)] if self._counters else []  # two kernels

    @torch.no_grad()
    def _take(self, joined):
        if joined:
            values, counts = joined
            torch._foreach_copy_(self._statistics, values.split([len(tensor) for tensor in self._statistics]))
            torch._foreach_copy_(self._counters, counts.unbind())
