"""Publishing, with the real client: one commit that a stranger can load, or nothing and one sentence."""

from __future__ import annotations

import tomllib

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

import medmim
from fakes import RECORD, TRAINING, save_tiny, tiny_decoder, tiny_model
from hubdouble import HubDouble
from medmim import hub
from medmim.cards import render_card
from medmim.errors import SpecError, WeightsError
from medmim.golden import difference, golden_outputs
from medmim.localhub import LocalHub
from medmim.publish import catalog_entry, plan_upload, push_to_hub
from medmim.spec import ModelSpec, WeightsSpec

REPO = "org/tiny.fake"
CARD = "---\nlicense: cc-by-4.0\n---\n# A card\n"
FILES = {"README.md", "config.json", "decoder.safetensors", "golden.safetensors", "model.safetensors"}


@pytest.fixture
def double(request):
    with HubDouble(prefix=getattr(request, "param", "")) as double:
        yield double


@pytest.fixture
def to_double(double):
    """Keywords that send a model to the double."""
    return {"endpoint": double.endpoint, "token": "hf_write", "card": CARD}


@pytest.fixture
def model():
    """Of other bytes each time: hf_xet remembers what it has uploaded."""
    model = tiny_model()
    torch.nn.init.normal_(model.norm.bias, generator=torch.Generator().manual_seed(torch.seed() % 2**60))
    return model


def push(model, **options):
    return push_to_hub(model, REPO, decoder=tiny_decoder(model), weights=RECORD, **options)


def plan(folder, **options):
    save_tiny(folder)
    return plan_upload(f"local-dir:{folder}", REPO, **options)


def titles(double, branch="main"):
    repository = double.repos[REPO]
    return [commit.title for commit in repository.history(repository.find(branch))]


# --- what is published ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", ["", "/artifactory/api/huggingfaceml/hf-local"], indirect=True)
def test_one_commit_that_a_stranger_loads(double, to_double, transport, model, tmp_path):
    published = push(model, **to_double)
    assert titles(double) == [f"vit_t_mae3d.fake, by medmim {medmim.__version__}", "initial commit"]
    assert set(double.repos[REPO].files) == FILES
    assert published.commit == double.repos[REPO].branches["main"]
    access = {"endpoint": double.endpoint, "cache_dir": tmp_path}
    loaded = medmim.create_model(f"hf-hub:{REPO}@{published.commit}", pretrained=True, **access)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert loaded.spec.weights == published.spec.weights
    golden = load_file(loaded.weights_place.fetch(loaded.spec.weights.golden))
    assert difference(golden_outputs(loaded, medmim.create_decoder(loaded)), golden) is None
    assert any(request.headers["user-agent"].startswith("medmim/") for request in double.requests)


def test_the_entry_for_the_catalog_is_the_record_with_its_commit(double, to_double, model, registry):
    published = push(model, **to_double)
    record = WeightsSpec.parse(tomllib.loads(catalog_entry(published.spec)), source="entry")
    assert (record.repo, record.revision) == (REPO, published.commit)
    assert [file.sha256 for file in record.encoder] == [double.repos[REPO].files["model.safetensors"].sha256]
    registry.register_model("tiny", family="vit", args=published.spec.args, weights=[record])
    loaded = medmim.create_model("tiny", pretrained=True, endpoint=double.endpoint)
    assert torch.equal(loaded.norm.bias, model.norm.bias)


def test_the_entry_for_the_catalog_lists_data_once_for_runs_that_share_it():
    other = [{**TRAINING["data"][0], "volumes": 9}]
    run = {**TRAINING, "before": {**TRAINING, "data": other, "before": TRAINING}}
    run = {**TRAINING, "before": {**TRAINING, "before": run}}
    file = {"name": "model.safetensors", "sha256": "0" * 64, "size": 1}
    record = WeightsSpec.parse({**RECORD, "decoder_spec": None, "training": run, "encoder": [file]}, source="test")
    spec = ModelSpec(architecture="vit_t_mae3d", family="vit", weights=record)
    entry = tomllib.loads(catalog_entry(spec))
    runs = [entry["training"]]
    while "before" in runs[-1]:
        runs.append(runs[-1]["before"])
    assert ["data" in run for run in runs] == [True, False, False, True, True]
    assert WeightsSpec.parse(entry, source="entry") == record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_t_mae3d", "resenc_b_mae3d", "swin_t_simmim3d"])
def test_golden_outputs_are_those_of_the_saved_numbers(double, to_double, name, dtype):
    model = tiny_model(name).to(dtype)
    published = push_to_hub(model, REPO, weights=RECORD, **to_double)
    loaded = medmim.from_pretrained(REPO, endpoint=double.endpoint)
    outputs = golden_outputs(loaded)
    golden = load_file(loaded.weights_place.fetch(published.spec.weights.golden))
    assert outputs.keys() == golden.keys()
    assert all(torch.equal(outputs[key], golden[key]) for key in golden)


def test_the_card_is_made_from_the_record(double, to_double, model):
    training = {
        "method": "mae",
        "recipe": "tiny",
        **{"steps": 1, "crops": 4, "volumes": 3, "wall_hours": 0, "cpu_hours": 0, "final_loss": 1},
        **{"hardware": "none", "date": "2025-01-01"},
        "data": [{"name": "x", "volumes": 3, "modality": "CT", "license": "CC-BY-4.0"}],
    }
    push_to_hub(model, REPO, weights={**RECORD, "training": training}, **{**to_double, "card": None})
    card = ModelCard(double.repos[REPO].files["README.md"].content.decode())
    assert card.data.library_name == "medmim"
    assert f'medmim.create_model("hf-hub:{REPO}", pretrained=True)' in card.text


def test_no_card_without_a_training_record(double, to_double, model):
    with pytest.raises(
        SpecError, match=r"needs weights with a training record; or write one, as README.md of the fold"
    ):
        push(model, **{**to_double, "card": None})
    assert not double.repos


def test_what_there_is_already_is_published_as_it_is(double, to_double, tiny_weights):
    published = plan_upload("tiny", REPO, **to_double).send("Copy")
    assert set(double.repos[REPO].files) == FILES
    assert published.spec.weights.encoder == tiny_weights.weights.encoder
    assert titles(double)[0] == "Copy"


def test_a_folder_without_golden_outputs_gets_some(double, to_double, tmp_path):
    spec, saved = save_tiny(tmp_path / "model"), sorted((tmp_path / "model").iterdir())
    assert spec.weights.golden is None
    published = plan_upload(f"local-dir:{tmp_path / 'model'}", REPO, **to_double).send()
    assert sorted((tmp_path / "model").iterdir()) == saved  # the folder is left as it was
    loaded = medmim.from_pretrained(REPO, endpoint=double.endpoint, cache_dir=tmp_path / "cache")
    assert loaded.spec.weights == published.spec.weights
    golden = load_file(loaded.weights_place.fetch(loaded.spec.weights.golden))
    assert difference(golden_outputs(loaded, medmim.create_decoder(loaded)), golden) is None
    # What has them is sent as it is.
    fetched = loaded.weights_place.find("config.json")
    assert plan_upload(f"local-dir:{fetched.parent}", REPO, **to_double).files["config.json"] == fetched


# --- beside what is there ---------------------------------------------------------------------------------------------


def test_an_older_version_leaves_nothing_behind_but_its_card(double, to_double, model, tmp_path):
    push(model, **to_double)
    older = double.repos[REPO].files
    double.repos[REPO].commit(
        "main", {**older, "notes.txt": older["README.md"], "data.csv": older["README.md"]}, title="x"
    )
    push_to_hub(tiny_model(), REPO, weights=RECORD, **{**to_double, "card": "# Another"})
    assert set(double.repos[REPO].files) == FILES - {"decoder.safetensors"} | {"notes.txt"}
    assert double.repos[REPO].files["README.md"].content.decode() == CARD
    push_to_hub(tiny_model(), REPO, weights=RECORD, **{**to_double, "card": "# Another"}, replace_card=True)
    assert double.repos[REPO].files["README.md"].content.decode() == "# Another"


def test_pushing_the_same_again_changes_nothing(double, to_double, model):
    first = push(model, **to_double)
    assert push(model, **to_double).commit == first.commit
    assert len(titles(double)) == 2


def test_private_tag_and_branch(double, to_double, transport, model):
    first = push(model, private=True, tag="v1", **to_double)
    assert double.repos[REPO].private
    assert double.repos[REPO].tags == {"v1": first.commit}
    second = push(tiny_model(), revision="trial", **to_double)
    assert double.repos[REPO].branches == {"main": first.commit, "trial": second.commit}
    third = push(model, revision="trial", **to_double)
    assert double.repos[REPO].branches == {"main": first.commit, "trial": third.commit}


def test_a_pull_request_leaves_main_alone(double, to_double, transport, model):
    first = push(model, **to_double)
    other = push(tiny_model(), create_pr=True, **to_double)
    assert other.pull_request == f"{double.endpoint}/{REPO}/discussions/1"
    assert double.repos[REPO].branches == {"main": first.commit, "refs/pr/1": other.commit}
    with pytest.raises(WeightsError, match="a pull request goes to main"):
        push(model, create_pr=True, tag="v1", **to_double)


def test_a_plan_says_what_would_be_sent_and_sends_nothing(double, to_double, tmp_path):
    upload = plan(tmp_path / "model", **to_double)
    assert set(upload.files) == FILES
    folder = sum(path.stat().st_size for path in (tmp_path / "model").iterdir() if path.name != "config.json")
    made = len(upload.files["config.json"]) + len(upload.files["golden.safetensors"])
    assert upload.size == folder + made + len(CARD)
    assert {request.method for request in double.requests} == {"GET"}
    assert not double.repos


def test_a_card_that_was_made_before_the_model_had_a_repository_is_made_again(tmp_path, monkeypatch):
    """A stranger cannot load it by the name that the card of its folder has."""
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    folder = tmp_path / "model"
    model = tiny_model()
    spec = medmim.save_pretrained(model, folder, weights={**RECORD, "training": TRAINING})
    (folder / "README.md").write_text(render_card(spec, picture=None, has_data_list=False))
    card = plan_upload(f"local-dir:{folder}", REPO).files["README.md"].decode()
    assert f'create_model("hf-hub:{REPO}"' in card
    (folder / "README.md").write_text(CARD)
    assert plan_upload(f"local-dir:{folder}", REPO).files["README.md"].read_text() == CARD


def test_only_files_that_medmim_knows_are_sent(double, to_double, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("data.csv", "recipe.yaml", "LICENSE", ".env", "notes.txt", "catalog.toml", "model.ckpt"):
        (tmp_path / "model" / name).write_text("secret?")
    upload = plan(tmp_path / "model", **to_double)
    assert set(upload.files) == FILES | {"data.csv", "recipe.yaml", "LICENSE"}


def test_a_card_that_is_made_speaks_of_the_files_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    folder = tmp_path / "model"
    weights = {**RECORD, "training": TRAINING, "decoder_spec": None}
    medmim.save_pretrained(tiny_model(), folder, weights=weights)
    card = plan_upload(f"local-dir:{folder}", REPO).files["README.md"].decode()
    assert "data.csv" not in card
    assert "![" not in card
    for name in ("data.csv", "reconstruction.png"):
        (folder / name).write_text("there")
    card = plan_upload(f"local-dir:{folder}", REPO).files["README.md"].decode()
    assert "`data.csv` beside the weights" in card
    assert "](reconstruction.png)" in card


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "field"),
    [
        (None, r"weights\.license and weights\.volume missing"),
        ({**RECORD, "license": " "}, r"weights\.license missing"),
        ({**RECORD, "license": "unknown"}, r"weights\.license missing"),
        ({key: value for key, value in RECORD.items() if key != "license"}, "license: Field required"),
        ({key: value for key, value in RECORD.items() if key != "volume"}, "volume: Field required"),
    ],
)
def test_nothing_without_licence_and_input_contract(double, to_double, model, weights, field):
    with pytest.raises(SpecError, match=field):
        push_to_hub(model, REPO, weights=weights, **to_double)
    assert not double.requests


def test_a_folder_without_a_record_is_refused_too(double, to_double, tmp_path):
    medmim.save_pretrained(tiny_model(), tmp_path)
    with pytest.raises(SpecError, match=rf"local-dir:{tmp_path} cannot be published: weights\.license and weights"):
        plan_upload(f"local-dir:{tmp_path}", REPO, **to_double)
    assert not double.requests


def test_damaged_files_are_not_published(double, to_double, tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged"):
        plan_upload(f"local-dir:{tmp_path}", REPO, **to_double)
    assert not double.requests


@pytest.mark.parametrize("repo", ["name", "org/name/more", "../name", "org/..", ""])
def test_a_name_that_is_none(repo, model):
    with pytest.raises(WeightsError, match="is not the name of a repository"):
        push_to_hub(model, repo, weights=RECORD)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (False, "it takes a token that is valid; run `hf auth login`, set HF_TOKEN or pass token="),
        ("hf_expired", "it takes a token that is valid"),
        ("hf_read", "the token may not write to org; use one with write access to it, or another namespace"),
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_who_may_not_publish(double, to_double, tmp_path, model, token, message, is_new):
    if not is_new:
        push(model, **to_double)
    before = dict(double.repos)
    with pytest.raises(WeightsError, match=f"publishing {REPO} on {double.endpoint} failed: {message}"):
        plan(tmp_path / "model", **{**to_double, "token": token}).send()
    assert double.repos == before


def test_who_publishes_on_what_has_changed_since(double, to_double, model, tmp_path, transport):
    push(model, **to_double)
    upload = plan(tmp_path / "model", **to_double)
    newest = double.repos[REPO].commit("main", {}, title="by somebody else")
    with pytest.raises(WeightsError, match="somebody else has published there since; look at what, then push again"):
        upload.send()
    assert double.repos[REPO].branches["main"] == newest


def test_a_tag_that_is_taken_and_a_repository_that_is_public(double, to_double, model):
    push(model, tag="v1", **to_double)
    for options, message in (({"tag": "v1"}, "has a tag 'v1' already"), ({"private": True}, "is there and public")):
        with pytest.raises(WeightsError, match=message):
            push(tiny_model(), **options, **to_double)
    assert len(titles(double)) == 2


def test_a_server_without_xet(double, to_double, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    double.xet = False
    with pytest.raises(WeightsError, match="the server does not speak Xet; set HF_HUB_DISABLE_XET=1"):
        push(model, **to_double)
    assert titles(double) == ["initial commit"]
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push(model, **to_double)


LATER = "push again later, or set HF_ENDPOINT to another server or MEDMIM_HUB to a local hub"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401}, "it takes a token that is valid"),
        ({"status": 403}, "the token may not write to org"),
        ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, "it is gated; ask for access on its page"),
        ({"status": 404}, "no such repository or branch"),
        ({"status": 409}, "the name is taken"),
        ({"status": 500}, f"HTTP 500, .*; {LATER}"),
        ({"status": 507, "headers": {"X-Error-Message": "Quota"}}, f"HTTP 507, Quota; {LATER}"),
        ({"status": 200, "body": b"<html>a proxy</html>"}, LATER),
        ({"cut": 0}, LATER),
    ],
)
@pytest.mark.parametrize("step", ["/api/repos/create", "/preupload/", "/commit/"])
def test_faults_of_the_server_are_one_sentence(double, to_double, tmp_path, fault, message, step, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    upload = plan(tmp_path / "model", **to_double)
    double.fault("POST", step, times=99, **fault)
    with pytest.raises(WeightsError, match=message) as error:
        upload.send()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"publishing {REPO} on {double.endpoint} failed: ")


def test_a_tag_that_cannot_be_made(double, to_double, tmp_path):
    double.fault("POST", "/tag/", status=403)
    with pytest.raises(
        WeightsError, match=rf"tagging {REPO}@\w{{40}}, which was published, on {double.endpoint} failed"
    ):
        plan(tmp_path / "model", **to_double, tag="v1").send()
    plan(tmp_path / "model", **to_double, tag="v1").send()
    assert len(titles(double)) == 2
    assert double.repos[REPO].tags.keys() == {"v1"}


def test_a_mirror_that_lists_no_branches_and_tags(double, to_double, model):
    double.fault("GET", "/refs", status=404, times=99)
    push(model, **to_double)
    assert push(model, **to_double).commit == double.repos[REPO].branches["main"]


def test_a_card_that_the_server_refuses(double, to_double, tmp_path):
    upload = plan(tmp_path / "model", **to_double)
    double.fault("POST", "validate-yaml", status=400, body=b'{"errors": [{"message": "no such licence"}]}')
    with pytest.raises(WeightsError, match=r"refuses the card .*no such licence.*; correct its front matter"):
        upload.send()
    assert titles(double) == ["initial commit"]


def test_when_only_the_answer_was_lost_pushing_again_sends_nothing_twice(double, to_double, tmp_path):
    double.fault("POST", "/commit/", cut=0)
    with pytest.raises(WeightsError, match="push again later"):
        plan(tmp_path / "model", **to_double).send()
    published = plan(tmp_path / "model", **to_double, tag="v1").send()
    assert len(titles(double)) == 2
    assert double.repos[REPO].tags == {"v1": published.commit}


def test_a_server_that_is_down(tmp_path):
    with pytest.raises(WeightsError, match="push again later, or set HF_ENDPOINT") as error:
        plan(tmp_path / "model", endpoint="http://127.0.0.1:9", card=CARD)
    assert "\n" not in str(error.value)


# --- to a local hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path, monkeypatch):
    """An empty local hub, which MEDMIM_HUB points to."""
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    return LocalHub(tmp_path / "hub")


def test_a_local_hub_gets_the_same(local, model):
    published = push(model, card=CARD, tag="v1")
    folder = local.find(REPO).folder
    assert {path.name for path in folder.iterdir()} == FILES | {"SHA256SUMS"}
    assert published.url == str(folder)
    for revision in ("main", "v1", published.commit):
        loaded = medmim.create_model(f"hf-hub:{REPO}@{revision}", pretrained=True)
        assert torch.equal(loaded.norm.bias, model.norm.bias)
        assert loaded.spec.weights == published.spec.weights


def test_a_local_hub_keeps_the_card_and_nothing_else_of_an_older_version(local, model):
    first = push(model, card=CARD)
    second = push_to_hub(tiny_model(), REPO, weights=RECORD, card="# Another", revision="trial")
    folder = local.find(REPO, "trial").folder
    assert {path.name for path in folder.iterdir()} == FILES - {"decoder.safetensors"} | {"SHA256SUMS"}
    assert (folder / "README.md").read_text() == CARD
    assert local.head(REPO) == first.commit != second.commit
    third = push_to_hub(tiny_model(), REPO, weights=RECORD, card="# Another", replace_card=True)
    assert (local.find(REPO, third.commit).folder / "README.md").read_text() == "# Another"


def test_what_is_kept_in_a_local_hub_is_no_link_out_of_it(local, model, tmp_path):
    """Who may write to a hub that several publish to must not get at files that they alone may read."""
    first = push(model, card=CARD)
    (tmp_path / "secret").write_text("of who publishes next")
    (local.find(REPO).folder / "README.md").unlink()
    (local.find(REPO).folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match=r"README\.md: a link that leads out of the model folder"):
        push_to_hub(tiny_model(), REPO, weights=RECORD, card=CARD)
    assert local.head(REPO) == first.commit


def test_a_local_hub_refuses_what_has_changed_since(local, model, tmp_path):
    push(model, card=CARD)
    upload = plan(tmp_path / "model", card=CARD)
    push_to_hub(tiny_model(), REPO, weights=RECORD, card=CARD)
    with pytest.raises(WeightsError, match="has moved from"):
        upload.send()


@pytest.mark.parametrize("revision", ["main", "trial"])
def test_a_local_hub_refuses_a_second_first_version(local, model, tmp_path, revision):
    """Two plan on a repository, or a branch, that is not there yet; the second would hide the first."""
    uploads = [plan(tmp_path / name, card=f"# Of {name}", revision=revision) for name in ("one", "two")]
    first = uploads[0].send()
    with pytest.raises(WeightsError, match=f"has moved from nothing to {first.commit} since it was read"):
        uploads[1].send()
    assert local.head(REPO, revision) == first.commit


@pytest.mark.parametrize("options", [{"endpoint": "http://127.0.0.1:9"}, {"private": True}, {"create_pr": True}])
def test_what_a_folder_cannot_do(local, model, options):
    with pytest.raises(WeightsError, match="neither endpoint, private repositories nor pull requests; leave them out"):
        push(model, card=CARD, **options)
    assert not local.root.exists()


def test_a_namespace_in_place_of_another_does_not_change_where_to(double, to_double, model, monkeypatch):
    monkeypatch.setenv("MEDMIM_HUB", "hospital")
    push(model, **to_double)
    assert list(double.repos) == [REPO]
    assert hub.local_hub() is None
