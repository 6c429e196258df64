"""The ledger of a run: the hours that it has used, over all sessions and machines, what they cost, and its budget."""

import contextlib
import os
import threading
import time
import uuid
from pathlib import Path

from engine.system import lock
from engine.system.files import delete_leftovers
from engine.system.plain_json import from_json, to_json

HOURS = "hours.json"
WRITE_SECONDS = 5.0  # between writings of hours.json; the most of a session that a kill can hide


class Ledger:
    """The sessions of a run, of which this process is one.

    A session is {"seconds": s, "price_per_hour": p or None}, known by a token. Seconds only ever grow, so that two ledgers of
    a run are merged by taking the larger number of each session. Every checkpoint has the ledger; hours.json beside it has
    what a killed session did after its last save.

    Args:
        begun: what time.perf_counter() showed when this session began.
        price_per_hour: of this machine, or None.
    """

    def __init__(self, begun, price_per_hour=None):
        self.run = self.session = uuid.uuid4().hex  # the run is called after its first session
        self.price_per_hour = price_per_hour
        self.budget = None  # or {"hours": h, "dollars": d or None}
        self.rates = None  # of the machine that it was planned on, as Rates.as_plain() has them
        self.saves = 0  # of the whole run: the larger number is the newer state
        self._begun, self._earlier = begun, {}
        self._ended, self._writing = threading.Event(), threading.Lock()

    def state(self):
        """Return the ledger as plain values."""
        return {
            "run": self.run,
            "session": self.session,
            "saves": self.saves,
            "budget": self.budget,
            "rates": self.rates,
            "sessions": self.sessions(),
        }

    def sessions(self):
        """Return {token: session} of all sessions, this one as long as it is by now."""
        seconds = time.perf_counter() - self._begun
        return self._earlier | {self.session: {"seconds": seconds, "price_per_hour": self.price_per_hour}}

    def take_over(self, saved):
        """Go on with a run whose ledger was state(); None, of a checkpoint of old, is passed over."""
        if not saved:
            return
        self.run, self.budget, self.rates = saved["run"], saved["budget"], saved.get("rates")
        self.saves = max(self.saves, saved["saves"])
        self.merge(saved)

    def merge(self, other):
        """Take over what another ledger of the same run knows of its sessions."""
        if not is_ledger(other) or other["run"] != self.run:
            return
        for token, session in other["sessions"].items():
            known = self._earlier.get(token)
            if token != self.session and (known is None or known["seconds"] < session["seconds"]):
                self._earlier[token] = session
        if self.price_per_hour is None and self._earlier:
            self.price_per_hour = list(self._earlier.values())[-1]["price_per_hour"]

    @property
    def earlier_sessions(self):
        return len(self._earlier)

    def hours(self):
        """Return the hours of all sessions so far."""
        return sum(session["seconds"] for session in self.sessions().values()) / 3600

    def dollars(self):
        """Return what they cost, each at its own price; a session without one costs nothing."""
        return _dollars(self.sessions())

    def used_before(self):
        """Return (hours, dollars) of the earlier sessions."""
        return sum(session["seconds"] for session in self._earlier.values()) / 3600, _dollars(self._earlier)

    def keep(self, folder, mirror=None):
        """Write hours.json in the folder, and in a Mirror, from now on, in a thread of its own each, until close()."""
        delete_leftovers(folder, HOURS)
        self._path = Path(folder) / HOURS
        self._repeat("hours", self._write, WRITE_SECONDS)
        if mirror is not None:
            self._repeat("mirror-hours", mirror.write_hours, lock.SIGN_OF_LIFE_SECONDS)

    def close(self):
        """Write hours.json for the last time."""
        self._ended.set()
        if hasattr(self, "_path"):
            self._write()

    def _repeat(self, name, write, seconds):
        def repeat():
            write()
            while not self._ended.wait(seconds):
                write()

        threading.Thread(target=repeat, name=name, daemon=True).start()

    def _write(self):
        temporary = self._path.with_name(f".{os.getpid()}-{HOURS}.tmp")
        with self._writing, contextlib.suppress(OSError):  # every checkpoint has it, too: not worth a sync every few seconds
            temporary.write_text(to_json(self.state()) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)


def _dollars(sessions):
    return sum(session["seconds"] / 3600 * (session["price_per_hour"] or 0.0) for session in sessions.values())


def is_ledger(saved):
    """Return whether something read is the state of a Ledger."""
    known = isinstance(saved, dict) and {"run", "saves", "budget", "sessions"} <= saved.keys()
    return known and isinstance(saved["sessions"], dict)


def read_hours(folder):
    """Return what hours.json in a folder holds, or None."""
    try:
        saved = from_json((Path(folder) / HOURS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return saved if is_ledger(saved) else None
