"""What the bare client and medmim make of each fault, measured; `python tests/reliability.py` writes the table.

Both fetch one file of a repository from the double while something is wrong, each with a double and a cache of its own.
The clock is virtual: sleep is not waited for but counted, and requests to a server that hangs time out early.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from unittest import mock

import conftest  # isort: skip, it makes an empty Hugging Face home before the client looks for one
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.utils import httpx

from hubdouble import HubDouble, Request
from medmim.access import HubAccess
from medmim.errors import WeightsError
from medmim.remote import Repository
from medmim.spec import FileSpec

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
CLIENT = f"huggingface_hub {importlib.metadata.version('huggingface_hub')}"
REPO, CONFIG, MODEL = "org/model", "config.json", "model.safetensors"
NOWHERE = "http://127.0.0.1:1"  # nothing listens there
DISABLED = {"X-Error-Message": "Access to this resource is disabled."}
AN_HOUR = {"Retry-After": "3600"}
ASK, BYTES, XORB = "/resolve/", f"^/objects/.*{MODEL}", "^/v1/xorbs/"


class Clock:
    """Time that passes by being slept through, and by timeouts when the server hangs."""

    def __init__(self) -> None:
        self.slept = 0.0
        self.hangs: Callable[[httpx.Request], bool] | None = None  # which requests will get no answer

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        start, send = time.monotonic(), httpx.Client.send

        def hurried(client, request, **kwargs):
            """Lets a request without an answer time out soon, and counts the time that it asked for."""
            if not self.hangs(request):
                return send(client, request, **kwargs)
            timeout = request.extensions["timeout"]
            hurry = {name: min(seconds or 0.3, 0.3) for name, seconds in timeout.items()}
            request.extensions = {**request.extensions, "timeout": hurry}
            try:
                return send(client, request, **kwargs)
            except httpx.TimeoutException:
                self.slept += timeout["read"]
                raise

        def sleep(seconds):
            self.slept += seconds

        def now():
            return start + self.slept

        with (
            mock.patch("time.sleep", sleep),
            mock.patch("time.monotonic", now),
            mock.patch.object(httpx.Client, "send", hurried if self.hangs else send),
        ):
            yield


@dataclass
class Stage:
    """A repository on a double, and an empty cache, before a fault is put in the way."""

    double: HubDouble
    root: Path
    contents: dict[str, bytes] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    revision: str = ""
    name: str = MODEL
    repo: str = REPO
    token: str | None = None
    is_offline: bool = False
    endpoint: str = ""
    cache: Path = Path()
    around: contextlib.AbstractContextManager = field(default_factory=contextlib.nullcontext)

    def __post_init__(self) -> None:
        self.endpoint, self.cache = self.double.endpoint, self.root / "cache"
        self.cache.mkdir()
        # New bytes each time: hf_xet remembers what it has uploaded.
        self.contents = {CONFIG: b'{"spacing": [2.0, 2.0, 2.0]}', MODEL: os.urandom(3_000_000)}
        api = HfApi(endpoint=self.endpoint, token="hf_write")
        api.create_repo(REPO)
        files = [CommitOperationAdd(name, content) for name, content in self.contents.items()]
        self.revision = api.create_commit(REPO, files, commit_message="Add a model").oid

    @property
    def place(self) -> Repository:
        access = HubAccess(self.token, self.cache, self.endpoint, self.is_offline)
        return Repository(self.repo, self.revision, access)

    @property
    def blob(self) -> Path:
        return next(self.cache.glob(f"models--*/snapshots/*/{self.name}")).resolve()

    def fetch_bare(self) -> Path:
        """What the client alone does."""
        return Path(
            hf_hub_download(
                self.repo,
                self.name,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache,
                endpoint=self.endpoint,
                local_files_only=self.is_offline,
            )
        )

    def fetch(self) -> Path:
        """What medmim does: by a record for weights, without one for a config."""
        if self.name == CONFIG:
            return self.place.find(CONFIG)
        content = self.contents[MODEL]
        return self.place.fetch(FileSpec(name=self.name, sha256=hashlib.sha256(content).hexdigest(), size=len(content)))

    def recover(self) -> None:
        """Ends the fault, and leaves the cache as it is."""
        self.double.heal()
        repository = self.double.repos[REPO]
        repository.private = repository.gated = False
        self.endpoint, self.repo, self.token, self.is_offline = self.double.endpoint, REPO, None, False
        self.revision, self.around, self.clock = "main", contextlib.nullcontext(), Clock()
        self.name = self.name if self.name in self.contents else MODEL
        if self.cache.is_file():
            self.cache.unlink()


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        name: The fault, in words.
        arrange: Puts it in the way.
        transport: How the large file is stored and comes.
        is_cached: Whether the file is in the cache before.
    """

    name: str
    arrange: Callable[[Stage], object]
    transport: str = "lfs"
    is_cached: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} (Xet)" if self.transport == "xet" else self.name


# --- faults -----------------------------------------------------------------------------------------------------------


def fault(method: str, path: str, **what) -> Callable[[Stage], object]:
    return lambda stage: stage.double.fault(method, path, **what)


def change(**fields) -> Callable[[Stage], object]:
    def arrange(stage: Stage) -> None:
        for name, value in fields.items():
            setattr(stage, name, value)

    return arrange


def hang(method: str, path: str) -> Callable[[Stage], object]:
    def arrange(stage: Stage) -> None:
        fault = stage.double.fault(method, path, times=inf, wait=3600)
        stage.clock.hangs = lambda request: bool(fault.strikes(Request("", request.method, request.url.path)))

    return arrange


def hang_for_branch(stage: Stage) -> None:
    stage.revision = "main"
    hang("*", "")(stage)


def of_repository(token: str | None = None, **fields) -> Callable[[Stage], object]:
    def arrange(stage: Stage) -> None:
        stage.token = token
        for name, value in fields.items():
            setattr(stage.double.repos[REPO], name, value)

    return arrange


def of_config(method: str, path: str, **what) -> Callable[[Stage], object]:
    def arrange(stage: Stage) -> None:
        stage.name = CONFIG
        stage.double.fault(method, path, **what)

    return arrange


def on_disk(damage: Callable[[Path], object], **fields) -> Callable[[Stage], object]:
    def arrange(stage: Stage) -> None:
        damage(stage.blob)
        change(**fields)(stage)

    return arrange


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def full_disk(stage: Stage) -> None:
    """No file may grow past a megabyte."""

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    stage.around = limited()


def read_only(stage: Stage) -> None:
    """The cache belongs to somebody else; root, who may write anywhere, becomes nobody."""

    @contextlib.contextmanager
    def refused() -> Iterator[None]:
        folders = [stage.cache, *(path for path in stage.cache.rglob("*") if path.is_dir() and not path.is_symlink())]
        for folder in folders:
            folder.chmod(0o555)
        Path(conftest.HOME.name).chmod(0o755)  # the token of the user, were there one, is in it
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)
            for folder in folders:
                folder.chmod(0o755)

    stage.around = refused()


def no_cache(stage: Stage) -> None:
    stage.cache.rmdir()
    stage.cache.write_text("not a folder")


DOWN_FOR_BRANCH = change(endpoint=NOWHERE, revision="main")
CASES = [
    # The server does not answer.
    Case("the server is down", change(endpoint=NOWHERE)),
    Case("the server is down, the file is cached", change(endpoint=NOWHERE), is_cached=True),
    Case("the server is down, a branch is asked for and cached", DOWN_FOR_BRANCH, is_cached=True),
    Case("the server hangs", hang("*", "")),
    Case("the server hangs, a branch is asked for and cached", hang_for_branch, is_cached=True),
    Case("HTTP 503 once, to the question about the file", fault("HEAD", ASK, status=503)),
    Case("HTTP 503 always", fault("*", "", times=inf, status=503)),
    Case("HTTP 502 always, the file is cached", fault("*", "", times=inf, status=502), is_cached=True),
    Case("HTTP 429 once, retry after 2 s", fault("HEAD", ASK, status=429, headers={"Retry-After": "2"})),
    Case("HTTP 429 always, retry after an hour", fault("*", "", times=inf, status=429, headers=AN_HOUR)),
    Case("the connection breaks before the answer, once", fault("HEAD", ASK, cut=0)),
    # It is not the Hub that answers.
    Case("a proxy without X-Repo-Commit", fault("*", ASK, times=inf, headers={"X-Repo-Commit": None})),
    Case("a proxy without ETags", fault("*", "", times=inf, headers={"ETag": None, "X-Linked-ETag": None})),
    Case("a login page in place of everything", fault("*", "", times=inf, status=200, body=b"<html>Log in</html>")),
    # It refuses.
    Case("a private repository, no token", of_repository(private=True)),
    Case("a private repository, a token without access", of_repository("hf_other", private=True)),
    Case("a gated repository, no token", of_repository(gated="auto")),
    Case("a gated repository, access not granted", of_repository("hf_other", gated="auto")),
    Case("an expired token", of_repository("hf_expired")),
    Case("a disabled repository", fault("*", "", times=inf, status=403, headers=DISABLED)),
    Case("no such repository", change(repo="org/missing")),
    Case("no such revision", change(revision="v9")),
    Case("no such file", change(name="missing.json")),
    # The bytes.
    Case("a byte flipped, once", fault("GET", BYTES, flip=True)),
    Case("a byte flipped, always", fault("GET", BYTES, times=inf, flip=True)),
    Case("a byte of the config flipped, once", of_config("GET", CONFIG, flip=True)),
    Case("a byte of the config flipped, always", of_config("GET", CONFIG, times=inf, flip=True)),
    Case("HTTP 503 once, in place of the bytes", fault("GET", BYTES, status=503)),
    Case("HTTP 503 always, in place of the bytes", fault("GET", BYTES, times=inf, status=503)),
    Case("HTTP 403 once: the signed address has run out", fault("GET", BYTES, status=403)),
    Case("the connection breaks halfway, once", fault("GET", BYTES, cut=0.5)),
    Case("the connection breaks halfway, always", fault("GET", BYTES, times=inf, cut=0.5)),
    Case("the connection is reset halfway, once", fault("GET", BYTES, reset=0.5)),
    Case("half of the file, said to be all, once", fault("GET", BYTES, keep=0.5)),
    Case("half of the file, said to be all, always", fault("GET", BYTES, times=inf, keep=0.5)),
    Case("the server of the bytes hangs", hang("GET", BYTES)),
    Case("a byte flipped, once", fault("GET", XORB, flip=True), "xet"),
    Case("a byte flipped, always", fault("GET", XORB, times=inf, flip=True), "xet"),
    Case("HTTP 503 once, in place of the bytes", fault("GET", XORB, status=503), "xet"),
    Case("the connection breaks halfway, once", fault("GET", XORB, cut=0.5), "xet"),
    Case("the Xet storage lacks the file", fault("GET", "^/v1/reconstructions/", times=inf, status=404), "xet"),
    Case("a proxy that passes Xet on without its tokens", fault("GET", "xet-read-token", times=inf, status=404), "xet"),
    # This machine.
    Case("the cached file has a flipped byte", on_disk(flip), is_cached=True),
    Case("the cached file has a flipped byte", on_disk(flip), "xet", is_cached=True),
    Case("the cached file has a flipped byte, no network", on_disk(flip, is_offline=True), is_cached=True),
    Case("the cached file is cut short", on_disk(truncate), is_cached=True),
    Case("the cached file is gone, its link is left", on_disk(Path.unlink), is_cached=True),
    Case("the network is off, the file is cached", change(is_offline=True), is_cached=True),
    Case("the network is off", change(is_offline=True)),
    Case("the disk is full", full_disk),
    Case("the disk is full", full_disk, "xet"),
    Case("the cache is read-only, the file is in it", read_only, is_cached=True),
    Case("the cache is read-only", read_only),
    Case("the cache cannot be made", no_cache),
]  # fmt: skip


# --- measurement ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a fetch.

    Attributes:
        text: A cell of the table.
        is_right: Whether the right bytes came; None when there was an error.
        error: That error.
    """

    text: str
    is_right: bool | None
    error: Exception | None = None


@contextlib.contextmanager
def staged(case: Case) -> Iterator[Stage]:
    """The stage of a case, with the fault in the way."""
    with tempfile.TemporaryDirectory() as root, HubDouble() as double:
        Path(root).chmod(0o755)
        with mock.patch.object(constants, "HF_HUB_DISABLE_XET", case.transport == "lfs"):
            stage = Stage(double, Path(root))
            if case.is_cached:
                for revision in ("main", stage.revision):
                    hf_hub_download(REPO, MODEL, revision=revision, endpoint=double.endpoint, cache_dir=stage.cache)
            case.arrange(stage)
            yield stage


def measure(stage: Stage, fetch: Callable[[], Path]) -> Outcome:
    """Fetches, and says what came of it and how long was waited."""
    before = stage.clock.slept
    try:
        with stage.clock.running(), stage.around:
            content = fetch().read_bytes()
    except Exception as error:
        return Outcome(_cell(stage, error) + _waited(stage, before), None, error)
    is_right = content == stage.contents[stage.name]
    return Outcome(
        ("the right file" if is_right else "**the wrong file**, no error") + _waited(stage, before), is_right
    )


def _waited(stage: Stage, before: float) -> str:
    seconds = round(stage.clock.slept - before)
    return f" ({seconds} s)" if seconds else ""


def _cell(stage: Stage, error: Exception) -> str:
    if not isinstance(error, WeightsError):
        response = getattr(error, "response", None)
        return f"`{type(error).__name__}`" + (f" (HTTP {response.status_code})" if response is not None else "")
    text = str(error).replace(str(stage.root), "").replace(stage.endpoint, "HUB").replace(stage.double.cdn, "CDN")
    text = re.sub(r"\b[0-9a-f]{64}\b", "DIGEST", text.replace(stage.revision, "COMMIT"))
    text = re.sub(r"\(…\)[0-9a-f]+/", "…/", text)
    text = re.sub(r"^\S+ of \S+ could not be fetched from HUB", "not fetched", text)
    return re.sub(r"\b[0-9a-f]{40}\b", "DIGEST", text).replace("|", r"\|")


def page(rows: list[tuple[str, str, str]]) -> str:
    """The text of the page."""
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"""# What can go wrong on the way from the Hub

`python tests/reliability.py` writes this page. It lets each fault happen to the client alone ({CLIENT}) and
to medmim, on a stand-in for the Hub on this machine, and looks at what comes back; `tests/test_reliability.py` does so
again and holds the page to it. The file is one of weights with a known sha256, of a pinned commit and not in the cache,
unless the row says otherwise. Seconds in brackets are those slept between attempts and waited for answers. A limit on
the size of files stands for the full disk. "Not fetched" is short for "FILE of REPOSITORY@REVISION could not be fetched
from HUB".

In none of the {len(rows)} rows does medmim return a wrong file. After each, with the fault gone, the next fetch from
the same cache gives the right one. Not in the table: when the Xet storage alone is down, hf_xet tries for about three
minutes, and medmim leaves it to that; HF_XET_CLIENT_RETRY_MAX_ATTEMPTS=1 makes it two seconds.

| fault | the client alone | medmim |
|---|---|---|
{table}"""


def read_page() -> list[tuple[str, str, str]]:
    """The rows of the page as it is."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in lines if line.startswith("| ")]
    return [tuple(row) for row in rows[1:]]


def main() -> None:
    rows = []
    for case in CASES:
        cells = []
        for fetch in (Stage.fetch_bare, Stage.fetch):
            with staged(case) as stage:
                cells.append(measure(stage, lambda stage=stage, fetch=fetch: fetch(stage)).text)
        rows.append((case.title, *cells))
        print(*rows[-1], sep=" | ", flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
