"""The report of a run that still goes on, in a browser: read only, on this machine alone, one page."""

import hashlib
import http.server
import secrets
import sys
import threading

from engine.report.page import as_html, paragraph
from engine.run.checkpoint_files import RECORDS
from engine.run.events import EVENTS, read_events
from engine.system.errors import UserError, first_line

OWN_NAMES = ("localhost", "127.0.0.1")  # a page elsewhere whose name leads here is not answered
QUIET_EVENTS = ("progress", "save")  # that need no new page


def serve(folders, report, port):
    """Serve the report of runs on 127.0.0.1 until Ctrl-C; the page asks every few seconds whether there is news.

    Args:
        folders: Paths of the runs.
        report: returns (title, blocks) of the report as it is now; a UserError is shown in its place.
        port: 0 takes a free one.
    Raises:
        UserError: the port is taken.
    """
    try:
        server = _Server(("127.0.0.1", port), _Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve {port}: {error}; name another port") from error
    with server:
        server.daemon_threads = True
        server.page = Page(folders, report)
        port = server.server_address[1]
        print(f"http://127.0.0.1:{port}/ shows {', '.join(map(str, folders))} as it grows; Ctrl-C ends it", flush=True)
        print(f"from another computer: ssh -L {port}:127.0.0.1:{port} this-machine", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


class Page:
    """The report as HTML, made anew when the runs have news; arguments as of serve."""

    def __init__(self, folders, report):
        self._folders, self._report = folders, report
        self._making = threading.Lock()
        self._state, self._html = None, b""

    def state(self):
        """Return a text that changes when the runs have news."""
        seen = []
        for folder in self._folders:
            for path in [folder / RECORDS, *sorted(folder.glob("*_gallery.json"))]:
                if path.is_file():
                    seen.append((path.name, path.stat().st_mtime_ns, path.stat().st_size))
            if (folder / EVENTS).is_file():
                events = [event["time"] for event in read_events(folder / EVENTS) if event["event"] not in QUIET_EVENTS]
                seen.append((EVENTS, len(events), events[-1:]))
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    def html(self, nonce):
        """Return the page, bytes; its script has the nonce."""
        with self._making:
            state = self.state()
            if state != self._state:
                try:
                    title, blocks = self._report()
                except UserError as error:
                    title, blocks = "Nothing to report yet", [paragraph(str(error))]
                except Exception as error:  # the page answers, and with the next state it is made anew
                    title = "The report could not be made"
                    blocks = [paragraph(f"{type(error).__name__}: {first_line(error)}")]
                self._html, self._state = as_html(title, blocks, live={"state": state, "nonce": "NONCE"}).encode(), state
            return self._html.replace(b'nonce="NONCE"', f'nonce="{nonce}"'.encode())


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a browser that went away before its answer
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers / and /state, and nothing else: no path leads to a file."""

    def do_GET(self):
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        path, nonce = self.path.split("?")[0], secrets.token_urlsafe(12)
        if name not in OWN_NAMES:
            self._answer(403, "text/plain", b"only for this machine\n", nonce)
        elif path == "/":
            self._answer(200, "text/html", self.server.page.html(nonce), nonce)
        elif path == "/state":
            self._answer(200, "text/plain", self.server.page.state().encode(), nonce)
        else:
            self._answer(404, "text/plain", b"there is only /\n", nonce)

    def _answer(self, status, kind, content, nonce):
        self.send_response(status)
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'"
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy + "; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
