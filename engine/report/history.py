"""What happened to a run, from its log: sessions, interruptions, work done twice.

A session is one process. Every line of the log is read by itself, so that damaged ones cost only themselves.
"""

import math
import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from engine.system.plain_json import from_json

STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}) (.*)")
BEGUN = re.compile(r"environment: (\{.*\})$")
CONFIGURATION = re.compile(r"configuration: (\{.*\})$")
IMAGES = re.compile(r"recipe (\S+): (\S+) on ([\d,]+) images of (\d+) classes, (\d+) steps an epoch; (.*)")
FOUND_RATE = re.compile(r"suggested learning_rate: (\d\S*) ")
RESUMED = re.compile(r"resumed (.+), after epoch (\d+)(?: and (\d+) batches)? \(best so far")
PROGRESS = re.compile(r"epoch (\d+)/\d+: batch (\d+)/\d+, ")
EPOCH_DONE = re.compile(r"epoch (\d+)/\d+: .*(?:val loss|not validated)")
STOPPED = re.compile(r"stopped by (.+) in epoch (\d+) after (\d+) batches; (saved|NOT saved)")
FAILED = re.compile(r"stopped: (.+)")
FINISHED = re.compile(r"finished \d+ epochs: ")
FINISHED_END = "finished"
SILENT_END = "no word of an end: killed, or still going"


class Session(NamedTuple):
    """One process of a run. Positions are (whole epochs done, batches of the next one done)."""

    begun: datetime
    last_word: datetime
    first_position: tuple
    last_position: tuple  # the last one that the log knows of
    ended: str  # FINISHED_END, 'stopped by SIGTERM, saved', an error, or SILENT_END
    recipe: str
    images: int
    classes: int
    steps_per_epoch: int
    hardware: str
    environment: dict
    config: dict
    asked_config: dict  # as it was asked for: with learning_rate 'auto', for example
    warnings: list
    verdicts: list | None = None  # events of alarms that began or ended; None of a session that had no verdict

    @property
    def seconds(self):
        return (self.last_word - self.begun).total_seconds()


def read_sessions(path):
    """Return the Sessions of a log file, of whatever runs wrote to it, oldest first."""
    sessions, current = [], None
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        stamped = STAMP.fullmatch(line)
        if stamped is None:
            continue
        instant, text = datetime.strptime(stamped[1], "%Y-%m-%dT%H:%M:%S%z"), stamped[2]
        if begun := BEGUN.fullmatch(text):
            if current is not None:
                sessions.append(current)
            current = Session(instant, instant, (0, 0), (0, 0), SILENT_END, "?", 0, 0, 0, "", _json(begun[1]), {}, {}, [])
        elif current is not None:
            current = _with_line(current, instant, text)
    return sessions + ([current] if current is not None else [])


def _with_line(session, instant, text):
    """Return the session as one more line of its log tells it."""
    session = session._replace(last_word=instant)
    if found := CONFIGURATION.fullmatch(text):
        config = _json(found[1])
        return session._replace(config=config, asked_config=session.asked_config or config)
    if (found := FOUND_RATE.match(text)) and session.config.get("learning_rate") == "auto":  # an older log says no more
        return session._replace(config=session.config | {"learning_rate": float(found[1])})
    if found := IMAGES.match(text):
        images, classes, steps = (int(found[n].replace(",", "")) for n in (3, 4, 5))
        return session._replace(recipe=found[1], images=images, classes=classes, steps_per_epoch=steps, hardware=found[6])
    if found := RESUMED.match(text):
        position = int(found[2]), int(found[3] or 0)
        return session._replace(first_position=position, last_position=position)
    if found := PROGRESS.match(text):
        return session._replace(last_position=(int(found[1]) - 1, int(found[2])))
    if found := EPOCH_DONE.match(text):
        return session._replace(last_position=(int(found[1]), 0))
    if found := STOPPED.match(text):
        return session._replace(last_position=(int(found[2]) - 1, int(found[3])), ended=f"stopped by {found[1]}, {found[4]}")
    if FINISHED.match(text):
        return session._replace(ended=FINISHED_END)
    if found := FAILED.match(text):
        return session._replace(ended=f"stopped: {found[1]}")
    if text.startswith(("WARNING", "bad image", "out of GPU memory")):
        return session._replace(warnings=[*session.warnings, text])
    return session


def _json(text):
    try:
        return from_json(text)
    except ValueError:
        return {}


def sessions_of_run(path, folder):
    """Return the Sessions in a log of the run that lies in a folder now, oldest first; not those of a run it replaced.

    Args:
        folder: the run's checkpoint_dir; one that was moved is known by its name.
    """
    folder, log_folder = Path(folder).resolve(), Path(path).resolve().parent
    sessions = [session for session in read_sessions(path) if "checkpoint_dir" in session.config]
    folders = [Path(str(session.config["checkpoint_dir"])) for session in sessions]  # 'inf' was read as a number
    own = [s for s, its in zip(sessions, folders, strict=True) if folder in ((log_folder / its).resolve(), its.resolve())]
    if not own:
        own = [s for s, its in zip(sessions, folders, strict=True) if its.name == folder.name]
    fresh = [number for number, session in enumerate(own) if session.first_position == (0, 0)]
    return own[fresh[-1] :] if fresh else own


class Interruption(NamedTuple):
    """The time between two sessions, and the work that had to be done again."""

    at: datetime
    how: str
    seconds_away: float
    steps_lost: int  # at least: what came after the log's last word is not known
    images_lost: int


def interruptions(sessions):
    """Return the Interruption between each session and the next; one that the run had come to its end before is none."""
    found = []
    for before, after in zip(sessions, sessions[1:], strict=False):
        began_at_the_end = before.first_position[0] >= before.config.get("epochs", math.inf)
        if before.ended == FINISHED_END or began_at_the_end:
            continue
        (epochs, batches), (last_epochs, last_batches) = after.first_position, before.last_position
        steps = (last_epochs - epochs) * before.steps_per_epoch + last_batches - batches
        away = (after.begun - before.last_word).total_seconds()
        lost = max(0, steps)
        found.append(Interruption(before.last_word, before.ended, away, lost, lost * before.config.get("batch_size", 0)))
    return found
