"""A stand-in for the Hugging Face Hub on the loopback address, as far as downloads go.

Serves `HEAD` and `GET /ORG/NAME/resolve/REVISION/FILE`, with the headers that huggingface_hub reads. Every repository
has one commit, on the branch main.
"""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubDouble:
    """A running double; use it as a context manager.

    Attributes:
        repos: Repository name -> file name -> bytes.
        token: What a client must send; None for public repositories.
        requests: "METHOD path" of every request so far.
        agents: User agents seen.
        damaged: How many more downloads get a flipped byte.
        failure: Status and headers that answer every request instead, when set.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.token: str | None = None
        self.requests: list[str] = []
        self.agents: set[str] = set()
        self.damaged = 0
        self.failure: tuple[int, dict[str, str]] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                status, headers, content = hub.look_up(self.command, self.path, self.headers)
                self.send_response(status)
                for key, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def add_folder(self, repo: str, folder: Path) -> None:
        """Publishes a model folder."""
        self.repos[repo] = {path.name: path.read_bytes() for path in folder.iterdir()}

    def look_up(self, method: str, path: str, headers) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        self.requests.append(f"{method} {path}")
        self.agents.add(headers["User-Agent"])
        if self.failure is not None:
            return *self.failure, b""
        organisation, name, _, revision, file = path.strip("/").split("/", 4)
        if self.token is not None and headers["Authorization"] != f"Bearer {self.token}":
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        repo = self.repos.get(f"{organisation}/{name}")
        if repo is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if file not in repo:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = repo[file]
        found = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if method == "GET" and self.damaged and file.endswith(".safetensors"):
            self.damaged -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        return 200, found, content

    def __enter__(self) -> HubDouble:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
