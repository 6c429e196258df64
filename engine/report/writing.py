"""report.html and report.md: what report.py writes when it is asked, and a run when it ends."""

from pathlib import Path

from engine.report.page import as_html, as_markdown
from engine.run.checkpoint_files import is_report
from engine.system.files import replacing

REPORT, COMPARED = "report", "compared"  # of one run, and of several beside each other


def write_report(output, title, blocks):
    """Write a report's title and blocks as OUTPUT.html and OUTPUT.md, each whole or not at all.

    Raises:
        OSError: one of them cannot be written, or takes the place of another file than a report.
    """
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    texts = {Path(f"{output}.html"): as_html(title, blocks), Path(f"{output}.md"): as_markdown(title, blocks)}
    for path in texts:
        if path.is_file() and path.stat().st_size and not is_report(path):
            raise FileExistsError(f"{path} is there and is no report of a run; python report.py --output NAME writes elsewhere")
    for path, text in texts.items():
        with replacing(path, "w") as file:
            file.write(text)
