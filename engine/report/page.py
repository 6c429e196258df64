"""A report as a list of blocks, written as Markdown and as one HTML page that needs nothing else.

The templates page.md.j2 and page.html.j2 beside this module show what the blocks look like.
"""

from pathlib import Path

import jinja2


def heading(text):
    """Return the block of a heading."""
    return {"kind": "heading", "text": text}


def paragraph(text):
    """Return the block of a paragraph."""
    return {"kind": "paragraph", "text": text}


def table(header, rows):
    """Return the block of a table; of the cells None is empty, and rows with nothing behind the first cell are left out."""
    rows = [["" if cell is None else cell for cell in row] for row in rows if any(cell is not None for cell in row[1:])]
    return {"kind": "table", "header": header, "rows": rows}


def chart_block(title, svg, names):
    """Return the block of a drawing; Markdown leaves it out.

    Args:
        names: for the key, list of (name of a series, number of its colour, style of its line in CSS).
    """
    return {"kind": "chart", "title": title, "svg": svg, "names": names}


def gallery_block(title, text, shots):
    """Return the block of some images, each of which shows its name and what the network saw at a click; not in Markdown.

    Args:
        shots: list of {'name', 'label', 'right', 'best': [[class, probability], ...], 'jpeg': base64}.
    """
    return {"kind": "gallery", "title": title, "text": text, "shots": shots}


def as_markdown(title, blocks):
    """Return the blocks as Markdown, without the drawings; None among the blocks is passed over."""
    return _render("page.md.j2", title, blocks).rstrip("\n") + "\n"


def as_html(title, blocks, live=None):
    """Return the blocks as one HTML page without any outside reference; None among the blocks is passed over.

    Args:
        live: {'state', 'nonce'} of a page that is served and loads itself anew when /state says something else.
    """
    return _render("page.html.j2", title, blocks, live=live)


def _render(template, title, blocks, **others):
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        title=title, blocks=[block for block in blocks if block is not None], **others
    )
