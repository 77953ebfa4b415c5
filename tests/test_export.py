"""Exported models, loaded back by those they are for, give what the model gives."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import medmim
from fakes import RECORD, TINY, save_tiny, tiny_model
from medmim import cli, export
from medmim.cli.exporting import Form
from medmim.errors import MedmimError, OutputError, SpecError, WeightsError
from medmim.models.vit import VisionTransformer3D
from medmim.spec import ModelSpec, VolumeSpec, ZScore
from synthetic import write_scan


@pytest.fixture
def model(tiny_folder):
    return medmim.from_pretrained(tiny_folder[0], num_classes=3)


def volumes(model, batch: int) -> torch.Tensor:
    return torch.rand(batch, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_t_mae3d", "resenc_b_mae3d", "swin_t_simmim3d"])
def test_torch_export(name, tmp_path):
    model = tiny_model(name, num_classes=3)
    medmim.export_model(model, tmp_path / "model.pt2", to="torch-export")
    assert model.training  # as it was
    model.eval()
    extra = {"medmim.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert ModelSpec.parse(json.loads(extra["medmim.json"]), source="extra").to_data() == model.spec.to_data()
    for batch in (1, 3):
        assert torch.equal(program.module()(volumes(model, batch)), model(volumes(model, batch)))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.slow
def test_onnx(model, tmp_path):
    import onnxruntime

    medmim.export_model(model, tmp_path / "model.onnx", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (volume,), (features,) = session.get_inputs(), session.get_outputs()
    assert (volume.name, volume.shape, features.shape) == ("volume", ["batch", 1, *model.img_size], ["batch", 3])
    spec = json.loads(session.get_modelmeta().custom_metadata_map["medmim"])
    assert ModelSpec.parse(spec, source="onnx").to_data() == model.spec.to_data()
    for batch in (1, 3):
        (outputs,) = session.run(["features"], {"volume": volumes(model, batch).numpy()})
        np.testing.assert_allclose(outputs, model(volumes(model, batch)).detach(), atol=1e-5)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.onnx"]


def test_monai_bundle(tmp_path, monkeypatch):
    from monai.bundle import ConfigWorkflow, verify_net_in_out

    save_tiny(tmp_path / "tiny")
    model = medmim.from_pretrained(tmp_path / "tiny")
    root = tmp_path / "bundle"
    medmim.export_model(model, root, to="monai-bundle")
    configs = {name: str(root / "configs" / f"{name}.json") for name in ("metadata", "inference")}
    verify_net_in_out("network_def", configs["metadata"], configs["inference"], bundle_root=str(root), device="cpu")

    (root / "scans").mkdir()
    write_scan(root / "scans" / "head.nii.gz")
    workflow = ConfigWorkflow(
        configs["inference"],
        configs["metadata"],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(root),
        device="cpu",
    )
    workflow.initialize()
    network = workflow.network_def
    assert network.spec.weights.volume == model.spec.weights.volume
    assert torch.equal(network(volumes(model, 2)), model(volumes(model, 2)))
    workflow.run()
    pooled = medmim.embed(model, root / "scans" / "head.nii.gz").pooled
    written = load_file(root / "features.safetensors")
    assert any(tensor.shape == pooled.shape and torch.equal(tensor, pooled) for tensor in written.values())


@pytest.mark.parametrize(("name", "decoder"), [("vit_t_mae3d", "light"), ("swin_t_simmim3d", "unet")])
def test_monai_bundle_of_a_segmenter_embeds_by_its_encoder(name, decoder, tmp_path):
    from monai.bundle import ConfigWorkflow, verify_net_in_out

    medmim.save_pretrained(tiny_model(name), tmp_path / "tiny", weights={**RECORD, "decoder_spec": None})
    tiny = f"local-dir:{tmp_path / 'tiny'}"
    model = medmim.create_segmenter(tiny, decoder, num_classes=3, pretrained=True)
    root = tmp_path / "bundle"
    medmim.export_model(model, root, to="monai-bundle")
    configs = [str(root / "configs" / f"{name}.json") for name in ("inference", "metadata")]
    verify_net_in_out("network_def", configs[1], configs[0], bundle_root=str(root), device="cpu")
    (root / "scans").mkdir()
    write_scan(root / "scans" / "head.nii.gz")
    workflow = ConfigWorkflow(*configs, workflow_type="infer", logging_file=False, bundle_root=str(root), device="cpu")
    workflow.initialize()
    workflow.run()
    pooled = medmim.embed(medmim.create_model(tiny, pretrained=True), root / "scans" / "head.nii.gz").pooled
    assert torch.equal(load_file(root / "features.safetensors")["head.nii.gz/pooled"], pooled)


def test_what_was_changed_since_a_model_was_built_is_exported(model, tmp_path):
    model.set_input_size((16, 32, 16))
    medmim.export_model(model, tmp_path / "model.pt2", to="torch-export")
    extra = {"medmim.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["medmim.json"])["args"]["img_size"] == [16, 32, 16]

    model.reset_classifier(2)
    volume = VolumeSpec(intensity={"PET": ZScore()})
    medmim.name_classes(model, ("no", "yes"), volume=volume)
    medmim.export_model(model, tmp_path / "bundle", to="monai-bundle")
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    image = metadata["network_data_format"]["inputs"]["image"]
    assert (image["spatial_shape"], image["modality"], image["value_range"]) == ([16, 32, 16], "PET", [])
    assert medmim.from_pretrained(tmp_path / "bundle" / "models").spec.volume == volume


def test_a_bundle_has_the_channels_of_the_model_where_they_are_the_constructors_own(registry, tmp_path):
    class TwoChannels(VisionTransformer3D):
        def __init__(self, *, in_chans: int = 2, **kwargs):
            super().__init__(in_chans=in_chans, **kwargs)

    medmim.register_model("two", cls=TwoChannels, args=TINY["vit"])
    medmim.save_pretrained(medmim.create_model("two"), tmp_path / "two", weights={**RECORD, "decoder_spec": None})
    medmim.export_model(medmim.from_pretrained(tmp_path / "two"), tmp_path / "bundle", to="monai-bundle")
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    image = metadata["network_data_format"]["inputs"]["image"]
    assert (image["num_channels"], image["channel_def"]) == (2, {"0": "image", "1": "image"})


def test_the_text_of_an_exported_model_builds_it_again():
    model = medmim.create_model("vit_t_mae3d", embed_dim=24, depth=1)
    assert json.loads(export._config(model)) == model.spec.to_data()  # nothing more, as nothing was changed
    model.reset_classifier(2, "attn")
    model.set_input_size((32, 48, 16), (8, 16, 8))
    spec = ModelSpec.parse(json.loads(export._config(model)), source="text")
    again = medmim.create_model(spec.architecture, **spec.args)
    shapes = [{key: tensor.shape for key, tensor in one.state_dict().items()} for one in (model, again)]
    assert shapes[0] == shapes[1]
    assert (again.num_classes, again.global_pool, again.patch_size) == (2, "attn", (8, 16, 8))


@pytest.mark.parametrize("taken", ["bundle", "bundle/models", "bundle/configs", "bundle/models/config.json/folder"])
def test_a_bundle_is_not_begun_where_it_cannot_be_written(taken, model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "save_pretrained", None)
    path = tmp_path / taken
    if taken.endswith("folder"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(OutputError, match=r"^[^\n]*bundle/.*: cannot be written \(.*\); choose another output$"):
        medmim.export_model(model, tmp_path / "bundle", to="monai-bundle")


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_file_is_not_computed_where_it_cannot_be_written(form, model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_trace", None)
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match=r"taken/model: cannot be written \(Not a directory\); choose another output"):
        medmim.export_model(model, tmp_path / "taken" / "model", to=form)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_full_disk_is_one_error_and_leaves_what_was_there(form, model, tmp_path):
    (tmp_path / "x.pt2").write_text("of before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match=r"x\.pt2: cannot be written \(File too large\); make room, or choose"):
            medmim.export_model(model, tmp_path / "x.pt2", to=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "x.pt2").read_text() == "of before"
    assert sorted(os.listdir(tmp_path)) == ["tiny", "x.pt2"]


def test_what_a_bundle_could_not_embed_is_not_exported(tmp_path):
    swin = tiny_model("swin_t_simmim3d")
    medmim.save_pretrained(swin, tmp_path / "tiny", weights={**RECORD, "decoder_spec": None})
    model = medmim.from_pretrained(tmp_path / "tiny", img_size=(32, 40, 16))
    with pytest.raises(SpecError, match=r"no multiple of .* the stride of the encoder's last map"):
        medmim.export_model(model, tmp_path / "bundle", to="monai-bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_model_is_left_as_it_was(tmp_path, monkeypatch):
    model = tiny_model().train()
    model.blocks[0].eval()  # frozen, say
    before = [module.training for module in model.modules()]
    exported = []
    monkeypatch.setitem(export.FORMS, "onnx", lambda model, path: exported.extend(m.training for m in model.modules()))
    medmim.export_model(model, tmp_path / "x.onnx", to="onnx")
    assert exported
    assert not any(exported)
    assert [module.training for module in model.modules()] == before


def test_the_command(tmp_path, monkeypatch, capfd):
    save_tiny(tmp_path / "tiny")
    arguments = ["export", f"local-dir:{tmp_path / 'tiny'}", "--to", "monai-bundle", "-o", str(tmp_path / "bundle")]
    monkeypatch.setattr(sys, "argv", ["medmim", *arguments])
    with contextlib.suppress(SystemExit):
        cli.main()
    assert "".join(capfd.readouterr().out.split()) == str(tmp_path / "bundle")
    assert medmim.from_pretrained(tmp_path / "bundle" / "models").spec.weights.tag == "fake"


def test_what_cannot_be_exported(model, tmp_path, monkeypatch):
    with pytest.raises(SpecError, match=r"no form 'torchscript'.*onnx, torch-export, monai-bundle"):
        medmim.export_model(model, tmp_path / "x", to="torchscript")
    with pytest.raises(WeightsError, match="input contract"):
        medmim.export_model(tiny_model(), tmp_path / "x", to="monai-bundle")
    monkeypatch.setattr(export, "ONNX_BYTES", 1000)
    with pytest.raises(MedmimError, match="an ONNX file holds 2; export it to torch-export"):
        medmim.export_model(model, tmp_path / "x.onnx", to="onnx")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(MedmimError, match=r"needs onnx and onnxscript; pip install 'medmim\[export\]'"):
        medmim.export_model(model, tmp_path / "x.onnx", to="onnx")
    medmim.name_classes(model, ("a", "b", "c"))
    model.reset_classifier(2)
    with pytest.raises(WeightsError, match="has 2 outputs, its task names 3"):
        medmim.export_model(model, tmp_path / "x.pt2", to="torch-export")
    model.spec = None
    with pytest.raises(WeightsError, match="has no spec"):
        medmim.export_model(model, tmp_path / "x.onnx", to="onnx")
    assert os.listdir(tmp_path) == ["tiny"]


def test_forms_of_the_command_line_are_those_of_the_function():
    assert [form.value for form in Form] == list(export.FORMS)
