"""Positions that count more: what the encoder computes is what it would with its positions multiplied."""

from __future__ import annotations

import pytest
import torch

from fakes import TINY, tiny_model
from medmim.errors import SpecError
from medmim_training.balance import raise_positions


@pytest.mark.parametrize("args", [{}, {"class_token": True, "num_registers": 2, "init_values": 0.3}], ids=str)
def test_the_encoder_computes_what_it_would_with_its_positions_multiplied(args):
    balanced, multiplied = (tiny_model(**args).double().eval() for _ in range(2))
    for model in (balanced, multiplied):
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                torch.nn.init.normal_(token, generator=torch.Generator().manual_seed(0))
    x = torch.rand(2, 1, *TINY["vit"]["img_size"], generator=torch.Generator().manual_seed(0)).double()
    before = balanced.forward_features(x)
    raise_positions(balanced, 8.0)
    multiplied.pos_embed *= 8
    after = balanced.forward_features(x)
    # The norms add 1e-6 to variances that are 64 times as small.
    torch.testing.assert_close(after, multiplied.forward_features(x), rtol=1e-3, atol=1e-3)
    assert (after - before).abs().mean() > 0.1


@pytest.mark.parametrize("name", ["swin_t_simmim3d", "resenc_b_mae3d"])
def test_an_encoder_without_positions_is_refused(name):
    with pytest.raises(SpecError, match="position_gain is for plain transformers"):
        raise_positions(tiny_model(name), 2.0)
