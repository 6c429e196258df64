"""Drawings of a report, as SVG in the page's own colours."""

import io

from engine.report.page import chart_block
from engine.run.curves import new_figure, tick_whole_numbers

# Colours that stand in the drawings for those of the page, which has a light and a dark set of them.
INK, FAINT, LINE = "#010203", "#010204", "#010205"
SERIES = ["#010210", "#010211", "#010212", "#010213", "#010214", "#010215"]
VARIABLES = {INK: "ink", FAINT: "faint", LINE: "line"} | {colour: f"series-{n}" for n, colour in enumerate(SERIES)}


# How lines are drawn in matplotlib and in CSS: round after round of the colours, and what is no measurement of the run.
ROUNDS, DOTTED = (("-", "solid"), ("--", "dashed"), ("-.", "double")), (":", "dotted")


def chart(title, series, unit, x_label="epoch", steps=False):
    """Return a chart's block, or None if there is nothing to draw or matplotlib is not installed.

    Args:
        series: list of (name, {x: y}) or (name, {x: y}, 'dotted').
        unit: of y.
        steps: y jumps instead of passing straight.
    """
    lines = []
    for number, (name, points, *dotted) in enumerate(series):
        points = {x: y for x, y in points.items() if y is not None}
        style, css = DOTTED if dotted else ROUNDS[number // len(SERIES) % len(ROUNDS)]
        lines += [(name, points, number % len(SERIES), style, css)] if points else []
    drawing = new_figure(1, 1, (5.6, 2.9)) if lines else None
    if drawing is None:
        return None
    figure, ((axis,),) = drawing
    look = {"lw": 1.8, "marker": ".", "ms": 4} | ({"drawstyle": "steps-mid"} if steps else {})
    for _, points, colour, style, _ in lines:
        axis.plot(*zip(*sorted(points.items()), strict=True), style, color=SERIES[colour], **look)
    axis.set_xlabel(x_label)
    axis.set_ylabel(unit)
    if all(isinstance(x, int) for _, points, *_ in lines for x in points):
        tick_whole_numbers(axis)
    return chart_block(title, _svg(figure, axis), [(name, colour, css) for name, _, colour, _, css in lines])


def timeline(title, bars, unit):
    """Return the block of a chart of spans on a line of time, or None without matplotlib.

    Args:
        bars: list of (begin, end, series number of its colour).
        unit: of the times, such as 'hours'.
    """
    drawing = new_figure(1, 1, (11.5, 1.25))
    if drawing is None or not bars:
        return None
    figure, ((axis,),) = drawing
    shortest = max(end for _, end, _ in bars) / 400  # else a short session could not be seen
    for start, end, colour in bars:
        axis.broken_barh([(start, max(end - start, shortest))], (0, 1), facecolors=SERIES[colour])
    axis.set_yticks([])
    axis.set_ylim(-0.2, 1.2)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"{unit} since the run was begun")
    return chart_block(title, _svg(figure, axis), [])


def _svg(figure, axis):
    """Return the figure as SVG in the page's colours, its text as text."""
    import matplotlib

    figure.patch.set_alpha(0)
    axis.patch.set_alpha(0)
    axis.grid(color=LINE, alpha=1)
    axis.tick_params(colors=FAINT, labelsize=9)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=FAINT, fontsize=9)
    for spine in axis.spines.values():
        spine.set_color(LINE)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as text; the page's style gives them its font
        figure.savefig(file, format="svg")
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text
