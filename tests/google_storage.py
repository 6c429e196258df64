"""Google Cloud Storage's XML API on loopback, as far as obstore speaks it for a mirror: a stand-in written from its manual.

https://cloud.google.com/storage/docs/xml-api/reference-headers: a put is conditional by the generation of the object alone.
"""

import email.utils
import http.server
import itertools
import json
import re
import threading
import time
import urllib.parse

BUCKET = "bucket"


class GoogleStorage(http.server.ThreadingHTTPServer):
    """A server with one bucket: {name: (generation, contents, seconds since 1970)} in `objects`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.uploads, self.busy, self.numbers = {}, {}, threading.Lock(), itertools.count(1)
        account = {"private_key": "", "private_key_id": "", "client_email": "", "disable_oauth": True}
        account["gcs_base_url"] = f"http://127.0.0.1:{self.server_port}"
        self.environment = {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account)}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _request(self):
        """Return (name of the object, query, body)."""
        path, _, query = self.path.partition("?")
        name = urllib.parse.unquote(path).removeprefix(f"/{BUCKET}").removeprefix("/")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        return name, dict(urllib.parse.parse_qsl(query, keep_blank_values=True)), body

    def _answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _facts(self, generation, modified):
        return {
            "ETag": f'"{generation:x}"',
            "x-goog-generation": generation,
            "Last-Modified": email.utils.formatdate(modified, usegmt=True),
        }

    def _store(self, name, content):
        generation, modified = next(self.server.numbers), time.time()
        self.server.objects[name] = generation, content, modified
        return self._facts(generation, modified)

    def do_PUT(self):
        name, query, body = self._request()
        with self.server.busy:
            if "uploadId" in query:
                self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
                return self._answer(200, **self._facts(next(self.server.numbers), time.time()))
            expected = self.headers["x-goog-if-generation-match"]
            if expected is not None and int(expected) != self.server.objects.get(name, (0,))[0]:
                return self._answer(412)
            return self._answer(200, **self._store(name, body))

    def do_POST(self):
        name, query, _ = self._request()
        with self.server.busy:
            if "uploads" in query:
                number = str(next(self.server.numbers))
                self.server.uploads[number] = {}
                text = f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
                return self._answer(200, text.encode())
            parts = self.server.uploads.pop(query["uploadId"])
            facts = self._store(name, b"".join(parts[number] for number in sorted(parts)))
            text = f"<CompleteMultipartUploadResult><ETag>{facts['ETag']}</ETag></CompleteMultipartUploadResult>"
            return self._answer(200, text.encode(), **facts)

    def do_DELETE(self):
        name, query, _ = self._request()
        with self.server.busy:
            self.server.uploads.pop(query.get("uploadId"), None)
            return self._answer(204 if self.server.objects.pop(name, None) else 404)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name, query, _ = self._request()
        with self.server.busy:
            if not name:
                return self._answer(200, self._listing(query.get("prefix", "")).encode())
            if name not in self.server.objects:
                return self._answer(404)
            generation, content, modified = self.server.objects[name]
        asked, facts = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""), self._facts(generation, modified)
        if asked is None:
            return self._answer(200, content, **facts)
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        facts["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return self._answer(206, content[start:end], **facts)

    def _listing(self, prefix):
        entries = "".join(
            f"<Contents><Key>{name}</Key><Size>{len(content)}</Size><ETag>{generation:x}</ETag>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(modified))}</LastModified></Contents>"
            for name, (generation, content, modified) in sorted(self.server.objects.items())
            if name.startswith(prefix)
        )
        return f"<ListBucketResult>{entries}</ListBucketResult>"
