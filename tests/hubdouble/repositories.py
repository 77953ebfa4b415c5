"""Repositories with a history: commits that name their files, branches and tags that name commits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

LARGE_SUFFIXES = (".safetensors", ".bin", ".gz", ".zst")
LARGE_BYTES = 10_000_000


@dataclass(frozen=True)
class File:
    """A file of a commit.

    Attributes:
        content: Its bytes; None when only the Xet storage has them.
        is_large: Whether the repository holds it by its sha256 (LFS or Xet), not in git.
        sha256, size: Of the content.
        xet: Its hash in the Xet storage, None when it is not there.
    """

    content: bytes | None
    is_large: bool
    sha256: str
    size: int
    xet: str | None = None

    @classmethod
    def of(cls, content: bytes, *, is_large: bool) -> File:
        return cls(content, is_large, hashlib.sha256(content).hexdigest(), len(content))

    @cached_property
    def oid(self) -> str:
        """The name of the git object: of the content, or of the pointer to it."""
        content = self.pointer if self.is_large else self.content
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository; `number` makes its date and, like its parent, its id."""

    files: dict[str, File]
    title: str
    description: str = ""
    parent: str | None = None
    number: int = 0

    @cached_property
    def oid(self) -> str:
        tree = {name: file.oid for name, file in sorted(self.files.items())}
        text = json.dumps([tree, self.title, self.description, self.parent, self.number])
        return hashlib.sha1(text.encode()).hexdigest()

    @property
    def date(self) -> str:
        return f"2025-01-01T00:{self.number // 60 % 60:02}:{self.number % 60:02}.000Z"


@dataclass
class Repository:
    """A model repository; it starts with an empty commit on main, as on the Hub."""

    private: bool = False
    gated: bool | str = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {}, title="initial commit")

    @property
    def files(self) -> dict[str, File]:
        """The files on main."""
        return self.commits[self.branches["main"]].files

    def commit(self, branch: str, files: dict[str, File], *, title: str, description: str = "") -> str:
        """Makes `files` the whole content of a branch; returns the id of the commit."""
        commit = Commit(files, title, description, self.branches.get(branch), len(self.commits))
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def find(self, revision: str) -> Commit | None:
        """The commit of an id, a branch or a tag."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def history(self, commit: Commit) -> list[Commit]:
        """A commit and those before it, newest first."""
        commits = [commit]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


def is_large(name: str, size: int) -> bool:
    """Whether the Hub keeps a file outside of git."""
    return name.endswith(LARGE_SUFFIXES) or size > LARGE_BYTES
