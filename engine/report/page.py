"""A report as blocks, written as Markdown and as one HTML page that needs nothing else.

Blocks are made by heading, paragraph, table and chart; both writers know them all.
"""

import html
import io
from typing import NamedTuple

from engine.run.curves import new_figure

# Colours that stand in the drawings for those of the page, which has a light and a dark set of them.
INK, FAINT, LINE = "#010203", "#010204", "#010205"
SERIES = ["#010210", "#010211", "#010212", "#010213", "#010214", "#010215"]
VARIABLES = {INK: "ink", FAINT: "faint", LINE: "line"} | {colour: f"series-{n}" for n, colour in enumerate(SERIES)}

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2430; --faint: #5d6877; --line: #d9dee5; --panel: #f5f7fa;
  --series-0: #2166ac; --series-1: #c2512e; --series-2: #1b7837;
  --series-3: #7b4fa0; --series-4: #8c6d1f; --series-5: #6b7480; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181e; --ink: #e4e9f0; --faint: #98a3b3; --line: #313946; --panel: #1c222b;
  --series-0: #6fb1f0; --series-1: #f08b66; --series-2: #69c584;
  --series-3: #bd95e0; --series-4: #d8b45c; --series-5: #a3adba; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem) 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; }
p { max-width: 60rem; } .faint { color: var(--faint); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.35rem 0.8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--panel); font-weight: 600; } tr:last-child td { border-bottom: 0; }
@media (min-width: 40rem) { td:first-child { white-space: nowrap; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 0.6rem 0.6rem 0.2rem; background: var(--panel); border-radius: 8px; }
figcaption { font-weight: 600; font-size: 0.95rem; padding: 0 0.3rem; } svg { width: 100%; height: auto; display: block; }
figure { overflow-x: auto; } .wide svg { min-width: 44rem; }
svg text { font-family: inherit !important; }
.key { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0.1rem 0.3rem; font-size: 0.82rem; color: var(--faint); }
.key i { display: inline-block; width: 1.1em; border-top: 3px solid; margin-right: 0.35em; vertical-align: middle; }
.key i.dashed { border-top-style: dotted; }
"""


class Block(NamedTuple):
    kind: str
    content: tuple


def heading(text):
    return Block("heading", (text,))


def paragraph(text):
    return Block("paragraph", (text,))


def table(header, rows):
    """A table of texts; rows whose cells are all None are left out."""
    return Block("table", (header, [row for row in rows if any(cell is not None for cell in row[1:])]))


def chart(title, series, unit, x_label="epoch", steps=False):
    """Return a drawing block, or None if there is nothing to draw or matplotlib is not installed.

    Args:
        series: list of (name, {x: y}) or (name, {x: y}, 'dashed').
        unit: of y.
        steps: y jumps instead of passing straight.
    """
    series = [(entry[0], {x: y for x, y in entry[1].items() if y is not None}, "dashed" in entry[2:]) for entry in series]
    series = [entry for entry in series if entry[1]]
    drawing = new_figure(1, 1, (5.6, 2.9)) if series else None
    if drawing is None:
        return None
    figure, ((axis,),) = drawing
    for (_, points, dashed), colour in zip(series, SERIES, strict=False):
        look = {"drawstyle": "steps-mid"} if steps else {}
        axis.plot(
            *zip(*sorted(points.items()), strict=True), ":" if dashed else "-", color=colour, lw=1.8, marker=".", ms=4, **look
        )
    axis.set_xlabel(x_label)
    axis.set_ylabel(unit)
    if x_label == "epoch":
        axis.xaxis.get_major_locator().set_params(integer=True)
    return Block("chart", (title, _svg(figure, axis), [(name, dashed) for name, _, dashed in series]))


def timeline(title, bars, unit):
    """Return a drawing block of spans on a line of time, or None without matplotlib.

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
    return Block("chart", (title, _svg(figure, axis), []))


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


# Writing -------------------------------------------------------------------------------------------------------------


def as_markdown(title, blocks):
    """Return the blocks as Markdown; of drawings the title."""
    lines = [f"# {title}", ""]
    for block in filter(None, blocks):
        if block.kind == "heading":
            lines += [f"## {block.content[0]}", ""]
        elif block.kind == "paragraph":
            lines += [block.content[0], ""]
        elif block.kind == "table":
            header, rows = block.content
            lines += [_markdown_row(header), "|---" * len(header) + "|", *map(_markdown_row, rows), ""]
    return "\n".join(lines)


def _markdown_row(cells):
    return "| " + " | ".join("" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def as_html(title, blocks):
    """Return the blocks as one HTML page without any outside reference."""
    parts = []
    in_charts = False
    for block in filter(None, blocks):
        if in_charts != (block.kind == "chart"):
            parts.append("</div>" if in_charts else '<div class="charts">')
            in_charts = not in_charts
        parts.append(_html_of(block))
    parts += ["</div>"] if in_charts else []
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_of(block):
    if block.kind == "heading":
        return f"<h2>{html.escape(block.content[0])}</h2>"
    if block.kind == "paragraph":
        return f"<p>{html.escape(block.content[0])}</p>"
    if block.kind == "table":
        header, rows = block.content
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header) if any(header) else ""
        body = "".join("<tr>" + "".join(f"<td>{html.escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    title, svg, names = block.content
    key = "".join(
        f'<span><i{" class=dashed" if dashed else ""} style="color: var(--series-{number})"></i>{html.escape(name)}</span>'
        for number, (name, dashed) in enumerate(names)
    )
    wide = ' class="wide"' if not names else ""  # the timeline, which says nothing when it is small
    return f'<figure{wide}><figcaption>{html.escape(title)}</figcaption><div class="key">{key}</div>{svg}</figure>'


def _text(cell):
    return "" if cell is None else str(cell)
