"""The hub in a folder: versions that are there in whole or not at all, and nothing outside of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading

import pytest
import torch

import medmim
from fakes import save_tiny, tiny_model
from medmim import localhub
from medmim.errors import WeightsError
from medmim.files import sha256_of
from medmim.localhub import LocalHub, read_sums

REPO = "org/tiny.fake"
OTHER = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder, which MEDMIM_HUB points to."""
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def local(root):
    return LocalHub(root)


@pytest.fixture
def files(tiny_folder):
    """The files of a model."""
    return {path.name: path for path in tiny_folder[0].iterdir()}


@pytest.fixture
def other_files(tmp_path):
    """Those of a newer version, without a decoder."""
    model = tiny_model()
    torch.nn.init.constant_(model.norm.bias, 7)
    medmim.save_pretrained(model, tmp_path / "newer")
    return {path.name: path for path in (tmp_path / "newer").iterdir()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- versions ---------------------------------------------------------------------------------------------------------


def test_what_was_published_is_loaded(local, files):
    version = local.publish(REPO, files)
    model = medmim.create_model(f"hf-hub:{REPO}", pretrained=True)
    for key, tensor in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    assert (model.spec.weights.repo, model.spec.weights.revision) == (REPO, version)
    medmim.create_decoder(model)
    assert medmim.from_pretrained(REPO).spec == model.spec


def test_the_newest_is_the_default_and_the_others_stay(local, files, other_files):
    first = local.publish(REPO, files, tag="v1")
    second = local.publish(REPO, other_files)
    trial = local.publish(REPO, files, branches=["trial"])
    assert trial == first != second
    for revision, version in ((None, second), ("main", second), ("v1", first), ("trial", first), (first, first)):
        assert local.find(REPO, revision).name == version
        assert medmim.from_pretrained(REPO, revision=revision).norm.bias[0] == (7 if version == second else 0)
    assert medmim.create_model(f"hf-hub:{REPO}@v1", pretrained=True).norm.bias[0] == 0


def test_a_version_is_named_by_its_content_or_by_its_commit(local, files, tmp_path):
    version = local.publish(REPO, files)
    assert LocalHub(tmp_path / "elsewhere").publish(REPO, files) == version
    assert local.publish(REPO, files, version=OTHER) == OTHER
    assert contents(local.find(REPO, OTHER).folder) == contents(local.find(REPO, version).folder)


def test_files_may_be_in_folders(local):
    version = local.publish(REPO, {"a/b/c.txt": b"there"})
    assert (local.find(REPO, version).folder / "a/b/c.txt").read_bytes() == b"there"


def test_the_digests_can_be_checked_without_medmim(local, files):
    local.publish(REPO, files)
    folder = local.find(REPO).folder
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    assert read_sums(folder) == {name: sha256_of(path) for name, path in files.items()}


def test_an_intact_version_is_left_alone_and_a_damaged_one_replaced(local, files):
    version = local.publish(REPO, files)
    path = local.find(REPO).folder / "model.safetensors"
    before = path.stat()
    local.publish(REPO, files)
    assert path.stat() == before
    path.write_bytes(path.read_bytes()[:-1])
    assert local.publish(REPO, files) == version
    assert path.read_bytes() == files["model.safetensors"].read_bytes()


def test_a_folder_copied_by_hand_is_one_version_until_one_is_published(local, root, tiny_folder, other_files):
    (root / REPO).parent.mkdir(parents=True)
    tiny_folder[0].rename(root / REPO)
    assert medmim.from_pretrained(REPO).spec.weights.tag == "fake"
    assert medmim.from_pretrained(REPO, revision="main").spec.weights.revision is None
    with pytest.raises(WeightsError, match="it holds one version without a name, so leave the revision out"):
        medmim.from_pretrained(REPO, revision="v1")
    local.publish(REPO, other_files)
    assert medmim.from_pretrained(REPO).norm.bias[0] == 7
    assert [version.name is None for version in local.versions()] == [True, False]


def test_weights_of_the_catalog_are_those_of_their_commit_else_the_newest(
    local, files, other_files, registry, tmp_path
):
    weights = save_tiny(tmp_path / "again").weights
    pinned = weights.model_copy(update={"repo": REPO, "revision": OTHER})
    registry.register_model("tiny", family="vit", args=tiny_model().spec.args, weights=[pinned])
    local.publish(REPO, files, version=OTHER)
    local.publish(REPO, other_files)
    assert medmim.create_model("tiny", pretrained=True).norm.bias[0] == 0
    local.publish("org/elsewhere", files)
    elsewhere = weights.model_copy(update={"repo": "org/elsewhere", "revision": OTHER})
    registry.register_model("tiny_too", family="vit", args=tiny_model().spec.args, weights=[elsewhere])
    medmim.create_model("tiny_too", pretrained=True)
    never = weights.model_copy(update={"tag": "never"})
    registry.register_model("tiny_three", family="vit", args=tiny_model().spec.args, weights=[never])
    with pytest.raises(WeightsError, match=r"has no model medmim/tiny_three\.never"):
        medmim.create_model("tiny_three", pretrained=True)


# --- in whole or not at all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["_copy", "sha256_of", "write_text"])
def test_a_version_that_could_not_be_written_leaves_what_was_there(local, files, other_files, monkeypatch, step):
    version = local.publish(REPO, files)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(localhub, step, fail)
    with pytest.raises(WeightsError, match=r"could not be published .* \(No space left on device\); make room there"):
        local.publish(REPO, other_files)
    assert [found.name for found in local.versions()] == [version]
    assert local.find(REPO).name == version
    assert not list(local.root.glob("*/*/.publishing-*"))


def test_what_a_killed_process_left_is_cleared(local, files, root):
    (root / REPO / ".publishing-x" / "version").mkdir(parents=True)
    local.publish(REPO, files)
    assert sorted(path.name for path in (root / REPO).iterdir()) == [".lock", "refs", "snapshots"]


def test_what_the_killed_process_of_another_user_left_is_in_nobodys_way(local, files, root, monkeypatch):
    rmdir = os.rmdir

    def refuse(path, **options):
        if str(path).endswith(".publishing-theirs"):
            raise PermissionError(13, "Permission denied", path)
        rmdir(path, **options)

    (root / REPO / ".publishing-theirs").mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", refuse)
    assert local.publish(REPO, files) == local.find(REPO).name
    assert len(list(local.versions())) == 1


def test_publishing_from_what_was_read_before_somebody_else_published(local, files, other_files):
    first = local.publish(REPO, files)
    second = local.publish(REPO, other_files, expected=first)
    with pytest.raises(WeightsError, match=f"has moved from {first} to {second} since it was read"):
        local.publish(REPO, files, expected=first)
    assert local.head(REPO) == second
    assert local.head(REPO, "trial") is None


def test_many_publish_at_once(local, files, other_files):
    """One of those who start from the same version wins; everybody else is told."""
    start = local.publish(REPO, files)
    ended = []

    def publish():
        try:
            ended.append(local.publish(REPO, other_files, expected=start))
        except WeightsError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended.count(local.head(REPO)) == 1
    assert sum("has moved" in end for end in ended) == 3


def test_a_tag_is_given_once(local, files, other_files):
    version = local.publish(REPO, files, tag="v1")
    with pytest.raises(WeightsError, match="has a branch or tag 'v1' already"):
        local.publish(REPO, other_files, tag="v1")
    assert local.find(REPO).name == version


def test_what_failed_after_it_was_tagged_is_published_again_with_its_tag(local, files, other_files, monkeypatch):
    local.publish(REPO, files)
    write_text = localhub.write_text

    def fail_at_branches(path, text):
        if path.parent.name == "refs":
            raise OSError(28, "No space left on device")
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(localhub, "write_text", fail_at_branches)
        with pytest.raises(WeightsError, match="could not be published"):
            local.publish(REPO, other_files, tag="v1")
    version = local.publish(REPO, other_files, tag="v1")
    assert local.find(REPO, "v1").name == local.find(REPO).name == version


@pytest.mark.parametrize("tag", ["", "../x", "a b"])
def test_a_tag_is_a_name(tag, local, files):
    with pytest.raises(WeightsError, match="cannot name a branch or tag of the local hub"):
        local.publish(REPO, files, tag=tag)


def test_a_tag_does_not_move(local, files, other_files):
    version = local.publish(REPO, files, tag="v1")
    with pytest.raises(WeightsError, match=r"'v1' is a tag of .*, which does not move"):
        local.publish(REPO, other_files, branches=["v1"])
    for name in ("main", "trial"):
        with pytest.raises(WeightsError, match=f"has a branch or tag '{name}' already"):
            local.publish(REPO, other_files, branches=["trial"], tag=name)
    assert local.find(REPO, "v1").name == local.find(REPO).name == version


# --- nothing outside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo", ["../up/x", "org/../x", "org/..", "/etc/x", "org", "org/a/b", "org\\x/y", ".hidden/x", ""]
)
def test_no_name_leaves_the_folder(local, repo, files):
    for use in (
        local.find,
        lambda repo: local.publish(repo, files),
        lambda repo: medmim.create_model(f"hf-hub:{repo}"),
    ):
        with pytest.raises(WeightsError, match="is not the name of a repository"):
            use(repo)
    assert not local.root.exists()


@pytest.mark.parametrize(
    "revision", ["..", "../main", "refs/../main", "a/b", ".hidden", "", "/etc/passwd", "A" * 40 + "/"]
)
def test_no_revision_leaves_the_folder(local, revision, files):
    local.publish(REPO, files)
    with pytest.raises(WeightsError, match="has no revision"):
        local.find(REPO, revision or " ")
    for names in ({"branches": [revision]}, {"tag": revision or " "}, {"branches": [OTHER]}, {"tag": OTHER}):
        with pytest.raises(WeightsError, match="cannot name a branch or tag"):
            local.publish(REPO, files, **names)


def test_no_link_leaves_the_folder(local, files, root, tmp_path):
    local.publish(REPO, files)
    (root / "org" / "link").symlink_to(tmp_path / "newer")
    with pytest.raises(WeightsError, match="leads out of the local hub"):
        local.find("org/link")
    folder = local.find(REPO).folder
    for name in ("config.json", "model.safetensors"):
        os.replace(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(WeightsError, match=f"{name}: a link that leads out"):
            medmim.from_pretrained(REPO)
        (folder / name).unlink()
        os.replace(tmp_path / name, folder / name)
    medmim.from_pretrained(REPO)


@pytest.mark.parametrize("content", ["", "../../../etc", "a" * 39, "A" * 40, "\0" * 40, OTHER, "0" * 10_000])
def test_a_reference_that_names_no_version_is_none(local, files, root, content):
    version = local.publish(REPO, files)
    (root / REPO / "refs" / "main").write_text(content)
    with pytest.raises(WeightsError, match=rf"has no revision 'main' of {REPO}; it has: {version}"):
        medmim.from_pretrained(REPO)
    assert local.head(REPO) is None
    local.publish(REPO, files)
    medmim.from_pretrained(REPO)


def test_a_version_that_was_deleted(local, files, other_files, root):
    first, second = local.publish(REPO, files, tag="v1"), local.publish(REPO, other_files)
    shutil.rmtree(root / REPO / "snapshots" / second)
    with pytest.raises(WeightsError, match=rf"has no revision '{second}' of {REPO}; it has: v1, {first}"):
        medmim.from_pretrained(REPO, revision=second)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"x", b"0" * 64 + b"  ../config.json\n", b"0" * 64 + b"  /etc/passwd\n"]
)
def test_a_list_of_digests_that_is_none(content, tmp_path):
    (tmp_path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(WeightsError, match=r"not a list|cannot be read"):
        read_sums(tmp_path)
