"""What a run says: on the terminal, in its log file, in events.jsonl."""

import contextlib
import errno
import logging
import os
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from engine.run.events import EventLog
from engine.system.console import lost_output
from engine.system.distributed import rank
from engine.system.errors import UserError, first_line
from engine.system.files import make_folder

WARNINGS = ("WARNING", "bad image", "out of GPU memory")  # what a warning begins with


class RunLog:
    """Says lines and keeps events. Of several processes only the first one does.

    Args:
        log_file: path, or None: nothing is logged.
    Raises:
        UserError: the file cannot be written to.
    """

    def __init__(self, log_file):
        self._is_main = rank() == 0
        self._speaking = threading.RLock()  # the heartbeat speaks, too
        self._events = EventLog()
        self._output_was_lost = False
        self._log = logging.Logger("training")  # not from the registry: each run has its own file
        if self._is_main and log_file is not None:
            try:
                make_folder(Path(log_file).parent)
                _require_text(log_file)
                handler = _LogFile(log_file, encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                reason = "nobody reads it" if error.errno == errno.ENXIO else error
                raise UserError(f"log_file = {log_file!r} cannot be written to: {reason}") from error
            handler.handleError = _complain_of_the_log
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"))
            self._log.addHandler(handler)

    def close(self):
        """Close the log file."""
        for handler in self._log.handlers:
            with contextlib.suppress(OSError):  # what a full disk did not take has been complained of
                handler.close()

    def log(self, text):
        """Print a line, above the bar if there is one, and log it."""
        if not self._is_main:
            return
        with self._speaking:
            self.log_to_file(text)
            if text.startswith(WARNINGS):
                self.event("warning", text=text)
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            if not self._output_was_lost and (reason := lost_output()):
                self._output_was_lost = True
                self.log_to_file(
                    f"note: standard output cannot be written to ({reason}); the run goes on, and this log has everything"
                )

    def event(self, event, **facts):
        """Add an event to events.jsonl, which lies in the folder of open_events."""
        if self._is_main:
            with self._speaking:
                self._events.add(event, **facts)

    def open_events(self, folder):
        """Write events.jsonl in a folder from now on; what was kept before comes first."""
        self._events.open(folder)

    def log_to_file(self, text):
        """Write a line to the log file alone."""
        for line in text.splitlines():
            self._log.info(line)

    @contextlib.contextmanager
    def warn_on_error(self, trouble):
        """Turn whatever goes wrong inside into a warning: the run is worth more."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self.log(f"WARNING: {trouble}: {first_line(error)}. The run goes on")


class _LogFile(logging.FileHandler):
    """Neither opening it nor a line waits for the reader of a pipe."""

    def _open(self):
        def open_at_once(path, flags):
            return os.open(path, flags | os.O_NONBLOCK, 0o666)

        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=open_at_once)


def _require_text(log_file):
    """Raise UserError if there is a file that is no text: a line behind a checkpoint or an image would damage it."""
    if Path(log_file).is_file():
        with open(log_file, "rb") as file:
            start = file.read(16)
        if b"\0" in start and start.strip(b"\0"):  # further on, and where all are, a power cut may have left zeros in a log
            raise UserError(f"log_file = {str(log_file)!r} is there and is no text: name another file with --log-file")


def _complain_of_the_log(record):
    """Say that a line could not be logged, in place of logging's traceback: a full disk must not end the run."""
    print(f"WARNING: not logged ({sys.exc_info()[1]}): {record.getMessage()}", file=sys.stderr)
