"""What the hub answers: repositories, commits, uploads and the way to a file's bytes.

The shapes are those that huggingface_hub reads; errors are in the headers, as on the Hub.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from functools import wraps
from urllib.parse import parse_qs, quote

from .repositories import Commit, File, Repository, is_large
from .server import TOKENS, Answer, HubDouble, Request, part_of, route

XET_TOKEN = "xet-token"


def answer(double: HubDouble, request: Request) -> Answer:
    if request.token is not None and request.token not in TOKENS:
        return refuse(401, message="Invalid credentials in Authorization header")
    return route(ROUTES, double, request)


def refuse(status: int, code: str = "", message: str = "") -> Answer:
    headers = {"X-Error-Code": code} if code else {"X-Error-Message": message}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Answer(status, headers, {"error": code or message})


def reads(handler: Callable[..., Answer]) -> Callable[..., Answer]:
    """Gives a handler the repository, when the token may see it."""

    @wraps(handler)
    def guarded(double: HubDouble, request: Request, repo: str, *rest: str | None) -> Answer:
        repository = double.repos.get(repo)
        may_read = request.token in ("hf_write", "hf_read")
        if repository is None or (repository.private and not may_read):
            # To a stranger what is private and what is not there look the same.
            if request.token is None:
                return refuse(401, message="Invalid username or password.")
            return refuse(404, "RepoNotFound")
        if repository.gated and not may_read and "/api/models/" not in request.path:
            return refuse(403 if request.token else 401, "GatedRepo")
        return handler(double, request, repo, repository, *rest)

    return guarded


def writes(handler: Callable[..., Answer]) -> Callable[..., Answer]:
    """Lets a handler be called with the token that may write only."""

    @wraps(handler)
    def guarded(double: HubDouble, request: Request, *rest: str | None) -> Answer:
        if request.token is None:
            return refuse(401, message="Invalid username or password.")
        if request.token != "hf_write":
            return refuse(403, message="You don't have the rights to do this.")
        return handler(double, request, *rest)

    return guarded


def at_revision(handler: Callable[..., Answer]) -> Callable[..., Answer]:
    """Gives a handler the commit that a revision stands for."""

    @wraps(handler)
    def guarded(double: HubDouble, request: Request, repo: str, repository: Repository, revision=None, *rest):
        commit = repository.find(revision or "main")
        if commit is None:
            return refuse(404, "RevisionNotFound")
        return handler(double, request, repo, repository, commit, *rest)

    return guarded


# --- repositories -----------------------------------------------------------------------------------------------------


def who_am_i(double: HubDouble, request: Request) -> Answer:
    if request.token is None:
        return refuse(401, message="Invalid username or password.")
    role = "write" if request.token == "hf_write" else "read"
    access = {"accessToken": {"displayName": "test", "role": role}}
    return Answer(body={"type": "user", "name": "org", "auth": {"type": "access_token", **access}, "orgs": []})


@writes
def create(double: HubDouble, request: Request) -> Answer:
    data = request.json()
    repo = f"{data.get('organization') or 'org'}/{data['name']}"
    url = {"url": f"{double.endpoint}/{repo}", "name": repo}
    if repo in double.repos:
        return Answer(409, {"X-Error-Message": "You already created this model repo"}, url)
    double.repos[repo] = Repository(data.get("visibility") == "private" or data.get("private", False))
    return Answer(body=url)


@writes
def delete(double: HubDouble, request: Request) -> Answer:
    data = request.json()
    found = double.repos.pop(f"{data.get('organization') or 'org'}/{data['name']}", None)
    return Answer() if found else refuse(404, "RepoNotFound")


@writes
@reads
def settings(double: HubDouble, request: Request, repo: str, repository: Repository) -> Answer:
    data = request.json()
    repository.gated = data.get("gated", repository.gated)
    if "visibility" in data or "private" in data:
        repository.private = data.get("visibility") == "private" or data.get("private", False)
    return Answer(body={})


@reads
@at_revision
def info(double: HubDouble, request: Request, repo: str, repository: Repository, commit: Commit) -> Answer:
    siblings = [{"rfilename": name} | _blob(file) for name, file in commit.files.items()]
    return Answer(
        body={
            "id": repo,
            "sha": commit.oid,
            "private": repository.private,
            "gated": repository.gated,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": commit.date,
            "createdAt": commit.date,
        }
    )


def _blob(file: File) -> dict:
    lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)} if file.is_large else None
    return {"size": file.size, "blobId": file.oid} | ({"lfs": lfs} if lfs else {})


def _entry(name: str, file: File) -> dict:
    entry = {"type": "file", "path": name, "oid": file.oid, "size": file.size}
    if file.is_large:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return entry | ({"xetHash": file.xet} if file.xet else {})


def _folders(files: dict[str, File]) -> set[str]:
    return {name[:end] for name in files for end, letter in enumerate(name) if letter == "/"}


@reads
@at_revision
def tree(double, request: Request, repo: str, repository: Repository, commit: Commit, folder: str | None) -> Answer:
    start = f"{folder}/" if folder else ""
    is_deep = request.query.get("recursive", "").lower() == "true"
    if folder and folder not in _folders(commit.files):
        return refuse(404, "EntryNotFound")
    entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in _folders(commit.files)]
    entries += [_entry(name, file) for name, file in commit.files.items()]
    inside = [entry for entry in entries if entry["path"].startswith(start)]
    return Answer(body=[entry for entry in inside if is_deep or "/" not in entry["path"][len(start) :]])


@reads
@at_revision
def paths_info(double, request: Request, repo: str, repository: Repository, commit: Commit) -> Answer:
    paths = parse_qs(request.body.decode()).get("paths", [])
    return Answer(body=[_entry(path, commit.files[path]) for path in paths if path in commit.files])


@reads
def refs(double: HubDouble, request: Request, repo: str, repository: Repository) -> Answer:
    def listed(kind: str, names: dict[str, str]) -> list[dict]:
        return [{"name": name, "ref": f"{kind}{name}", "targetCommit": oid} for name, oid in names.items()]

    branches = {name: oid for name, oid in repository.branches.items() if not name.startswith("refs/")}
    pulls = {name: oid for name, oid in repository.branches.items() if name.startswith("refs/")}
    answer = {"branches": listed("refs/heads/", branches), "tags": listed("refs/tags/", repository.tags)}
    return Answer(body=answer | {"converts": [], "pullRequests": listed("", pulls)})


@reads
@at_revision
def commits(double: HubDouble, request: Request, repo: str, repository: Repository, commit: Commit) -> Answer:
    history = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": "org"}],
        }
        for commit in repository.history(commit)
    ]
    return Answer(body=history)


@writes
@reads
@at_revision
def add_tag(double: HubDouble, request: Request, repo: str, repository: Repository, commit: Commit) -> Answer:
    name = request.json()["tag"]
    if name in repository.tags:
        return refuse(409, message="Tag reference exists already")
    repository.tags[name] = commit.oid
    return Answer(body={})


@writes
@reads
def delete_tag(double: HubDouble, request: Request, repo: str, repository: Repository, name: str) -> Answer:
    return Answer() if repository.tags.pop(name, None) else refuse(404, "RevisionNotFound")


@writes
@reads
def branch(double: HubDouble, request: Request, repo: str, repository: Repository, name: str) -> Answer:
    if request.method == "DELETE":
        return Answer() if repository.branches.pop(name, None) else refuse(404, "RevisionNotFound")
    if name in repository.branches:
        return refuse(409, message="Reference already exists")
    commit = repository.find((request.json() if request.body else {}).get("startingPoint", "main"))
    if commit is None:
        return refuse(404, "RevisionNotFound")
    repository.branches[name] = commit.oid
    return Answer(body={})


# --- uploads ----------------------------------------------------------------------------------------------------------


def validate_yaml(double: HubDouble, request: Request) -> Answer:
    return Answer(body={"errors": [], "warnings": []})


@writes
@reads
@at_revision
def preupload(double: HubDouble, request: Request, repo: str, repository: Repository, commit: Commit) -> Answer:
    """Says of each file how it is to be uploaded, and what of that name is there already."""
    files = []
    for file in request.json()["files"]:
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        there = commit.files.get(file["path"])
        known = {"oid": there.etag} if there else {}
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | known)
    return Answer(body={"files": files})


@writes
@reads
def lfs_batch(double: HubDouble, request: Request, repo: str, repository: Repository) -> Answer:
    objects = []
    for item in request.json()["objects"]:
        wanted = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in double.objects:
            verify = {"href": f"{double.endpoint}/{repo}.git/info/lfs/objects/verify"}
            wanted["actions"] = {"upload": {"href": f"{double.cdn}/objects/{item['oid']}"}, "verify": verify}
        objects.append(wanted)
    return Answer(body={"transfer": "basic", "objects": objects})


@writes
@reads
def lfs_verify(double: HubDouble, request: Request, repo: str, repository: Repository) -> Answer:
    item = request.json()
    is_there = len(double.objects.get(item["oid"], b"")) == item["size"]
    return Answer(body={}) if is_there else refuse(404, message="the object was not uploaded")


@reads
def xet_token(double: HubDouble, request: Request, repo: str, repository: Repository, kind: str, revision: str):
    if not double.xet:
        return refuse(404, message="no Xet here")
    if kind == "write" and request.token != "hf_write":
        return refuse(403, message="You don't have the rights to do this.")
    expires = int(time.time()) + 3600
    headers = {"Cas-Url": double.cdn, "Access-Token": XET_TOKEN, "Token-Expiration": str(expires)}
    data = {"casUrl": double.cdn, "accessToken": XET_TOKEN, "exp": expires}
    return Answer(200, {f"X-Xet-{name}": value for name, value in headers.items()}, data)


@writes
@reads
def commit(double: HubDouble, request: Request, repo: str, repository: Repository, name: str) -> Answer:
    """Adds a commit to a branch, or a pull request with one."""
    head = repository.find(name)
    if head is None or name not in repository.branches:
        return refuse(404, "RevisionNotFound")
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    is_pull = request.query.get("create_pr") == "1"
    if header.get("parentCommit") not in (None, head.oid) and not is_pull:
        return refuse(412, message="A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = File.of(base64.b64decode(value["content"]), is_large=False)
        elif line["key"] == "lfsFile":
            content, xet = double.objects.get(value["oid"]), double.xet_of_sha256.get(value["oid"])
            if content is None and xet is None:
                return refuse(400, message=f"{value['path']} was not uploaded")
            files[value["path"]] = File(content, True, value["oid"], value["size"], xet if content is None else None)
        elif line["key"] == "deletedFile":
            if files.pop(value["path"], None) is None:
                return refuse(404, "EntryNotFound")
        elif line["key"] == "deletedFolder":
            files = {path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
    if is_pull:
        pulls = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        name = f"refs/pr/{pulls}"
        repository.branches[name] = header.get("parentCommit") or head.oid
    oid = repository.commit(name, files, title=header["summary"], description=header.get("description", ""))
    pull = {"pullRequestUrl": f"{double.endpoint}/{repo}/discussions/{name.split('/')[-1]}"} if is_pull else {}
    return Answer(
        body={"success": True, "commitUrl": f"{double.endpoint}/{repo}/commit/{oid}", "commitOid": oid} | pull
    )


# --- files ------------------------------------------------------------------------------------------------------------


@reads
@at_revision
def resolve(double: HubDouble, request: Request, repo: str, repository: Repository, commit: Commit, name: str):
    """Where the bytes of a file are: on the hub when it is small, else on the CDN."""
    file = commit.files.get(name)
    headers = {"X-Repo-Commit": commit.oid}
    if file is None:
        return Answer(404, headers | {"X-Error-Code": "EntryNotFound"})
    if not file.is_large:
        place = f"{double.prefix}/api/resolve-cache/models/{repo}/{commit.oid}/{quote(name)}"
        return Answer(307, headers | {"Location": place, "ETag": f'"{file.oid}"'}, b"Temporary Redirect")
    headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"', "ETag": f'"{file.oid}"'}
    if file.xet is not None:
        token = f"{double.endpoint}/api/models/{repo}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
    return Answer(302, headers | {"Location": f"{double.cdn}/objects/{file.sha256}/{quote(name)}"}, b"Found")


@reads
@at_revision
def small_file(double: HubDouble, request: Request, repo: str, repository: Repository, commit: Commit, name: str):
    file = commit.files.get(name)
    if file is None or file.is_large:
        return refuse(404, "EntryNotFound")
    answer = part_of(file.content, request)
    answer.headers |= {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
    return answer


REPO, ONE, REST = "([^/]+/[^/]+)", "([^/]+)", "(.+)"
MODEL = f"/api/models/{REPO}"
ROUTES = [
    ("GET", "/api/whoami-v2", who_am_i),
    ("POST", "/api/repos/create", create),
    ("DELETE", "/api/repos/delete", delete),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("PUT", f"{MODEL}/settings", settings),
    ("GET", MODEL, info),
    ("GET", f"{MODEL}/revision/{ONE}", info),
    ("GET", f"{MODEL}/tree/{ONE}(?:/{REST})?", tree),
    ("POST", f"{MODEL}/paths-info/{ONE}", paths_info),
    ("GET", f"{MODEL}/refs", refs),
    ("GET", f"{MODEL}/commits/{ONE}", commits),
    ("POST", f"{MODEL}/tag/{ONE}", add_tag),
    ("DELETE", f"{MODEL}/tag/{ONE}", delete_tag),
    ("POST DELETE", f"{MODEL}/branch/{ONE}", branch),
    ("POST", f"{MODEL}/preupload/{ONE}", preupload),
    ("POST", f"{MODEL}/commit/{ONE}", commit),
    ("GET", f"{MODEL}/xet-(read|write)-token/{ONE}", xet_token),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", lfs_verify),
    ("HEAD GET", f"/{REPO}/resolve/{ONE}/{REST}", resolve),
    ("HEAD GET", f"/api/resolve-cache/models/{REPO}/{ONE}/{REST}", small_file),
]
