"""Fetching through olah, a mirror of the Hub that others wrote, so that not only our own double has been met.

olah wants versions of its own of what medmim depends on, so it has an environment of its own:

    python -m venv olah && olah/bin/pip install olah && MEDMIM_OLAH=olah/bin/olah-cli pytest -m olah
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

import medmim
from fakes import tiny_model
from hubdouble import File, HubDouble
from hubdouble.repositories import is_large
from medmim.errors import WeightsError
from mirrors import OLAH, olah, olah_before

REPO = "org/tiny.fake"
pytestmark = [pytest.mark.olah, pytest.mark.skipif(not OLAH, reason="MEDMIM_OLAH names no olah-cli")]


def same_weights(model) -> bool:
    return all(torch.equal(model.state_dict()[key], tensor) for key, tensor in tiny_model().state_dict().items())


@pytest.fixture
def mirrored(tiny_folder, tmp_path):
    """A double with a repository, and the endpoint of olah in front of it."""
    with HubDouble() as double:
        double.add_folder(REPO, tiny_folder[0])
        with olah_before(double, tmp_path / "olah") as endpoint:
            yield double, endpoint


def test_a_mirror_gives_what_the_hub_has(mirrored, tmp_path):
    double, mirror = mirrored
    commit = double.repos[REPO].branches["main"]
    for number, revision in enumerate((None, "main", commit)):
        model = medmim.from_pretrained(REPO, revision=revision, endpoint=mirror, cache_dir=tmp_path / f"cache{number}")
        assert same_weights(model)
        assert model.spec.weights.revision == commit
    # The mirror has fetched the weights once for the three of us.
    assert len(double.asked("^/objects/.*model.safetensors")) == 1


def test_a_byte_flipped_before_the_mirror(mirrored, tmp_path):
    double, mirror = mirrored
    double.fault("GET", "^/objects/", times=9, flip=True)
    with pytest.raises(WeightsError, match=r"is not the file that was published .* a proxy alters downloads"):
        medmim.from_pretrained(REPO, endpoint=mirror, cache_dir=tmp_path / "cache")


def test_a_mirror_passes_refusals_on(mirrored, tmp_path):
    double, mirror = mirrored
    access = {"endpoint": mirror, "cache_dir": tmp_path / "cache"}
    double.repos[REPO].private = True
    with pytest.raises(WeightsError, match="no such repository, or a private one"):
        medmim.from_pretrained(REPO, **access)
    assert same_weights(medmim.from_pretrained(REPO, token="hf_read", **access))
    with pytest.raises(WeightsError, match="no such repository, or a private one"):
        medmim.from_pretrained("org/missing", **access)


def test_a_git_repository_without_a_hub(tiny_folder, tmp_path):
    """Olah serves a checkout with LFS from disk: nothing that answers here is ours."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    checkout = tmp_path / "mirrors" / "models" / REPO
    checkout.mkdir(parents=True)

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        run = subprocess.run(["git", *who, *words], cwd=checkout, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    git("init", "-b", "main")
    for path in tiny_folder[0].iterdir():
        content = path.read_bytes()
        file = File.of(content, is_large=is_large(path.name, len(content)))
        (checkout / path.name).write_bytes(file.pointer if file.is_large else content)
        if file.is_large:
            stored = checkout / ".git" / "lfs" / "objects" / file.sha256[:2] / file.sha256[2:4] / file.sha256
            stored.parent.mkdir(parents=True)
            stored.write_bytes(content)
    git("add", ".")
    git("commit", "-m", "Add a model")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    settings = {"mirrors-path": [str(tmp_path / "mirrors")], "offline": True}
    with olah(tmp_path / "olah", **settings) as endpoint:
        for number, revision in enumerate((None, "v1", commit)):
            access = {"endpoint": endpoint, "cache_dir": tmp_path / f"cache{number}"}
            model = medmim.from_pretrained(REPO, revision=revision, **access)
            assert same_weights(model)
            assert model.spec.weights.revision == commit
            assert same_weights(medmim.from_pretrained(REPO, revision=commit, local_files_only=True, **access))
        with pytest.raises(WeightsError, match="no such repository"):
            medmim.from_pretrained("org/missing", endpoint=endpoint, cache_dir=tmp_path / "cache")
