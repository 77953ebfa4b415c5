"""The two servers, what they were asked, and the faults that are put in their way."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .repositories import File, Repository, is_large

TOKENS = ("hf_write", "hf_read", "hf_other")


@dataclass(frozen=True)
class Request:
    """A request as it came in.

    Attributes:
        server: "hub" or "cdn".
        method, path: The path is without the prefix of the endpoint and without the query, and still quoted.
        query: Its fields, the last value of each.
        headers: By name in lower case.
        body: Its bytes.
    """

    server: str
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def token(self) -> str | None:
        """What was sent as Authorization."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What goes back; `body` may be data, which becomes JSON."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = b""

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes):
            self.body = json.dumps(self.body).encode()
            self.headers = {"Content-Type": "application/json", **self.headers}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path matches.

    Attributes:
        status: Answer this instead, with `headers` and `body`. All other faults change the proper answer.
        headers: Added to the answer, in place of those of the same name; None takes one away.
        flip: The last byte of the body has one bit flipped.
        keep: Only this share of the body is there, and Content-Length says so.
        cut: The connection breaks after this share of the body; 0 for before the status line.
        reset: As cut, but the client sees a reset connection, not a closed one.
        wait: Seconds before the answer.
        crawl: Seconds between one kilobyte of the body and the next.
        act: Called before the answer is made up.
    """

    method: str
    path: str
    times: float = 1
    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    body: bytes = b""
    flip: bool = False
    keep: float | None = None
    cut: float | None = None
    reset: float | None = None
    wait: float = 0
    crawl: float = 0
    act: Callable[[], None] | None = None

    def strikes(self, request: Request) -> bool:
        return self.times > 0 and self.method in ("*", request.method) and re.search(self.path, request.path)

    def change(self, answer: Answer) -> None:
        for name, value in self.headers.items():
            answer.headers.pop(name, None)
            if value is not None:
                answer.headers[name] = value
        if self.flip and answer.body:
            answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])
        if self.keep is not None:
            answer.body = answer.body[: int(len(answer.body) * self.keep)]


class HubDouble:
    """A running hub and its CDN; use it as a context manager.

    Args:
        prefix: Path that the endpoint has, such as "/artifactory/api/huggingfaceml/hf-local".
        xet: Whether uploads can go over Xet; a private mirror has LFS only.

    Attributes:
        repos: By "org/name".
        objects: What the CDN holds, by sha256.
        xorbs, shards: What the Xet storage holds: see `cdn`.
        requests: Every request so far.
    """

    def __init__(self, *, prefix: str = "", xet: bool = True) -> None:
        self.prefix, self.xet = prefix, xet
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.xorbs: dict[str, bytes] = {}
        self.shards: dict[str, Any] = {}
        self.xet_of_sha256: dict[str, str] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._servers = {name: _listen(self, name) for name in ("hub", "cdn")}
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            for server in self._servers.values()
        ]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers['hub'].server_port}{self.prefix}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._servers['cdn'].server_port}"

    def add_folder(self, repo: str, folder: Path, *, private: bool = False, gated: bool | str = False) -> str:
        """Commits the files of a folder to main of a repository, made when it is new; returns the commit's id."""
        repository = self.repos.setdefault(repo, Repository(private, gated))
        files = {}
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            name, content = path.relative_to(folder).as_posix(), path.read_bytes()
            files[name] = File.of(content, is_large=is_large(name, len(content)))
            if files[name].is_large:
                self.objects[files[name].sha256] = content
        return repository.commit("main", files, title=f"Add {len(files)} files")

    def fault(self, method: str, path: str, *, times: float = 1, **what: Any) -> Fault:
        """Lets something go wrong, `math.inf` times for always; see `Fault`. Returns it: `times` is what is left."""
        fault = Fault(method, path, times, **what)
        self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Ends all faults."""
        self._faults.clear()

    def asked(self, pattern: str = "") -> list[str]:
        """What was asked since the last call, each as "METHOD path", when its path matches."""
        found = [str(request) for request in self.requests if re.search(pattern, request.path)]
        self.requests.clear()
        return found

    def respond(self, request: Request) -> tuple[Answer, Fault | None]:
        """The answer to a request, and the fault that its sending suffers from."""
        from . import cdn, hub

        with self.lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.strikes(request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None:
            if fault.act is not None:
                fault.act()
            self.closing.wait(fault.wait)
            if fault.status is not None:
                return Answer(fault.status, dict(fault.headers), fault.body), fault
        with self.lock:
            answer = (hub if request.server == "hub" else cdn).answer(self, request)
        if fault is not None:
            fault.change(answer)
        return answer, fault

    def __enter__(self) -> HubDouble:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for the last answer
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is none of a test's business, all else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _listen(double: HubDouble, name: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one segment
        disable_nagle_algorithm = True

        def handle_anything(self) -> None:
            body = self.read_body()
            url = urlsplit(self.path)
            prefix = double.prefix if name == "hub" else ""
            path = url.path.removeprefix(prefix) if url.path.startswith(prefix) else "/outside-of-the-prefix"
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            headers = {key.lower(): value for key, value in self.headers.items()}
            answer, fault = double.respond(Request(name, self.command, path, query, headers, body))
            self.send(answer, fault)

        do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = handle_anything

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def send(self, answer: Answer, fault: Fault | None) -> None:
            self.close_connection = True
            if fault is not None and fault.cut == 0:
                return self.hang_up()
            self.send_response(answer.status)
            for key, value in {
                "Content-Length": str(len(answer.body)),
                "Connection": "close",
                **answer.headers,
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return None
            body = answer.body
            share = None if fault is None else fault.cut if fault.reset is None else fault.reset
            if share is not None:
                body = body[: int(len(body) * share)]
            if fault is not None and fault.crawl:
                for start in range(0, len(body), 1000):
                    self.wfile.write(body[start : start + 1000])
                    self.wfile.flush()
                    if double.closing.wait(fault.crawl):
                        break
            else:
                self.wfile.write(body)
            self.wfile.flush()
            if len(body) < len(answer.body):
                self.hang_up(is_reset=fault.reset is not None)
            return None

        def hang_up(self, *, is_reset: bool = False) -> None:
            if is_reset:
                # Closed with no time to linger, a socket drops what was not sent and says so.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args: object) -> None:
            pass

    return _Server(("127.0.0.1", 0), Handler)


def part_of(content: bytes, request: Request) -> Answer:
    """A file, or the part of it that a Range header asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not found:
        return Answer(200, {"Accept-Ranges": "bytes"}, content)
    start, end = int(found[1]), int(found[2] or len(content) - 1)
    part = content[start : end + 1]
    if not part:
        return Answer(416, {"Content-Range": f"bytes */{len(content)}"})
    return Answer(206, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}, part)


def route(routes: list[tuple[str, str, Callable[..., Answer]]], double: HubDouble, request: Request) -> Answer:
    """Calls the first handler of (methods, pattern, handler) that fits, with the unquoted groups of the pattern."""
    for methods, pattern, handler in routes:
        found = re.fullmatch(pattern, request.path)
        if found and request.method in methods.split():
            return handler(double, request, *(None if group is None else unquote(group) for group in found.groups()))
    return Answer(404, {"X-Error-Message": f"the double has no {request}"})
