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


# The sums, in the order in which a checkpoint keeps them. The first two are each rank's own; the others are the same in all.
OWN = ("loss", "correct")
SHARED = ("grad_norm", "images", "steps", "skipped", "row", "longest_row")


class MetricAccumulator:
    """Sums over the epoch's steps, float64 [8], kept on the device and read by the host only when asked."""

    def __init__(self, device):
        self.values = torch.zeros(len(OWN + SHARED), dtype=torch.float64, device=device)
        self._own, self._shared = self.values[: len(OWN)], self.values[len(OWN) :]
        self._of = dict(zip(OWN + SHARED, self.values.unbind(), strict=True))  # views: changed in place
        self._summed = self.values[:-2]  # without the rows

    def reset(self):
        """Begin a new epoch; a row of steps without a finite gradient goes on across its beginning."""
        self._summed.zero_()
        self._of["longest_row"].copy_(self._of["row"])

    def add(self, loss, correct, grad_norm, images):
        """Add one step.

        Args:
            loss: this rank's part of the batch's mean loss; a scalar on the device, which is not waited for.
            correct: hits among this rank's images; likewise.
            grad_norm: likewise, the same in all ranks.
            images: of the whole batch.
        """
        counts = torch.isfinite(loss) & torch.isfinite(grad_norm)
        zero = torch.zeros_like(loss)
        step = {
            "loss": torch.where(counts, loss * images, zero),
            "correct": torch.where(counts, correct, zero),
            "grad_norm": torch.where(counts, grad_norm, zero),
            "images": torch.full_like(loss, images),
            "steps": counts.to(loss.dtype),
            "skipped": (~counts).to(loss.dtype),
        }
        self._summed += torch.stack([step[name] for name in (OWN + SHARED)[: len(step)]])
        row, longest = self._of["row"], self._of["longest_row"]
        row.copy_((row + 1) * ~counts)
        longest.copy_(torch.maximum(longest, row))

    def state(self):
        """Return the sums over all ranks for a checkpoint: a resumed epoch ends with the figures of the whole epoch."""
        return torch.cat([all_reduce_sum(self._own.clone()), self._shared])

    def load(self, state):
        """Go on from a checkpoint's sums, whatever the number of ranks was."""
        self.values.copy_(state)
        if rank() > 0:
            self._own.zero_()

    def read(self):
        """Return the TrainingMetrics so far, over all ranks; waits for the device."""
        of = dict(zip(OWN + SHARED, self.state().tolist(), strict=True))
        counted = of["images"] * of["steps"] / max(of["steps"] + of["skipped"], 1)  # every step has the same number of images
        return TrainingMetrics(
            loss=of["loss"] / counted if counted else float("nan"),
            top1=100 * of["correct"] / counted if counted else float("nan"),
            grad_norm=of["grad_norm"] / of["steps"] if of["steps"] else float("nan"),
            images=int(of["images"]),
            skipped_steps=int(of["skipped"]),
            skipped_in_a_row=int(of["row"]),
            longest_skipped_row=int(of["longest_row"]),
        )
