"""Real servers on this machine for tests of remote data: nginx, S3, and a TCP proxy that makes trouble between."""

import os
import random
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

NGINX = """
daemon off; master_process off; pid {run}/pid; error_log {run}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {run}/access.log; default_type application/octet-stream;
  client_body_temp_path {run}; proxy_temp_path {run}; fastcgi_temp_path {run};
  uwsgi_temp_path {run}; scgi_temp_path {run};
  server {{ listen 127.0.0.1:{port}; root {root}; {rules} }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def nginx(root: Path, run: Path, rules: str = "") -> Iterator[int]:
    """nginx serving a folder; yields its port. `run` gets access.log."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")  # where Debian puts it, beside most paths
    if program is None:
        pytest.skip("nginx is not installed")
    run.mkdir(exist_ok=True)
    port = free_port()
    (run / "nginx.conf").write_text(NGINX.format(run=run, port=port, root=root, rules=rules))
    server = subprocess.Popen([program, "-p", str(run), "-c", str(run / "nginx.conf"), "-e", str(run / "error.log")])
    try:
        _wait_for(port, server)
        yield port
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen) -> None:
    for _ in range(200):
        assert server.poll() is None, "nginx ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nginx does not listen")


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """An S3 server with one empty bucket; yields its endpoint, and the environment points there meanwhile."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with mock.patch.dict(os.environ, settings):
        boto3.client("s3").create_bucket(Bucket=bucket)
        try:
            yield settings["AWS_ENDPOINT_URL"]
        finally:
            server.stop()


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Forwards HTTP requests to a server of this machine, and spoils some of the answers.

    `faults` gives the share of each kind: reset (connection reset in mid-body), stall (silence in mid-body),
    short (the body ends early), 503 and 429. One request a connection.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: int, faults: dict[str, float], seed: int = 0, stall_seconds: float = 3.0) -> None:
        super().__init__(("127.0.0.1", 0), _Spoiler)
        self.upstream, self.faults, self.stall_seconds = upstream, faults, stall_seconds
        self.down = False
        self.injected: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def draw(self) -> str:
        """The fate of the next request."""
        with self._lock:
            kinds = [*self.faults, "none"]
            shares = [*self.faults.values(), 1 - sum(self.faults.values())]
            fate = self._random.choices(kinds, shares)[0]
            self.injected[fate] += 1
            return fate

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gives up is what the test is about."""


class _Spoiler(socketserver.BaseRequestHandler):
    server: FaultyProxy

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            part = self.request.recv(65536)
            if not part:
                return
            head += part
        if self.server.down:
            return self._reset()
        fate = self.server.draw()
        if fate in ("503", "429"):
            self.request.sendall(f"HTTP/1.1 {fate} Trouble\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            return None
        answer = self._ask(head)
        if fate == "none":
            self.request.sendall(answer)
            return None
        body = answer.index(b"\r\n\r\n") + 4
        self.request.sendall(answer[: (body + len(answer)) // 2])
        if fate == "stall":
            time.sleep(self.server.stall_seconds)
        if fate == "reset":
            self._reset()
        return None

    def _ask(self, head: bytes) -> bytes:
        head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n").replace(b"Connection: keep-alive\r\n", b"")
        with socket.create_connection(("127.0.0.1", self.server.upstream)) as upstream:
            upstream.sendall(head)
            parts = []
            while part := upstream.recv(1 << 20):
                parts.append(part)
        return b"".join(parts)

    def _reset(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
        self.request.close()


@contextmanager
def faulty_proxy(upstream: int, faults: dict[str, float], **options: float) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(upstream, faults, **options)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
