"""A thread that looks after a run from outside of it, once a second: whether it goes on, and where it is."""

import threading

BEAT_SECONDS = 1.0


class Heartbeat:
    """Calls a function once a second in a thread of its own, until stop().

    Args:
        beat: function without arguments; an error of it ends the thread and nothing else.
    """

    def __init__(self, beat):
        self._beat = beat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self):
        """Begin to beat."""
        self._thread.start()

    def stop(self):
        """End the thread."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self):
        while not self._ended.wait(BEAT_SECONDS):
            self._beat()
