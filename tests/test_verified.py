"""Files that were found right are hashed again only when something has happened to them."""

from __future__ import annotations

import errno
import os

import pytest
from huggingface_hub import cached_assets_path

import medmim
from fakes import RECORD, tiny_model
from medmim import files, verified
from medmim.errors import WeightsError
from medmim.files import sha256_of
from medmim.verified import fault_unless_noted, note_of


@pytest.fixture(autouse=True)
def hashed(monkeypatch):
    """Names of the files that were hashed; of these small ones notes are taken, too."""
    names = []
    monkeypatch.setattr(verified, "WORTH_NOTING", 0)
    monkeypatch.setattr(files, "sha256_of", lambda path: names.append(path.name) or sha256_of(path))
    return names


@pytest.fixture
def folder(tmp_path):
    """A model folder."""
    medmim.save_pretrained(tiny_model(), tmp_path / "model", weights=RECORD)
    return tmp_path / "model"


def flip(path):
    """Changes the last byte in place, and sets the time of change back."""
    before = path.stat()
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_folder_is_hashed_once(folder, hashed):
    medmim.from_pretrained(folder)
    medmim.from_pretrained(folder)
    assert hashed == ["model.safetensors"]


def test_a_flipped_byte_is_found_though_size_and_time_are_as_they_were(folder):
    medmim.from_pretrained(folder)
    flip(folder / "model.safetensors")
    for _ in range(2):
        with pytest.raises(WeightsError, match="damaged"):
            medmim.from_pretrained(folder)


def test_a_copy_is_hashed_for_itself(folder, tmp_path, hashed):
    medmim.from_pretrained(folder)
    folder.rename(tmp_path / "moved")
    flip(tmp_path / "moved" / "model.safetensors")
    with pytest.raises(WeightsError, match="damaged"):
        medmim.from_pretrained(tmp_path / "moved")
    assert hashed == 2 * ["model.safetensors"]


def test_a_note_holds_for_the_bytes_that_were_expected(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1")
    right, wrong = sha256_of(path), "0" * 64
    for _ in range(2):
        assert fault_unless_noted(path, note_of(path, right), sha256=right) is None
        assert "expected 000" in fault_unless_noted(path, note_of(path, wrong), sha256=wrong)


def test_what_changes_while_it_is_hashed_is_not_noted(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"1")
    sha256 = sha256_of(path)

    def hash_slowly(path):
        path.write_bytes(b"2")
        return sha256

    monkeypatch.setattr(files, "sha256_of", hash_slowly)
    assert fault_unless_noted(path, tmp_path / "note", sha256=sha256) is None
    assert not (tmp_path / "note").exists()


@pytest.mark.parametrize("damage", [b"", b"0 0 0 0", b"\xff\xfe"])
def test_a_damaged_note_counts_for_nothing(tmp_path, damage):
    path, note = tmp_path / "file", tmp_path / "note"
    path.write_bytes(b"1")
    note.write_bytes(damage)
    assert "expected 000" in fault_unless_noted(path, note, sha256="0" * 64)


def test_without_leave_to_write_files_are_hashed_each_time(folder, monkeypatch, hashed):
    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(verified, "atomic_write", refuse)
    medmim.from_pretrained(folder)
    medmim.from_pretrained(folder)
    assert hashed == 2 * ["model.safetensors"]


def test_notes_are_where_the_hub_client_keeps_what_libraries_make(tmp_path):
    assert note_of(tmp_path, "0" * 64).parent == cached_assets_path("medmim", subfolder="verified")


def test_no_note_lies_beside_the_file(folder):
    before = set(folder.iterdir())
    medmim.from_pretrained(folder)
    assert set(folder.iterdir()) == before
