"""Sums over an epoch's steps, counted on the device."""

from typing import NamedTuple

import torch

from engine.system.distributed import all_reduce_sum, rank


class TrainingMetrics(NamedTuple):
    """Figures of the epoch so far."""

    loss: float  # mean over the images of the steps that counted
    top1: float  # percent, of the augmented training images
    grad_norm: float  # mean over the steps that counted, before clipping
    images: int
    skipped_steps: int  # loss or gradient not finite: the weights stayed as they were
    skipped_in_a_row: int  # the current row
    longest_skipped_row: int


class MetricAccumulator:
    """Sums over the epoch's steps, kept on the device and read by the host only when asked.

    `values` is float64 [8]. The first two, of losses and hits, are this process's own; the others are the same in all.
    """

    def __init__(self, device):
        self.values = torch.zeros(8, dtype=torch.float64, device=device)

    def reset(self):
        """Begin a new epoch; a row of steps without a finite gradient goes on across its beginning."""
        self.values[:6] = 0
        self.values[7] = self.values[6]

    def add(self, loss, correct, grad_norm, images):
        """Add one step.

        Args:
            loss: this process's part of the batch's mean loss; a scalar on the device, which is not waited for.
            correct: hits among this process's images; likewise.
            grad_norm: likewise, the same in all processes.
            images: of the whole batch.
        """
        counts = torch.isfinite(loss) & torch.isfinite(grad_norm)
        zero = torch.zeros_like(loss)
        step = torch.stack(
            [
                torch.where(counts, loss * images, zero),
                torch.where(counts, correct, zero),
                torch.where(counts, grad_norm, zero),
                torch.full_like(loss, images),
                counts.to(loss.dtype),
                (~counts).to(loss.dtype),
            ]
        )
        self.values[:6] += step
        row = (self.values[6] + 1) * ~counts
        self.values[6] = row
        self.values[7] = torch.maximum(self.values[7], row)

    def state(self):
        """Return the sums over all processes, for a checkpoint: a resumed epoch ends with the figures of the whole epoch."""
        return torch.cat([all_reduce_sum(self.values[:2].clone()), self.values[2:]])

    def load(self, state):
        """Go on from a checkpoint's sums, whatever the number of processes was."""
        self.values.copy_(state)
        if rank() > 0:
            self.values[:2] = 0

    def read(self):
        """Return the TrainingMetrics so far, over all processes; waits for the device."""
        loss, correct, grad_norm, images, steps, skipped, row, longest = self.state().tolist()
        counted = images * steps / max(steps + skipped, 1)  # every step has the same number of images
        return TrainingMetrics(
            loss=loss / counted if counted else float("nan"),
            top1=100 * correct / counted if counted else float("nan"),
            grad_norm=grad_norm / steps if steps else float("nan"),
            images=int(images),
            skipped_steps=int(skipped),
            skipped_in_a_row=int(row),
            longest_skipped_row=int(longest),
        )
