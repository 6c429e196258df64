"""The measurements as one picture."""

import statistics

from engine.run.curves import MUTED, RAW, new_figure, save_figure

OURS, OTHERS = RAW, MUTED


def draw_benchmarks(measured, path):
    """Draw bars of images/s, with the range over the rounds, to a PNG.

    Args:
        measured: {'input': results, 'step': results, 'train': results}.
    Returns:
        False if matplotlib is not installed.
    """
    step, loaders = measured["step"], measured["input"]["loaders"]
    largest = str(step["resolutions"][-1])
    groups = {
        f"Files to batches, {loaders['workers']} workers, {loaders['resolution']} px": loaders["rates"],
        f"Train step, {largest} px": {name: rates[largest] for name, rates in step["rates"].items() if rates[largest]},
        f"Training end to end, {measured['train']['resolution']} px": measured["train"]["rates"],
    }
    drawing = new_figure(1, len(groups), (14, 4.2))
    if drawing is None:
        return False
    figure, (axes,) = drawing
    for axis, (title, rates) in zip(axes, groups.items(), strict=True):
        names = list(rates)[::-1]
        medians = [statistics.median(rates[name]) for name in names]
        spread = [
            [median - min(rates[name]) for name, median in zip(names, medians, strict=True)],
            [max(rates[name]) - median for name, median in zip(names, medians, strict=True)],
        ]
        colours = [OURS if name.startswith(("ours", "training")) else OTHERS for name in names]
        axis.barh(names, medians, xerr=spread, color=colours, error_kw={"elinewidth": 1})
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("images per second")
        axis.grid(axis="y", visible=False)
    where = step["gpu"] or f"{step['cpu']}, {step['cores']} cores"
    figure.suptitle(f"{where}, PyTorch {step['versions']['torch']}, {step['date']}", fontsize=10, x=0.01, ha="left")
    save_figure(figure, path)
    return True
