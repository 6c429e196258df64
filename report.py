"""What a run has done, from its own records: results, curves, timeline with interruptions, use of the machine, cost.

python report.py                                  checkpoints/report.html and report.md, of the run in checkpoints/
python report.py checkpoints/demo --price-per-hour 0.752
python report.py runs/a runs/b                    several runs on one page, runs/a/compared.html
python report.py checkpoints --serve              in a browser, renewed as epochs end

Reads metrics.jsonl and events.jsonl, of runs from before these the log; the run may still be going on.
"""

import argparse
import sys
from pathlib import Path

from config import CONFIG
from engine.cli.command_line import FlagsParser
from engine.cli.keys import positive_number
from engine.inference.outputs import claim, named_prefix, user_error_on_failure
from engine.report.figures import read_run
from engine.report.one_run import report_of_run
from engine.report.serving import serve
from engine.report.side_by_side import report_of_runs
from engine.report.writing import COMPARED, REPORT, write_report
from engine.run.checkpoint_files import is_report
from engine.system.console import protect_output
from engine.system.errors import UserError, run_program
from engine.system.files import path_argument, path_text


def main(arguments):
    if arguments.log_file and arguments.log_file.is_dir():
        raise UserError(f"--log-file {arguments.log_file} is a folder: name a file")
    if arguments.serve is not None:
        serve(arguments.folders, lambda: report_of(arguments), arguments.serve)
        return 0
    name = REPORT if len(arguments.folders) == 1 else COMPARED
    output = named_prefix("output", arguments.output or arguments.folders[0] / name)
    if arguments.output or arguments.folders[0].is_dir():  # else there is no run, which is said below
        claim("output", dict.fromkeys((f"{output}.html", f"{output}.md"), is_report), [arguments.log_file or ""])
    title, blocks = report_of(arguments)
    with user_error_on_failure("output", output):
        write_report(output, title, blocks)
    print(f"wrote {output}.html and {output}.md")
    return 0


def report_of(arguments):
    """Return (title, blocks) of the report that the arguments ask for."""
    runs = [read_run(folder, CONFIG, arguments.log_file) for folder in arguments.folders]
    if len(runs) == 1:
        return report_of_run(runs[0], arguments.price_per_hour)
    return report_of_runs(runs, arguments.price_per_hour)


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = FlagsParser("report.py", description=__doc__)
    folders = {"nargs": "*", "type": path_argument, "default": [Path("checkpoints")], "metavar": "FOLDER"}
    parser.add_argument("folders", help="a run's checkpoint_dir; default checkpoints", **folders)
    where = "a log to read in place of events.jsonl; default without events: training.log in the folder, above it or here"
    parser.add_argument("--log-file", type=path_argument, metavar="FILE", help=where)
    parser.add_argument("--log", dest="log_file", type=path_argument, help=argparse.SUPPRESS)  # its former name
    parser.add_argument("--price-per-hour", type=positive_number, help="what an hour of the machine costs")
    where = "of the files OUTPUT.html and OUTPUT.md; default FOLDER/report, of several runs FOLDER/compared of the first"
    parser.add_argument("--output", type=path_text, help=where)
    how = "show the report in a browser while the run goes on, on this machine's PORT (8000)"
    parser.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT", help=how)
    parsed = parser.parse_args(arguments)
    if parsed.serve is not None and parsed.output is not None:
        parser.error("--output: --serve writes no file")
    return parsed


if __name__ == "__main__":
    protect_output()
    sys.exit(run_program("report.py", main, parse_arguments()))
