"""The learning-rate range test (arXiv:1506.01186): one short run whose rate rises exponentially until it diverges.

Unlike the paper's, it trains on the same few batches over and over. On fresh batches the noise between batches is larger
than what a hundred steps can learn, and the reading is that of the noise; on BATCHES_IN_CYCLE batches the loss falls by its
whole height and shows where the rate begins to work, where it works best and where it breaks. These batches are not alike:
what is read is the mean over a lap of them.
"""

import itertools
import math

import numpy as np

from engine.data.batches import training_requests
from engine.system.distributed import all_reduce_sum
from engine.system.errors import TrainingStopped
from engine.training.optim import peak_rates

DIVERGED = 2.0  # times the lowest mean over a lap: the test has seen enough
RISEN = 0.1  # of its whole fall, which the loss has risen again: the rate is too high
CLEAR = 8  # standard deviations of the noise; noise alone falls by more in 1 of 2,000 simulated tests of 100 steps
LEAST_DEPTH = 0.01  # of the first loss; a smaller fall tells nothing
LONGEST_SKIPPED_ROW = 31  # steps in a row without a finite gradient: diverged, and not a loss scale that is still falling
FEWEST_POINTS = 10
BATCHES_IN_CYCLE = 8
OF_ADAM, OF_SGD, OF_MUON = (1e-5, 1.0, 100), (1e-4, 10.0, 100), (1e-4, 1.0, 100)  # lowest, highest rate; steps
USUAL_RANGE = {"adamw": OF_ADAM, "adam": OF_ADAM, "sgd": OF_SGD, "sgdw": OF_SGD, "muon": OF_MUON}
SMOOTHING = 0.04  # of the test's length; standard deviation of the smoothing in steps, that of the mean over a lap included


def range_test(step, batches, lowest, highest, steps, lap=BATCHES_IN_CYCLE):
    """Run the test and return what it saw.

    Args:
        step: called with (rate, batch); trains one step and returns (loss, applied), a float and whether the weights were
            changed: AMP may skip a step to find its loss scale, and such a step is tried again.
        batches: iterable of at least `steps` batches, the same `lap` ones over and over.
        lowest, highest: the first and the last rate.
        steps: applied steps at the most.
    Returns:
        dict with the lists `rates` and `losses`, and all that suggest() returns.
    Raises:
        TrainingStopped: too few points came out to say anything.
    """
    rates, losses, lap_means = [], [], []
    for batch in batches:
        rate = lowest * (highest / lowest) ** (len(rates) / (steps - 1))
        loss = _loss_of_applied_step(step, rate, batch)
        if loss is None:
            break
        rates.append(rate)
        losses.append(loss)
        if len(losses) >= lap:
            lap_means.append(sum(losses[-lap:]) / lap)
        if len(rates) == steps or (len(rates) >= FEWEST_POINTS and _has_diverged(lap_means)):
            break
    if len(rates) < FEWEST_POINTS:
        raise TrainingStopped(
            f"the range test got only {len(rates)} steps with a finite loss from rate {lowest:g} on: "
            "look at the images, lower --lowest-rate or try --precision fp32"
        )
    return {"rates": rates, "losses": losses} | suggest(rates, losses, lap)


def _loss_of_applied_step(step, rate, batch):
    """Return the loss of a step with a batch, tried until it is applied; None if it never is."""
    for _ in range(LONGEST_SKIPPED_ROW):
        loss, applied = step(rate, batch)
        if math.isfinite(loss) and applied:
            return loss
    return None


def _has_diverged(lap_means):
    """Return whether the last mean over a lap shows that the loss rises without return."""
    lowest = min(lap_means)
    return lap_means[-1] > lowest + max((DIVERGED - 1) * lowest, RISEN * (max(lap_means[:-1]) - lowest))


def suggest(rates, losses, lap=BATCHES_IN_CYCLE):
    """Return the readings of a range test.

    Args:
        rates: rising list of floats, evenly spaced in the logarithm.
        losses: finite list of floats of the same length, at least lap + 2; every lap-th is the same batch's.
    Returns:
        dict: `smoothed_losses`, None for half a lap at either end; `steepest`, the rate at which the smoothed loss falls
        fastest; `valley`, the middle (in log rate) of the longest descent; `divergence`, the rate at which the loss has
        risen from its minimum by a tenth of what it had fallen, or None if it never did; `suggestion` and its `reason`.
        Where the curve tells no rate, `suggestion` is None and `advice` says what to try; where no fall stands out of the
        noise, steepest, valley and divergence are None, too.
    """
    log_rates, losses = np.log(rates), np.asarray(losses)
    means, centres = _lap_means(losses, lap), _lap_means(log_rates, lap)
    smooth, slopes = _smoothed(means, math.sqrt(max((SMOOTHING * len(losses)) ** 2 - (lap**2 - 1) / 12, 1)))
    bottom = int(np.argmin(smooth))
    steepest = int(np.argmin(slopes[: bottom + 1]))
    top = int(np.argmax(smooth[: bottom + 1]))
    depth = smooth[top] - smooth[bottom]
    at_rates = np.interp(log_rates, centres, smooth, left=math.nan, right=math.nan).tolist()
    readings = {"smoothed_losses": [None if math.isnan(loss) else loss for loss in at_rates]}
    lower = f"begin lower: --lowest-rate {rates[0] / 100:.2g}"
    least = max(CLEAR * _noise(losses[: max(bottom, 2) + lap], lap), LEAST_DEPTH * abs(smooth[0]))
    if depth <= least:
        unread = dict.fromkeys(("steepest", "valley", "divergence"))
        if smooth.max() - smooth[bottom] > least:
            return readings | unread | _nothing("the loss only rises", f"{lower}, try more images or a larger batch_size")
        advice = "try more images, a larger batch_size or other rates"
        return readings | unread | _nothing("the loss falls by no more than it varies", advice)

    risen = np.flatnonzero(smooth[bottom:] > smooth[bottom] + RISEN * depth)
    divergence = math.exp(centres[bottom + int(risen[0])]) if len(risen) else None
    readings |= {
        "steepest": math.exp(centres[steepest]),
        "valley": math.exp((centres[top] + centres[bottom]) / 2),
        "divergence": divergence,
    }
    suggestion, reason = readings["steepest"], "the loss falls fastest there"
    ceiling = (divergence or rates[-1]) / 4
    if suggestion > ceiling:  # a peak that is held for epochs must keep its distance from the cliff
        suggestion = ceiling
        reason = "a quarter of the rate at which the loss rises again, which comes soon after its steepest fall"
        if divergence is None:
            reason = "a quarter of the highest rate tested, close to which the loss falls fastest"
    early = "the loss falls at the lowest rate already"
    if suggestion < rates[0]:
        return readings | _nothing(f"{early} and rises soon", lower)
    if slopes[0] < 0.9 * slopes[steepest]:
        return readings | _nothing(f"{early} as fast as anywhere", lower)
    return readings | {"suggestion": float(f"{suggestion:.2g}"), "reason": reason}


def _nothing(reason, advice):
    """Return what suggest() says of a curve that tells no rate."""
    return {"suggestion": None, "reason": reason, "advice": advice}


def _lap_means(values, lap):
    """Return the mean of each `lap` values in a row: each batch counts once, so that their order and hardness cancel out."""
    return np.convolve(values, np.full(lap, 1 / lap), "valid")


def _noise(losses, lap):
    """Return the standard deviation of a smoothed loss' noise, from what a batch's change in a lap differs from the next's."""
    of_one = np.median(np.abs(np.diff(losses[lap:] - losses[:-lap]))) / 2 / 0.6745  # four losses; median to deviation
    return of_one / math.sqrt(lap)


def _smoothed(values, width):
    """Return (levels, slopes per step) of lines fitted to the values around each, under a Gaussian window.

    A line does not flatten the slope at the ends, as a mean would.
    """
    steps = np.arange(len(values))
    offsets = steps - steps[:, None]
    weights = np.exp(-0.5 * (offsets / width) ** 2)
    total, first, second = weights.sum(axis=1), (weights * offsets).sum(axis=1), (weights * offsets**2).sum(axis=1)
    of_values, of_products = weights @ values, (weights * offsets) @ values
    determinant = total * second - first**2
    return (second * of_values - first * of_products) / determinant, (total * of_products - first * of_values) / determinant


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

    lap = list(itertools.islice(training_requests(images, config, epoch=0), BATCHES_IN_CYCLE))
    monitor.start("learning-rate range test", steps)
    drawn = monitor.watch(batches.training(itertools.cycle(lap), set()))
    result = range_test(step, drawn, lowest, highest, steps, len(lap))
    monitor.finish()
    if config["optimizer"] == "muon" and result["suggestion"] is None:  # what falls may be what AdamW learns
        result["advice"] += ", lower --adamw-learning-rate for the test"
    return result


def describe_rates(result):
    """Return the sentence that a range test's result amounts to."""
    if result["suggestion"] is None:
        return f"no learning_rate is suggested: {result['reason']}; {result['advice']}, or train at the recipe's rate"
    divergence = f"{result['divergence']:.2g}" if result["divergence"] else f"not reached up to {result['rates'][-1]:.2g}"
    return (
        f"suggested learning_rate: {result['suggestion']:g} ({result['reason']}; steepest descent {result['steepest']:.2g}, "
        f"valley {result['valley']:.2g}, divergence {divergence})"
    )
