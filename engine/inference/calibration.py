"""Whether a network is right as often as its probabilities say."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.inference.outputs import DETAILS_SOURCE
from engine.run.curves import AVERAGED, RAW, as_written, new_figure, save_figure

BINS = 15  # of equal width, as in arXiv:1706.04599
LOWEST, HIGHEST = 0.01, 100.0  # temperatures that are considered
HALVINGS = 40  # of their ratio: far below what a figure shows


class Calibration(NamedTuple):
    """How confidences and accuracies go together."""

    error: float  # expected calibration error, share
    counts: torch.Tensor  # [BINS], images in each bin of confidence
    confidences: torch.Tensor  # [BINS], mean of each; NaN where it is empty
    accuracies: torch.Tensor  # [BINS], likewise


def calibration(logits, labels):
    """Return the Calibration of the most probable classes (arXiv:1706.04599, section 2).

    Args:
        logits: float [N, C].
        labels: int64 [N].
    """
    confidences, predictions = logits.double().softmax(dim=1).max(dim=1)
    return calibration_of(confidences, predictions == labels)


def calibration_of(confidences, right):
    """Return the Calibration of predictions: float [N], how sure they are, and bool [N], whether they are right."""
    confidences, right = confidences.double(), right.double()
    bins = (confidences * BINS).ceil().long().clamp(1, BINS) - 1  # (low, high]
    counts, confident, correct = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, values)
        for values in (torch.ones_like(right), confidences, right)
    )
    error = ((confident - correct).abs().sum() / len(right)).item()
    return Calibration(error, counts.long(), confident / counts, correct / counts)


def best_temperature(logits, labels):
    """Return the temperature by which the logits are to be divided for the smallest mean loss.

    The loss is convex in 1 / temperature, so its slope is brought to 0 by halving.
    """
    finite = logits.masked_fill(logits == -torch.inf, 0.0).double()  # in the product with a probability of 0
    of_label = finite.gather(1, labels[:, None]).mean()

    def slope(temperature):
        """Return the slope of the mean loss in 1 / temperature."""
        return ((logits.double() / temperature).softmax(dim=1) * finite).sum(dim=1).mean() - of_label

    low, high = LOWEST, HIGHEST
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def write_calibration(path, logits, labels, title):
    """Draw the reliability picture; return (whether it was drawn, a line on error and temperature)."""
    before, temperature = calibration(logits, labels), best_temperature(logits, labels)
    after = calibration(logits / temperature, labels)
    losses = [F.cross_entropy(logits / t, labels).item() for t in (1.0, temperature)]
    line = (
        f"calibration: expected calibration error {100 * before.error:.2f} % ({BINS} bins, arXiv:1706.04599); temperature "
        f"{temperature:.3g} gives the smallest loss, {losses[1]:.4f} in place of {losses[0]:.4f}, with an error of "
        f"{100 * after.error:.2f} %; found on these same images"
    )
    return _draw(path, before, after, temperature, title), line


def _draw(path, before, after, temperature, title):
    drawing = new_figure(1, 2, (12, 5))
    if drawing is None:
        return False
    figure, ((reliability, histogram),) = drawing
    reliability.plot([0, 100], [0, 100], ":", color="gray")
    for each, colour, name in ((before, RAW, "as it is"), (after, AVERAGED, f"at temperature {temperature:.3g}")):
        label = f"{name}: error {100 * each.error:.2f} %"
        reliability.plot(
            (100 * each.confidences).tolist(), (100 * each.accuracies).tolist(), marker="o", ms=4, color=colour, label=label
        )
    reliability.legend(fontsize=8)
    reliability.set_title("Top-1 in % by confidence in %", loc="left")
    histogram.bar([100 * (number + 0.5) / BINS for number in range(BINS)], before.counts.tolist(), width=90 / BINS, color=RAW)
    histogram.set_title("Images by confidence in %", loc="left")
    figure.suptitle(as_written(title), fontsize=10, x=0.01, ha="left")
    save_figure(figure, path, DETAILS_SOURCE)
    return True
