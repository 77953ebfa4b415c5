"""Fetching from a repository as a whole: over both transports, by several processes, through mirrors, in time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session

from hubdouble import HubDouble
from medmim import transport as fetching
from medmim.access import HubAccess
from medmim.errors import WeightsError
from medmim.remote import Repository
from medmim.spec import FileSpec

REPO, CONFIG, MODEL = "org/model", "config.json", "model.safetensors"


@pytest.fixture
def double():
    with HubDouble() as double:
        yield double


@pytest.fixture
def content():
    """Of the large file; new bytes each time, because hf_xet remembers what it has uploaded."""
    return os.urandom(300_000)


@pytest.fixture
def record(content):
    return FileSpec(name=MODEL, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def publish(double, content) -> str:
    """Uploads a config and a large file as a client does; returns the commit."""
    api = HfApi(endpoint=double.endpoint, token="hf_write")
    api.create_repo(REPO, exist_ok=True)
    files = [CommitOperationAdd(CONFIG, b"{}"), CommitOperationAdd(MODEL, content)]
    return api.create_commit(REPO, files, commit_message="Add a model").oid


@pytest.fixture
def place(double, content, tmp_path):
    """The repository with both files, over LFS, and an empty cache."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / CONFIG).write_text("{}")
    (folder / MODEL).write_bytes(content)
    commit = double.add_folder(REPO, folder)
    return Repository(REPO, commit, HubAccess(cache_dir=tmp_path / "cache", endpoint=double.endpoint))


def offline(place: Repository) -> Repository:
    return replace(place, access=replace(place.access, local_files_only=True))


@pytest.mark.parametrize("prefix", ["", "/artifactory/api/huggingfaceml/hf-local"])
def test_up_and_down_and_offline(transport, prefix, content, record, tmp_path):
    with HubDouble(prefix=prefix) as double:
        commit = publish(double, content)
        double.repos[REPO].private = True
        double.requests.clear()
        access = HubAccess("hf_read", tmp_path / "cache", double.endpoint)
        place = Repository(REPO, commit, access)
        assert place.find(CONFIG).read_bytes() == b"{}"
        assert place.fetch(record).read_bytes() == content
        asked = double.requests
    # No other host is sent the token, and nothing but the file itself is asked for.
    assert {request.token for request in asked if request.server == "cdn"} <= {None, "xet-token"}
    assert all("/api/models/" not in request.path or "/xet-read-token/" in request.path for request in asked)
    assert any("/v1/xorbs/" in request.path for request in asked) == (transport == "xet")
    assert offline(place).fetch(record).read_bytes() == content
    assert place.fetch(record).read_bytes() == content  # the hub is gone


def test_weights_without_a_record_are_checked_too(transport, double, content, tmp_path):
    access = HubAccess(cache_dir=tmp_path / "cache", endpoint=double.endpoint)
    place = Repository(REPO, publish(double, content), access)
    double.fault("GET", "^/objects/|^/v1/xorbs/", flip=True)
    assert place.find(MODEL).read_bytes() == content
    double.fault("GET", "^/objects/|^/v1/xorbs/", flip=True, times=inf)
    with pytest.raises(WeightsError, match="is not the file that was published"):
        replace(place, access=replace(access, cache_dir=tmp_path / "other")).find(MODEL)


def test_an_etag_that_is_no_digest_is_not_held_against_the_file(place, double):
    double.fault("*", "", times=inf, headers={"ETag": '"5d41402abc4b2a76b9719d911017c592"'})
    assert place.find(CONFIG).read_bytes() == b"{}"


def test_an_etag_that_is_a_plain_sha1(place, double):
    double.fault("*", "", times=inf, headers={"ETag": f'"{hashlib.sha1(b"{}").hexdigest()}"'})
    assert place.find(CONFIG).read_bytes() == b"{}"


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize("name", ["{outside}", "..", "a/../../../../x", r"..\..\x", r"C:\x", r"\x"])
@pytest.mark.parametrize("first", [0, 1])
def test_no_answer_names_a_file_outside_of_the_cache(header, name, first, place, double, tmp_path):
    """A hub may answer the client's own question, the second one, otherwise than the first."""
    value = name.format(outside=tmp_path / "outside")
    lie = {header: value if header == "X-Repo-Commit" else f'"{value}"'}
    for revision in (place.revision, "main"):
        double.fault("HEAD", "resolve-cache", times=first, headers={})
        double.fault("HEAD", "resolve-cache", times=inf, headers=lie)
        with pytest.raises(WeightsError, match=f"{header} of the answer names a file outside of the cache; set HF_E"):
            replace(place, revision=revision).find(CONFIG)
        double.heal()
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "cache"}
    assert place.find(CONFIG).read_bytes() == b"{}"


def test_the_client_that_follows_a_failed_connection_is_watched_too(place, double, tmp_path, monkeypatch):
    """huggingface_hub drops its client when a connection fails, and a server decides whether one does."""
    first = get_session()
    request, failure = type(first).request, sys.modules[type(first).__module__.partition(".")[0]].ConnectError
    asked = []

    def fail_after_the_first_answer(self, *args, **kwargs):
        asked.append(self)
        if len(asked) in (3, 4):  # before them a question and where it led to
            raise failure("TLS handshake failed")
        return request(self, *args, **kwargs)

    monkeypatch.setattr(type(first), "request", fail_after_the_first_answer)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    double.fault("HEAD", "resolve-cache", headers={})
    double.fault("HEAD", "resolve-cache", times=inf, headers={"ETag": f'"{tmp_path / "outside"}"'})
    with pytest.raises(WeightsError, match="ETag of the answer names a file outside of the cache"):
        place.find(CONFIG)
    assert get_session() is asked[-1] is not first
    assert not (tmp_path / "outside").exists()


def test_no_answer_notes_a_missing_file_outside_of_the_cache(place, double, tmp_path):
    lie = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": str(tmp_path / "outside")}
    double.fault("HEAD", "", times=inf, status=404, headers=lie)
    with pytest.raises(WeightsError, match="X-Repo-Commit of the answer names a file outside of the cache"):
        place.find("other.json")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(("host", "kept"), [("huggingface.co", False), ("hf.co", False), ("mirror.example.org", True)])
def test_the_password_of_a_mirror_is_kept_from_the_hub(host, kept, place):
    place.find(CONFIG)
    session = get_session()
    request = session.build_request("GET", f"https://{host}/x", headers={"authorization": "Basic bWU6aHVudGVyMg=="})
    for hook in session.event_hooks["request"]:
        hook(request)
    assert ("authorization" in request.headers) is kept


@pytest.mark.parametrize("etag", ['W/"abc"', '"a/b+c=="', '"a..b"'])
def test_other_etags_are_let_through(etag, place, double):
    double.fault("HEAD", "resolve-cache", times=inf, headers={"ETag": etag})
    assert place.find(CONFIG).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("headers", "body"),
    [({}, bytes(30_000_000)), ({"Transfer-Encoding": "chunked"}, (b"100000\r\n" + bytes(2**20) + b"\r\n") * 30)],
    ids=["long", "endless"],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_no_more_is_taken_than_the_file_has(headers, body, damaged, place, double, content, record, monkeypatch):
    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)
    if damaged:
        place.fetch(record).resolve().write_bytes(bytes(len(content)))
    double.fault("GET", "^/objects/", times=inf, status=200, headers=headers, body=body)
    with pytest.raises(WeightsError, match="the answer is longer than the file, which has 300000 bytes"):
        place.fetch(record)
    assert all(path.stat().st_size <= 300_000 for path in place.access.cache_dir.rglob("*"))
    double.heal()
    assert place.fetch(record).read_bytes() == content


def test_no_wait_is_too_long_to_be_read(place, double):
    double.fault("*", "", times=inf, status=429, headers={"Retry-After": "9" * 5000})
    with pytest.raises(WeightsError, match="too many requests; try again in 999999999 seconds"):
        place.find(CONFIG)


def test_a_cache_in_the_home_folder_is_looked_into_too(place, double, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    place = replace(place, access=replace(place.access, cache_dir="~/mine"))
    assert place.find(CONFIG).is_relative_to(tmp_path / "mine")
    double.asked()
    assert place.find(CONFIG).read_bytes() == b"{}"
    assert double.asked() == []


def test_a_file_that_a_commit_lacks_is_asked_for_once(place, double):
    assert place.find("model.safetensors.index.json") is None
    assert double.asked()
    assert place.find("model.safetensors.index.json") is None
    assert double.asked() == []
    # Without a network it need not be asked for, of a branch neither.
    branch = replace(place, revision="main")
    assert branch.find("model.safetensors.index.json") is None
    assert offline(branch).find("model.safetensors.index.json") is None


def test_patience_is_what_the_client_was_told(place, double, record, monkeypatch):
    slept = []
    monkeypatch.setattr(fetching.time, "sleep", slept.append)
    monkeypatch.setattr(fetching.time, "monotonic", lambda: sum(slept))
    double.fault("*", "", times=inf, status=503)
    for told, least, most in ((10, 7, 8), (60, 30, 60)):  # 10 is the client's default
        slept.clear()
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", told)
        with pytest.raises(WeightsError, match=rf"in {most} seconds \(HTTP 503\); try again, wait longer by HF_HUB_"):
            place.fetch(record)
        assert least <= sum(slept) <= most


# --- several processes ------------------------------------------------------------------------------------------------

FETCH = """
import sys
import huggingface_hub.file_download
from medmim.access import HubAccess
from medmim.remote import Repository
from medmim.spec import FileSpec
endpoint, cache, commit, sha256, size = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
place = Repository("org/model", commit, HubAccess(endpoint=endpoint, cache_dir=cache))
print(place.fetch(FileSpec(name="model.safetensors", sha256=sha256, size=int(size))))
"""


def start(place: Repository, record: FileSpec) -> subprocess.Popen:
    """A process that says when it is ready to fetch the large file, and does so when it is sent a line."""
    words = [place.access.endpoint, place.access.cache_dir, place.revision, record.sha256, record.size]
    command = [sys.executable, "-c", FETCH, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*processes: subprocess.Popen) -> None:
    """Sends them off together."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.mark.parametrize("flips", [0, 1])
def test_two_processes_fetch_the_same_file(flips, place, double, content, record):
    double.fault("GET", "^/objects/", wait=0.5, flip=bool(flips))
    processes = [start(place, record) for _ in range(2)]
    go(*processes)
    paths = [Path(process.communicate(timeout=60)[0].strip()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.read_bytes() for path in paths] == [content] * 2
    assert len(double.asked("^/objects/")) == 1 + flips
    assert not list(place.access.cache_dir.rglob("*.incomplete"))


def test_a_process_that_is_killed_leaves_nothing_in_the_way(place, double, content, record):
    double.fault("GET", "^/objects/", crawl=0.05)
    with start(place, record) as process:
        go(process)
        end = time.monotonic() + 60
        while not list(place.access.cache_dir.rglob("*.incomplete")) and time.monotonic() < end:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -9
    assert place.fetch(record).read_bytes() == content
