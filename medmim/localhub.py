"""A hub that is a folder: models laid out as on the Hugging Face Hub, for a site that has no way to it.

    HUB/ORG/NAME/snapshots/VERSION/   one version: a model folder and its SHA256SUMS, written once
    HUB/ORG/NAME/refs/main            the newest version; other files there are branches
    HUB/ORG/NAME/tags/TAG             another name of a version, which never moves

A version is named by 40 hexadecimal digits: by the commit it was copied from, or by the start of the sha256 of its
SHA256SUMS. It is written beside its place and renamed into it, then `refs/main` is replaced, so that a reader finds the
old version or the whole new one. `sha256sum -c SHA256SUMS` checks a version where there is no medmim.

A model folder that was copied to HUB/ORG/NAME by hand is found too, as a single version without a name.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medmim.errors import WeightsError
from medmim.files import Content, sha256_of, size_of, write_text

SNAPSHOTS, REFS, TAGS, SUMS, MAIN = "snapshots", "refs", "tags", "SHA256SUMS", "main"
ANYTHING = "anything"  # that a branch may be at
STAGING = ".publishing-"
VERSION = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUM = re.compile(r"([0-9a-f]{64})  ([\w-][\w.-]*(?:/[\w-][\w.-]*)*)", re.ASCII)
_CHUNK = 2**24
_REF_BYTES, _SUMS_BYTES = 64, 1_000_000  # of files that may come from a stranger: 41, and a hundred a line


@dataclass(frozen=True)
class Version:
    """A version of a model in a local hub.

    Attributes:
        folder: The model folder.
        repo: "org/name".
        name: 40 hexadecimal digits; None for a folder that was copied there by hand.
    """

    folder: Path
    repo: str
    name: str | None


class LocalHub:
    """The hub in a folder, which need not exist until something is published to it."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.expanduser(root))

    def __str__(self) -> str:
        return f"the local hub {self.root}"

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, repo: str, revision: str | None = None) -> Version:
        """A version of a model.

        Args:
            repo: "org/name".
            revision: A version, tag or branch; None for the newest.

        Raises:
            WeightsError: When there is none, with those that there are.
        """
        home = self._home(repo)
        if not os.path.isdir(home):
            raise WeightsError(f"{self} has no model {repo}; publish or copy it there, or set another MEDMIM_HUB")
        version = self._version(home, revision or MAIN)
        if version is not None:
            return Version(home / SNAPSHOTS / version, repo, version)
        if revision in (None, MAIN) and ((home / "config.json").is_file() or not (home / SNAPSHOTS).is_dir()):
            return Version(home, repo, None)
        known = ", ".join(self._revisions(home))
        raise WeightsError(
            f"{self} has no revision {revision or MAIN!r} of {repo}; "
            + (f"it has: {known}" if known else "it holds one version without a name, so leave the revision out")
        )

    def find_pinned(self, repo: str, version: str | None) -> Version:
        """The version that was asked for where the hub has it, else the newest: digests decide whether it will do.

        Raises:
            WeightsError: When the hub has none.
        """
        has_it = version is not None and (self._home(repo) / SNAPSHOTS / version).is_dir()
        return self.find(repo, version if has_it else None)

    def head(self, repo: str, branch: str = MAIN) -> str | None:
        """The version that a branch is at; None when there is no such branch."""
        return self._version(self._home(repo), branch)

    def versions(self) -> Iterator[Version]:
        """Everything in the hub, in the order of names."""
        for home in sorted(path for path in self.root.glob("*/*") if path.is_dir()):
            repo = f"{home.parent.name}/{home.name}"
            if not REPOSITORY.fullmatch(repo):
                continue
            if (home / "config.json").is_file():
                yield Version(home, repo, None)
            for folder in sorted((home / SNAPSHOTS).glob("*")):
                if VERSION.fullmatch(folder.name):
                    yield Version(folder, repo, folder.name)

    def _home(self, repo: str) -> Path:
        if not REPOSITORY.fullmatch(repo):
            raise WeightsError(f"{repo!r} is not the name of a repository; it is written org/name")
        home = self.root / repo
        if not home.resolve().is_relative_to(self.root.resolve()):
            raise WeightsError(f"{home}: leads out of {self}; copy the model itself there")
        return home

    @staticmethod
    def _version(home: Path, revision: str) -> str | None:
        """The version that a revision of any kind means; None when there is none."""
        if VERSION.fullmatch(revision):
            return revision if (home / SNAPSHOTS / revision).is_dir() else None
        if not REVISION.fullmatch(revision):
            return None
        for folder in (REFS, TAGS):
            try:
                with open(home / folder / revision, "rb") as file:
                    version = file.read(_REF_BYTES).decode("ascii", errors="replace").strip()
            except OSError:
                continue
            return version if VERSION.fullmatch(version) and (home / SNAPSHOTS / version).is_dir() else None
        return None

    def _revisions(self, home: Path) -> list[str]:
        """Names of branches, tags and versions that are there in whole."""
        names = [path.name for folder in (REFS, TAGS, SNAPSHOTS) for path in sorted((home / folder).glob("[!.]*"))]
        return [name for name in names if self._version(home, name)]

    # --- writing ------------------------------------------------------------------------------------------------------

    def publish(
        self,
        repo: str,
        files: Mapping[str, Content],
        *,
        version: str | None = None,
        branches: Sequence[str] = (MAIN,),
        tag: str | None = None,
        expected: str | None = ANYTHING,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> str:
        """Adds a version, whole or not at all. One that is there already is left alone if it is intact.

        Args:
            repo: "org/name".
            files: Each file of the model folder: where it is now, or what is in it.
            version: The commit that they are of; None names the version by its content.
            branches: What will point to it; none of them may be a tag.
            tag: Another name for it for good, which no other version may have.
            expected: The version that the first branch must still be at; None where there must be no such branch yet.
            progress: Called with bytes copied and bytes in all.

        Returns:
            The version.

        Raises:
            WeightsError: When a name is impossible or taken, the branch has moved, or the folder cannot be written.
        """
        from huggingface_hub.utils import WeakFileLock

        home = self._home(repo)
        for word in (*branches, *([] if tag is None else [tag])):
            if not REVISION.fullmatch(word) or VERSION.fullmatch(word):
                raise WeightsError(f"{word!r} cannot name a branch or tag of {self}; use letters, digits, _, - and .")
        try:
            home.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(home / ".lock"):
                for left_by_a_crash in home.glob(f"{STAGING}*"):
                    shutil.rmtree(left_by_a_crash, ignore_errors=True)  # it may be another user's
                with tempfile.TemporaryDirectory(dir=home, prefix=STAGING) as staging:
                    return self._publish(home, Path(staging), files, version, branches, tag, expected, progress)
        except OSError as error:
            raise WeightsError(
                f"{repo} could not be published to {self} ({error.strerror or error}); make room there, or get leave "
                "to write; what was there before is untouched"
            ) from error

    def _publish(self, home, staging, files, version, branches, tag, expected, progress) -> str:
        if expected != ANYTHING and (found := self._version(home, branches[0])) != expected:
            raise WeightsError(
                f"{branches[0]} of {home} has moved from {expected or 'nothing'} to {found or 'nothing'} since it was "
                "read; look at what was published there, then publish again"
            )
        taken = f"{home} has a branch or tag {tag!r} already; choose another name for the tag"
        if tag is not None and (tag in branches or (home / REFS / tag).exists()):
            raise WeightsError(taken)
        for branch in branches:
            if (home / TAGS / branch).exists():
                raise WeightsError(f"{branch!r} is a tag of {home}, which does not move; choose another branch")
        folder = staging / "version"
        folder.mkdir()
        _copy(files, folder, progress)
        sums = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in sorted(files))
        write_text(folder / SUMS, sums)
        version = version or hashlib.sha256(sums.encode()).hexdigest()[:40]
        # What failed after it had written the tag is done again with it.
        if tag is not None and (home / TAGS / tag).exists() and self._version(home, tag) != version:
            raise WeightsError(taken)
        target = home / SNAPSHOTS / version
        target.parent.mkdir(exist_ok=True)
        if not target.exists() or not _is_intact(target):
            if target.exists():
                os.replace(target, staging / "damaged")
            os.replace(folder, target)
        if tag is not None:
            write_text(home / TAGS / tag, f"{version}\n")
        for branch in branches:
            write_text(home / REFS / branch, f"{version}\n")
        return version


def read_sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file that the list of a version names.

    Raises:
        WeightsError: When there is no such list.
    """
    path = folder / SUMS
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(_SUMS_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}); publish or copy the version again") from None
    listed = [_SUM.fullmatch(line) for line in lines]
    if not listed or None in listed:
        raise WeightsError(f"{path}: not a list of digests and files; publish or copy the version again")
    return {match[2]: match[1] for match in listed}


def _is_intact(folder: Path) -> bool:
    try:
        return all(sha256_of(folder / name) == digest for name, digest in read_sums(folder).items())
    except (OSError, WeightsError):
        return False


def _copy(files: Mapping[str, Content], folder: Path, progress: Callable[[int, int], None]) -> None:
    done, total = 0, sum(map(size_of, files.values()))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with _opened(content) as source, open(folder / name, "xb") as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
                done += len(chunk)
                progress(done, total)
            target.flush()
            os.fsync(target.fileno())


def _opened(content: Content) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")
