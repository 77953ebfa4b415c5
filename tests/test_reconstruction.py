"""Reconstruction of whole volumes, the baselines beside it, and the picture of both."""

import itertools
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medmim import reconstruction as module
from medmim.heads.mae import MAEDecoder
from medmim.layers.tokens import gather_patches, to_grid_size
from medmim.models.vit import VisionTransformer3D
from medmim.pictures import PLANES, _plane, reconstruction_picture
from medmim.reconstruction import Reconstruction, mean_fill, nearest_visible, normalised_mse, reconstruct

IMG_SIZE, PATCH_SIZE = (16, 24, 32), (4, 8, 16)
SIZES = [
    (6, 5, 7),  # two patches, neither of them whole
    IMG_SIZE,
    (17, 24, 33),  # a voxel more than a window along two axes
    (40, 25, 70),
    (10, 60, 32),  # smaller than a window along one axis, larger along another
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_volume(size, channels=1, seed=0):
    return torch.rand(channels, *size, generator=seeded(seed))


def make_model(channels=1):
    torch.manual_seed(0)
    model = VisionTransformer3D(IMG_SIZE, PATCH_SIZE, in_chans=channels, embed_dim=24, depth=2, num_heads=2)
    decoder = MAEDecoder(
        24, model.grid_size, patch_size=PATCH_SIZE, in_chans=channels, embed_dim=24, depth=1, num_heads=2
    )
    return model.eval(), decoder.eval()


class Oracle(nn.Module):
    """An encoder and decoder in one that knows the hidden patches, and remembers the windows it was shown."""

    img_size, unit, grid_size, in_chans = IMG_SIZE, PATCH_SIZE, to_grid_size(IMG_SIZE, PATCH_SIZE), 1

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))
        self.windows = []

    def predict(self, encoder, window, idx_keep, idx_hidden):
        self.windows.append(window[0])
        both = [*idx_keep[0].tolist(), *idx_hidden[0].tolist()]
        assert len(set(both)) == len(both) <= math.prod(self.grid_size)
        return gather_patches(window, idx_hidden, self.unit)


# --- reconstruct ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_oracle_has_no_error(size):
    volume, oracle = make_volume(size), Oracle()
    result = reconstruct(oracle, oracle, volume, generator=seeded())
    torch.testing.assert_close(result.prediction, volume)  # the mean of three equal numbers may be off in the last bit
    assert normalised_mse(result.prediction, volume, result.hidden) < 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 2])
def test_hides_whole_patches_and_predicts_all_of_them(size, channels):
    model, decoder = make_model(channels)
    volume = make_volume(size, channels)
    result = reconstruct(model, decoder, volume, generator=seeded())
    assert result.original.shape == result.prediction.shape == volume.shape
    assert result.hidden.shape == volume.shape[1:]
    changed = (result.prediction != volume).any(dim=0)
    assert torch.equal(changed, result.hidden)
    for corner in itertools.product(*(range(0, side, patch) for side, patch in zip(size, PATCH_SIZE, strict=True))):
        patch = tuple(slice(start, start + step) for start, step in zip(corner, PATCH_SIZE, strict=True))
        assert result.hidden[patch].all() or not result.hidden[patch].any()
    assert torch.equal(result.visible.isnan(), result.hidden.expand_as(volume))
    assert torch.equal(result.visible[:, ~result.hidden], volume[:, ~result.hidden])


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_hides_the_exact_share_of_patches(ratio):
    model, decoder = make_model()
    size = (24, 48, 48)  # a grid of 6 x 6 x 3, three windows
    hidden = reconstruct(model, decoder, make_volume(size), ratio=ratio, generator=seeded()).hidden
    assert hidden.sum() == int(ratio * 6 * 6 * 3) * math.prod(PATCH_SIZE)


def test_one_window_is_what_pretraining_computes():
    model, decoder = make_model()
    volume = make_volume(IMG_SIZE)
    result = reconstruct(model, decoder, volume, generator=seeded(3))
    idx_keep, idx_hidden = module.random_hiding(1, math.prod(model.grid_size), 0.75, generator=seeded(3))
    expected = decoder(model.forward_visible(volume[None], idx_keep), idx_keep, idx_hidden)
    assert torch.equal(gather_patches(result.prediction[None], idx_hidden, PATCH_SIZE), expected)


def test_overlapping_windows_are_averaged():
    class Counter(Oracle):
        def predict(self, encoder, window, idx_keep, idx_hidden):
            return torch.full_like(super().predict(encoder, window, idx_keep, idx_hidden), len(self.windows))

    counter, size = Counter(), (24, *IMG_SIZE[1:])  # windows from slice 0 to 16 and from 8 to 24
    result = reconstruct(counter, counter, make_volume(size), overlap=0.5, generator=seeded())
    for start, stop, expected in ((0, 8, 1), (8, 16, 1.5), (16, 24, 2)):
        predicted = result.prediction[:, start:stop][:, result.hidden[start:stop]]
        assert torch.equal(predicted, torch.full_like(predicted, expected))


@pytest.mark.parametrize("size", SIZES)
def test_hidden_voxels_never_reach_the_model(size):
    model, decoder = make_model()
    volume = make_volume(size)
    first = reconstruct(model, decoder, volume, generator=seeded())
    other = volume.clone()
    other[:, first.hidden] = volume[:, first.hidden].flip(1)  # their minimum stays, which is what lies outside
    assert not torch.equal(other, volume)
    assert torch.equal(first.prediction, reconstruct(model, decoder, other, generator=seeded()).prediction)


@pytest.mark.parametrize("size", SIZES)
def test_windows_end_with_the_volume(size):
    oracle, calls = Oracle(), []
    volume = torch.arange(math.prod(size), dtype=torch.float32).view(1, *size)  # values that tell where a voxel lies
    reconstruct(oracle, oracle, volume, generator=seeded(), progress=lambda *call: calls.append(call))
    assert calls == [(done, len(oracle.windows)) for done in range(1, 1 + len(oracle.windows))]
    assert torch.equal(torch.cat([window.flatten() for window in oracle.windows]).unique(), volume.flatten())
    outside = volume.min()
    for window in oracle.windows:
        for axis, (side, patch, width) in enumerate(zip(size, PATCH_SIZE, IMG_SIZE, strict=True)):
            filled = int((window[0] != outside).movedim(axis, 0).flatten(1).any(dim=1).sum())  # slices of the volume
            assert filled in ({side} if side < width else {width, width - -side % patch})


def test_a_volume_smaller_than_a_window_lies_in_its_middle_and_what_is_around_it_is_shown():
    class Recorder(Oracle):
        def predict(self, encoder, window, idx_keep, idx_hidden):
            self.kept = idx_keep
            return super().predict(encoder, window, idx_keep, idx_hidden)

    recorder, volume = Recorder(), make_volume((8, 8, 32), channels=1)  # on a grid of 4 x 3 x 2
    result = reconstruct(recorder, recorder, volume, ratio=0.5, generator=seeded())
    assert result.hidden.float().mean() == 0.5
    own = torch.zeros(recorder.grid_size, dtype=torch.bool)
    own[1:3, 1:2] = True
    shown = torch.zeros_like(own).flatten().index_fill(0, recorder.kept[0], True).view(own.shape)
    assert shown[~own].all()
    assert int(shown[own].sum()) == 2
    window = recorder.windows[0].clone()
    assert torch.equal(window[:, 4:12, 8:16], volume)
    window[:, 4:12, 8:16] = outside = volume.min()
    assert torch.all(window == outside)


def test_is_decided_by_the_generator():
    model, decoder = make_model()
    volume = make_volume((17, 24, 33))
    first, same, other = (reconstruct(model, decoder, volume, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.hidden, same.hidden)
    assert torch.equal(first.prediction, same.prediction)
    assert not torch.equal(first.hidden, other.hidden)


@pytest.mark.parametrize(
    ("shape", "ratio", "message"),
    [((2, 16, 24, 32), 0.75, "takes"), ((16, 24, 32), 0.75, "takes"), ((1, 16, 24, 32), 1.0, "hides 24 of 24")],
)
def test_refuses_what_makes_no_sense(shape, ratio, message):
    model, decoder = make_model()
    with pytest.raises(ValueError, match=message):
        reconstruct(model, decoder, torch.zeros(shape), ratio=ratio)


# --- baselines --------------------------------------------------------------------------------------------------------


def test_mean_fill_takes_the_mean_of_each_channel():
    volume = torch.stack([torch.full((4, 5, 6), 2.0), torch.full((4, 5, 6), 7.0)])
    hidden = torch.zeros(4, 5, 6, dtype=torch.bool)
    hidden[1:3] = True
    volume[:, 1:3] = -100  # must not count
    filled = mean_fill(volume, hidden)
    assert torch.equal(filled, torch.tensor([2.0, 7.0])[:, None, None, None].expand_as(volume))


def test_nearest_visible_is_what_a_search_over_all_voxels_finds():
    volume, hidden = make_volume((5, 7, 6), channels=2), make_volume((5, 7, 6), seed=1)[0] < 0.8
    filled = nearest_visible(volume, hidden)
    visible = (~hidden).nonzero()
    assert torch.equal(filled[:, ~hidden], volume[:, ~hidden])
    for voxel in hidden.nonzero():
        distances = ((visible - voxel) ** 2).sum(dim=1)
        candidates = volume[(slice(None), *visible[distances == distances.min()].T)]  # ties may go either way
        assert (candidates == filled[(slice(None), *voxel)][:, None]).all(dim=0).any()


def test_nearest_visible_in_blocks_is_as_good_as_at_once(monkeypatch):
    volume = make_volume((33, 20, 41))
    hidden = make_volume((33, 20, 41), seed=1)[0] < 0.7
    volume = volume.cumsum(1).cumsum(2).cumsum(3)  # smooth, so that ties hardly matter
    whole = normalised_mse(nearest_visible(volume, hidden), volume, hidden)
    monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(module, "MARGIN", 6)
    assert normalised_mse(nearest_visible(volume, hidden), volume, hidden) == pytest.approx(whole, rel=0.05)


def test_nearest_visible_far_from_everything_is_the_mean(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "MARGIN", 2)
    volume = make_volume((4, 4, 40))
    hidden = torch.ones(4, 4, 40, dtype=torch.bool)
    hidden[..., :4] = False
    filled = nearest_visible(volume, hidden)
    assert torch.equal(filled[..., 20:], mean_fill(volume, hidden)[..., 20:])
    assert torch.equal(filled[..., 4], volume[..., 3])


# --- the error --------------------------------------------------------------------------------------------------------


def test_normalised_mse_is_error_over_variance():
    volume = make_volume((9, 8, 7), channels=2) + 1000
    hidden = make_volume((9, 8, 7), seed=1)[0] < 0.6
    values = volume[:, hidden].double()
    expected = 0.25 / float(values.var(correction=0))
    assert normalised_mse(volume + 0.5, volume, hidden) == pytest.approx(expected, rel=1e-4)
    assert normalised_mse(torch.full_like(volume, float(values.mean())), volume, hidden) == pytest.approx(1, rel=1e-4)


def test_mean_fill_of_noise_has_an_error_of_about_one():
    volume = make_volume((40, 30, 20))
    hidden = make_volume((40, 30, 20), seed=1)[0] < 0.75
    assert normalised_mse(mean_fill(volume, hidden), volume, hidden) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("hidden", [torch.zeros(4, 4, 4, dtype=torch.bool), torch.ones(4, 4, 4, dtype=torch.bool)])
def test_nothing_to_compare_is_nan(hidden):
    assert math.isnan(normalised_mse(torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), hidden))


# --- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR", "PIL"])
def test_planes_show_the_patient_the_same_way_whatever_the_axes(orientation):
    volume = np.random.default_rng(0).random((5, 7, 9))  # odd sides: the middle slice is the same from both ends
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    turned = nib.orientations.apply_orientation(volume, turn)
    for _, top, left in PLANES:
        np.testing.assert_array_equal(_plane(turned, top, left, orientation), _plane(volume, top, left, "RAS"))


def test_planes_are_as_radiologists_look_at_them():
    volume = np.zeros((3, 5, 7))
    volume[2, 4, :], volume[2, :, 6], volume[:, 4, 6] = 1, 2, 3  # right and front; right and top; front and top
    axial, coronal, sagittal = (_plane(volume, top, left, "RAS") for _, top, left in PLANES)
    assert axial.shape == (5, 3)
    assert axial[0, 0] == 1
    assert coronal.shape == (7, 3)
    assert coronal[0, 0] == 2
    assert sagittal.shape == (7, 5)
    assert sagittal[0, 0] == 3


@pytest.mark.parametrize("size", [(20, 30, 40), (3, 4, 5), (200, 200, 3)])
def test_picture_is_a_png(tmp_path, size):
    volume = make_volume(size)
    hidden = make_volume(size, seed=1)[0] < 0.75
    path = tmp_path / "new" / "picture.png"
    reconstruction_picture(Reconstruction(volume, hidden, volume + 0.1), path, spacing=(1, 2.5, 3), title="x")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_picture_of_a_constant_volume(tmp_path):
    volume = torch.zeros(1, 8, 8, 8)
    reconstruction_picture(Reconstruction(volume, volume[0] > 0, volume), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("title", ["scan$_$1", "no text: \udcff", "two\nlines"])
def test_any_name_may_stand_above_a_picture(tmp_path, title):
    volume = make_volume((8, 8, 8))
    reconstruction_picture(Reconstruction(volume, volume[0] > 0.5, volume), tmp_path / "picture.png", title=title)
    assert (tmp_path / "picture.png").exists()
