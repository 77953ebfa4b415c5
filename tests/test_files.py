"""Files: whole or not there, with the permissions of any other."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
import typer

import medmim
from fakes import tiny_model
from medmim.cli import terminal
from medmim.errors import OutputError
from medmim.files import atomic_write, write_text

# In a process of its own, because a umask is of a whole process; one that is set for a moment is seen by all threads.
WRITE = """
import os, sys
os.umask(0o027)
def refuse(*args):
    raise AssertionError("the umask was changed")
os.umask = refuse
from medmim.files import write_text
write_text(sys.argv[1], "text")
"""


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "file.txt")], check=True)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_tensors_are_as_readable_as_the_config_beside_them(tmp_path):
    (tmp_path / "plain").touch()
    medmim.save_pretrained(tiny_model(), tmp_path / "model")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes.keys() == {"config.json", "model.safetensors"}
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}


def test_what_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "scan.nii.gz"
    write_text(path, "before")
    seen = []

    def stopped():
        with atomic_write(path) as temporary:
            seen.append(temporary)
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert seen[0].name.endswith(".nii.gz")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["scan.nii.gz"]


@pytest.mark.parametrize("inside", ["", "/model"])
def test_a_model_is_not_saved_where_a_file_is(inside, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file.*: cannot be written \(Not a directory\); choose another output"):
        medmim.save_pretrained(tiny_model(), f"{tmp_path}/file{inside}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_command_names_the_file_that_a_full_disk_does_not_take(tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource")  # of POSIX
    app = typer.Typer()
    app.command()(lambda: write_text(tmp_path / "page.md", "x" * 50_000))
    monkeypatch.setattr(sys, "argv", ["medmim-train"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SystemExit, match="1"):
            terminal.run(app)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = f"[Errno 27] File too large: '{tmp_path / 'page.md'}'; make room, and start the same command again"
    assert capsys.readouterr().err == f"medmim-train: error: {error}\n"
    assert list(tmp_path.iterdir()) == []
