"""Where files come from, over the real huggingface_hub client against a double on the loopback address."""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from huggingface_hub import scan_cache_dir

import medmim
from fakes import RECORD, tiny_model
from hubdouble import HubDouble
from medmim import files, hub, transport, verified
from medmim.errors import SpecError, UnknownModelError, WeightsError
from medmim.publish import push_to_hub
from medmim.spec import FileSpec

REPO = "org/tiny.fake"
FILES = ("config.json", "model.safetensors", "decoder.safetensors")


@pytest.fixture
def double(tiny_folder):
    """A running hub with one repository."""
    with HubDouble() as double:
        double.add_folder(REPO, tiny_folder[0])
        yield double


@pytest.fixture
def commit(double):
    """The commit that main of the repository points to."""
    return double.repos[REPO].branches["main"]


@pytest.fixture
def access(double, tmp_path):
    """Keywords that make create_model use the double, with an empty cache."""
    return {"endpoint": double.endpoint, "cache_dir": tmp_path / "cache"}


@pytest.fixture
def published(registry, tiny_folder, commit):
    """The same weights in the catalog as "tiny.fake", published at REPO and not installed: their record."""
    weights = tiny_folder[1].weights.model_copy(update={"repo": REPO, "revision": commit})
    registry.register_model("tiny", family="vit", args=tiny_folder[1].args, weights=[weights])
    return weights


def asked(double) -> list[str]:
    """What was asked of the double since the last call: "HEAD REVISION/FILE", "GET FILE" for the bytes of one.

    The redirect of a small file is left out, which is to another path of the hub.
    """
    found = []
    for request in double.asked():
        method, path = request.split()
        if method == "GET":
            found.append(f"GET {path.rsplit('/', 1)[1]}")
        elif "/resolve/" in path:
            found.append(f"HEAD {path.partition('/resolve/')[2]}")
    return found


def blob(cache_dir, name) -> Path:
    (pointer,) = Path(cache_dir).glob(f"models--*/snapshots/*/{name}")
    return pointer.resolve()


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# --- from a hub -------------------------------------------------------------------------------------------------------


def test_from_the_hub_bit_for_bit(double, access, commit):
    model = medmim.from_pretrained(REPO, **access)
    for key, tensor in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    assert model.spec.weights.repo == REPO
    assert model.spec.weights.revision == commit
    for request in double.requests:
        assert request.headers["user-agent"].startswith(f"medmim/{medmim.__version__}")


def test_the_branch_costs_one_request_and_the_commit_none(double, access, commit):
    medmim.create_model(f"hf-hub:{REPO}", pretrained=True, **access)
    assert asked(double) == [
        # What is not in the cache is asked for once by medmim and once by the client.
        *["HEAD main/config.json"] * 2,
        "GET config.json",
        # The rest is of the commit that config.json was of.
        *[f"HEAD {commit}/model.safetensors"] * 2,
        "GET model.safetensors",
    ]
    medmim.create_model(f"hf-hub:{REPO}", pretrained=True, **access)
    assert asked(double) == ["HEAD main/config.json"]
    medmim.create_model(f"hf-hub:{REPO}@{commit}", pretrained=True, **access)
    medmim.from_pretrained(REPO, revision=commit, **access)
    medmim.create_model(f"hf-hub:{REPO}", pretrained=True, local_files_only=True, **access)
    assert asked(double) == []


def test_a_cached_commit_leaves_the_client_alone(access, commit, monkeypatch):
    medmim.from_pretrained(REPO, **access)

    def ask(*args, **kwargs):  # which may ask huggingface.co what calls it, whatever the endpoint
        raise AssertionError("the client was called")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    medmim.from_pretrained(REPO, revision=commit, **access)
    medmim.from_pretrained(REPO, local_files_only=True, **access)


def test_without_pretrained_only_the_config_is_fetched(double, access):
    medmim.create_model(f"hf-hub:{REPO}", **access)
    assert {request.split("/")[-1].split()[-1] for request in asked(double)} == {"config.json"}


def test_weights_of_the_catalog_are_pinned(double, access, published, commit):
    model = medmim.create_model("tiny", pretrained=True, **access)
    assert model.spec.weights == published
    assert asked(double) == [*[f"HEAD {commit}/model.safetensors"] * 2, "GET model.safetensors"]
    medmim.create_decoder(model)
    assert asked(double) == [*[f"HEAD {commit}/decoder.safetensors"] * 2, "GET decoder.safetensors"]
    double.fault("*", "", times=math.inf, status=503)
    medmim.create_decoder(medmim.create_model("tiny.fake", pretrained=True, **access))
    assert asked(double) == []


def test_a_repository_without_a_record_works_too(double, access, tmp_path):
    medmim.save_pretrained(tiny_model(), tmp_path / "plain")
    double.add_folder("org/plain", tmp_path / "plain")
    model = medmim.from_pretrained("org/plain", **access)
    assert torch.equal(model.blocks[0].attn.qkv.weight, tiny_model().blocks[0].attn.qkv.weight)


def test_a_private_repository_needs_the_token_and_no_model_keeps_it(double, access):
    double.repos[REPO].private = True
    with pytest.raises(WeightsError, match="no such repository, or a private one; check the name, set HF_TOKEN"):
        medmim.from_pretrained(REPO, **access)
    double.requests.clear()
    model = medmim.from_pretrained(REPO, token="hf_read", **access)
    assert {(request.server, request.token) for request in double.requests} == {("hub", "hf_read"), ("cdn", None)}
    assert b"hf_read" not in pickle.dumps(model)
    assert "hf_read" not in repr(hub.HubAccess(token="hf_read"))


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_se cret", "hf_secret\u2603"])
def test_a_token_that_is_none_is_refused_and_not_shown(token, double, access):
    def push(repo, cache_dir, **options):
        push_to_hub(tiny_model(), repo, weights=RECORD, **options)

    for use in (medmim.from_pretrained, push):
        with pytest.raises(WeightsError, match="the token has a space, a line break or another") as caught:
            use(REPO, token=token, **access)
        assert "hf_se" not in "".join(traceback.format_exception(caught.value))
    assert not double.requests


PASSWORD = {"authorization": f"Basic {base64.b64encode(b'me:hunter2/x').decode()}"}


@pytest.fixture
def logged(caplog):
    """What the client logs, to the last line."""
    for name in ("huggingface_hub", "httpx", "httpx2"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


def test_a_password_in_the_address_of_a_hub_is_sent_and_kept_nowhere(double, access, logged, monkeypatch):
    monkeypatch.setattr("hubdouble.hub.TOKENS", [PASSWORD["authorization"]])
    access = {**access, "endpoint": double.endpoint.replace("://", "://me:hunter2%2Fx@")}
    model = medmim.from_pretrained(REPO, **access)
    assert {request.headers.get("authorization") for request in double.requests if request.server == "hub"} == {
        PASSWORD["authorization"]
    }
    medmim.create_decoder(model)
    assert "hunter2" not in logged.text + repr(model.weights_place)
    assert b"hunter2" not in pickle.dumps(model)
    place = pickle.loads(pickle.dumps(model.weights_place))
    assert place.access.address == double.endpoint
    assert place.access.headers is None


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_a_password_in_the_address_of_a_hub_is_not_shown(status, double, access, logged, monkeypatch):
    monkeypatch.setattr(transport, "PATIENCE", 0.1)
    endpoint = double.endpoint.replace("://", "://me:hunter2@")
    access = {**access, "endpoint": endpoint}
    double.fault("*", "", times=math.inf, status=status)
    with pytest.raises(WeightsError, match=f"could not be fetched from {double.endpoint}") as fetching:
        medmim.from_pretrained(REPO, **access)
    with pytest.raises(WeightsError, match=f"on {double.endpoint} failed") as pushing:
        push_to_hub(tiny_model(), REPO, weights=RECORD, card="a card", endpoint=endpoint)
    for caught in (fetching, pushing):
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in logged.text


@pytest.mark.parametrize("use", ["medmim.from_pretrained('org/model')", "plan_upload(PATH, 'org/model')"])
def test_a_password_in_hf_endpoint_is_not_shown(use, double, tiny_folder, tmp_path):
    """The client asks that address on its own too, for the names of programs that it may run in."""
    endpoint = double.endpoint.replace("://", "://me:hunter2@")
    use = use.replace("PATH", repr(f"local-dir:{tiny_folder[0]}"))
    code = f"import logging, medmim; from medmim.publish import plan_upload; logging.basicConfig(level=0); {use}"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_DEBUG": "1", "HF_HOME": str(tmp_path / "home")}
    del environment["HF_HUB_DISABLE_TELEMETRY"]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "WeightsError: " in done.stderr
    assert f" {double.endpoint}" in done.stderr
    assert any("agent-harnesses" in request.path for request in double.requests)
    assert all(request.headers["authorization"].startswith("Basic ") for request in double.requests)
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "endpoint",
    [
        *("http://me:hunter2/x@h", "http://me:hunter2 x@h", "http://me:hunter2?x@h", "http://me:hunter2#x@h"),
        *("http://me:12/hunter2@h", "http://h/?token=hunter2", "me:hunter2@h", "http://me:hunter2@", "http://[hunter2"),
    ],
)
def test_an_address_that_is_none_is_refused_and_not_shown(endpoint):
    with pytest.raises(WeightsError, match=r"^the endpoint is no address of a hub, such") as caught:
        medmim.from_pretrained(REPO, endpoint=endpoint)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("endpoint", ["localhost:8080", "hub", "ftp://hub", "http://hub:99999"])
def test_an_address_that_is_none_is_named(endpoint, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(WeightsError, match=f"^the endpoint '{endpoint}' is no address of a hub"):
        medmim.from_pretrained(REPO, endpoint=endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(WeightsError, match=f"^the endpoint '{endpoint}' is no address of a hub"):
        medmim.from_pretrained(REPO)


# --- damaged downloads ------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_fetched_again(double, access):
    double.fault("GET", "model.safetensors", flip=True)
    model = medmim.from_pretrained(REPO, **access)
    assert torch.equal(model.norm.bias, tiny_model().norm.bias)
    assert asked(double).count("GET model.safetensors") == 2


def test_a_byte_that_stays_flipped_is_an_error(double, access, tiny_folder):
    double.fault("GET", "model.safetensors", times=math.inf, flip=True)
    with pytest.raises(WeightsError) as error:
        medmim.from_pretrained(REPO, **access)
    expected = tiny_folder[1].weights.encoder[0].sha256
    for part in ("model.safetensors", REPO, double.endpoint, f"expected {expected}", "its sha256 is", "fetched twice"):
        assert part in str(error.value)
    assert asked(double).count("GET model.safetensors") == 2
    double.heal()
    medmim.from_pretrained(REPO, **access)


def test_a_blob_is_hashed_once(access, double, monkeypatch):
    hashed = []
    sha256 = files.sha256_of
    monkeypatch.setattr(verified, "WORTH_NOTING", 0)
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path.name) or sha256(path))
    medmim.from_pretrained(REPO, **access)
    medmim.from_pretrained(REPO, **access)
    assert hashed == ["model.safetensors"]


def test_a_blob_that_changed_since_is_hashed_again(double, access, commit):
    medmim.from_pretrained(REPO, **access)
    damage(blob(access["cache_dir"], "model.safetensors"))
    asked(double)
    model = medmim.from_pretrained(REPO, revision=commit, **access)
    assert torch.equal(model.norm.bias, tiny_model().norm.bias)
    assert "GET model.safetensors" in asked(double)


def test_a_damaged_blob_without_a_network_is_an_error(double, access):
    medmim.from_pretrained(REPO, **access)
    path = blob(access["cache_dir"], "model.safetensors")
    damage(path)
    with pytest.raises(WeightsError, match=r"damaged in the cache .* load it once with the network on"):
        medmim.from_pretrained(REPO, local_files_only=True, **access)
    assert path.exists()


def test_what_is_remembered_leaves_the_cache_in_order(access, commit):
    medmim.from_pretrained(REPO, **access)
    found = scan_cache_dir(access["cache_dir"])
    assert not found.warnings
    assert len(found.repos) == 1
    found.delete_revisions(commit).execute()
    assert not list(access["cache_dir"].glob("models--*"))


def test_a_shared_blob_behind_the_blob_is_discarded_too(tmp_path):
    (tmp_path / "shared").write_text("x")
    (tmp_path / "blob").symlink_to(tmp_path / "shared")
    (tmp_path / "pointer").symlink_to("blob")
    hub.Repository._discard(tmp_path / "pointer")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_cache_is_hashed_each_time(access, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(verified, "WORTH_NOTING", 0)
    monkeypatch.setattr(verified, "atomic_write", refuse)
    medmim.from_pretrained(REPO, **access)
    assert not list(access["cache_dir"].glob("models--*/.medmim-verified/*"))
    damage(blob(access["cache_dir"], "model.safetensors"))
    with pytest.raises(WeightsError, match="damaged in the cache"):
        medmim.from_pretrained(REPO, local_files_only=True, **access)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:org/missing", "no such repository, or a private one"),
        (f"hf-hub:{REPO}@v9", "there is no such revision"),
    ],
)
def test_what_is_not_there(name, message, access):
    with pytest.raises(WeightsError, match=message) as error:
        medmim.create_model(name, pretrained=True, **access)
    assert str(error.value).startswith("config.json of org/")
    assert access["endpoint"] in str(error.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "not a model folder, it has no config.json"),
        ("model.safetensors", "has no file model.safetensors"),
    ],
)
def test_a_file_that_is_not_there(file, message, access, double):
    del double.repos[REPO].files[file]
    with pytest.raises(WeightsError, match=message):
        medmim.from_pretrained(REPO, **access)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ((401, {"X-Error-Code": "GatedRepo"}), "it is gated; ask for access on its page, then set HF_TOKEN"),
        ((403, {"X-Error-Code": "GatedRepo"}), "it is gated"),
        (
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "it may have expired; set HF_TOKEN",
        ),
        ((403, {"X-Error-Message": "Access to this resource is disabled."}), "the Hub has disabled the repository"),
        ((403, {}), "a private one; check the name, set HF_TOKEN"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "no such repository"),
    ],
)
def test_refusals_say_what_to_do(failure, message, access, double):
    status, headers = failure
    double.fault("*", "", times=math.inf, status=status, headers=headers)
    with pytest.raises(WeightsError, match=message) as error:
        medmim.from_pretrained(REPO, **access)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "the disk is full; free space, or set HF_HOME"),
        (PermissionError(13, "Permission denied", "/cache"), r"the cache cannot be written \(/cache\); set HF_HOME"),
        (OSError(30, "Read-only file system", "/cache"), r"the cache cannot be written \(/cache\)"),
        (RuntimeError("404 for https://h/api/models/a/b/xet-read-token/x"), "set HF_HUB_DISABLE_XET=1"),
        (RuntimeError("Task error: IO Error: File too large (os error 27)"), "the disk is full"),
        (TimeoutError("timed out"), r"\(TimeoutError timed out\); try again, or set HF_ENDPOINT to a mirror"),
    ],
)
def test_faults_of_the_machine_say_what_to_do(error, message, monkeypatch, access):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr(transport.time, "sleep", lambda seconds: None)
    with pytest.raises(WeightsError, match=message) as caught:
        medmim.from_pretrained(REPO, **access)
    endpoint = access["endpoint"]
    assert str(caught.value).startswith(f"config.json of {REPO}@main could not be fetched from {endpoint}")


def test_offline_and_not_cached(access):
    with pytest.raises(WeightsError, match="not in the cache and the network is off; fetch it once online"):
        medmim.from_pretrained(REPO, local_files_only=True, **access)


def test_offline_by_environment(access):
    medmim.from_pretrained(REPO, **access)
    code = f"""
import medmim
medmim.from_pretrained({REPO!r}, cache_dir={str(access["cache_dir"])!r})
try:
    medmim.from_pretrained("org/other", cache_dir={str(access["cache_dir"])!r})
except medmim.WeightsError as error:
    assert "the network is off" in str(error), error
else:
    raise SystemExit("loaded what is not there")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


# --- MEDMIM_HUB -------------------------------------------------------------------------------------------------------


@pytest.fixture
def local_hub(tiny_folder, tmp_path, monkeypatch):
    """A folder laid out as the Hub, which MEDMIM_HUB points to."""
    root = tmp_path / "hub"
    (root / "org").mkdir(parents=True)
    tiny_folder[0].rename(root / REPO)
    monkeypatch.setenv("MEDMIM_HUB", str(root))
    return root


def test_a_local_hub_replaces_the_hub(local_hub, published):
    for name in ("tiny", "tiny.fake", f"hf-hub:{REPO}"):
        model = medmim.create_model(name, pretrained=True)
        assert torch.equal(model.norm.weight, tiny_model().norm.weight)
        medmim.create_decoder(model)
    damage(local_hub / REPO / "model.safetensors")
    with pytest.raises(WeightsError, match="damaged"):
        medmim.create_model("tiny", pretrained=True)


def test_a_local_hub_is_never_left(local_hub, published):
    shutil.rmtree(local_hub / REPO)
    for name in ("tiny", f"hf-hub:{REPO}"):
        with pytest.raises(WeightsError, match=f"the local hub {local_hub} has no model {REPO}"):
            medmim.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("value", "folder"),
    [("hospital", None), ("./hub", Path("hub")), ("/data/hub", Path("/data/hub")), ("~/hub", Path.home() / "hub")],
)
def test_a_namespace_is_told_from_a_path(value, folder, monkeypatch):
    monkeypatch.setenv("MEDMIM_HUB", value)
    found = hub.local_hub()
    assert (found and found.root) == folder


def test_another_namespace_is_checked_by_digest(double, access, published, monkeypatch):
    double.repos["hospital/tiny.fake"] = double.repos.pop(REPO)
    monkeypatch.setenv("MEDMIM_HUB", "hospital")
    medmim.create_model("tiny", pretrained=True, **access)
    assert {path.split("/resolve/")[0] for path in double.asked("/resolve/")} == {"HEAD /hospital/tiny.fake"}
    with pytest.raises(WeightsError, match="no such repository"):  # what the caller names is left as it is
        medmim.create_model(f"hf-hub:{REPO}", pretrained=True, **access)


def test_what_is_installed_goes_before_everything(tiny_weights, monkeypatch):
    monkeypatch.setenv("MEDMIM_HUB", "/nowhere")
    medmim.create_model("tiny", pretrained=True)
    monkeypatch.delenv("MEDMIM_HUB")
    (hub.PACKAGED / "tiny.fake" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=re.escape(f"tiny.fake is not in {hub.PACKAGED} and was never published")):
        medmim.create_model("tiny", pretrained=True)


# --- files that cannot be trusted -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", WeightsError, "not readable as JSON"),
        (b"\xff\xfe", WeightsError, "not readable as JSON"),
        (b"[" * 100_000, WeightsError, "not readable as JSON"),
        (b" " * 2_000_000, WeightsError, "larger than"),
        (b"[]", SpecError, "top level"),
        (b'{"medmim": 1}', SpecError, "architecture"),
    ],
)
def test_a_config_that_is_none(content, error, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        hub.read_model(hub.Folder(tmp_path))
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.pth", "..", ""])
def test_an_index_names_files_beside_it_only(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(WeightsError, match="must be a safetensors file beside the index"):
        hub.fetch_encoder(hub.Folder(tmp_path), None)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"x": 1}}])
def test_an_index_that_is_none(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="weight_map must map tensors to files"):
        hub.fetch_encoder(hub.Folder(tmp_path), None)


def test_a_missing_shard_or_no_file_at_all(tmp_path):
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        hub.fetch_encoder(hub.Folder(tmp_path), None)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    with pytest.raises(WeightsError, match="not all of its shards are there"):
        hub.fetch_encoder(hub.Folder(tmp_path), None)


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 2_100 + "x", "x" * 4_200])
def test_a_name_that_no_file_can_have_is_refused(name, tiny_folder):
    config = json.loads((tiny_folder[0] / "config.json").read_text())
    config["weights"]["encoder"][0]["name"] = f"{name}.safetensors"
    (tiny_folder[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"weights\.encoder\.0\.name.* must be a path inside the model folder"):
        medmim.from_pretrained(tiny_folder[0])
    (tiny_folder[0] / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": f"{name}.safetensors"}})
    )
    (tiny_folder[0] / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="must be a safetensors file beside the index"):
        hub.fetch_encoder(hub.Folder(tiny_folder[0]), None)


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 2_100, "~nobody-of-that-name/x"])
def test_a_folder_that_cannot_be_is_none(path, monkeypatch):
    with pytest.raises(WeightsError, match="there is no such folder"):
        medmim.create_model(f"local-dir:{path}", pretrained=True)
    with pytest.raises(WeightsError, match="neither a folder that exists nor a repository"):
        medmim.from_pretrained(path)
    monkeypatch.setenv("MEDMIM_HUB", f"./{path}" if path[0] == "x" else path)
    with pytest.raises(WeightsError, match="has no model org/x"):
        medmim.create_model("hf-hub:org/x", pretrained=True)


@pytest.mark.parametrize("path", ["", " "])
def test_no_folder_is_not_the_one_that_one_is_in(path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder[0])
    with pytest.raises(
        UnknownModelError, match=r"names no folder; write local-dir:PATH, with \. for the one you are in"
    ):
        medmim.create_model(f"local-dir:{path}", pretrained=True)
    medmim.create_model("local-dir:.", pretrained=True)


@pytest.mark.parametrize("name", ["org/a--b", "org/a.git", "org/" + "x" * 100])
def test_a_name_that_no_repository_has_is_not_blamed_on_the_hub(name, double, access):
    with pytest.raises(WeightsError, match=r"no repository has such a name \(.*\); check it$"):
        medmim.create_model(f"hf-hub:{name}", pretrained=True, **access)
    with pytest.raises(WeightsError, match=r"choose another name$"):
        push_to_hub(tiny_model(), name, weights=RECORD, card="a card", endpoint=double.endpoint)


def test_a_file_is_described_as_it_is(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hub.describe_file(tmp_path, "x") == FileSpec(name="x", sha256=digest, size=3)
