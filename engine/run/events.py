"""events.jsonl: what happens to a run, a JSON object a line: when it starts, resumes, saves, warns, stops and ends."""

import time
from pathlib import Path

from engine.system.files import append_whole
from engine.system.plain_json import from_json, to_json

EVENTS = "events.jsonl"
# Their kinds: start, configuration (once the rate is found), resume, progress, epoch, save, warning, verdict (an alarm
# begins or ends), interruption (asked to stop), error (cannot go on), end (trained to the end).


class EventLog:
    """Appends events to the file of a run; until open() says where that lies, and where it cannot be written, it keeps them.

    Each has `event`, its kind, `time` in seconds since 1970, and where they are known `epoch` (whole epochs done), `batch`
    (batches of the next one done) and `step` (optimizer steps of the run done).
    """

    def __init__(self):
        self._path, self._waiting, self._steps_per_epoch = None, [], None

    def open(self, folder):
        """Write to the folder's file from now on; what was added before comes first."""
        self._path = Path(folder) / EVENTS
        if _ends_within_a_line(self._path):  # a kill cut it short
            self._waiting.insert(0, None)
        self._write()

    def add(self, event, **facts):
        """Append an event; `facts` are plain values."""
        self._steps_per_epoch = facts.get("steps_per_epoch", self._steps_per_epoch)
        if self._steps_per_epoch and "epoch" in facts and "batch" in facts:
            facts["step"] = facts["epoch"] * self._steps_per_epoch + facts["batch"]
        self._waiting.append({"event": event, "time": time.time()} | facts)
        self._write()

    def _write(self):
        if self._path is None or not self._waiting:
            return
        lines = b"".join((to_json(event).encode() if event else b"") + b"\n" for event in self._waiting)
        try:
            append_whole(self._path, lines)
        except OSError:  # the log says what the disk does not take; the next event tries again
            return
        self._waiting.clear()


def _ends_within_a_line(path):
    return path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0


def read_events(path):
    """Return the events of a file, oldest first; lines that cannot be read are passed over."""
    events = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = from_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), int | float):
            events.append(event)
    return events
