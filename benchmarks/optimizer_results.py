"""What the study of optimizers found: its tables, how many steps Muon saves, and a picture."""

import functools
import math
import statistics

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.optimizer_evidence import CLASSES, KINDS, OPTIMIZERS, SHARED, VARIANTS, best_rate, scores_of
from benchmarks.recipe_evidence import mean_and_spread
from config import CONFIG
from engine.run.curves import AVERAGED, EMA, MUTED, RAW, new_figure, save_figure
from engine.training.muon import orthogonalize, split_groups
from model import build_model

AT_WORK = ("resnet50", 176, 256)  # architecture, px and batch size of a run on ImageNet with `mild`, on average
COLOURS = dict(zip(OPTIMIZERS, (RAW, MUTED, EMA, AVERAGED), strict=True))
MARKERS = dict(zip(OPTIMIZERS, "ovso", strict=True))


def optimizer_tables(runs):
    """Return the runs as lines of Markdown: of each study the scans of rates, the best rates at every length, and the gain."""
    if not runs:
        return ["nothing was measured"]
    studies = {}
    for run in runs:
        studies.setdefault(tuple(run["study"].items()), []).append(run)
    lines = [line for of_study in studies.values() for line in [*_study_lines(of_study), ""]]
    here = SHARED["train_resolution"], SHARED["batch_size"]
    own = " and ".join(f"{newton_schulz_share(name, *here):.2f} for {name}" for name in _architectures(runs))
    shares = ", ".join(f"{newton_schulz_share('resnet50', px, 256):.3f}" for px in (224, 176, 128))
    return [
        *lines,
        f"Muon's Newton-Schulz steps over the network's own work in a step, in FLOP (calculated): {own} at {here[0]} px and "
        f"batches of {here[1]}, as above; {shares} for resnet50 at 224, 176 and 128 px and batches of 256.",
    ]


def _architectures(runs):
    return list(dict.fromkeys(run["study"]["architecture"] for run in runs))


def _study_lines(runs):
    """Return optimizer_tables of the runs of one study."""
    study, kinds, lengths = runs[0]["study"], _kinds(runs), sorted({run["epochs"] for run in runs})
    where = " and ".join(dict.fromkeys(f"{run['gpu'] or run['cpu']} with PyTorch {run['versions']['torch']}" for run in runs))
    scanned = scanned_epochs(runs)
    lines = [
        f"{study['architecture']}, {study['train_images']:,} synthetic training images of {CLASSES} classes, "
        f"{study['val_images']:,} for validation, {SHARED['train_resolution']} px, batches of {SHARED['batch_size']}, "
        f"{where}, {max(run['date'] for run in runs)}; top-1 in % after the last epoch.",
        "",
        f"Rates, {scanned} epochs, one seed:",
        "",
        "| pictures | optimizer | rate: top-1 |",
        "|---|---|---|",
    ]
    for kind in kinds:
        for name in OPTIMIZERS:
            cells = ", ".join(f"{rate:g}: {top1:.1f}" for rate, top1 in sorted(scores_of(runs, kind, name, scanned).items()))
            lines += [f"| {kind} | {name} | {cells} |"] if cells else []
    rows = []
    for kind in kinds:
        for name in (*OPTIMIZERS, *VARIANTS):
            scores = scores_by_length(runs, kind, name)
            cells = [f"{mean_and_spread(scores[n])} (n = {len(scores[n])})" if n in scores else "" for n in lengths]
            rows += [f"| {kind} | {name} | {' | '.join(cells)} |"] if any(cells) else []
    if rows:  # no scan is complete yet otherwise
        lines += ["", "At the best rate of the scan, mean and standard deviation over the seeds:", ""]
        lines += [f"| pictures | optimizer | {' | '.join(f'{n} epochs' for n in lengths)} |", "|---" * (2 + len(lengths)) + "|"]
    return lines + rows + _gain_lines(runs, kinds)


def _gain_lines(runs, kinds):
    """Return the table of what others need for Muon's top-1, where there are several lengths."""
    rows, lengths = [], sorted({run["epochs"] for run in runs if run["optimizer"] == "Muon"})
    for kind in kinds:
        for name in OPTIMIZERS:
            needed = epochs_for_muons_top1(runs, kind, name)
            longest = max(scores_by_length(runs, kind, name), default=0)
            cells = [_epochs_in_words(needed.get(n), n, longest) for n in lengths]
            rows += [f"| {kind} | {name} | {' | '.join(cells)} |"] if any(cells) else []
    if not rows:
        return []
    header = f"| pictures | optimizer | {' | '.join(f'{n} epochs' for n in lengths)} |"
    words = "Epochs after which another optimizer has the top-1 that Muon has after so many"
    return ["", f"{words} (linear in the logarithm between its lengths):", "", header, "|---" * (2 + len(lengths)) + "|", *rows]


def _epochs_in_words(needed, muons, longest):
    if needed is None:
        return ""
    return f"over {longest}" if needed > longest else f"{needed:.1f} ({needed / muons:.2f}x)"


def _kinds(runs):
    return [kind for kind in KINDS if any(run["kind"] == kind for run in runs)]


def scanned_epochs(runs):
    """Return the length at which the rates of a study were scanned: that of most runs."""
    return statistics.mode(run["epochs"] for run in runs)


def scores_by_length(runs, kind, name):
    """Return {epochs: top-1 in % of each seed} of an optimizer, or a variant, at the best rate of its scan."""
    rate, scores = best_rate(runs, kind, name if name in OPTIMIZERS else "Muon", scanned_epochs(runs)), {}
    for run in runs:
        if (run["kind"], run["optimizer"], run["rate"]) == (kind, name, rate):
            scores.setdefault(run["epochs"], []).append(run["top1"][-1])
    return dict(sorted(scores.items()))


def epochs_for_muons_top1(runs, kind, name):
    """Return {epochs of Muon: epochs after which another optimizer has the same top-1}, where two lengths of it are known.

    Between two of its lengths top-1 is taken to be linear in the logarithm of the epochs; beyond them it is infinity, and
    below them there is none.
    """
    points = [(epochs, statistics.mean(scores)) for epochs, scores in scores_by_length(runs, kind, name).items()]
    needed = {}
    for length, scores in scores_by_length(runs, kind, "Muon").items() if name != "Muon" else ():
        top1 = statistics.mean(scores)
        if len(points) > 1 and top1 > max(mean for _, mean in points):
            needed[length] = math.inf
        for (shorter, low), (longer, high) in zip(points, points[1:], strict=False):
            if low <= top1 <= high and high > low:
                needed[length] = shorter * math.exp(math.log(longer / shorter) * (top1 - low) / (high - low))
                break
    return needed


@functools.cache
def newton_schulz_share(architecture, px, batch_size):
    """Return the FLOP of an optimizer step's Newton-Schulz steps over those of the network, forward and backward."""
    with torch.device("meta"):
        model = build_model(CONFIG | {"architecture": architecture}, CLASSES, torch.device("meta"))
        with FlopCounterMode(display=False) as counted:
            model(torch.empty(1, 3, px, px)).sum().backward()
    filters, _ = split_groups([{"params": list(model.parameters())}])
    with torch.no_grad(), FlopCounterMode(display=False) as steps:
        for weight in filters:
            orthogonalize(weight.flatten(1)[None], torch.float16)
    return steps.get_total_flops() / (batch_size * counted.get_total_flops())


def draw_optimizers(runs, path):
    """Draw top-1 after runs of several lengths to a PNG: against steps, and against calculated work, for each kind of picture.

    Muon's step counts as much longer than the others' as it would be in AT_WORK; dotted, as it is in the study itself.

    Args:
        runs: of one study.
    Returns:
        False if matplotlib is not installed.
    """
    kinds, study = _kinds(runs), runs[0]["study"]
    drawing = new_figure(2, len(kinds), (4.4 * len(kinds), 7))
    if drawing is None:
        return False
    figure, axes = drawing
    steps = study["train_images"] // SHARED["batch_size"]
    at_work = 1 + newton_schulz_share(*AT_WORK)
    here = 1 + newton_schulz_share(study["architecture"], SHARED["train_resolution"], SHARED["batch_size"])
    for (by_steps, by_work), kind in zip(axes.T, kinds, strict=True):
        for name, colour in COLOURS.items():
            scores = scores_by_length(runs, kind, name)
            epochs, means = np.array(list(scores)), [statistics.mean(of_length) for of_length in scores.values()]
            spread = [statistics.stdev(of_length) if len(of_length) > 1 else 0 for of_length in scores.values()]
            costs = {"-": at_work, ":": here} if name == "Muon" else {"-": 1}
            by_steps.errorbar(epochs * steps, means, spread, color=colour, marker=MARKERS[name], capsize=3, label=name)
            for style, cost in costs.items():
                by_work.errorbar(
                    epochs * steps * cost, means, spread, color=colour, marker=MARKERS[name], capsize=3, linestyle=style
                )
        by_steps.set_title(kind, loc="left")
        for axis, label in ((by_steps, "steps"), (by_work, "work, in steps of the others (calculated)")):
            axis.set_xscale("log")
            ticks = [100 * 2**doublings for doublings in range(6)]
            axis.set_xticks(ticks, ticks)
            axis.minorticks_off()
            axis.set_xlabel(label)
            axis.set_ylabel("top-1 in %")
            axis.set_ylim(0, 119)
            axis.set_yticks(range(0, 101, 20))
    axes[0, 0].legend(frameon=False, loc="upper left", ncols=2)
    axes[1, 0].plot([], color=COLOURS["Muon"], label="a step as in {} at {} px, batches of {}".format(*AT_WORK))
    axes[1, 0].plot([], ":", color=COLOURS["Muon"], label="a step as in this study")
    axes[1, 0].legend(frameon=False, loc="upper left")
    save_figure(figure, path)
    return True
