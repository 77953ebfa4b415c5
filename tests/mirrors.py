"""olah, a mirror of the Hub that others wrote, as a running server (see `test_olah`)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from urllib.parse import urlsplit

OLAH = os.environ.get("MEDMIM_OLAH")


@contextlib.contextmanager
def olah(folder, **basic):
    """A running olah that keeps its files in a folder: its endpoint."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    offline = basic.pop("offline", False)
    settings = {
        "host": "127.0.0.1",
        "port": int(address.split(":")[1]),
        "mirror-netloc": address,
        "mirror-lfs-netloc": address,
        "repos-path": str(folder / "repos"),
        "log-path": str(folder / "logs"),
        "metadata-cache-ttl": 0,
        **basic,
    }
    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    folder.mkdir()
    (folder / "olah.toml").write_text(
        "\n".join(["[basic]", *lines, "[accessibility]", f"offline = {str(offline).lower()}"])
    )
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen([OLAH, "-c", "olah.toml"], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "output.txt").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/repos"):
                break
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def olah_before(double, folder):
    """A running olah that mirrors a double of the Hub: its endpoint."""
    hub, cdn = urlsplit(double.endpoint).netloc, urlsplit(double.cdn).netloc
    return olah(folder, **{"hf-scheme": "http", "hf-netloc": hub, "hf-lfs-netloc": cdn})
