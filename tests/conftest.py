"""Every test runs with an empty Hugging Face home and without a network: only the loopback address can be reached."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from functools import partial

import pytest

# huggingface_hub reads these when it is imported, so they are settled before any test module is.
HOME = tempfile.TemporaryDirectory(prefix="medmim-tests-")
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "MEDMIM_HUB"))]:
    del os.environ[name]
os.environ |= {"HF_HOME": HOME.name, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ["COLUMNS"] = "200"  # rich reads it when the command line is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

LOOPBACK = ("127.0.0.1", "::1", "localhost", None)


def pytest_unconfigure():
    HOME.cleanup()


@pytest.fixture(autouse=True, scope="session")
def only_loopback():
    """Turns every attempt to reach another host into an error that says so."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def refuse(host):
        raise RuntimeError(f"a test tried to reach {host!r}; tests have no network")

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            refuse(address[0])
        return connect(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        return getaddrinfo(host, *args, **kwargs) if host in LOOPBACK else refuse(host)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(params=["lfs", "xet"])
def transport(request, monkeypatch):
    """Runs a test twice: the client uploads large files over LFS, and over Xet."""
    from huggingface_hub import constants

    # What HF_HUB_DISABLE_XET sets; the client reads the variable once, and this at each use.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def registry(monkeypatch):
    """The registry; what a test registers is forgotten after it."""
    from medmim import registry

    monkeypatch.setattr(registry, "_registered_models", dict(registry._registered_models))
    monkeypatch.setattr(registry, "_registered_families", dict(registry._registered_families))
    return registry


@pytest.fixture
def tiny_folder(tmp_path):
    """A model folder with encoder, decoder and a full record, as small as can be: (folder, its spec)."""
    from fakes import save_tiny

    folder = tmp_path / "tiny"
    return folder, save_tiny(folder)


@pytest.fixture
def tiny_weights(tiny_folder, registry, monkeypatch, tmp_path):
    """The same in the catalog, as "tiny" with the tag "fake", and installed beside the source: its spec."""
    from medmim import hub

    folder, spec = tiny_folder
    monkeypatch.setattr(hub, "PACKAGED", tmp_path / "weights")
    monkeypatch.setattr(registry, "PACKAGED", tmp_path / "weights")
    hub.PACKAGED.mkdir()
    folder.rename(hub.PACKAGED / "tiny.fake")
    registry.register_model("tiny", family="vit", args=spec.args, weights=[spec.weights])
    return spec


@pytest.fixture
def run_command(monkeypatch, capfd):
    """Runs a command in this process: its name, `main` and arguments; gives exit code, standard output and error."""

    def run(name, main, *arguments):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{name}", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def call(run_command):
    """Runs `medmim` with arguments, see `run_command`."""
    from medmim import cli

    return partial(run_command, "medmim", lambda: cli.main())
