"""Figures of a report in words."""

import statistics

from engine.report.history import interruptions
from engine.system.wording import duration


def percent(value):
    return None if value is None else f"{value:.2f} %"


def spread(values, digits=0):
    """Return 'mean (lowest to highest)' of some numbers, or None of none."""
    if not values:
        return None
    mean, low, high = (f"{value:,.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def clock(hours):
    """Return hours as text; of less than a second '0 seconds'."""
    return duration(max(hours, 0.0))


def interruptions_of(run):
    """Return how often a run was interrupted; only its log knows."""
    return len(interruptions(run.sessions)) if run.sessions else "unknown: no log"


def position(of):
    """Return (whole epochs, batches) in words."""
    epochs, batches = of
    return f"epoch {epochs + 1}, batch {batches}" if batches else (f"end of epoch {epochs}" if epochs else "the beginning")
