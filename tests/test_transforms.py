"""Preprocessing keeps every voxel at its place in the patient, and can be undone."""

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import LoadImage
from monai.utils import SpaceKeys
from torch import nn

from medmim.errors import ScanError, SpecError
from medmim.formats import LPS_TO_RAS
from medmim.intensity import IntensityMap, intensity_map
from medmim.scans import same_place
from medmim.spec import ModelSpec, Percentile, VolumeSpec, Window, ZScore
from medmim.transforms import VolumeTransform, create_transform, guess_modality, to_grid
from medmim.volumes import Volume, load_volume
from scans import write_dicom

SHAPE = (41, 22, 33)
AXES = {  # columns: the direction of each array axis, before a rotation of 10 degrees
    "RAS": np.eye(3),
    "LPS": np.diag([-1, -1, 1]),
    "SLA": np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]]),
}


def world(affine: np.ndarray, shape) -> np.ndarray:
    """Millimetres of every voxel centre: (D, H, W, 3)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def ramp(position: np.ndarray) -> np.ndarray:
    """A linear function of the place in the patient; interpolation and smoothing leave it as it is."""
    return (position @ np.array([1.0, 2.0, -3.0])).astype(np.float32)


def ramp_volume(axes="SLA", spacing=(0.8, 2.5, 1.1), shape=SHAPE) -> Volume:
    angle = np.deg2rad(10)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ AXES[axes] * spacing
    affine[:3, 3] = (10, -20, 30)
    return Volume(ramp(world(affine, shape))[None], affine)


def volume_spec(**changes) -> VolumeSpec:
    rules = {"CT": Window(low=-1000, high=1000), "MR": Percentile(), "PET": ZScore()}
    return VolumeSpec(**{"orientation": "RAS", "spacing": (2, 3, 1.5), "intensity": rules} | changes)


def interior(array: np.ndarray, margin=4) -> np.ndarray:
    return array[(..., *(slice(margin, -margin),) * 3)]


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR"])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("spacing", [None, (2, 3, 1.5)])
def test_grid_keeps_the_place_in_the_patient(axes, codes, spacing):
    volume = ramp_volume(axes)
    grid = to_grid(volume, volume_spec(orientation=codes, spacing=spacing))
    affine = grid.affine.numpy()
    assert grid.dtype == torch.float32
    assert grid.is_contiguous()
    assert "".join(nib.aff2axcodes(affine)) == codes
    if spacing:
        np.testing.assert_allclose(nib.affines.voxel_sizes(affine), spacing)
    expected = ramp(world(affine, grid.shape[1:]))
    np.testing.assert_allclose(interior(grid.numpy()[0]), interior(expected), atol=1e-3)


def test_grid_without_resampling_only_moves_voxels():
    volume = ramp_volume("SLA")
    grid = to_grid(volume, volume_spec(spacing=None))
    assert tuple(grid.shape) == (1, 22, 33, 41)
    np.testing.assert_array_equal(np.sort(grid.numpy(), axis=None), np.sort(volume.array, axis=None))


def test_grid_of_a_file_equals_grid_of_its_mirror_image(tmp_path):
    volume = ramp_volume("RAS")
    mirrored = np.flip(volume.array[0], axis=(0, 2))
    flip = np.diag([-1.0, 1.0, -1.0, 1.0])
    flip[:3, 3] = (SHAPE[0] - 1, 0, SHAPE[2] - 1)
    nib.save(nib.Nifti1Image(volume.array[0], volume.affine), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(mirrored, volume.affine @ flip), tmp_path / "b.nii.gz")
    first, second = (to_grid(load_volume(tmp_path / name), volume_spec()) for name in ("a.nii.gz", "b.nii.gz"))
    torch.testing.assert_close(first.as_tensor(), second.as_tensor(), atol=1e-3, rtol=0)
    torch.testing.assert_close(first.affine, second.affine, atol=1e-5, rtol=0)


def test_coarser_grid_averages_instead_of_skipping():
    noise = np.random.default_rng(0).standard_normal((1, 40, 40, 40)).astype(np.float32)
    volume = Volume(noise, np.diag([0.5, 0.5, 2.0, 1.0]))
    grid = to_grid(volume, volume_spec(spacing=(2, 2, 2)))
    # 4 x 4 voxels go into one: averaging them would leave a standard deviation of 1/4, skipping would leave 1.
    assert 0.15 < float(grid.std()) < 0.35


def test_only_axes_that_become_coarser_are_smoothed():
    affine = np.eye(4)
    affine[:3, :3] = AXES["SLA"] * 0.5
    noise = np.random.default_rng(0).standard_normal((1, 40, 48, 56)).astype(np.float32)
    grid = to_grid(Volume(noise, affine), volume_spec(spacing=(2, 0.5, 2))).numpy()[0]  # finer along A alone
    along_a = np.corrcoef(grid[:, 1:].ravel(), grid[:, :-1].ravel())[0, 1]
    assert abs(along_a) < 0.1
    assert float(grid.std()) < 0.35


def test_grid_does_not_change_its_input():
    volume = ramp_volume()
    before = volume.array.copy()
    to_grid(volume, volume_spec(spacing=(4, 4, 4)))
    np.testing.assert_array_equal(volume.array, before)


def test_header_in_the_wrong_unit_is_refused():
    volume = ramp_volume(spacing=(800, 2500, 1100))
    with pytest.raises(ScanError, match=r"800 x 2500 x 1100 mm voxels give too large a volume"):
        to_grid(volume, volume_spec())


# --- modality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("air", "modality"), [(0.3, "CT"), (0.02, "CT"), (0.002, "MR"), (0.0, "MR")])
def test_modality_is_guessed_from_air(air, modality):
    generator = np.random.default_rng(0)
    array = np.where(generator.random((1, 48, 40, 44)) < air, -1000, 100).astype(np.int16)
    assert guess_modality(Volume(array, np.eye(4))) == modality


def test_modality_of_the_header_wins():
    assert guess_modality(Volume(np.full((1, 9, 8, 7), -1000), np.eye(4), modality="PET")) == "PET"


def test_modality_that_is_not_covered_is_refused():
    spec = volume_spec(intensity={"CT": Window(low=-1000, high=1000)})
    with pytest.raises(SpecError, match=r"'PET' is not covered .* trained on CT"):
        VolumeTransform(spec, (8, 8, 8), modality="PET")
    with pytest.raises(ScanError, match=r"seems to be MR, but these weights were trained on CT; pass modality="):
        VolumeTransform(spec, (8, 8, 8))(ramp_volume())
    assert VolumeTransform(spec, (8, 8, 8), modality="CT")(ramp_volume()).shape == (1, 8, 8, 8)


def test_channels_of_two_modalities_have_no_rule(tmp_path):
    generator = np.random.default_rng(0)
    ct = np.where(generator.random(SHAPE) < 0.3, -1000, 100).astype(np.int16)
    pet = generator.integers(0, 9, SHAPE).astype(np.int16)
    transform = VolumeTransform(volume_spec(), (8, 8, 8), in_chans=2)
    message = r"seems to be CT and {}, but .* on CT, MR, PET and all channels are prepared alike; pass modality="
    with pytest.raises(ScanError, match=message.format("MR")):
        transform(np.stack([ct, pet]))
    stored = {"PT": pet, "CT": ct}
    series = [write_dicom(tmp_path / code, array, np.eye(4), modality=code) for code, array in stored.items()]
    with pytest.raises(ScanError, match=message.format("PET")):
        transform(series)
    assert VolumeTransform(volume_spec(), (8, 8, 8), in_chans=2, modality="PET")(series).shape == (2, 8, 8, 8)
    assert guess_modality(Volume(np.stack([ct, ct + 1]), np.eye(4))) == "CT"
    assert transform([series[0]] * 2).shape == (2, 8, 8, 8)


# --- intensity --------------------------------------------------------------------------------------------------------


def test_window():
    mapping = intensity_map(Window(low=-100, high=300), np.zeros((2, 2, 2)))
    np.testing.assert_allclose(mapping.apply(np.array([-500, -100, 0, 300, 900], np.int16)), [0, 0, 0.25, 1, 1])


def test_percentile_leaves_out_the_background():
    array = np.zeros((1, 30, 20, 10), np.float32)
    array[:, 15:] = np.random.default_rng(0).uniform(10, 20, (1, 15, 20, 10))
    mapping = intensity_map(Percentile(low=10, high=90), array)
    np.testing.assert_allclose([mapping.low, mapping.high], [11, 19], atol=0.2)


def test_zscore_leaves_out_the_background():
    array = np.full((1, 30, 20, 10), -1000, np.float32)
    array[:, 15:] = np.random.default_rng(0).normal(50, 4, (1, 15, 20, 10))
    scaled = intensity_map(ZScore(), array).apply(array)[:, 15:]
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-4)


@pytest.mark.parametrize("rule", [Percentile(), ZScore()])
@pytest.mark.parametrize("offset", [100, -0.6123, -1024.5])
def test_the_value_of_the_background_makes_no_difference(rule, offset):
    array = np.zeros((1, 40, 44, 36), np.float32)
    array[:, 12:30, 10:34, 8:28] = np.random.default_rng(0).gamma(4, 100, (1, 18, 24, 20))
    spec = volume_spec(spacing=(2, 2, 2), intensity={"MR": rule})
    transform = VolumeTransform(spec, (8, 8, 8), modality="MR", fit="pad")
    affine = ramp_volume(spacing=(1.7, 2.5, 1.6)).affine  # not smoothed, so that only rounding differs
    expected, x = (transform(Volume(array + np.float32(o), affine)).as_tensor() for o in (0, offset))
    torch.testing.assert_close(x, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("rule", [Percentile(), ZScore()])
def test_constant_volume_maps_to_zeros(rule):
    array = np.full((1, 5, 6, 7), 13, np.int16)
    np.testing.assert_array_equal(intensity_map(rule, array).apply(array), np.zeros_like(array))


def test_binary_shape_keeps_its_two_values():
    array = np.zeros((1, 5, 6, 7), np.uint8)
    array[:, 2:4] = 1
    np.testing.assert_array_equal(intensity_map(Percentile(), array).apply(array), array)


@pytest.mark.parametrize("rule", [Percentile(), ZScore()])
def test_statistics_of_a_sample_are_those_of_the_volume(rule, monkeypatch):
    array = np.random.default_rng(0).gamma(2, 100, (1, 64, 48, 56)).astype(np.float32)
    exact = intensity_map(rule, array)
    monkeypatch.setattr("medmim.intensity.SAMPLE_SIZE", 30_000)
    sampled = intensity_map(rule, array)
    assert sampled != exact
    np.testing.assert_allclose([sampled.low, sampled.high], [exact.low, exact.high], rtol=0.1, atol=2)


@settings(max_examples=50, deadline=None)
@given(
    low=st.floats(-2000, 2000),
    width=st.floats(0.1, 4000),
    values=st.lists(st.floats(-5000, 5000, width=32), min_size=1),
)
def test_intensities_are_scaled_and_clipped(low, width, values):
    array = np.array(values)
    scaled = (array - low) / width
    np.testing.assert_allclose(IntensityMap(low, low + width, clip=False).apply(array), scaled, atol=1e-6)
    np.testing.assert_allclose(IntensityMap(low, low + width, clip=True).apply(array), scaled.clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float32])
def test_intensity_of_tensors_and_arrays_agree(dtype):
    tensor = torch.arange(60).reshape(1, 3, 4, 5).to(dtype)
    mapping = intensity_map(Percentile(low=5, high=95), tensor)
    assert mapping == intensity_map(Percentile(low=5, high=95), tensor.numpy())
    assert mapping.apply(tensor).dtype == torch.float32
    np.testing.assert_allclose(mapping.apply(tensor).numpy(), mapping.apply(tensor.numpy()), atol=1e-6)


def test_map_of_the_volume_holds_for_its_crops():
    """What makes preprocessing at use equal that of pretraining: the store keeps `to_grid`, and crops come later."""
    volume, spec = ramp_volume(), volume_spec()
    stored = to_grid(volume, spec).numpy()
    crop = (slice(None), slice(3, 19), slice(2, 10), slice(5, 17))
    in_pretraining = intensity_map(spec.intensity["MR"], stored).apply(stored[crop])
    at_use = VolumeTransform(spec, (8, 8, 8), modality="MR", fit="pad")(volume)
    np.testing.assert_array_equal(in_pretraining, at_use.numpy()[crop])


# --- the whole transform ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("modality", ["CT", "MR", "PET"])
def test_size_and_background(fit, modality):
    size = (16, 24, 20)  # the grid of the ramp is 27 x 13 x 22: longer, shorter and longer than this
    x = VolumeTransform(volume_spec(), size, modality=modality, fit=fit)(ramp_volume())
    assert tuple(x.shape) == ((1, *size) if fit == "crop" else (1, 27, 24, 22))
    inside = slice((24 - 13 + 1) // 2, (24 - 13 + 1) // 2 + 12)
    assert len(x[:, :, 0].unique()) == 1  # padding
    assert len(x[:, :, inside].unique()) > 100
    if fit == "pad":
        assert float(x.min()) == float(x[0, 0, 0, 0])


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("spacing", [None, (2, 3, 1.5)])
def test_inverse_returns_to_the_scan(axes, fit, spacing):
    volume = ramp_volume(axes)
    transform = VolumeTransform(volume_spec(spacing=spacing), (16, 24, 20), modality="CT", fit=fit)
    x = transform(volume)
    back = transform.inverse(x)
    assert back.shape == volume.array.shape
    np.testing.assert_array_equal(back.affine.numpy(), volume.affine)
    expected = (volume.array + 1000) / 2000
    seen = back.numpy() != 0
    assert seen.all() if fit == "pad" else 0.1 < seen.mean() < 0.9
    # At the rim the grid has no more voxels to interpolate with, only the padding.
    seen, back, expected = (interior(array) for array in (seen, back.numpy(), expected))
    np.testing.assert_allclose(back[seen], expected[seen], atol=0.004)


def test_inverse_without_resampling_is_exact():
    volume = ramp_volume()
    transform = VolumeTransform(volume_spec(spacing=None), (8, 8, 8), modality="CT", fit="pad")
    x = transform(volume)
    np.testing.assert_allclose(transform.inverse(x).numpy(), (volume.array + 1000) / 2000, atol=1e-6)


def test_inverse_of_labels_takes_the_nearest_and_keeps_the_type():
    volume = ramp_volume()
    transform = VolumeTransform(volume_spec(), (16, 24, 20), modality="CT", fit="pad")
    x = transform(volume)
    threshold = float(np.median((volume.array + 1000) / 2000))
    labels = torch.stack([(x[0] > threshold) * 7, torch.full(x.shape[1:], 3)]).as_tensor()  # without the geometry
    back = transform.inverse(labels, like=x, labels=True)
    assert back.dtype == labels.dtype
    assert back[0].unique().tolist() == [0, 7]
    assert back[1].unique().tolist() == [3]
    assert np.mean((back[0].numpy() == 7) == ((volume.array[0] + 1000) / 2000 > threshold)) > 0.97


def test_inverse_in_slabs_is_the_inverse(monkeypatch):
    volume = ramp_volume()
    transform = VolumeTransform(volume_spec(), (16, 24, 20), modality="CT")
    x = transform(volume)
    whole = transform.inverse(x)
    monkeypatch.setattr("medmim.resampling.SLAB_VOXELS", 5 * SHAPE[1] * SHAPE[2])
    torch.testing.assert_close(transform.inverse(x).as_tensor(), whole.as_tensor(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("size", [(32, 36, 40), (33, 35, 38)])
def test_inverse_has_the_outermost_slices(axes, size):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = AXES[axes], (-90.3, -126.1, -72.7)
    volume = Volume(ramp(world(affine, size))[None], affine)
    transform = VolumeTransform(volume_spec(spacing=(2, 2, 2)), (16, 16, 16), modality="CT", fit="pad")
    x = transform(volume)
    # Of 32 voxels of 1 mm, the last centre is half a voxel behind the last of 16 of 2 mm.
    assert transform.inverse(torch.ones(x.shape), like=x, labels=True).all()


@pytest.mark.parametrize(
    ("spacing", "off", "same"), [(0.703125, 0.0, True), (0.7031, 0.0, True), (0.71, 0.0, False), (0.7031, 0.2, False)]
)
def test_a_spacing_that_is_a_little_off_counts_where_the_scan_ends(spacing, off, same):
    """Rounded to four digits it is the same grid; off by a hundredth of a millimetre, 512 voxels end 3.5 mm apart."""
    scan, labels = np.diag([0.703125, 0.703125, 5, 1]), np.diag([spacing, spacing, 5, 1])
    labels[2, 3] = off
    assert same_place(labels, scan, (512, 512, 3)) is same


def test_inverse_needs_the_geometry():
    transform = VolumeTransform(volume_spec(), (16, 24, 20), modality="CT")
    with pytest.raises(SpecError, match="needs like="):
        transform.inverse(torch.zeros(1, 16, 24, 20))
    with pytest.raises(SpecError, match=r"shape \(16, 24, 21\) for a scan of \(16, 24, 20\)"):
        transform.inverse(torch.zeros(1, 16, 24, 21), like=transform(ramp_volume()))


def test_array_lies_on_the_grid_already():
    array = np.random.default_rng(0).normal(100, 30, (16, 24, 20)).astype(np.float32)
    transform = VolumeTransform(volume_spec(orientation="SLA"), (16, 24, 20), modality="CT")
    x = transform(array)
    np.testing.assert_allclose(x.numpy()[0], (array + 1000) / 2000, atol=1e-6)
    assert nib.aff2axcodes(x.affine.numpy()) == ("S", "L", "A")
    np.testing.assert_array_equal(transform(array[None]).numpy(), x.numpy())


FORMS = {
    "image": lambda volume: nib.Nifti1Image(volume.array[0], volume.affine),
    "image of one frame": lambda volume: nib.Nifti1Image(volume.array[0][..., None], volume.affine),
    "meta tensor": lambda volume: MetaTensor(volume.array, affine=volume.affine),
    "meta tensor without channels": lambda volume: MetaTensor(volume.array[0], affine=volume.affine),
    "meta tensor in LPS": lambda volume: MetaTensor(
        volume.array, affine=LPS_TO_RAS @ volume.affine, meta={"space": SpaceKeys.LPS}
    ),
    "meta tensor with gradients": lambda volume: MetaTensor(volume.array, affine=volume.affine).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_what_has_an_affine_is_prepared_as_the_volume_is(form):
    volume = ramp_volume()
    transform = VolumeTransform(volume_spec(), (16, 24, 20), modality="CT")
    expected, x = transform(volume), transform(form(volume))
    torch.testing.assert_close(x.as_tensor(), expected.as_tensor())
    torch.testing.assert_close(x.affine, expected.affine)
    assert transform.inverse(x).shape == volume.array.shape


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")  # of LoadImage, which looks for all its readers
@pytest.mark.parametrize("slope", [None, 0.37])
def test_what_a_library_read_from_a_file_is_prepared_as_the_file_is(slope, tmp_path):
    volume, path = ramp_volume(), tmp_path / "scan.nii.gz"
    image = nib.Nifti1Image(volume.array[0].round().astype(np.int16), volume.affine)
    image.header.set_slope_inter(slope, None if slope is None else -12)
    nib.save(image, path)
    transform = VolumeTransform(volume_spec(), (16, 24, 20), modality="CT")
    expected = transform(path)
    for scan in (nib.load(path), str(path), [path], LoadImage()(path)):
        x = transform(scan)
        torch.testing.assert_close(x.as_tensor(), expected.as_tensor())
        assert x.meta["filename_or_obj"] == str(path)
    lazy = nib.load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ScanError, match=r"scan.nii.gz: cannot be read \(.*\); copy or export it again"):
        transform(lazy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_tensors_are_arrays(dtype):
    tensor = torch.from_numpy(np.random.default_rng(0).normal(100, 30, (16, 24, 20))).to(dtype)
    transform = VolumeTransform(volume_spec(), (16, 24, 20), modality="CT")
    expected = transform(tensor.float().numpy())
    for scan in (tensor, tensor[None]):
        x = transform(scan)
        torch.testing.assert_close(x.as_tensor(), expected.as_tensor())
        torch.testing.assert_close(x.affine, expected.affine)


def test_one_file_a_channel(tmp_path):
    volume = ramp_volume()
    paths = [tmp_path / name for name in ("t1.nii.gz", "t2.nii.gz")]
    nib.save(nib.Nifti1Image(volume.array[0], volume.affine), paths[0])
    nib.save(nib.Nifti1Image(-volume.array[0], volume.affine), paths[1])
    transform = VolumeTransform(volume_spec(), (16, 24, 20), in_chans=2, modality="CT")
    expected = transform(Volume(np.concatenate([volume.array, -volume.array]), volume.affine))
    for scan in (paths, tuple(map(str, paths))):
        torch.testing.assert_close(transform(scan).as_tensor(), expected.as_tensor())

    moved = volume.affine.copy()
    moved[0, 3] += 1
    for array, affine in ((volume.array[0, :-1], volume.affine), (volume.array[0], moved)):
        nib.save(nib.Nifti1Image(array, affine), paths[1])
        with pytest.raises(ScanError, match=r"t2.nii.gz: does not lie on .*t1.nii.gz \(.*\); resample one to"):
            transform(paths)


@pytest.mark.parametrize("scan", [None, 3, {}, [], [1, 2], ["a.nii", 3], [[1.0]], b"scan.nii"], ids=repr)
def test_what_is_no_scan_is_refused(scan):
    with pytest.raises(ScanError, match=rf"a scan is a path, .*; this {type(scan).__name__} is none of these"):
        VolumeTransform(volume_spec(), (8, 8, 8))(scan)


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        (nib.Nifti1Image(np.zeros((5, 6, 7, 2), np.int16), np.eye(4)), r"has shape \(5, 6, 7, 2\), which is more than"),
        (nib.Nifti1Image(np.zeros((5, 6, 7), np.int16), None), "the image has no affine"),
        (nib.Nifti1Image(np.zeros((5, 6), np.int16), np.eye(4)), "give a 3-D scan"),
        (torch.zeros(1, 1, 5, 6, 7), "has 4 axes beside the channels"),
        (MetaTensor(torch.full((1, 5, 6, 7), torch.nan)), "are NaN or infinite"),
        (torch.zeros(5, 6, 7, dtype=torch.complex64), "complex"),
    ],
)
def test_images_and_tensors_that_are_no_scan_are_refused(scan, message):
    with pytest.raises(ScanError, match=f"this volume: .*{message}"):
        VolumeTransform(volume_spec(), (8, 8, 8))(scan)


def test_channels_are_scaled_one_by_one():
    first = np.random.default_rng(0).normal(100, 30, (16, 24, 20))
    transform = VolumeTransform(volume_spec(), (16, 24, 20), in_chans=2, modality="MR")
    x = transform(np.stack([first, 5 * first + 3])).as_tensor()
    torch.testing.assert_close(x[0], x[1], atol=1e-5, rtol=0)
    with pytest.raises(ScanError, match=r"has 1 channel\(s\) but the model takes 2"):
        transform(first)


# --- from a model -----------------------------------------------------------------------------------------------------


def model_with(weights_volume: VolumeSpec | None) -> nn.Module:
    model = nn.Identity()
    model.img_size, model.in_chans = (16, 24, 20), 1
    model.spec = ModelSpec(architecture="tiny", family="vit")
    if weights_volume:
        weights = {
            "tag": "toy",
            "encoder": [{"name": "model.safetensors", "sha256": "0" * 64, "size": 1}],
            "license": "MIT",
            "citation": "none",
            "volume": weights_volume.to_data(),
        }
        model.spec = ModelSpec(architecture="tiny", family="vit", weights=weights)
    return model


def test_create_transform_reads_the_weights():
    transform = create_transform(model_with(volume_spec()), modality="CT")
    assert transform.spec == volume_spec()
    assert transform(ramp_volume()).shape == (1, 16, 24, 20)


def test_create_transform_without_weights_says_what_to_pass():
    with pytest.raises(SpecError, match=r"pass volume=VolumeSpec"):
        create_transform(model_with(None))
    assert create_transform(model_with(None), volume=volume_spec(), fit="pad").fit == "pad"


def test_unknown_fit_is_refused():
    with pytest.raises(SpecError, match=r"use \"crop\" or \"pad\""):
        create_transform(model_with(volume_spec()), fit="stretch")
