"""Debian's Chromium without a window, told what to do through a pair of pipes (the DevTools protocol)."""

import base64
import contextlib
import json
import os
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One page in a browser of its own."""

    def __init__(self, ours, theirs):
        self._write, self._read, self._number, self._rest = ours, theirs, 0, b""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")

    def ask(self, method, **parameters):
        """Return the answer to a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._wait(lambda answer: answer.get("id") == self._number)["result"]

    def _wait(self, wanted):
        while True:
            while b"\0" not in self._rest:
                block = os.read(self._read, 1 << 20)
                assert block, "the browser has ended"
                self._rest += block
            message, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(message)
            assert "error" not in answer, answer
            if wanted(answer):
                return answer

    def open(self, url, width=1280, height=900, dark=False):
        """Show a page in a window of so many px, in light or dark."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        self._wait(lambda answer: answer.get("method") == "Page.loadEventFired")

    def value(self, script):
        """Return the value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector):
        """Press and release the mouse in the middle of the first element that a selector finds."""
        script = f"e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
        script += "r = e.getBoundingClientRect(); [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = self.value(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path, whole=True):
        """Write what the page shows, down to its end, to a PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(folder):
    """Give a Page; its browser keeps its files in a folder and ends with the block."""
    to_it, ours = os.pipe()
    theirs, from_it = os.pipe()

    def as_3_and_4():
        os.dup2(to_it, 103)
        os.dup2(from_it, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    command = [
        CHROMIUM,
        "--headless",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        "--no-first-run",
        "--disable-gpu",
    ]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        command, preexec_fn=as_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_it)
    os.close(from_it)
    try:
        yield Page(ours, theirs)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
