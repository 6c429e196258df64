"""The learning-rate range test (arXiv:1506.01186): one short run whose rate rises exponentially until it diverges.

Unlike the paper's, it trains on the same few batches over and over. On fresh batches the noise between batches is larger
than what a hundred steps can learn, and the reading is that of the noise; on BATCHES_IN_CYCLE batches the loss falls by its
whole height and shows where the rate begins to work, where it works best and where it breaks.
"""

import itertools
import math

import numpy as np

from engine.data.batches import training_requests
from engine.system.distributed import all_reduce_sum
from engine.system.errors import TrainingStopped
from engine.training.optim import peak_rates

DIVERGED = 2.0  # times the lowest smoothed loss: the test has seen enough
LONGEST_SKIPPED_ROW = 30  # steps in a row without a finite gradient: diverged, and not a loss scale that is still falling
FEWEST_POINTS = 10
BATCHES_IN_CYCLE = 8
OF_ADAM, OF_SGD, OF_MUON = (1e-5, 1.0, 100), (1e-4, 10.0, 100), (1e-4, 1.0, 100)  # lowest, highest rate; steps
USUAL_RANGE = {"adamw": OF_ADAM, "adam": OF_ADAM, "sgd": OF_SGD, "sgdw": OF_SGD, "muon": OF_MUON}
SMOOTHING = 0.04  # of the test's length; standard deviation of the smoothing in steps


def range_test(step, batches, lowest, highest, steps):
    """Run the test and return what it saw.

    Args:
        step: called with (rate, batch); trains one step and returns (loss, applied), a float and whether the weights were
            changed: AMP may skip a step to find its loss scale, and such a step is tried again at the same rate.
        batches: iterable of at least `steps` batches and as many as AMP skips.
        lowest, highest: the first and the last rate.
        steps: applied steps at the most.
    Returns:
        dict with the lists `rates` and `losses`, and all that suggest() returns.
    Raises:
        TrainingStopped: too few points came out to say anything.
    """
    rates, losses = [], []
    smoothed, lowest_smoothed, skipped = 0.0, math.inf, 0
    for batch in batches:
        rate = lowest * (highest / lowest) ** (len(rates) / (steps - 1))
        loss, applied = step(rate, batch)
        if not math.isfinite(loss) or not applied:
            skipped += 1
            if skipped > LONGEST_SKIPPED_ROW:
                break
            continue
        skipped = 0
        rates.append(rate)
        losses.append(loss)
        smoothed = 0.8 * smoothed + 0.2 * loss
        current = smoothed / (1 - 0.8 ** len(losses))
        lowest_smoothed = min(lowest_smoothed, current)
        if len(rates) == steps or (len(rates) >= FEWEST_POINTS and current > DIVERGED * lowest_smoothed):
            break
    if len(rates) < FEWEST_POINTS:
        raise TrainingStopped(
            f"the range test got only {len(rates)} steps with a finite loss from rate {lowest:g} on: "
            "look at the images, lower --lowest-rate or try --precision fp32"
        )
    return {"rates": rates, "losses": losses} | suggest(rates, losses)


def suggest(rates, losses):
    """Return the readings of a range test.

    Args:
        rates: rising list of floats.
        losses: finite list of floats of the same length.
    Returns:
        dict: `smoothed_losses`; `steepest`, the rate at which the smoothed loss falls fastest; `valley`, the middle (in
        log rate) of the longest descent; `divergence`, the rate at which the loss has risen from its minimum by a tenth of
        what it had fallen, or None if it never did; `suggestion` and its `reason`.
    """
    log_rates = np.log(rates)
    smooth = _smoothed(np.asarray(losses), SMOOTHING * len(losses))
    bottom = int(np.argmin(smooth))
    slopes = np.gradient(smooth, log_rates)
    steepest = int(np.argmin(slopes[: bottom + 1]))
    top = int(np.argmax(smooth[: bottom + 1]))
    valley = math.exp((log_rates[top] + log_rates[bottom]) / 2)
    depth = smooth[: bottom + 1].max() - smooth[bottom]
    risen = np.flatnonzero(smooth[bottom:] > smooth[bottom] + 0.1 * depth)
    divergence = rates[bottom + int(risen[0])] if len(risen) else None

    suggestion = rates[steepest]
    reason = "the loss falls fastest there"
    ceiling = (divergence or rates[-1]) / 4
    if suggestion > ceiling:  # a peak that is held for epochs must keep its distance from the cliff
        suggestion = ceiling
        reason = "a quarter of the rate at which the loss rises again, which comes soon after its steepest fall"
    return {
        "smoothed_losses": smooth.tolist(),
        "steepest": rates[steepest],
        "valley": valley,
        "divergence": divergence,
        "suggestion": float(f"{suggestion:.2g}"),
        "reason": reason,
    }


def _smoothed(values, width):
    """Return values under a centred Gaussian window: it smooths without the lag of a running mean."""
    steps = np.arange(len(values))
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None]) / max(width, 1e-6)) ** 2)
    return (weights @ values) / weights.sum(axis=1)


def find_learning_rate(trials, config, batches, monitor, lowest, highest, steps):
    """Return the result of a range test with a run's own step.

    Args:
        trials: Trials, which take the step.
        batches: BatchLoader of the run's images.
        lowest, highest, steps: as for range_test; rates as config['learning_rate'] states them.
    """
    images = batches.splits["train"]
    state = trials.scratch_state(config, lowest, compiled=config["compile"] == "on")
    state.ddp_model.train()

    def step(rate, batch):
        peaks = peak_rates(state.optimizer, config | {"learning_rate": rate})  # adamw_learning_rate stays as it is
        for group, peak in zip(state.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
        result = trials.step(state, *batch, config)
        while trials.remarks:
            monitor.log(trials.remarks.pop(0))
        return all_reduce_sum(result.loss).item(), math.isfinite(result.grad_norm.item())

    requests = itertools.cycle(itertools.islice(training_requests(images, config, epoch=0), BATCHES_IN_CYCLE))
    monitor.start("learning-rate range test", steps)
    result = range_test(step, monitor.watch(batches.training(requests, set())), lowest, highest, steps)
    monitor.finish()
    return result


def describe_rates(result):
    """Return the sentence that a range test's result amounts to."""
    divergence = f"{result['divergence']:.2g}" if result["divergence"] else f"not reached up to {result['rates'][-1]:.2g}"
    return (
        f"suggested learning_rate: {result['suggestion']:g} ({result['reason']}; steepest descent {result['steepest']:.2g}, "
        f"valley {result['valley']:.2g}, divergence {divergence})"
    )
