"""A real S3 server on loopback (moto), and a line to it that can be slow or broken."""

import select
import socket
import subprocess
import sys
import threading
import time
import urllib.request

BUCKET = "bucket"


class S3Server:
    """moto's server in a process of its own, and a proxy before it whose `mode` is 'open', 'slow' or 'refusing'."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.mode = "open"
        self.bytes_in = 0  # from the clients
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        threading.Thread(target=self._accept, daemon=True).start()
        deadline = time.monotonic() + 60
        while True:
            try:
                bucket = urllib.request.Request(f"http://127.0.0.1:{self._port}/{BUCKET}", method="PUT")
                urllib.request.urlopen(bucket).close()
                return
            except OSError:
                assert time.monotonic() < deadline and self._process.poll() is None
                time.sleep(0.1)

    def close(self):
        self._listener.close()
        self._process.kill()
        self._process.wait()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refusing":
                client.close()
            else:
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client):
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            ends = {client: server, server: client}
            while self.mode != "refusing":
                for one in select.select(list(ends), [], [], 0.2)[0]:
                    try:
                        data = one.recv(1 << 16)
                        if not data:
                            return
                        ends[one].sendall(data)
                    except OSError:
                        return
                    if one is client:
                        self.bytes_in += len(data)
                    if self.mode == "slow":
                        time.sleep(len(data) / 2e6)


class SilentServer:
    """A server on loopback that accepts whoever comes and never answers."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def wait_for_client(self):
        """Return once somebody has come and asked; the connection stays open."""
        self._client, _ = self._listener.accept()
        assert self._client.recv(1)

    def close(self):
        self._client.close()
        self._listener.close()
