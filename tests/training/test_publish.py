"""From a finished run to a model folder that others load, and to results on scans."""

from __future__ import annotations

import csv
import json
import tomllib

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import medmim
from fakes import RECORD, tiny_model
from medmim.cards import render_card
from medmim.cards.encoder import PICTURE_FILE
from medmim.errors import SpecError
from medmim.factory import create_decoder
from medmim.golden import golden_outputs
from medmim.spec import TrainingRecord, WeightsSpec
from medmim_training.engine import build_method, pretrain
from medmim_training.evaluate import evaluate_reconstruction
from medmim_training.publish import _data_list_of, _write_data_list, package, write_picture
from medmim_training.recipe import MethodSection, Recipe, ScheduleSection, load_recipe
from medmim_training.starting import start_from_weights
from medmim_training.store.index import Store
from medmim_training.store.sources import find_sources


@pytest.fixture(scope="module")
def folder(finished, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    package(finished[1], folder, store=store, tag="synthetic", license="CC-BY-4.0", citation="@misc{none}")
    return folder


@pytest.fixture
def model(folder):
    return medmim.create_model(f"local-dir:{folder}", pretrained=True)


def test_the_encoder_is_the_trained_one_in_bfloat16(finished, model):
    trained = finished[0].encoder.state_dict()
    assert all(torch.equal(t, trained[name].bfloat16().float()) for name, t in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_golden_outputs_hold_for_who_loads_it(folder, model):
    golden = load_file(folder / "golden.safetensors")
    outputs = golden_outputs(model, create_decoder(model))
    assert golden.keys() == outputs.keys() == {"pooled", "tokens", "hidden_patches"}
    for name, tensor in outputs.items():
        torch.testing.assert_close(tensor, golden[name], rtol=1e-5, atol=1e-5)


def test_golden_outputs_notice_a_change(folder, model):
    golden = load_file(folder / "golden.safetensors")
    model.blocks[1].mlp.fc1.weight.data[0] += 0.1
    assert not torch.allclose(golden_outputs(model)["pooled"], golden["pooled"], rtol=1e-5, atol=1e-5)


def test_the_spec_says_what_it_was_trained_on(folder, model, store, recipe):
    weights = model.spec.weights
    assert model.spec.name == "vit_t_mae3d.synthetic"
    assert weights.volume == recipe.volume
    assert (weights.training.steps, weights.training.volumes) == (20, 3)
    with open(folder / "data.csv", newline="") as file:
        assert [row["sha256"] for row in csv.DictReader(file)] == [entry.sha256 for entry in store.entries]


def test_the_catalog_entry_is_the_config(folder, model):
    entry = tomllib.loads((folder / "catalog.toml").read_text())
    config = json.loads((folder / "config.json").read_text())["weights"]
    assert WeightsSpec.parse(entry, source="toml") == WeightsSpec.parse(config, source="json") == model.spec.weights


def test_the_card_reads_as_the_hub_does(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "medmim"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "3 volumes" in card.text
    assert "Not a medical device" in card.text


def test_the_card_shows_a_sample_scan_that_lies_beside_it(folder):
    assert f"]({PICTURE_FILE})" in (folder / "README.md").read_text("utf-8")
    assert (folder / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_a_decoder_there_is_no_picture(tmp_path):
    medmim.save_pretrained(tiny_model(), tmp_path, weights={**RECORD, "decoder_spec": None})
    assert not write_picture(tmp_path)
    assert not (tmp_path / PICTURE_FILE).exists()


def test_a_folder_of_another_model_gets_all_that_goes_with_the_new_one(finished, store, tmp_path):
    medmim.save_pretrained(medmim.create_model("vit_t_mae3d", embed_dim=12, depth=1, num_heads=1), tmp_path)
    (tmp_path / "data.csv").write_text("of another model")
    package(finished[1], tmp_path, store=store, tag="synthetic", license="CC-BY-4.0", citation="@misc{none}")
    assert (tmp_path / "recipe.yaml").read_bytes() == (finished[1] / "recipe.yaml").read_bytes()
    assert "thorax.nii.gz" in (tmp_path / "data.csv").read_text()


def test_an_unfinished_run_is_refused(tmp_path, store):
    with pytest.raises(SpecError, match="no finished run"):
        package(tmp_path, tmp_path / "out", store=store, tag="x", license="MIT", citation="@misc{none}")


def test_a_run_is_not_packaged_with_another_store(finished, store, tmp_path):
    """Its list of data would name scans that the weights never saw."""
    fewer = Store(store.folder)
    fewer.entries = store.entries[:1]
    with pytest.raises(SpecError, match=r"the run drew from .*, of 3 volumes"):
        package(finished[1], tmp_path / "out", store=fewer, tag="x", license="MIT", citation="@misc{none}")
    assert not (tmp_path / "out").exists()


def test_results_are_means_over_each_group_and_reproducible(model, scans, tmp_path):
    (tmp_path / "text.nii.gz").write_text("no scan")
    listing = tmp_path / "list.csv"
    rows = [f"{scans}/large.nii.gz,MR,head", f"{scans}/thorax.nii.gz,CT,chest", f"{tmp_path}/text.nii.gz,CT,chest"]
    listing.write_text("\n".join(["file,modality,group", *rows]))
    problems = []
    decoder, sources = create_decoder(model), find_sources(listing)
    results = evaluate_reconstruction(model, decoder, sources, report=lambda *event: problems.append(event))
    assert [(result.dataset, result.cases) for result in results] == [("chest", 1), ("head", 1), ("all", 2)]
    assert [name for name, problem in problems if problem] == [f"{tmp_path}/text.nii.gz"]
    assert results == evaluate_reconstruction(model, decoder, sources)
    for result in results:
        assert result.baselines["mean fill"] == pytest.approx(1, abs=0.3)
        assert 0 < result.value < 10


def test_a_run_can_start_from_what_was_published(folder, model, recipe, store, tmp_path):
    started = with_weights(recipe, f"local-dir:{folder}")
    method = build_method(started)
    before = start_from_weights(method, started)
    assert before == model.spec.weights.training
    for part, published in ((method.encoder, model), (method.decoder, create_decoder(model))):
        assert all(torch.equal(t, published.state_dict()[name]) for name, t in part.state_dict().items())
    pretrain(started.model_copy(update={"schedule": ScheduleSection(steps=2)}), store, tmp_path)
    record = TrainingRecord.parse(json.loads((tmp_path / "record.json").read_text()), source="record.json")
    assert record.steps == 2
    assert record.before == before


def test_a_run_with_other_patches_takes_over_what_the_decoder_knows(folder, model, recipe):
    started = with_weights(recipe, f"local-dir:{folder}", patch_size=[8, 16, 4])
    method = build_method(started)
    start_from_weights(method, started)
    assert method.encoder.patch_size == method.decoder.unit == (8, 16, 4)
    published = create_decoder(model)
    tokens = torch.randn(1, 2, published.embed.out_features, generator=torch.Generator().manual_seed(0))
    coarse, fine = (decoder.to_voxels(tokens).unflatten(2, decoder.unit) for decoder in (published, method.decoder))
    # Twice as tall, half as deep: along the first axis nothing changes, along the last one two voxels are one.
    torch.testing.assert_close(fine[:, :, :, ::2], coarse.unflatten(4, (4, 2)).mean(-1))
    torch.testing.assert_close(fine[:, :, :, 1::2], fine[:, :, :, ::2])
    assert torch.equal(method.decoder.blocks[0].attn.qkv.weight, published.blocks[0].attn.qkv.weight)


def test_a_run_from_weights_of_another_input_size_keeps_their_places(folder, model, recipe, store, tmp_path):
    """In its own folder, when it goes on there, and in what is published of it."""
    started = with_weights(recipe, f"local-dir:{folder}", img_size=[16, 16, 40])
    started = started.model_copy(update={"schedule": ScheduleSection(steps=1)})
    method = pretrain(started, store, tmp_path / "run")
    assert method.encoder.pretrained_img_size == model.img_size
    assert method.decoder.first_place == method.encoder.first_place != (0, 0, 0)
    written = load_recipe(str(tmp_path / "run" / "recipe.yaml")).model.args
    assert written["pretrained_img_size"] == list(model.img_size)
    pretrain(started, store, tmp_path / "run")  # finished: there is nothing to do, and no other recipe
    package(tmp_path / "run", tmp_path / "out", store=store, tag="x", license="MIT", citation="@misc{none}")
    assert torch.equal(medmim.from_pretrained(tmp_path / "out").pos_embed, method.encoder.pos_embed)


def published_method(recipe, folder, name: str, **args):
    """A fresh method, saved as a run of it is published."""
    method = build_method(recipe.model_copy(update={"method": MethodSection(name=name, args=args)}))
    record = {**RECORD, "decoder_spec": method.decoder_spec}
    medmim.save_pretrained(method.encoder, folder, decoder=method.decoder, weights=record)
    return method


def test_a_decoder_with_its_defaults_written_out_is_the_same(recipe, tmp_path):
    decoder = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    published = published_method(recipe, tmp_path, "mae", decoder=decoder).decoder.state_dict()
    started = with_weights(recipe, f"local-dir:{tmp_path}").model_copy(
        update={"seed": 1, "method": MethodSection(name="mae", args={"decoder": {**decoder, "mlp_ratio": 4.0}})}
    )
    method = build_method(started)
    start_from_weights(method, started)
    assert all(torch.equal(weight, published[name]) for name, weight in method.decoder.state_dict().items())


def test_a_decoder_for_other_patches_that_cannot_be_fitted_starts_anew(recipe, tmp_path):
    """That of SimMIM, when as much is hidden together as before."""
    published_method(recipe, tmp_path, "simmim", unit=[8, 16, 8])
    started = with_weights(recipe, f"local-dir:{tmp_path}", patch_size=[8, 16, 8])
    started = started.model_copy(update={"method": MethodSection(name="simmim", args={"unit": [8, 16, 8]})})
    method = build_method(started)
    fresh = {name: weight.clone() for name, weight in method.decoder.state_dict().items()}
    start_from_weights(method, started)
    assert all(torch.equal(weight, fresh[name]) for name, weight in method.decoder.state_dict().items())


def test_the_data_list_has_the_files_of_the_run_before_too(folder, store, tmp_path):
    few = Store(store.folder)
    few.entries = store.entries[:1]
    _write_data_list(tmp_path / "data.csv", few, _data_list_of(f"local-dir:{folder}"))
    with open(tmp_path / "data.csv", newline="") as file, open(folder / "data.csv", newline="") as every:
        assert sorted(csv.reader(file)) == sorted(csv.reader(every))


def test_a_run_starts_from_weights_of_its_own_architecture_only(folder, recipe):
    other = with_weights(recipe, f"local-dir:{folder}")
    other = other.model_copy(update={"model": other.model.model_copy(update={"name": "vit_t_simmim3d"})})
    with pytest.raises(SpecError, match=r"model\.weights are of vit_t_mae3d, but model\.name is vit_t_simmim3d"):
        start_from_weights(build_method(other), other)


def test_a_card_tells_of_the_run_before(model):
    weights = model.spec.weights
    training = weights.training.model_copy(update={"before": weights.training, "steps": 7})
    spec = model.spec.model_copy(update={"weights": weights.model_copy(update={"training": training})})
    card = render_card(spec)
    assert f"| 1 | `tiny` | {weights.training.steps} |" in card
    assert "| 2 | `tiny` | 7 |" in card
    assert "Each run started from the weights of the one above it." in card


def with_weights(recipe: Recipe, weights: str, **args) -> Recipe:
    changed = {"weights": weights, "args": {**recipe.model.args, **args}}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changed)})
