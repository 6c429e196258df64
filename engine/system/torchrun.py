"""What torchrun tells the processes that it starts, by environment variables; known before torch is imported."""

import os

from engine.system.errors import UserError

_CURE = "start several processes with torchrun, which sets them all; for one process: unset RANK WORLD_SIZE"
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched():
    """Return whether torchrun, or something like it, has started this process."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def launched_size():
    """Return the number of processes that belong together, 1 without torchrun or where check_launch() will complain."""
    count = os.environ.get("WORLD_SIZE", "") if launched() else ""
    return max(int(count), 1) if count.isdecimal() else 1


def launch_number(name, default):
    """Return the number that an environment variable of torchrun's holds.

    Raises:
        UserError: it holds something else.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} = {text!r} is no number: {_CURE}")
    return int(text)


def check_launch():
    """Raise UserError unless the environment is that of a plain process or a whole one of torchrun's."""
    if not launched():
        return
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        there = ", ".join(f"{name} = {os.environ[name]!r}" for name in NEEDED if name in os.environ)
        raise UserError(f"the environment says {there}, but not {' and '.join(missing)}: {_CURE}")
    numbers = {name: launch_number(name, 0) for name in NUMBERS if name in os.environ}
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(f"the environment says RANK = {numbers['RANK']} of WORLD_SIZE = {numbers['WORLD_SIZE']}: {_CURE}")
