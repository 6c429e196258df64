"""Signals and spot notices: they raise a flag, and the run stops between two batches."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future

SPOT_POLL_SECONDS = 5.0  # as AWS recommends; the notice comes two minutes ahead
SAVING_SECONDS = 120.0  # before a limit on a session's hours, for the step in progress, the save and its upload


class Interrupted(Exception):
    """The run was asked to stop; raised between two batches, where its state is whole."""

    def __init__(self, cause, exit_code):
        super().__init__(cause)
        self.exit_code = exit_code


class RunEnded(Exception):
    """The run has ended early: everything is saved and logged, and the program only has to end with the exit status."""

    def __init__(self, exit_code):
        super().__init__(exit_code)
        self.exit_code = exit_code


class StopRequest:
    """Remembers that somebody asked the run to stop.

    Inside `with StopRequest() as stop:` SIGTERM, SIGINT and SIGHUP raise a flag instead of ending the process; a second SIGINT
    ends it at once. SIGUSR1 raises another flag, which asks for a save alone. A SIGHUP that nohup has switched off stays so.
    `stop.between(items)` yields the items and raises Interrupted once the flag is up; a BatchLoader does so in all processes
    of a job.

    Args:
        interrupting: until begin() is called the flag is not waited for: the main thread gets a KeyboardInterrupt, too. So
            ends what takes long and has nothing to save, and later while_waiting().
    """

    def __init__(self, interrupting=False):
        self._interrupting = interrupting
        self.cause = None
        self.exit_code = 0
        self.machine_goes_away = False
        self.save_asked = False
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if number == signal.SIGUSR1:
            self.save_asked = True
            return
        if self.cause is not None and number == signal.SIGINT:
            for worker in multiprocessing.active_children():
                worker.kill()
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopped at once, on the second Ctrl-C; the last checkpoint on disk is whole\n")
            os._exit(130)
        self.request(signal.Signals(number).name, 128 + number)
        if self._interrupting:
            self._interrupting = False  # what it ends is not interrupted in closing what is open
            raise KeyboardInterrupt

    def request(self, cause, exit_code):
        """Ask the run to stop; only the first cause counts."""
        if self.cause is None:
            self.exit_code = exit_code
            self.cause = cause
            main = threading.main_thread()
            if self._interrupting and threading.current_thread() is not main:
                signal.pthread_kill(main.ident, signal.SIGTERM)

    def begin(self):
        """From now on the run stops between two batches."""
        self._interrupting = False

    @contextlib.contextmanager
    def after(self, hours, begun):
        """Ask the run to stop in time for it to have ended so many hours after it began; None never does.

        Where that is past already, it stops at its first batch.

        Args:
            begun: what time.perf_counter() showed then.
        """
        timer = None
        if hours is not None:
            seconds = 3600 * hours - min(SAVING_SECONDS, 3600 * hours / 30) - (time.perf_counter() - begun)
            what = f"--stop-after-hours {hours:g}", 0
            if seconds <= 0:
                self.request(*what)
            else:
                timer = threading.Timer(seconds, self.request, what)
                timer.daemon = True
                timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def check(self):
        """Raise Interrupted if somebody asked the run to stop."""
        if self.cause is not None:
            raise Interrupted(self.cause, self.exit_code)

    def while_waiting(self, items):
        """Yield the items; end once somebody asked the run to stop, even if the next one does not come.

        Only the wait for an item is broken off: what is done between two of them is not.
        """
        items, end = iter(items), object()
        item = None
        while item is not end:
            try:
                self._interrupting = True  # before the look at the cause: nothing is missed between the two
                item = end if self.cause is not None else next(items, end)
                self._interrupting = False
            except KeyboardInterrupt:
                if self.cause is None:
                    raise
                return
            except BaseException:
                self._interrupting = False
                raise
            if item is not end:
                yield item

    def between(self, items):
        """Yield the items; raise Interrupted before the next one once somebody asked the run to stop."""
        self.check()
        for item in items:
            yield item
            self.check()


def in_a_thread(function, *arguments, seconds=None, **options):
    """Return function(...), called in a thread where the main thread asks: a signal is heard while a foreign library waits.

    Args:
        seconds: raise TimeoutError once they have passed; what the function does is left to itself then, as after a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments, **options)
    outcome = Future()

    def call():
        try:
            outcome.set_result(function(*arguments, **options))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()  # none of concurrent.futures', which Python waits for when it ends
    return outcome.result(seconds)


def ignore_signals():
    """Make this process deaf to what asks a run to stop or to save: its parent ends it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def watch_spot_notice(stop, url, log, poll_seconds=SPOT_POLL_SECONDS):
    """Start a daemon thread that turns an EC2 spot termination notice into a stop request, exit code 143.

    Args:
        stop: the StopRequest.
        url: root of the instance metadata service, e.g. http://169.254.169.254; IMDSv2 tokens are used.
        log: called with a text when the service cannot be reached, once.
    Returns:
        the thread's stop event.
    """
    ended = threading.Event()

    def poll():
        complained = False
        while not ended.is_set():
            try:
                notice = spot_notice(url)
            except (OSError, ValueError) as error:
                notice = None
                if not complained:
                    log(f"spot_notice: the instance metadata service at {url} does not answer ({error}); still polling")
                    complained = True
            if notice:
                stop.machine_goes_away = True
                stop.request(f"spot termination notice ({notice})", 128 + signal.SIGTERM)
                return
            ended.wait(poll_seconds)

    threading.Thread(target=poll, name="spot-notice", daemon=True).start()
    return ended


def spot_notice(url):
    """Return the text of the spot instance action, or None while there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # link-local: never through a proxy
    token_request = urllib.request.Request(
        f"{url}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with opener.open(token_request, timeout=2) as answer:
        token = answer.read().decode()
    notice_request = urllib.request.Request(
        f"{url}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with opener.open(notice_request, timeout=2) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
