"""The U-Net decoder: full resolution from any pyramid, and the same numbers as dynamic-network-architectures."""

from __future__ import annotations

import pytest
import torch

from medmim.convert.dynamic_network_architectures import from_residual_encoder, from_unet_decoder
from medmim.errors import WeightsError
from medmim.heads.unet import UNetDecoder
from medmim.models.resenc import ResidualEncoder3D
from resenc_peer import TINY, randomise, reference


def decoder_of(model: torch.nn.Module, out_channels: int = 3) -> UNetDecoder:
    info = model.feature_info
    return UNetDecoder([i["num_chs"] for i in info], [i["reduction"] for i in info], out_channels=out_channels)


def pyramid(channels, reductions, size) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(2, c, *(s // r for s, r in zip(size, reduction, strict=True)), generator=generator)
        for c, reduction in zip(channels, reductions, strict=True)
    ]


@torch.inference_mode()
def test_encoder_and_decoder_give_what_the_peer_gives():
    theirs = randomise(reference(**TINY)).eval()
    encoder = ResidualEncoder3D(**TINY)
    decoder = decoder_of(encoder)
    encoder.load_state_dict(from_residual_encoder(theirs.state_dict()))
    decoder.load_state_dict(from_unet_decoder(theirs.state_dict()))
    x = torch.rand(2, 1, *TINY["img_size"])
    ours, expected = decoder(encoder.forward_intermediates(x, intermediates_only=True)), theirs(x)
    assert ours.shape == (2, 3, *TINY["img_size"])
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_names_of_one_tensor_that_differ_and_unknown_ones_are_refused():
    theirs = reference(**TINY).state_dict()
    key = "decoder.stages.1.convs.0.conv.weight"
    with pytest.raises(WeightsError, match="two names of one tensor") as error:
        from_unet_decoder({**theirs, key: theirs[key] + 1})
    assert key in str(error.value)
    for key in ("decoder.stages.0.convs.1.conv.weight", "extra"):
        with pytest.raises(WeightsError, match=key):
            from_unet_decoder({**theirs, key: torch.zeros(1)})


@pytest.mark.parametrize(
    ("channels", "reductions"),
    [
        ((4, 6, 8), ((1, 1, 1), (1, 2, 2), (3, 4, 2))),
        ((4, 6), ((2, 2, 4), (4, 4, 8))),  # as Swin's: the finest level is below full resolution
        ((6, 6), ((4, 4, 8), (4, 4, 8))),  # as a ViT's: all levels at one resolution
    ],
)
def test_any_pyramid_comes_to_full_resolution(channels, reductions):
    size = (12, 16, 8)
    decoder = UNetDecoder(channels, reductions, out_channels=2)
    maps = [y.requires_grad_() for y in pyramid(channels, reductions, size)]
    out = decoder(maps)
    assert out.shape == (2, 2, *size)
    out.square().mean().backward()
    assert all(y.grad.any() for y in maps)


def test_compiles():
    channels, reductions = (4, 6), ((1, 2, 2), (2, 2, 4))
    decoder, maps = UNetDecoder(channels, reductions, out_channels=2), pyramid(channels, reductions, (4, 8, 8))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(decoder, fullgraph=True, backend="eager")(maps), decoder(maps))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        UNetDecoder((4, 6), ((1, 2, 2), (3, 3, 4)), out_channels=1)
    channels, reductions = (4, 6), ((1, 1, 1), (2, 2, 2))
    decoder = UNetDecoder(channels, reductions, out_channels=1)
    with pytest.raises(ValueError, match="takes 2 maps"):
        decoder(pyramid(channels, reductions, (4, 4, 4))[:1])
