"""report.html and report.md: what report.py writes when it is asked, and a run when it ends."""

from pathlib import Path

from engine.report.page import as_html, as_markdown
from engine.system.files import replacing

REPORT = "report"


def write_report(output, title, blocks):
    """Write a report's title and blocks as OUTPUT.html and OUTPUT.md, each whole or not at all."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("html", as_html(title, blocks)), ("md", as_markdown(title, blocks))):
        with replacing(f"{output}.{suffix}", "w") as file:
            file.write(text)
