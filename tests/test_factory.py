"""Building, loading and saving models: strict, bit for bit, never random numbers for weights."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import medmim
from fakes import RECORD, TINY, save_tiny, tiny_decoder, tiny_model
from medmim import checkpoints, hub
from medmim.errors import OutputError, SpecError, UnknownModelError, WeightsError
from medmim.models.vit import VisionTransformer3D, adapt_state_dict, resize_patch_kernel
from medmim.publish import save_with_golden
from medmim.verify import verify

SIZE, GRID = (32, 48, 16), (4, 3, 2)


def volumes(model, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, model.in_chans, *model.img_size, generator=generator)


def assert_same_state(first: nn.Module, second: nn.Module):
    one, two = first.state_dict(), second.state_dict()
    assert list(one) == list(two)
    for key in one:
        assert one[key].dtype == two[key].dtype
        assert torch.equal(one[key], two[key]), key


def rewrite(folder, change, name="model.safetensors"):
    """Changes the tensors of a saved file, and takes the record of weights away, which would notice."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("weights", None)
    (folder / "config.json").write_text(json.dumps(config))


# --- the round trip, for every model of the catalog -------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in medmim.list_models() if medmim.model_info(name).family in TINY])
def test_saved_and_loaded_is_bit_equal(name, tmp_path):
    model = tiny_model(name, num_classes=3).eval()
    spec = medmim.save_pretrained(model, tmp_path)
    loaded = medmim.from_pretrained(tmp_path)
    assert_same_state(model, loaded)
    # The meta path gives what the normal path does, positions included, which no file stores.
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert torch.equal(loaded(volumes(model)), model(volumes(model)))
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.spec.to_data() == spec.to_data()


@pytest.mark.parametrize("name", medmim.list_models())
def test_every_model_builds_at_its_own_size(name):
    with torch.device("meta"):
        model = medmim.create_model(name)
    assert model.training
    assert model.spec.name == name
    assert model.spec.weights is None
    img_size = medmim.model_info(name).args["img_size"]
    assert model.img_size == img_size
    assert model.grid_size == tuple(side // patch for side, patch in zip(img_size, model.patch_size, strict=True))
    assert medmim.model_info(name).family in TINY


@pytest.mark.parametrize("name", medmim.list_pretrained())
def test_every_packaged_set_of_weights_loads_offline_and_keeps_its_promise(name):
    from medmim.golden import golden_outputs

    if not (hub.PACKAGED / name).is_dir():
        pytest.skip(f"{name} does not ship with the source")
    model = medmim.create_model(name, pretrained=True)
    decoder = medmim.create_decoder(model) if model.spec.weights.decoder else None
    golden = load_file(hub.PACKAGED / name / hub.GOLDEN)
    outputs = golden_outputs(model, decoder)
    assert outputs.keys() == golden.keys()
    for key, expected in golden.items():
        torch.testing.assert_close(outputs[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_file_keeps_the_dtype_and_the_model_is_float32(dtype, tmp_path):
    model = tiny_model().to(dtype)
    medmim.save_pretrained(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert_same_state(medmim.from_pretrained(tmp_path), copy.deepcopy(model).float())
    same = medmim.from_pretrained(tmp_path, dtype=dtype)
    assert_same_state(same, model)
    assert {buffer.dtype for buffer in same.buffers()} == {dtype}


def test_device_and_dtype_without_weights():
    model = tiny_model(device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in (*model.parameters(), *model.buffers()))


def test_weights_are_loaded_whatever_the_default_device(tiny_folder):
    with torch.device("meta"):
        model = medmim.from_pretrained(tiny_folder[0], num_classes=2)
        decoder = medmim.create_decoder(model)
    expected = medmim.from_pretrained(tiny_folder[0], num_classes=0)
    assert torch.equal(model.forward_features(volumes(model)), expected.forward_features(volumes(model)))
    assert torch.equal(decoder.pos_embed, medmim.create_decoder(expected).pos_embed)
    assert 0.01 < model.head.weight.std() < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_with_weights(tiny_folder):
    model = medmim.from_pretrained(tiny_folder[0], device="cuda", dtype=torch.float16, num_classes=2)
    assert all(t.is_cuda and t.dtype == torch.float16 for t in (*model.parameters(), *model.buffers()))
    assert all(t.is_cuda and t.dtype == torch.float16 for t in medmim.create_decoder(model).parameters())


def test_a_large_model_is_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 250_000)
    model = tiny_model()
    spec = medmim.save_pretrained(model, tmp_path, weights={**RECORD, "decoder_spec": None})
    assert len(spec.weights.encoder) > 1
    assert all(file.size < 260_000 for file in spec.weights.encoder)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert_same_state(medmim.from_pretrained(tmp_path), model)

    rewrite(tmp_path, lambda tensors: None, spec.weights.encoder[0].name)  # now only the index says which shards
    assert_same_state(medmim.from_pretrained(tmp_path), model)

    monkeypatch.undo()
    medmim.save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_all_kinds_give_the_same_weights(tiny_weights):
    folder = hub.PACKAGED / "tiny.fake"
    model = medmim.create_model("tiny", pretrained=True)
    assert model.spec == tiny_weights.model_copy(update={"architecture": "tiny"})
    assert model.spec.name == "tiny.fake"
    assert_same_state(model, tiny_model())
    assert_same_state(medmim.create_model("tiny.fake", pretrained=True), model)
    assert_same_state(medmim.create_model(f"local-dir:{folder}", pretrained=True), model)
    assert_same_state(medmim.from_pretrained(folder), model)
    assert_same_state(medmim.from_pretrained(str(folder)), model)
    file = folder / "model.safetensors"
    loaded = medmim.create_model("tiny", checkpoint_path=file)
    assert_same_state(loaded, model)
    assert loaded.spec.weights is None


def test_without_pretrained_a_folder_gives_the_architecture_alone(tiny_folder):
    folder, spec = tiny_folder
    torch.manual_seed(5)
    model = medmim.create_model(f"local-dir:{folder}", depth=1)
    assert model.training
    assert model.spec.weights is None
    assert model.spec.args == {**spec.args, "depth": 1}
    assert not torch.equal(model.norm.weight + model.blocks[0].attn.qkv.weight[0], tiny_model().norm.weight)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("vit_t_mae", UnknownModelError, "nearest: vit_t_mae3d"),
        ("org/name", UnknownModelError, "'hf-hub:org/name' for a Hub repository or 'local-dir:org/name' for a folder"),
        ("./folder", UnknownModelError, "'local-dir:./folder' for a folder"),
        ("hf_hub:org/name", UnknownModelError, "there is no source 'hf_hub'; write hf-hub:org/name or local-dir:path"),
        ("hf-hub:name", WeightsError, "'name' is not the name of a repository"),
        ("hf-hub:../../etc", WeightsError, "'../../etc' is not the name of a repository"),
        ("local-dir:nowhere", WeightsError, "nowhere: there is no such folder"),
        (Path("folder"), UnknownModelError, "from_pretrained(PATH) loads a folder, as does the name 'local-dir:PATH'"),
        (None, UnknownModelError, "a name of a model is text, not of type NoneType"),
        (torch.nn.Linear(1, 1), UnknownModelError, "not of type Linear; from_pretrained(PATH) loads a folder"),
        ("vit_t_mae3d.nothing", UnknownModelError, "no weights tagged 'nothing'"),
    ],
)
def test_wrong_names(name, error, message):
    with pytest.raises(error, match=re.escape(message)):
        medmim.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("img_sizes", "vit_t_mae3d: there is no argument 'img_sizes'; nearest: img_size"),
        ("num_class", "nearest: num_classes"),
        ("pretrain", "there is no argument 'pretrain'; "),
        ("xyz", "there is no argument 'xyz'; accepted: img_size, patch_size, in_chans"),
    ],
)
def test_a_wrong_argument_gets_the_accepted_ones(argument, message):
    with pytest.raises(UnknownModelError, match=re.escape(message)) as error:
        medmim.create_model("vit_t_mae3d", **{argument: 1})
    assert "global_pool" in str(error.value)


@pytest.mark.parametrize("args", [{"img_size": (33, 48, 16)}, {"num_heads": 7}, {"global_pool": "token"}])
def test_impossible_arguments_are_one_error(args):
    with pytest.raises(SpecError, match="vit_t_mae3d cannot be built with these arguments: "):
        medmim.create_model("vit_t_mae3d", **args)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("img_size", "96", "img_size is '96'; give three whole numbers"),
        ("img_size", (64, 64), "img_size is (64, 64); give three whole numbers"),
        ("img_size", 96.0, "img_size is 96.0; give"),
        ("img_size", (32, 48.0, 16), "img_size is (32, 48.0, 16); give"),
        ("img_size", None, "img_size is None; give"),
        ("img_size", 0, "img_size is 0; give three whole numbers of at least 1"),
        ("patch_size", (8, -8, 8), "patch_size is (8, -8, 8); give"),
        ("in_chans", "2", "in_chans: Input should be a valid integer, not '2'"),
        ("num_classes", 2.0, "num_classes: Input should be a valid integer, not 2.0"),
        ("pos_embed", "x", "pos_embed: Input should be 'sincos' or 'learned', not 'x'"),
    ],
)
def test_arguments_of_another_type_are_named(pretrained, argument, value, message, tiny_weights):
    with pytest.raises(SpecError, match=re.escape(f"tiny: {message}")):
        medmim.create_model("tiny", pretrained, **{argument: value})


@pytest.mark.parametrize("pretrained", [False, True])
def test_one_number_is_a_cube(pretrained, tiny_weights):
    model = medmim.create_model("tiny", pretrained, img_size=32, patch_size=np.int64(16), num_classes=np.int64(3))
    assert (model.img_size, model.patch_size) == ((32, 32, 32), (16, 16, 16))
    assert model(volumes(model)).shape == (2, 3)
    args = {"img_size": (32, 32, 32), "patch_size": (16, 16, 16), "num_classes": 3}
    assert {key: value for key, value in model.spec.args.items() if key in args} == args
    assert medmim.create_model("tiny", pretrained, img_size=[32, 32, 48]).img_size == (32, 32, 48)


@pytest.mark.parametrize(
    ("argument", "value", "way_out"),
    [
        ("features_only", True, "forward_intermediates(x)"),
        ("out_indices", (2,), "forward_intermediates(x)"),
        ("dynamic_img_size", True, "give img_size=, or call set_input_size"),
        ("pretrained_cfg", None, "weights are chosen by their tag"),
        ("in_channels", 2, "give in_chans="),
        ("out_channels", 2, "give num_classes="),
        ("spatial_dims", 3, "leave it out"),
        ("map_location", "cpu", "give device="),
        ("strict", False, "leave it out, loading is strict"),
        ("force_download", True, "leave it out, files are checked"),
    ],
)
def test_arguments_of_other_libraries_have_another_name_here(argument, value, way_out):
    with pytest.raises(UnknownModelError, match=re.escape(f"no argument '{argument}'; {way_out}")):
        medmim.create_model("vit_t_mae3d", **{argument: value})


@pytest.mark.parametrize(
    "call",
    [
        lambda: medmim.create_model(None),
        lambda: medmim.create_model(Path("vit_t_mae3d")),
        lambda: medmim.create_model("vit_t_mae3d", device="graphics card"),
        lambda: medmim.create_model("vit_t_mae3d", device=1.5),
        lambda: medmim.create_model("vit_t_mae3d", True, device="meta"),
        lambda: medmim.create_model("vit_t_mae3d", dtype="float32"),
        lambda: medmim.create_model("vit_t_mae3d", dtype=torch.int32),
        lambda: medmim.create_model("vit_t_mae3d", checkpoint_path=3),
        lambda: medmim.from_pretrained(None),
        lambda: medmim.from_pretrained(3),
        lambda: medmim.from_pretrained(b"x"),
        lambda: medmim.from_pretrained(""),
        lambda: medmim.save_pretrained(tiny_model(), None),
        lambda: medmim.save_pretrained(tiny_model(), ""),
        lambda: medmim.save_pretrained(tiny_model(), "a\0b"),
        lambda: medmim.save_pretrained(tiny_model(), "x", weights="CC-BY-4.0"),
        lambda: medmim.save_pretrained("vit_t_mae3d", "x"),
        lambda: medmim.save_pretrained(nn.Linear(2, 2), "x"),
        lambda: medmim.export_model(tiny_model(), None, to="onnx"),
        lambda: medmim.export_model(None, "x", to="onnx"),
        lambda: medmim.create_decoder(nn.Linear(2, 2)),
        lambda: medmim.name_classes(nn.Linear(2, 2), ("a", "b")),
        lambda: medmim.create_transform(None),
        lambda: medmim.embed(nn.Linear(2, 2), "x.nii"),
        lambda: medmim.segment(nn.Linear(2, 2), "x.nii"),
        lambda: medmim.segment(None, "x.nii"),
        lambda: medmim.classify(nn.Linear(2, 2), "x.nii"),
        lambda: medmim.classify(None, "x.nii"),
        lambda: medmim.create_segmenter(None, num_classes=2),
        lambda: medmim.create_segmenter("vit_t_mae3d", None, num_classes=2),
        lambda: medmim.create_segmenter("vit_t_mae3d", num_classes="2"),
        lambda: medmim.create_segmenter("vit_t_mae3d", num_classes=2.5),
        lambda: medmim.create_segmenter("vit_t_mae3d", num_classes=10**9),
        lambda: medmim.create_segmenter("vit_t_mae3d", classes="liver"),
        lambda: medmim.create_segmenter("vit_t_mae3d", classes=3),
        lambda: medmim.create_segmenter("vit_t_mae3d", num_classes=2, decoder_args=3),
        lambda: medmim.create_segmenter("vit_t_mae3d", num_classes=2, volume="CT"),
        lambda: medmim.list_models(None),
        lambda: medmim.list_models(["vit_*", 3]),
        lambda: medmim.list_models(tags=3),
        lambda: medmim.list_pretrained(3),
        lambda: medmim.model_info(None),
        lambda: medmim.register_model(3),
    ],
)
def test_odd_arguments_of_public_functions_are_one_error(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(medmim.MedmimError):
        call()
    assert not list(tmp_path.iterdir())
    assert not medmim.is_model(None)


def test_a_path_that_is_neither_folder_nor_repository(tmp_path):
    with pytest.raises(WeightsError, match=r"neither a folder that exists nor a repository .* create_model"):
        medmim.from_pretrained(tmp_path / "missing")
    with pytest.raises(WeightsError, match="neither"):
        medmim.from_pretrained("vit_t_mae3d")
    with pytest.raises(WeightsError, match="no revision 'main'"):
        medmim.from_pretrained(tmp_path, revision="main")
    with pytest.raises(WeightsError, match=r"not a model folder, it has no config.json"):
        medmim.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="give one of them"):
        medmim.create_model("hf-hub:org/name@v1", revision="v2")
    with pytest.raises(WeightsError, match="pinned"):
        medmim.create_model("vit_t_mae3d", revision="v2")


# --- never random -----------------------------------------------------------------------------------------------------


def test_weights_that_do_not_exist_are_an_error_that_helps(tiny_weights):
    with pytest.raises(WeightsError) as error:
        medmim.create_model("vit_l_mae3d_p8", pretrained=True)
    message = str(error.value)
    assert message.startswith("vit_l_mae3d_p8 has no weights yet; weights exist for: ")
    for part in (*medmim.list_pretrained(), "tiny.fake", "medmim-train package", "local-dir:PATH", "hf-hub:ORG/NAME"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "missing: norm.weight (48,)"),
        (lambda t: t.update(extra=torch.zeros(2, 3)), "unexpected: extra (2, 3)"),
        (
            lambda t: t.update({"norm.weight": torch.zeros(47)}),
            "of another shape: norm.weight (47,) for (48,)",
        ),
        (
            lambda t: t.update({"norm.weight": torch.zeros(48, dtype=torch.int64)}),
            "of another type: norm.weight torch.int64 for torch.float32",
        ),
        (lambda t: t.clear() or t.update(x=torch.zeros(1)), " and 24 more; unexpected: x (1,)"),
        (
            lambda t: t.update({"head.weight": torch.zeros(2, 48), "head.bias": torch.zeros(3)}),
            "of another shape: head.weight (2, 48) for (3, 48)",
        ),
        (lambda t: t.pop("head.bias"), "missing: head.bias (3,)"),
    ],
)
def test_what_does_not_fit_is_listed(change, message, tmp_path):
    medmim.save_pretrained(tiny_model(num_classes=3), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        medmim.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_a_file_of_a_wrapped_model_is_told_so(wrap, tmp_path):
    model = wrap(tiny_model())
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"as of a wrapped model: save model\.(module|_orig_mod)\.state_dict\(\)"):
        medmim.create_model("vit_t_mae3d", checkpoint_path=tmp_path / "x.safetensors", **TINY["vit"])


@pytest.mark.parametrize(
    "args", [{"depth": 3}, {"embed_dim": 24}, {"class_token": True}, {"init_values": 0.1}, {"pos_embed": "learned"}]
)
def test_another_architecture_is_refused(args, tiny_folder):
    with pytest.raises(WeightsError, match="does not fit the model"):
        medmim.from_pretrained(tiny_folder[0], **args)


def test_what_cannot_be_fitted_to_other_sizes_is_refused(tmp_path):
    medmim.save_pretrained(tiny_model(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"patch_embed.proj.weight": torch.zeros(48, 1, 8)}))
    with pytest.raises(WeightsError, match="cannot be fitted to the model"):
        medmim.from_pretrained(tmp_path, in_chans=2)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def pickle_instead(path):
    torch.save({"norm.weight": torch.zeros(48)}, path)


@pytest.mark.parametrize("name", ["model.safetensors", "decoder.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_last_byte, "damaged (its sha256 is "),
        (truncate, "damaged (it has "),
        (pickle_instead, "damaged (it has "),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_damaged_files_are_refused(name, damage, message, tiny_folder):
    folder, _ = tiny_folder
    damage(folder / name)
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        medmim.create_decoder(medmim.from_pretrained(folder))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "not a whole safetensors file"),
        (pickle_instead, "a pickle (.pth, .ckpt), which can run code"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a pickle"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "not a safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 8 + b"{}"), "not a whole safetensors file"),
        (lambda path: path.unlink() or path.mkdir(), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_files_without_a_record_are_checked_too(damage, message, tiny_folder):
    path = tiny_folder[0] / "model.safetensors"
    damage(path)
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        medmim.create_model("vit_t_mae3d", checkpoint_path=path, **TINY["vit"])
    assert str(error.value).startswith(str(path))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match="x is stored in another shard already"):
        checkpoints.read_tensors([tmp_path / "a", tmp_path / "b"])


def test_truncating_the_file_under_a_live_model_is_harmless(tiny_folder):
    folder, _ = tiny_folder
    model = medmim.from_pretrained(folder)
    with open(folder / "model.safetensors", "rb+") as file:
        file.truncate(16)
    assert model(volumes(model)).isfinite().all()


def test_a_damaged_shard_is_refused_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 100_000)
    spec = medmim.save_pretrained(tiny_model(), tmp_path, weights={**RECORD, "decoder_spec": None})
    shards = [file.name for file in spec.weights.encoder]
    assert len(shards) > 2
    for name in (shards[0], shards[-1]):
        whole = (tmp_path / name).read_bytes()
        flip_last_byte(tmp_path / name)
        with pytest.raises(WeightsError, match=rf"{name}: damaged \(its sha256 is "):
            medmim.from_pretrained(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert medmim.from_pretrained(tmp_path).spec.weights == spec.weights


@pytest.mark.parametrize("block", [1, 30, checkpoints.BLOCK_BYTES])
def test_tensors_of_every_kind_are_read_as_the_library_reads_them(block, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", block)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.rand(3, 5, generator=generator),
        "scalar": torch.tensor(7),
        "nothing": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "half": torch.rand(2, 2, 2, generator=generator).bfloat16(),
        "double": torch.rand(3, generator=generator).double(),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = checkpoints.read_tensors([tmp_path / "x.safetensors"])
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)
    save_file(read, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_halves_may_be_widened_while_they_are_read(tmp_path):
    tensors = {
        "brain": torch.rand(3, 5).bfloat16(),
        "half": torch.rand(7).half(),
        "none": torch.empty(0, 4).half(),
        "float": torch.rand(4),
        "double": torch.rand(2).double(),
        "whole": torch.arange(3),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    read = checkpoints.read_tensors([tmp_path / "x.safetensors"], widen=True)
    for key, tensor in tensors.items():
        expected = tensor.float() if key in ("brain", "half", "none") else tensor
        assert read[key].dtype == expected.dtype
        assert torch.equal(read[key], expected)


def test_a_part_of_a_loaded_model_is_saved_alone(tiny_folder, tmp_path):
    """Though its tensors lie in one piece of memory with all others."""
    model = medmim.from_pretrained(tiny_folder[0])
    torch.save(model.norm.state_dict(), tmp_path / "norm.pt")
    assert (tmp_path / "norm.pt").stat().st_size < 10_000


@pytest.mark.parametrize("dtype", checkpoints.DTYPES.values(), ids=str)
def test_every_type_of_numbers_is_read(dtype, tmp_path):
    stored = torch.arange(24).reshape(2, 3, 4).to(dtype)
    save_file({"x": stored}, tmp_path / "x.safetensors")
    read = checkpoints.read_tensors([tmp_path / "x.safetensors"])["x"]
    assert read.dtype == dtype
    assert torch.equal(read, stored)


def test_numbers_of_a_type_that_no_encoder_has_are_refused(tmp_path):
    save_file({"x": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors: x has numbers of the type F8_E5M2; save it as one of F64"):
        checkpoints.read_tensors([tmp_path / "x.safetensors"])


@pytest.mark.parametrize("name", ["vit_t_mae3d", "swin_t_simmim3d", "resenc_b_mae3d"])
def test_the_first_load_does_not_import_the_compiler(name, tmp_path):
    """Filling or computing on the meta device imports torch._dynamo and sympy: seconds, in every new process."""
    if name == "vit_t_mae3d":
        save_tiny(tmp_path)
    else:
        medmim.save_pretrained(tiny_model(name), tmp_path)
    code = f"""
import sys, medmim
model = medmim.from_pretrained({str(tmp_path)!r}, num_classes=2)
if model.spec.weights:
    medmim.create_decoder(model)
print(*[name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(family="nofamily"), UnknownModelError, "there is no model family 'nofamily'"),
        (lambda c: c.update(family="os:path"), SpecError, "config.json: family"),
        (lambda c: c["args"].update(later=1), UnknownModelError, "there is no argument 'later'"),
        (lambda c: c["args"].update(depth="deep"), SpecError, "depth: Input should be a valid integer"),
        (lambda c: c.update(medmim=99), SpecError, "version 99 of the format, of which this medmim knows 1; update it"),
        (lambda c: c.update(medmim=0), SpecError, "config.json: medmim"),
        (lambda c: c["weights"].update(converter="evil"), WeightsError, "converter 'evil'"),
        (lambda c: c["weights"]["encoder"][0].update(name="../x"), SpecError, "inside the model folder"),
    ],
)
def test_a_bad_config_is_refused(change, error, message, tiny_folder):
    folder, _ = tiny_folder
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=re.escape(message)):
        medmim.create_model(f"local-dir:{folder}", pretrained=True)


# --- fitting to another shape -----------------------------------------------------------------------------------------


def test_another_input_size(tiny_folder):
    size = (16, 32, 40)
    model = medmim.from_pretrained(tiny_folder[0], img_size=size)
    expected = tiny_model().eval()
    expected.set_input_size(size)
    assert_same_state(model, expected)
    assert torch.equal(model(volumes(model)), expected(volumes(model)))
    assert model.spec.args["img_size"] == size
    assert model.spec.name == "vit_t_mae3d.fake"
    assert model.spec.args["pretrained_img_size"] == expected.pretrained_img_size == tiny_model().img_size
    untrained = medmim.create_model(f"local-dir:{tiny_folder[0]}", img_size=size)
    assert untrained.pretrained_img_size is None


def test_what_was_fitted_is_fitted_again_from_where_it_was_trained(tiny_folder, tmp_path):
    medmim.save_pretrained(medmim.from_pretrained(tiny_folder[0], img_size=(16, 32, 40)), tmp_path)
    again = medmim.from_pretrained(tmp_path, img_size=32)
    assert torch.equal(again.pos_embed, medmim.from_pretrained(tiny_folder[0], img_size=32).pos_embed)
    back = medmim.from_pretrained(tmp_path, img_size=tiny_model().img_size)
    assert_same_state(back, medmim.from_pretrained(tiny_folder[0]))
    assert torch.equal(back.pos_embed, tiny_model().pos_embed)


def test_a_fitted_decoder_has_the_encoders_places(tiny_folder):
    model = medmim.from_pretrained(tiny_folder[0], img_size=(16, 32, 40))
    assert medmim.create_decoder(model).first_place == model.first_place == (1, 0.5, -1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_input_size_with_learned_positions(dtype, tmp_path):
    source = tiny_model(pos_embed="learned").to(dtype)
    medmim.save_pretrained(source, tmp_path)
    model = medmim.from_pretrained(tmp_path, img_size=(32, 16, 48))
    source.float().set_input_size((32, 16, 48))
    assert_same_state(model, source)


def test_another_patch_size_is_fitted_in_float32(tmp_path):
    source = tiny_model().to(torch.bfloat16)
    medmim.save_pretrained(source, tmp_path)
    model = medmim.from_pretrained(tmp_path, patch_size=(16, 8, 8))
    expected = resize_patch_kernel(source.patch_embed.proj.weight.float(), (16, 8, 8))
    assert torch.equal(model.patch_embed.proj.weight, expected)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight.float())
    assert model.grid_size == (2, 6, 2)


@pytest.mark.parametrize(("saved", "wanted"), [(1, 3), (3, 1), (2, 5)])
def test_another_number_of_channels(saved, wanted, tmp_path):
    source = tiny_model(in_chans=saved).eval()
    medmim.save_pretrained(source, tmp_path)
    model = medmim.from_pretrained(tmp_path, in_chans=wanted)
    assert model.in_chans == model.spec.args["in_chans"] == wanted
    if saved == 1:  # the same volume in every channel means what it meant
        x = volumes(source)
        torch.testing.assert_close(model(x.expand(-1, wanted, -1, -1, -1)), source(x))


@pytest.mark.parametrize("how", ["folder", "file"])
@pytest.mark.parametrize(("saved", "wanted"), [(0, 3), (3, 0), (3, 5), (3, 3)])
def test_another_number_of_classes(how, saved, wanted, tmp_path):
    source = tiny_model(num_classes=saved).eval()
    medmim.save_pretrained(source, tmp_path)
    torch.manual_seed(7)
    if how == "folder":
        model = medmim.from_pretrained(tmp_path, num_classes=wanted)
    else:
        file = tmp_path / "model.safetensors"
        model = medmim.create_model("vit_t_mae3d", checkpoint_path=file, **TINY["vit"], num_classes=wanted)
    assert model.num_classes == wanted
    x = volumes(source)
    assert torch.equal(model.forward_features(x), source.forward_features(x))
    assert model(x).shape == (2, wanted or 48)
    if saved == wanted:
        assert torch.equal(model(x), source(x))
    elif wanted:
        assert 0.01 < model.head.weight.std() < 0.03
        assert not model.head.bias.any()


@pytest.mark.parametrize(
    "args",
    [
        {"num_classes": 3, "global_pool": "attn"},
        {"num_classes": 3, "global_pool": "token", "class_token": True},
        {"pos_embed": "learned"},
    ],
)
def test_a_file_of_a_model_with_the_arguments_given_is_loaded_as_it_is(args, tmp_path):
    source = tiny_model(**args)
    for parameter in source.parameters():  # so that nothing is what it starts from
        torch.nn.init.normal_(parameter)
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    loaded = medmim.create_model("vit_t_mae3d", checkpoint_path=tmp_path / "x.safetensors", **TINY["vit"], **args)
    assert_same_state(loaded, source)


def test_several_changes_at_once(tmp_path):
    save_tiny(tmp_path)
    args = {"img_size": (32, 32, 64), "patch_size": (16, 16, 16), "in_chans": 4, "num_classes": 2}
    model = medmim.from_pretrained(tmp_path, **args, dtype=torch.float64)
    assert model(volumes(model).double()).shape == (2, 2)
    assert {key: model.spec.args[key] for key in args} == args
    medmim.save_pretrained(model, tmp_path / "again")
    assert_same_state(medmim.from_pretrained(tmp_path / "again", dtype=torch.float64), model)


# --- the decoder ------------------------------------------------------------------------------------------------------


def test_the_decoder_comes_with_the_weights(tiny_weights):
    model = medmim.create_model("tiny", pretrained=True)
    decoder = medmim.create_decoder(model)
    expected = tiny_decoder(model).eval()
    assert_same_state(decoder, expected)
    assert not decoder.training
    tokens = torch.arange(math.prod(GRID))[None]
    features = model.forward_visible(volumes(model, 1), tokens[:, ::4])
    inputs = (features, tokens[:, ::4], tokens[:, 1::4])
    assert torch.equal(decoder(*inputs), expected(*inputs))


def test_the_decoder_follows_the_model(tiny_folder):
    model = medmim.from_pretrained(tiny_folder[0], img_size=(16, 32, 40), dtype=torch.bfloat16)
    decoder = medmim.create_decoder(model)
    assert decoder.grid_size == model.grid_size == (2, 2, 5)
    assert decoder.pos_embed.shape[1] == 20
    assert {tensor.dtype for tensor in (*decoder.parameters(), *decoder.buffers())} == {torch.bfloat16}
    assert_same_state(medmim.create_decoder(copy.deepcopy(model)), decoder)


@pytest.mark.parametrize("source", ["folder", "local hub"])
def test_the_decoder_is_found_from_another_folder(source, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "folder":
        model = medmim.from_pretrained("tiny")
    else:
        monkeypatch.setenv("MEDMIM_HUB", "./hub")
        (tmp_path / "hub" / "org").mkdir(parents=True)
        tiny_folder[0].rename(tmp_path / "hub" / "org" / "tiny")
        model = medmim.from_pretrained("org/tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same_state(medmim.create_decoder(model), tiny_decoder(model))


def without_decoder(weights):
    return weights.model_copy(update={"decoder": None})


def of_another_kind(weights):
    return weights.model_copy(update={"decoder_spec": weights.decoder_spec.model_copy(update={"kind": "jepa"})})


def for_other_patches(weights):
    args = {"patch_size": [16, 8, 8], "in_chans": 1}  # as many voxels as the model's: shapes would fit
    return weights.model_copy(update={"decoder_spec": weights.decoder_spec.model_copy(update={"args": args})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_decoder, "published without its decoder"),
        (of_another_kind, "a decoder of kind 'jepa'"),
        (for_other_patches, "is for patch_size (16, 8, 8), the model has (8, 16, 8)"),
        (lambda weights: None, "holds no published weights"),
    ],
)
def test_no_decoder_is_made_up(change, message, tiny_folder):
    model = medmim.from_pretrained(tiny_folder[0])
    model.spec = model.spec.model_copy(update={"weights": change(model.spec.weights)})
    with pytest.raises(WeightsError, match=re.escape(message)):
        medmim.create_decoder(model)


def test_a_model_of_other_patches_has_no_decoder(tiny_folder):
    model = medmim.from_pretrained(tiny_folder[0], patch_size=(16, 16, 16))
    with pytest.raises(WeightsError, match="does not fit the model"):
        medmim.create_decoder(model)


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def published_folder(tmp_path):
    """A model folder with everything that is published beside weights."""
    model = tiny_model()
    save_with_golden(model, tmp_path / "published", decoder=tiny_decoder(model), weights=RECORD)
    for name in hub.COMPANIONS:
        (tmp_path / "published" / name).write_text("of the model")
    return tmp_path / "published"


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_saved_over_itself_loses_nothing(published_folder):
    before = content_of(published_folder)
    medmim.save_pretrained(medmim.from_pretrained(published_folder), published_folder)
    assert content_of(published_folder) == before
    assert all(check.fault is None for check in verify(f"local-dir:{published_folder}"))


@pytest.mark.parametrize("args", [{}, {"img_size": (16, 32, 16)}, {"num_classes": 2}])
def test_of_another_model_nothing_stays(args, published_folder):
    (published_folder / "notes.txt").write_text("mine")
    model = medmim.from_pretrained(published_folder, **args)
    if not args:
        torch.nn.init.constant_(model.norm.bias, 7)
    saved = medmim.save_pretrained(model, published_folder)
    assert set(content_of(published_folder)) == {"config.json", "model.safetensors", "notes.txt"}
    assert (saved.weights.decoder, saved.weights.golden, saved.weights.evidence) == (None, None, ())
    assert_same_state(medmim.from_pretrained(published_folder), model)


def test_files_of_a_folder_without_a_model_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("of the project")
    medmim.save_pretrained(tiny_model(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "of the project"


def test_a_full_disk_is_one_error_and_leaves_what_was_there(published_folder):
    """Files may not become large, which the writer of weights meets as it does a full disk."""
    before, model = content_of(published_folder), tiny_model(depth=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match=r"published: cannot be written \(.*File too large.*\); make room, or"):
            medmim.save_pretrained(model, published_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content_of(published_folder) == before


@pytest.mark.parametrize("depth", [1, 2])
def test_copies_that_somebody_made_of_the_weights_stay(depth, published_folder):
    copies = ("model.safetensors.bak", "model.safetensors.2026-11-24", "model-best-of-three.safetensors")
    for name in copies:
        shutil.copy(published_folder / "model.safetensors", published_folder / name)
    before = content_of(published_folder)
    medmim.save_pretrained(tiny_model(depth=depth), published_folder)
    after = content_of(published_folder)
    assert all(after[name] == before[name] for name in copies)


@pytest.mark.parametrize("failing", [1, 5, 9, 10, 11])  # nine go out, two come in
def test_what_fails_while_files_change_places_puts_them_back(failing, published_folder, monkeypatch):
    before, moves, replace = content_of(published_folder), [], os.replace

    def fail_once(source, target):
        # Files are written by renaming too; those that are moved out or in keep their name.
        if Path(source).name == Path(target).name:
            moves.append(source)
            if len(moves) == failing:
                raise OSError(5, "Input/output error")
        replace(source, target)

    model = tiny_model(depth=1)
    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OutputError, match="published: cannot be written \\(Input/output error\\); make room"):
        medmim.save_pretrained(model, published_folder)
    assert content_of(published_folder) == before


def test_what_a_model_folder_holds(tiny_folder):
    folder, spec = tiny_folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "decoder.safetensors", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config == spec.to_data()
    assert config["args"]["img_size"] == list(SIZE)
    assert spec.weights.encoder[0].size == (folder / "model.safetensors").stat().st_size


def test_a_model_loaded_and_saved_keeps_its_record_but_not_its_publication(tiny_folder, tmp_path):
    folder, spec = tiny_folder
    model = medmim.from_pretrained(folder)
    published = {"repo": "org/name", "revision": "a" * 40, "golden": spec.weights.encoder[0]}
    model.spec = spec.model_copy(update={"weights": spec.weights.model_copy(update=published)})
    with torch.no_grad():
        model.norm.bias.add_(1)
    saved = medmim.save_pretrained(model, tmp_path / "tuned")
    assert saved.weights.volume == spec.weights.volume
    assert saved.weights.license == spec.weights.license
    assert saved.weights.encoder != spec.weights.encoder
    for field in ("repo", "revision", "golden", "decoder", "decoder_spec"):
        assert getattr(saved.weights, field) is None
    assert_same_state(medmim.from_pretrained(tmp_path / "tuned"), model)


def test_what_was_changed_by_the_models_own_methods_is_saved(tiny_folder, tmp_path):
    model = medmim.from_pretrained(tiny_folder[0])
    model.set_input_size((16, 32, 40), (8, 16, 8))
    model.reset_classifier(4)
    saved = medmim.save_pretrained(model, tmp_path / "task")
    assert (saved.args["num_classes"], saved.args["img_size"]) == (4, (16, 32, 40))
    loaded = medmim.from_pretrained(tmp_path / "task")
    assert torch.equal(loaded(volumes(model)), model(volumes(model)))


def test_attentive_pooling_is_new_on_weights_without_it_and_loads_back(tiny_folder, tmp_path):
    encoder = medmim.from_pretrained(tiny_folder[0])
    torch.manual_seed(0)
    model = medmim.from_pretrained(tiny_folder[0], num_classes=3, global_pool="attn")
    state, kept = model.state_dict(), encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert {name.split(".")[0] for name in state.keys() - kept.keys()} == {"attn_pool", "head"}
    torch.manual_seed(0)
    again = medmim.from_pretrained(tiny_folder[0], num_classes=3, global_pool="attn")
    assert_same_state(again, model)

    medmim.name_classes(model, ("a", "b", "c"))
    medmim.save_pretrained(model, tmp_path / "task")
    loaded = medmim.from_pretrained(tmp_path / "task")
    assert_same_state(loaded, model)
    assert torch.equal(loaded(volumes(model)), model(volumes(model)))
    pooled = medmim.from_pretrained(tmp_path / "task", num_classes=0)  # the pool that was trained stays
    assert torch.equal(pooled(volumes(model)), model.forward_head(model.forward_features(volumes(model)), True))
    # A classifier is no good for features that are pooled otherwise.
    other = medmim.from_pretrained(tmp_path / "task", global_pool="avg")
    assert other.attn_pool is None
    assert other.spec.task is None
    assert not torch.equal(other.head.weight, model.head.weight)


def test_a_pool_that_is_said_to_be_there_and_is_not_is_an_error(tiny_folder, tmp_path):
    medmim.save_pretrained(medmim.from_pretrained(tiny_folder[0]), tmp_path / "task")
    config = json.loads((tmp_path / "task" / "config.json").read_text())
    config["args"]["global_pool"] = "attn"
    (tmp_path / "task" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"missing: attn_pool\.latent \(1, 1, 48\)"):
        medmim.from_pretrained(tmp_path / "task")


def test_a_model_its_spec_does_not_describe_is_not_saved(tmp_path):
    model = tiny_model()
    model.prune_intermediate_layers([0])
    with pytest.raises(WeightsError, match=r"changed since it was built, .*missing: blocks\.1"):
        medmim.save_pretrained(model, tmp_path / "pruned")
    model.spec = None
    with pytest.raises(WeightsError, match="has no spec"):
        medmim.save_pretrained(model, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({**RECORD, "license": None}, SpecError, "weights: license"),
        ({**RECORD, "decoder_spec": None}, WeightsError, "'decoder_spec'"),
        (None, WeightsError, "'decoder_spec'"),
    ],
)
def test_a_failed_save_leaves_what_was_there(weights, error, message, tiny_folder):
    folder, _ = tiny_folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny_model(depth=1)
    with pytest.raises(error, match=message):
        medmim.save_pretrained(model, folder, decoder=tiny_decoder(model), weights=weights)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- models from outside ----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """The least a registered class can be: no classifier, no adapter, a buffer that no file stores."""

    def __init__(self, width: int = 3, *, scale: float = 2.0, forgets: bool = False):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.scale, self.forgets = scale, forgets
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("table", torch.full((2,), scale), persistent=False)

    def init_buffers(self):
        if not self.forgets:
            self.table = torch.full((2,), self.scale)


def test_a_registered_class_is_built_saved_and_loaded(registry, tmp_path):
    medmim.register_model("linear", cls=Linear, args={"width": 5})
    model = medmim.create_model("linear", scale=3.0)
    medmim.save_pretrained(model, tmp_path)
    loaded = medmim.from_pretrained(tmp_path)
    assert isinstance(loaded, Linear)
    assert_same_state(loaded, model)
    assert loaded.count == 7
    assert loaded.table.tolist() == [3.0, 3.0]
    with pytest.raises(WeightsError, match="linear has no weights yet"):
        medmim.create_model("linear", pretrained=True)
    with pytest.raises(WeightsError, match=r"Linear: table got no values; init_buffers\(\) must rebuild"):
        medmim.from_pretrained(tmp_path, forgets=True)


class Extended(VisionTransformer3D):
    """Passes what it does not know on, and settles one argument that its own methods can change."""

    def __init__(self, *, scale: float = 1.0, **kwargs):
        super().__init__(class_token=True, global_pool="token", **kwargs)
        self.scale = scale


@pytest.mark.parametrize("cls", [Extended, partial(VisionTransformer3D, class_token=True, global_pool="token")])
def test_a_constructor_that_passes_arguments_on_has_those_of_the_class_it_extends(cls, registry, tmp_path):
    medmim.register_model("passing", cls=cls, adapt=adapt_state_dict, args=TINY["vit"])
    model = medmim.create_model("passing").eval()
    medmim.save_pretrained(model, tmp_path / "built")
    model.set_input_size((64, 48, 16))
    medmim.save_pretrained(model, tmp_path / "changed")
    fitted = medmim.from_pretrained(tmp_path / "built", img_size=(64, 48, 16))
    for other in (fitted, medmim.from_pretrained(tmp_path / "changed")):
        assert torch.equal(other(volumes(model)), model(volumes(model)))
    model.reset_classifier(3)
    medmim.save_pretrained(model, tmp_path / "classifier")
    assert medmim.from_pretrained(tmp_path / "classifier", img_size=32).img_size == (32, 32, 32)
    with pytest.raises(SpecError, match="passing: depth: Input should be a valid integer"):
        medmim.create_model("passing", depth="two")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.out.weight = self.into.weight


def test_a_tensor_of_two_names_is_not_saved(registry, tmp_path):
    medmim.register_model("tied", cls=Tied)
    with pytest.raises(WeightsError, match=r"tied: into\.weight and out\.weight are one tensor"):
        medmim.save_pretrained(medmim.create_model("tied"), tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def test_arguments_that_are_no_plain_data_cannot_be_saved(registry, tmp_path):
    medmim.register_model("linear", cls=Linear)
    model = medmim.create_model("linear")
    model.spec = model.spec.model_copy(update={"args": {"forgets": object()}})
    with pytest.raises(SpecError, match="only plain data"):
        medmim.save_pretrained(model, tmp_path)


# --- without a network ------------------------------------------------------------------------------------------------


def test_packaged_weights_need_no_network(tiny_weights, tmp_path):
    from medmim import hub

    code = f"""
import json, socket
class NoNetwork(socket.socket):
    def __init__(self, *args, **kwargs):
        raise RuntimeError("a socket was opened")
socket.socket = NoNetwork
import pathlib, medmim, medmim.hub
medmim.hub.PACKAGED = pathlib.Path({str(hub.PACKAGED)!r})
spec = json.loads((medmim.hub.PACKAGED / "tiny.fake" / "config.json").read_text())
medmim.register_model("tiny", family="vit", args=spec["args"], weights=[spec["weights"] | {{"repo": "org/name"}}])
model = medmim.create_model("tiny", pretrained=True)
medmim.create_decoder(model)
print(model.spec.name)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "tiny.fake"
