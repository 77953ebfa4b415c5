"""The contract of segmenters: every encoder of the catalog with every decoder that fits it, tiny, non-cubic."""

from __future__ import annotations

import json

import pytest
import torch
from monai.networks.nets import UNETR
from timm.optim import param_groups_layer_decay

import medmim
from fakes import FITTING, RECORD, TINY, save_tiny, tiny_model
from medmim.errors import SpecError, UnknownModelError, WeightsError
from medmim.golden import difference, golden_outputs
from medmim.heads.segmenter import DECODERS, Segmenter
from medmim.heads.unetr import UNETRDecoder
from medmim.layers.upsampling import upsampling_strides
from medmim.spec import ModelSpec, VolumeSpec, ZScore
from medmim.tasks import encoder_of
from medmim.verify import GOLDEN, verify

THIN = {"unetr": {"feature_size": 2}, "light": {"width": 2}}
CLASSES = ("background", "anterior", "posterior")
PAIRS = [(name, decoder) for name in medmim.list_models() for decoder in FITTING[medmim.model_info(name).family]]
ONE_OF_EACH = [
    (name, decoder)
    for name in {medmim.model_info(name).family: name for name in medmim.list_models()}.values()
    for decoder in FITTING[medmim.model_info(name).family]
]


def tiny_segmenter(name: str, decoder: str, **args):
    torch.manual_seed(0)
    args = {**TINY[medmim.model_info(name).family], **args}
    return medmim.create_segmenter(name, decoder, classes=CLASSES, decoder_args=THIN.get(decoder), **args)


def volumes(model, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "decoder"), PAIRS)
def test_scores_of_each_voxel_with_gradients_down_to_the_first_layer(name, decoder):
    model = tiny_segmenter(name, decoder, in_chans=2)
    scores = model(volumes(model))
    assert scores.shape == (2, 3, *model.img_size)
    scores.square().mean().backward()
    first = next(p for n, p in model.encoder.named_parameters() if n.endswith("weight") and p.ndim == 5)
    assert first.grad.any()
    # The map of a token encoder's output is not what every decoder takes alone, but all of it is used.
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("name", "decoder"), ONE_OF_EACH)
def test_saved_and_loaded_by_its_own_methods(name, decoder, tmp_path):
    model = tiny_segmenter(name, decoder).eval()
    assert model.save_pretrained(tmp_path) == medmim.from_pretrained(tmp_path).spec
    loaded = Segmenter.from_pretrained(tmp_path)
    x = volumes(model)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(WeightsError, match="holds a Segmenter, not a "):
        type(model.encoder).from_pretrained(tmp_path)


def test_published_by_its_own_method_and_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path))
    model = tiny_segmenter("vit_t_mae3d", "light")
    record = {key: value for key, value in RECORD.items() if key != "decoder_spec"}
    published = model.push_to_hub("org/name", weights=record, card="# A card")
    name = f"hf-hub:org/name@{published.commit}"
    checks = {check.item: check.fault for check in verify(name)}
    assert GOLDEN in checks
    assert set(checks.values()) == {None}
    loaded = medmim.create_model(name, pretrained=True)
    golden = golden_outputs(loaded)
    assert golden["scores"].shape[0] == len(CLASSES)
    torch.nn.init.normal_(next(loaded.decoder.parameters()))
    assert difference(golden_outputs(loaded), golden) is not None


@pytest.mark.parametrize(("name", "decoder"), ONE_OF_EACH)
def test_saved_and_loaded_is_bit_equal(name, decoder, tmp_path):
    model = tiny_segmenter(name, decoder).eval()
    spec = medmim.save_pretrained(model, tmp_path)
    loaded = medmim.from_pretrained(tmp_path)
    assert torch.equal(loaded(volumes(model)), model(volumes(model)))
    assert not loaded.training
    assert loaded.spec == spec
    assert loaded.spec.task.classes == CLASSES
    assert loaded.spec.task.decoder.kind == decoder


@pytest.mark.parametrize(("name", "decoder"), ONE_OF_EACH)
def test_the_pretrained_encoder_inside_gives_its_features_bit_for_bit(name, decoder, tmp_path):
    encoder = tiny_model(name).eval()
    medmim.save_pretrained(encoder, tmp_path, weights={**RECORD, "decoder_spec": None})
    model = medmim.create_segmenter(f"local-dir:{tmp_path}", decoder, num_classes=3, pretrained=True)
    x = volumes(model)
    assert torch.equal(model.encoder.forward_features(x), encoder.forward_features(x))
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[1]))
    model(x)
    output, maps = encoder.forward_intermediates(x, norm=model.decoder.norm_taps)
    if output.ndim == 3:
        output = output.mT.unflatten(2, encoder.grid_size)
    expected = [*(maps[tap] for tap in model.decoder.taps), output]
    assert len(seen) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


@pytest.mark.parametrize(("name", "decoder"), ONE_OF_EACH)
def test_layer_decay_covers_all_parameters_once_and_the_decoder_learns_at_the_full_rate(name, decoder):
    model = tiny_segmenter(name, decoder)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == {id(p) for p in model.parameters()}
    assert {scale[id(p)] for p in model.decoder.parameters()} == {1.0}
    inside = {name: scale[id(p)] for name, p in model.encoder.named_parameters()}
    assert max(inside.values()) == 0.5
    alone = param_groups_layer_decay(
        model.encoder, 0.05, no_weight_decay_list=model.encoder.no_weight_decay(), layer_decay=0.5
    )
    for group in alone:
        for parameter in group["params"]:
            # One layer more lies behind: the decoder. Without a classifier nothing lies behind the encoder's last.
            assert scale[id(parameter)] == group["lr_scale"] / 2
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert not any(decay[id(named[key])] for key in model.no_weight_decay() & named.keys())


@pytest.mark.parametrize(("name", "decoder"), ONE_OF_EACH)
def test_a_new_decoder_expects_background_nearly_everywhere(name, decoder):
    with torch.no_grad():
        model = tiny_segmenter(name, decoder)
        # Where the features say nothing.
        for parameter in list(model.decoder.parameters())[:-1]:
            parameter.zero_()
        shares = model(volumes(model)).softmax(1).mean((0, 2, 3, 4))
    assert shares.tolist() == pytest.approx([0.99, 0.005, 0.005])


@pytest.mark.parametrize(("name", "decoder"), ONE_OF_EACH)
def test_sizes_that_round_up_and_other_input_sizes(name, decoder):
    model = tiny_segmenter(name, decoder).eval()
    size = tuple(patch * grid for patch, grid in zip(model.patch_size, (5, 3, 7), strict=True))
    model.set_input_size(size)
    assert model(volumes(model)).shape == (2, 3, *size)


@pytest.mark.parametrize(("name", "decoder"), ONE_OF_EACH)
def test_checkpointed_encoders_give_the_same_scores_and_gradients(name, decoder):
    model = tiny_segmenter(name, decoder)
    first = next(model.encoder.parameters())

    def gradient():
        model.zero_grad()
        model(volumes(model)).square().mean().backward()
        return first.grad.clone()

    plain = gradient()
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradient(), plain)


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_that_does_not_fit_says_which_one_does(family, decoder):
    name = next(name for name in medmim.list_models() if medmim.model_info(name).family == family)
    if decoder in FITTING[family]:
        return
    with pytest.raises(SpecError, match=rf"decoder {decoder} does not fit {name}: .*; use {FITTING[family][0]}"):
        tiny_segmenter(name, decoder)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ("unetr", "decoder unetr: there is no argument 'feature_sise'; nearest: feature_size; accepted: feature_size"),
        ("linear", "decoder linear: there is no argument 'feature_sise'; accepted: none"),
    ],
)
def test_an_argument_of_a_decoder_that_does_not_exist(decoder, message):
    with pytest.raises(SpecError, match=f"^{message}"):
        medmim.create_segmenter("vit_t_mae3d", decoder, num_classes=2, decoder_args={"feature_sise": 8})


# --- UNETR ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_unetr_gives_what_monai_gives():
    theirs = UNETR(1, 3, img_size=(32, 48, 16), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2).eval()
    theirs.out.conv.conv.weight.data += 0.5
    ours = medmim.create_segmenter(
        "vit_t_mae3d", "unetr", num_classes=3, decoder_args={"feature_size": 4}, img_size=(32, 48, 16), embed_dim=24,
        num_heads=2,
    ).eval()  # fmt: skip
    decoder = ours.decoder
    assert decoder.taps == (3, 6, 9)
    pairs = [
        (decoder.volume, theirs.encoder1),
        *zip(decoder.projections, (theirs.encoder4, theirs.encoder3, theirs.encoder2), strict=True),
        *zip(decoder.merges, (theirs.decoder5, theirs.decoder4, theirs.decoder3, theirs.decoder2), strict=True),
        (decoder.to_classes, theirs.out),
    ]
    for mine, other in pairs:
        tensors = other.state_dict().values()
        mine.load_state_dict(dict(zip(mine.state_dict(), tensors, strict=True)))
    x = torch.rand(2, 1, 32, 48, 16)
    output, hidden = theirs.vit(x)
    maps = [state.mT.unflatten(2, (2, 3, 1)) for state in (*(hidden[i] for i in decoder.taps), output)]
    expected = theirs(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(decoder(x, maps), expected)


@pytest.mark.parametrize(
    ("patch", "steps"),
    [((16, 16, 16), 4), ((8, 8, 8), 3), ((4, 16, 8), 4), ((6, 12, 2), 3), ((2, 2, 2), 1), ((5, 7, 1), 1)],
)
def test_unetr_takes_any_patch(patch, steps):
    img_size = tuple(side * 2 for side in patch)
    encoder = tiny_model(img_size=img_size, patch_size=patch, depth=4)
    decoder = UNETRDecoder(encoder, num_classes=2, feature_size=2)
    assert len(decoder.taps) == steps - 1
    maps = [torch.rand(1, 48, 2, 2, 2) for _ in range(steps)]
    assert decoder(torch.rand(1, 1, *img_size), maps).shape == (1, 2, *img_size)


def test_steps_multiply_to_the_patch_and_flat_ones_come_last():
    assert upsampling_strides((4, 16, 16)) == [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]
    assert upsampling_strides((12, 5, 1)) == [(3, 5, 1), (2, 1, 1), (2, 1, 1)]
    assert upsampling_strides((1, 1, 1)) == []


# --- specs ------------------------------------------------------------------------------------------------------------


def test_a_stored_segmenter_keeps_its_classes_unless_it_gets_a_new_decoder(tmp_path):
    stored = f"local-dir:{tmp_path}"
    medmim.save_pretrained(medmim.create_segmenter("vit_t_mae3d", "light", num_classes=3, **TINY["vit"]), tmp_path)
    with pytest.raises(SpecError, match="segments into 3 classes, not 5; create_segmenter gives its encoder a new"):
        medmim.create_model(stored, pretrained=True, num_classes=5)
    same = medmim.create_model(stored, pretrained=True, num_classes=3)
    assert (same.num_classes, same.encoder.num_classes) == (3, 0)
    other = medmim.create_segmenter(stored, "light", num_classes=5, pretrained=True)
    assert other(torch.zeros(1, 1, *other.img_size)).shape[1] == len(other.spec.task.classes) == 5


def test_the_record_of_the_encoders_weights_and_another_preprocessing_are_kept(tmp_path):
    save_tiny(tmp_path / "encoder")
    volume = VolumeSpec.parse({"spacing": [1, 1, 2], "intensity": {"MR": {"kind": "zscore"}}}, source="test")
    name = f"local-dir:{tmp_path / 'encoder'}"
    model = medmim.create_segmenter(name, "light", classes=CLASSES, pretrained=True, volume=volume)
    medmim.save_pretrained(model, tmp_path / "segmenter")
    loaded = medmim.from_pretrained(tmp_path / "segmenter")
    assert loaded.spec.volume == volume
    assert loaded.spec.weights.license == RECORD["license"]
    assert loaded.spec.weights.decoder is None
    assert medmim.create_transform(loaded).spec == volume
    plain = medmim.create_segmenter(name, "light", classes=CLASSES, pretrained=True)
    assert plain.spec.volume == plain.spec.weights.volume


def test_a_damaged_segmenter_is_refused(tmp_path):
    save_tiny(tmp_path / "encoder")
    model = medmim.create_segmenter(f"local-dir:{tmp_path / 'encoder'}", "linear", classes=CLASSES, pretrained=True)
    medmim.save_pretrained(model, tmp_path / "segmenter")
    file = tmp_path / "segmenter" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        medmim.from_pretrained(tmp_path / "segmenter")


def test_weights_of_a_segmenter_are_fitted_to_another_input(tmp_path):
    model = tiny_segmenter("vit_t_mae3d", "light", pos_embed="learned").eval()
    medmim.save_pretrained(model, tmp_path)
    larger = medmim.from_pretrained(tmp_path, img_size=(64, 48, 32), dtype=torch.float64)
    assert larger(volumes(larger).double()).shape == (2, 3, 64, 48, 32)
    model.set_input_size((64, 48, 32))
    torch.testing.assert_close(larger.float()(volumes(larger)), model(volumes(model)))


def test_the_encoder_of_a_segmenter_starts_another_task(tmp_path):
    model = tiny_segmenter("vit_t_mae3d", "light")
    medmim.save_pretrained(model, tmp_path)
    other = medmim.create_segmenter(f"local-dir:{tmp_path}", "linear", num_classes=2, pretrained=True)
    assert all(torch.equal(p, q) for p, q in zip(model.encoder.parameters(), other.encoder.parameters(), strict=True))
    assert other.spec.task.classes == ("background", "class 1")


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_a_segmenter_from_a_fine_tuned_model_prepares_scans_as_that_one(kind, tmp_path):
    save_tiny(tmp_path / "encoder")
    volume = VolumeSpec.parse({"spacing": [1, 1, 2], "intensity": {"MR": {"kind": "zscore"}}}, source="test")
    name = f"local-dir:{tmp_path / 'encoder'}"
    if kind == "segmentation":
        tuned = medmim.create_segmenter(name, "light", classes=CLASSES, pretrained=True, volume=volume)
    else:
        tuned = medmim.create_model(name, pretrained=True, num_classes=3)
        medmim.name_classes(tuned, CLASSES, volume=volume)
    saved = medmim.save_pretrained(tuned, tmp_path / "tuned")
    assert saved.volume == volume != saved.weights.volume

    stored = f"local-dir:{tmp_path / 'tuned'}"
    encoder = encoder_of(medmim.create_model(stored, pretrained=True))
    assert (encoder.spec.volume, encoder.spec.task, encoder.num_classes) == (volume, None, 0)
    again = medmim.create_segmenter(stored, "linear", num_classes=2, pretrained=True)
    assert again.spec.volume == volume
    # What it started from are the weights of the first task, which are not those of the pretraining any more.
    assert (again.spec.task.origin.name, again.spec.task.kind) == (saved.name, "segmentation")
    assert medmim.save_pretrained(again, tmp_path / "again").name == f"{saved.name}_segmentation"
    other = VolumeSpec(intensity={"PET": ZScore()})
    assert medmim.create_segmenter(stored, "linear", num_classes=2, pretrained=True, volume=other).spec.volume == other


@pytest.mark.parametrize("args", [{"num_classes": 5}, {"num_classes": 0}])
def test_another_classifier_on_a_fine_tuned_one_is_given_scans_as_that_one(args, tmp_path):
    save_tiny(tmp_path / "encoder")
    volume = VolumeSpec.parse({"spacing": [1, 1, 2], "intensity": {"MR": {"kind": "zscore"}}}, source="test")
    tuned = medmim.from_pretrained(tmp_path / "encoder", num_classes=3)
    medmim.name_classes(tuned, CLASSES, volume=volume)
    medmim.save_pretrained(tuned, tmp_path / "tuned")
    other = medmim.from_pretrained(tmp_path / "tuned", **args)
    assert other.spec.task is None
    assert medmim.create_transform(other).spec == volume
    assert medmim.save_pretrained(other, tmp_path / "other").volume == volume


@pytest.mark.parametrize("decoder", ["light", None])
def test_a_model_for_a_task_that_is_built_anew_started_from_no_weights(decoder, tmp_path):
    save_tiny(tmp_path / "encoder")
    name = f"local-dir:{tmp_path / 'encoder'}"
    if decoder is not None:
        tuned = medmim.create_segmenter(name, decoder, classes=CLASSES, pretrained=True)
    else:
        tuned = medmim.create_model(name, pretrained=True, num_classes=3)
        medmim.name_classes(tuned, CLASSES)
    saved = medmim.save_pretrained(tuned, tmp_path / "tuned")
    assert saved.task.origin is not None
    stored, file = f"local-dir:{tmp_path / 'tuned'}", tmp_path / "tuned" / "model.safetensors"
    for model in (medmim.create_model(stored), medmim.create_model(stored, checkpoint_path=file)):
        anew = medmim.save_pretrained(model, tmp_path / "anew")
        assert (anew.weights, anew.task.origin, anew.task.classes) == (None, None, CLASSES)
    assert medmim.create_model(stored, pretrained=True).spec.task == saved.task


def test_a_segmenter_that_was_saved_without_a_record_hands_its_preprocessing_on(tmp_path):
    volume = VolumeSpec(intensity={"PET": ZScore()})
    medmim.save_pretrained(tiny_segmenter("vit_t_mae3d", "light", volume=volume), tmp_path)
    again = medmim.create_segmenter(f"local-dir:{tmp_path}", "linear", num_classes=2, pretrained=True)
    assert (again.spec.volume, again.spec.task.origin) == (volume, None)


def test_a_classifier_keeps_its_class_names(tmp_path):
    model = tiny_model(num_classes=2)
    volume = VolumeSpec.parse({"intensity": {"MR": {"kind": "zscore"}}}, source="test")
    medmim.name_classes(model, ("benign", "malignant"), volume=volume)
    medmim.save_pretrained(model, tmp_path)
    loaded = medmim.from_pretrained(tmp_path)
    assert loaded.spec.task.classes == ("benign", "malignant")
    assert loaded.spec.task.kind == "classification"
    assert medmim.create_transform(loaded).spec == volume
    assert medmim.from_pretrained(tmp_path, num_classes=5).spec.task is None


def test_an_older_config_has_no_task(tiny_folder):
    folder, spec = tiny_folder
    assert "task" not in json.loads((folder / "config.json").read_text())
    assert spec.task is None
    assert spec.volume == spec.weights.volume


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({}, SpecError, "needs num_classes="),
        ({"num_classes": 2, "classes": CLASSES}, SpecError, "num_classes is 2, but 3 classes"),
        ({"num_classes": 0}, SpecError, "needs two classes or more, the background included"),
        ({"num_classes": 1}, SpecError, "needs two classes or more, the background included"),
        ({"classes": ("a",)}, SpecError, "needs two classes or more, the background included"),
        ({"classes": ("a", "a")}, SpecError, "same name"),
        ({"num_classes": 2, "decoder": "unetrr"}, SpecError, "there is no decoder 'unetrr'; there are unetr, unet"),
        ({"num_classes": 2, "decoder_args": {"widht": 4}}, SpecError, "widht"),
        ({"num_classes": 2, "imgsize": (16, 16, 16)}, UnknownModelError, "nearest: img_size"),
    ],
)
def test_what_cannot_be_built_is_refused(args, error, message):
    decoder = args.pop("decoder", "unetr")
    with pytest.raises(error, match=message):
        medmim.create_segmenter("vit_t_mae3d", decoder, **{**TINY["vit"], **args})


def test_names_that_do_not_match_the_outputs_are_refused(tmp_path):
    with pytest.raises(SpecError, match="has 2 outputs, but 3 classes"):
        medmim.name_classes(tiny_model(num_classes=2), CLASSES)
    task = {"kind": "segmentation", "classes": ["a", "b"]}
    with pytest.raises(SpecError, match="needs a decoder"):
        ModelSpec.parse({"architecture": "vit", "family": "vit", "task": task}, source="config.json")
