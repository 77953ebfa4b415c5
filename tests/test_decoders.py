"""The pretraining decoder of every method: it is published, found again, and predicts what was hidden."""

from __future__ import annotations

import pytest
import torch

import medmim
from fakes import RECORD, tiny_model
from medmim.errors import WeightsError
from medmim.factory import DECODERS, decoder_class
from medmim.golden import golden_outputs
from medmim.layers.tokens import patchify
from medmim.reconstruction import reconstruct

# An encoder of the catalog, the kind of its decoder, and the arguments that the encoder does not decide.
CASES = [
    ("vit_t_mae3d", "mae", {"embed_dim": 24, "depth": 1, "num_heads": 2}),
    ("vit_t_simmim3d", "simmim", {"unit": [8, 16, 8]}),
    ("swin_t_simmim3d", "simmim", {"unit": [16, 16, 8]}),
    ("resenc_b_mae3d", "mae_cnn", {"unit": [16, 16, 8]}),
]
every_case = pytest.mark.parametrize(("name", "kind", "args"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])


def build(name, kind, args):
    model = tiny_model(name).eval()
    cls = decoder_class(kind)
    return model, cls(**cls.of_encoder(model), **args).eval()


def test_every_kind_is_tested():
    assert {kind for _, kind, _ in CASES} == set(DECODERS)


@every_case
def test_it_is_found_beside_the_weights(name, kind, args, tmp_path):
    model, decoder = build(name, kind, args)
    record = {**RECORD, "decoder_spec": {"kind": kind, "args": args}}
    medmim.save_pretrained(model, tmp_path, decoder=decoder, weights=record)
    loaded = medmim.from_pretrained(tmp_path)
    again = medmim.create_decoder(loaded)
    assert again.state_dict().keys() == decoder.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in decoder.state_dict().items())
    expected, outputs = golden_outputs(model, decoder), golden_outputs(loaded, again)
    assert "hidden_patches" in outputs
    assert all(torch.equal(outputs[key], tensor) for key, tensor in expected.items())


@every_case
def test_it_predicts_whole_units_from_the_others(name, kind, args):
    model, decoder = build(name, kind, args)
    for parameter in decoder.parameters():  # some start at zero, and would predict nothing
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    volume = torch.rand(1, 40, 48, 16, generator=torch.Generator().manual_seed(1))
    first = reconstruct(model, decoder, volume, generator=torch.Generator().manual_seed(2))
    units = patchify(first.hidden[None, None, :32].float(), decoder.unit)
    assert torch.equal(units.amin(dim=2), units.amax(dim=2))
    assert torch.equal((first.prediction != volume)[0], first.hidden)
    other = volume.clone()
    other[:, first.hidden] = volume[:, first.hidden].flip(1)  # their minimum stays, which is what lies outside
    again = reconstruct(model, decoder, other, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.prediction, first.prediction)


def test_a_decoder_that_the_encoder_cannot_have(tmp_path):
    model, decoder = build(*CASES[0])
    medmim.save_pretrained(model, tmp_path, decoder=decoder, weights=RECORD)
    loaded = medmim.from_pretrained(tmp_path)
    wrong = loaded.spec.weights.decoder_spec.model_copy(update={"kind": "mae_cnn", "args": {}})
    weights = loaded.spec.weights.model_copy(update={"decoder_spec": wrong})
    loaded.spec = loaded.spec.model_copy(update={"weights": weights})
    with pytest.raises(WeightsError, match="decoder"):
        medmim.create_decoder(loaded)
