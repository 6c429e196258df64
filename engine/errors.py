"""How a program ends when something is wrong that its user can mend: one clear message, no traceback."""

import os
import sys


class UserError(ValueError):
    """Something that the user can mend; the message says what is wrong, the value and what to do."""

    exit_code = 1


class DataError(UserError):
    """The data set cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint cannot be used, or a folder of checkpoints must not be written to."""


class TrainingStopped(UserError):
    """The run cannot go on; what is on disk is good."""


def launched_rank():
    """Return the number that torchrun has given this process, known before torch is imported; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def first_line(error):
    """Return the first line of an exception's message, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_program(name, main, *arguments):
    """Return the exit status of main(*arguments): its own, or that of the UserError that ended it."""
    for stream in (sys.stdout, sys.stderr):  # a name on disk may hold what the terminal has no character for
        stream.reconfigure(errors="backslashreplace")
    try:
        return main(*arguments) or 0
    except UserError as error:
        if rank := launched_rank():
            name = f"{name} (process {rank})"
        sys.stderr.writelines(f"{name}: {line}\n" for line in str(error).splitlines())
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{name}: stopped before there was anything to save", file=sys.stderr)
        return 130
