"""What a program prints, wherever that goes: a terminal, a pipe, a file on a full disk, nothing at all."""

import contextlib
import io
import os
import select
import signal
import sys

PATIENCE_MS = 5000  # for a reader that has stopped reading: Ctrl-S, a stopped process behind a pipe
PIPE_PIECE = 512  # bytes; POSIX's least PIPE_BUF: where poll() finds room, so much never blocks


class OutputLost(OSError):
    """Standard output cannot be written to, and is what the program is for."""


def protect_output():
    """Replace sys.stdout and sys.stderr by streams that no character and no closed end can break.

    What cannot be written is dropped, and the program's work goes on. A character that the output's encoding lacks is written
    as an escape. Descriptors 0 to 2 that the caller has closed are opened on /dev/null: else the next file that the program
    opens would take their number, and receive what libraries print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` would halt a program in the background
    sys.stdout = _stream(sys.stdout, 1)
    sys.stderr = _stream(sys.stderr, 2)


def _stream(present, descriptor):
    if present is None:  # closed when Python started; its number may belong to another file by now
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(OSError, ValueError):
        present.flush()
    raw = _Forgiving(descriptor, "w", closefd=False)
    encoding = present.encoding or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True)


def _raw_output():
    return getattr(getattr(sys.stdout, "buffer", None), "raw", None)


@contextlib.contextmanager
def required_output():
    """Raise BrokenPipeError or OutputLost inside the block where standard output cannot be written to."""
    raw = _raw_output()
    if not isinstance(raw, _Forgiving):
        yield
        return
    raw.required = True
    try:
        yield
        sys.stdout.flush()
    finally:
        raw.required = False


class _Forgiving(io.FileIO):
    """A descriptor for writing that drops what it cannot write, without an error and without waiting long."""

    lost = None  # why something was dropped
    required = False

    def write(self, data):
        """Write the bytes, or drop what is left of them; return their number."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and (self.required or self._has_room()):
                done += super().write(view[done : done + PIPE_PIECE]) or 0
        except OSError as error:
            self.lost = error.strerror
            if self.required and isinstance(error, BrokenPipeError):
                raise
            if self.required:
                raise OutputLost(error.errno, error.strerror) from error
        return len(view)

    def _has_room(self):
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        has_room = bool(poll.poll(0 if self.lost else PATIENCE_MS))
        if not has_room:
            self.lost = "nobody reads it"
        return has_room


def lost_output():
    """Return why something that was printed to standard output has been dropped, or None."""
    return getattr(_raw_output(), "lost", None)
