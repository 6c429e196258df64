"""Pictures: a run's curves and the learning-rate range test."""

import importlib.util
import os
import warnings
from pathlib import Path

from PIL import ImageFont

from engine.run.weights import WEIGHTS
from engine.system.files import replacing

RAW, AVERAGED, EMA, MUTED = "#2166ac", "#d6604d", "#1b7837", "#8c8c8c"


def new_figure(rows, columns, size, layout="constrained"):
    """Return (figure, axes), or None where matplotlib is missing; imported here, since it takes half a second."""
    os.environ["MPLBACKEND"] = "agg"  # no display is needed; a notebook's setting stops the import elsewhere
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=size, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_written(text):
    """Return a text for matplotlib to draw as it is, a name or a path: two dollar signs would begin and end a formula.

    Bytes of a name that are no UTF-8 become escapes.
    """
    return text.replace("$", r"\$").encode("utf-8", "backslashreplace").decode()


def tick_whole_numbers(axis):
    """Let the ticks along an axis be whole numbers: of what is counted, such as epochs; where there is one, one tick."""
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def save_figure(figure, path, source=None):
    """Write the figure as a PNG, whole or not at all.

    Args:
        source: which program and flag it is of, to stand in the file; or None.
    """
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it, as for an emoji in a class's name
        figure.savefig(file, format="png", dpi=110, metadata={"Source": source} if source else None)


def label_font(size):
    """Return a Pillow font: matplotlib's, with Latin, Greek and Cyrillic letters; without it Pillow's, of ASCII alone."""
    found = importlib.util.find_spec("matplotlib")
    path = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found and found.origin else None
    return ImageFont.truetype(path, size) if path and path.is_file() else ImageFont.load_default(size)


def draw_curves(records, path):
    """Draw loss, top-1, rate and throughput by epoch from metrics.jsonl's records to a PNG.

    Returns:
        False if matplotlib is not installed.
    """
    drawing = new_figure(2, 2, (11, 7), layout=None)
    if drawing is None:
        return False
    figure, ((loss, top1), (rate, speed)) = drawing
    figure.subplots_adjust(0.07, 0.08, 0.98, 0.94, wspace=0.17, hspace=0.32)  # half the time of matplotlib's own layout

    def plot(axis, key, label, colour, style="-"):
        points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=".", markersize=5)

    for axis, name in ((loss, "loss"), (top1, "top1")):
        plot(axis, f"train_{name}", "training, augmented", MUTED, "--")
        for (kind, weights), colour in zip(WEIGHTS.items(), (RAW, AVERAGED, EMA), strict=True):
            label = "validation" if kind == "raw" else f"validation, {weights.in_words}"
            plot(axis, f"{weights.column}_{name}", label, colour)
        axis.legend(frameon=False)
    plot(rate, "learning_rate", "", RAW)
    plot(speed, "images_per_s", "", RAW)
    speed.set_ylim(bottom=0)
    titles = ("Loss", "Top-1 accuracy in %", "Learning rate at the epoch's end", "Training images per second")
    for axis, title in zip((loss, top1, rate, speed), titles, strict=True):
        axis.set_title(title, loc="left")
        axis.set_xlabel("epoch")
        tick_whole_numbers(axis)
    save_figure(figure, path)
    return True


def draw_range_test(result, path, source):
    """Draw the loss against the rate of a range test, with its marks, to a PNG; source as for save_figure.

    Returns:
        False if matplotlib is not installed.
    """
    drawing = new_figure(1, 1, (9, 5.5))
    if drawing is None:
        return False
    figure, ((axis,),) = drawing
    axis.plot(result["rates"], result["losses"], color=MUTED, linewidth=0.8, label="loss of each step")
    axis.plot(result["rates"], result["smoothed_losses"], color=RAW, linewidth=2, label="smoothed")
    marks = (("suggestion", AVERAGED), ("steepest", "#1b7837"), ("valley", "#762a83"), ("divergence", "black"))
    for name, colour in marks:
        if result[name] is not None:
            label = f"{name}: {result[name]:.2g}"
            axis.axvline(result[name], color=colour, linestyle="-" if name == "suggestion" else ":", label=label)
    if result["steepest"] is not None:  # else all that there is to see
        smoothed = [loss for loss in result["smoothed_losses"] if loss is not None]
        low, high = min(smoothed), smoothed[0]
        axis.set_ylim(low - 0.15 * (high - low), high + 0.6 * (high - low))
    axis.set_xscale("log")
    nothing = f"\nno rate is suggested: {result['reason']}" if result["suggestion"] is None else ""
    axis.set_title(f"Learning-rate range test{nothing}", loc="left")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss")
    axis.legend(frameon=False, loc="upper left" if result["steepest"] is None else "lower left")
    save_figure(figure, path, source)
    return True
