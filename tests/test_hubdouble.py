"""The double against the real client, which uploads and downloads over LFS and over Xet: the rest builds on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError

from hubdouble import HubDouble

REPO = "org/model"


@pytest.fixture(params=["", "/artifactory/api/huggingfaceml/hf-local"], ids=["plain", "prefix"])
def double(request):
    with HubDouble(prefix=request.param) as double:
        yield double


@pytest.fixture
def api(double):
    return HfApi(endpoint=double.endpoint, token="hf_write")


@pytest.fixture
def files(tmp_path):
    """A folder to upload, and what is in it."""
    # New bytes each time: hf_xet remembers what it has uploaded, and to which address.
    contents = {
        "README.md": b"---\nlicense: mit\n---\n",
        "config.json": b"{}",
        "golden/inputs.json": b"[1]",
        "model.safetensors": os.urandom(300_000) + bytes(200_000),
    }
    for name, content in contents.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "files", contents


def publish(api, files, **commit):
    api.create_repo(REPO, exist_ok=True)
    operations = [CommitOperationAdd(name, files[0] / name) for name in files[1]]
    return api.create_commit(REPO, operations, commit_message="Add a model", **commit)


def test_a_commit_up_and_down(double, api, files, transport, tmp_path):
    commit = publish(api, files)
    paths = double.asked()
    assert any("/v1/xorbs/" in path for path in paths) == (transport == "xet")
    assert any(path.startswith("PUT /objects/") for path in paths) == (transport == "lfs")
    for name, content in files[1].items():
        path = hf_hub_download(REPO, name, revision=commit.oid, endpoint=double.endpoint, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == content
        assert Path(path).relative_to(tmp_path / "cache").parts[2] == commit.oid
    assert any("/v1/xorbs/" in path for path in double.asked()) == (transport == "xet")


def test_a_folder_up_and_a_snapshot_down(double, api, files, transport, tmp_path):
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=files[0])
    snapshot = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert {path: (snapshot / path).read_bytes() for path in files[1]} == files[1]
    checked = api.verify_repo_checksums(REPO, cache_dir=tmp_path / "cache")
    assert checked.checked_count == len(files[1])
    assert not checked.mismatches


def test_the_token_stays_on_the_hub(double, api, files, transport, tmp_path):
    publish(api, files)
    api.update_repo_settings(REPO, visibility="private")
    hf_hub_download(REPO, "model.safetensors", endpoint=double.endpoint, token="hf_read", cache_dir=tmp_path)
    seen = {request.token for request in double.requests if request.server == "cdn"}
    assert seen <= {None, "xet-token"}
    assert {"hf_write", "hf_read"} <= {request.token for request in double.requests}


def test_history_tags_branches_and_pull_requests(api, files, transport):
    first = publish(api, files)
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="dev", revision="v1")
    second = api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="Less")
    pull = publish(api, files, create_pr=True)
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Less", "Add a model", "initial commit"]
    assert api.model_info(REPO).sha == second.oid
    for revision in ("v1", "dev", first.oid, pull.pr_revision):
        assert sorted(api.list_repo_files(REPO, revision=revision)) == sorted(files[1])
    assert "config.json" not in api.list_repo_files(REPO)
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches, *refs.pull_requests]} == {
        "v1": first.oid,
        "dev": first.oid,
        "main": second.oid,
        "refs/pr/1": pull.oid,
    }
    (info,) = api.get_paths_info(REPO, ["model.safetensors"])
    assert info.size == len(files[1]["model.safetensors"])


def test_a_commit_on_an_old_parent_is_refused(api, files, transport):
    first = publish(api, files)
    change = {"commit_message": "Change", "parent_commit": first.oid}
    api.create_commit(REPO, [CommitOperationDelete("README.md")], **change)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, [CommitOperationDelete("config.json")], **change)
    assert error.value.response.status_code == 412


@pytest.mark.parametrize(
    ("token", "private", "gated", "status"),
    [
        (False, False, False, None),
        (False, True, False, 401),
        ("hf_other", True, False, 404),
        ("hf_read", True, False, None),
        (False, False, "auto", 401),
        ("hf_other", False, "auto", 403),
        ("hf_read", False, "auto", None),
        ("hf_expired", False, False, 401),
    ],
)
def test_who_may_read(token, private, gated, status, double, files, tmp_path):
    double.add_folder(REPO, files[0], private=private, gated=gated)

    def download():
        return hf_hub_download(REPO, "config.json", endpoint=double.endpoint, token=token, cache_dir=tmp_path / "cache")

    if status is None:
        assert Path(download()).read_bytes() == b"{}"
    else:
        with pytest.raises(HfHubHTTPError) as error:
            download()
        assert error.value.response.status_code == status
        assert isinstance(error.value, GatedRepoError) == bool(gated)


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_read", 403), ("hf_expired", 401)])
def test_who_may_write(token, status, double, files):
    double.add_folder(REPO, files[0])
    api = HfApi(endpoint=double.endpoint, token=token)
    for write in (
        lambda: api.create_repo("org/new"),
        lambda: api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="x"),
        lambda: api.create_tag(REPO, tag="v1"),
        lambda: api.delete_repo(REPO),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert error.value.response.status_code == status
    assert list(double.repos) == [REPO]


def test_faults_come_as_often_as_asked(double, files, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    double.add_folder(REPO, files[0])

    def size():
        cache = {"cache_dir": tmp_path / "cache", "force_download": True}
        return Path(hf_hub_download(REPO, "model.safetensors", endpoint=double.endpoint, **cache)).stat().st_size

    fault = double.fault("GET", "model.safetensors", times=2, status=503)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError):
            size()
    assert fault.times == 0
    assert size() == len(files[1]["model.safetensors"])
    double.fault("GET", "model.safetensors", cut=0.5)
    double.requests.clear()
    assert size() == len(files[1]["model.safetensors"])
    ranges = [request.headers.get("range") for request in double.requests if request.server == "cdn"]
    assert ranges == [None, "bytes=250000-"]


def test_what_is_not_there(double, files, tmp_path):
    double.add_folder(REPO, files[0])
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "other.json", endpoint=double.endpoint, cache_dir=tmp_path / "cache")
    assert not HfApi(endpoint=double.endpoint).file_exists(REPO, "other.json")


def test_a_mirror_without_xet(double, api, files):
    double.xet = False
    with pytest.raises(Exception, match="xet-write-token"):
        publish(api, files)
