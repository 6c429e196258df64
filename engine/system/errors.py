"""How a program ends when something is wrong that its user can mend: one clear message, no traceback."""

import contextlib
import os
import signal
import sys

from engine.system.console import OutputLost, required_output


class UserError(ValueError):
    """Something that the user can mend; the message says what is wrong, the value and what to do."""

    exit_code = 1


class DataError(UserError):
    """The data set cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint cannot be used, or a folder of checkpoints must not be written to."""


TRY_LATER = 75  # exit status: the same command line does it later; EX_TEMPFAIL of sysexits.h


class InUse(CheckpointError):
    """Another process holds what this one needs."""

    exit_code = TRY_LATER


class MachineError(UserError):
    """The machine does not give what is needed: a right, memory, open files. What it was needed for may be good."""


class TrainingStopped(UserError):
    """The run cannot go on; what is on disk is good."""


def launched_rank():
    """Return the number that torchrun has given this process, known before torch is imported; 0 without torchrun."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def first_line(error):
    """Return the first line of an exception's message, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_main_memory(error):
    """Return whether an exception says that the machine gives no more main memory, processes or threads."""
    said = ("can't allocate memory", "not enough memory", "can't start new thread")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in said))


def run_program(name, main, *arguments, needs_output=False):
    """Return the exit status of main(*arguments): its own, or that of the error that ended it.

    Args:
        needs_output: what is printed is what the program is for. Where nobody reads it any more the program ends without a
            word, as other Unix programs do.
    """
    try:
        with required_output() if needs_output else contextlib.nullcontext():
            return main(*arguments) or 0
    except UserError as error:
        if rank := launched_rank():
            name = f"{name} (process {rank})"
        sys.stderr.writelines(f"{name}: {line}\n" for line in str(error).splitlines())
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{name}: stopped before there was anything to save", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not needs_output:
            raise
        return 128 + signal.SIGPIPE
    except OutputLost as error:
        print(f"{name}: standard output cannot be written to: {error.strerror}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a right that is missing, a folder that is gone
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_main_memory(error):
            raise
        print(
            f"{name}: the machine gives no more memory, processes or threads ({first_line(error)}): end other programs, raise "
            "the limits (ulimit -a; a container's), or lower --batch-size or --num-workers",
            file=sys.stderr,
        )
        return 1
