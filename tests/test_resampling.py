"""A volume on another grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from medmim.resampling import resample_to

SHAPE, GRID = (9, 14, 11), (13, 8, 17)
LABELS = np.random.default_rng(0).integers(1, 200, SHAPE).astype(np.uint8)


def axes(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    """(3, 3), the directions of a grid whose axes are those of the world in another order and direction."""
    return np.eye(3)[:, list(order)] * signs


def place(directions: np.ndarray, spacing: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The affine of a grid with its middle in the middle of the world."""
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def reference(values: np.ndarray, affine: np.ndarray, grid: np.ndarray, shape: tuple[int, ...], order: int):
    """SciPy's, and which voxels no rounding can move to another one or over the face of the volume."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    to_source = np.linalg.solve(affine, grid)
    places = to_source[:3, :3] @ indices + to_source[:3, 3:]
    sides = np.array(values.shape)[:, None]
    inside = ((places >= -0.5) & (places <= sides - 0.5)).all(axis=0)
    found = map_coordinates(values.astype(float), places, order=order, mode="nearest") * inside
    sure = (np.abs(places - np.floor(places) - 0.5) > 0.01).all(axis=0)
    return found.reshape(shape), sure.reshape(shape)


DIRECTIONS = [
    *(axes(order, (1, 1, 1)) for order in itertools.permutations(range(3))),
    *(axes((2, 0, 1), signs) for signs in itertools.product((1, -1), repeat=3)),
    Rotation.from_euler("xyz", (8, -15, 30), degrees=True).as_matrix(),
    Rotation.from_euler("x", 0.5, degrees=True).as_matrix(),
]


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.9, 1.2)])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_it_is_what_scipy_makes(directions, spacing):
    affine, grid = place(np.eye(3), (1.1, 0.8, 1.3), SHAPE), place(directions, spacing, GRID)
    grid[:3, 3] += 0.123  # off the places that lie between two voxels
    expected, sure = reference(LABELS, affine, grid, GRID, order=0)
    source = MetaTensor(torch.from_numpy(LABELS)[None], affine=torch.from_numpy(affine))
    found = resample_to(source, torch.from_numpy(grid), GRID, mode="nearest")
    assert (found.shape, found.dtype) == ((1, *GRID), torch.uint8)
    np.testing.assert_array_equal(found.affine.numpy(), grid)
    assert sure.mean() > 0.8
    np.testing.assert_array_equal(found[0].numpy()[sure], expected[sure])

    expected, sure = reference(LABELS, affine, grid, GRID, order=1)
    source = MetaTensor(source.as_tensor().float(), affine=torch.from_numpy(affine))
    found = resample_to(source, torch.from_numpy(grid), GRID, mode="bilinear")
    np.testing.assert_allclose(found[0].numpy()[sure], expected[sure], atol=0.02)


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("spacing", [0.5, 2.0, 0.3])
def test_of_two_that_are_as_near_the_same_is_taken_whichever_way_a_grid_goes(signs, spacing):
    affine = place(np.eye(3), (1, 1, 1), (8, 8, 8))
    source = MetaTensor(torch.from_numpy(LABELS[:8, :8, :8])[None], affine=torch.from_numpy(affine))
    shape = (int(8 / spacing) + 1,) * 3  # an odd number of them, so that places lie between voxels
    one, other = (
        resample_to(
            source, torch.from_numpy(place(axes((0, 1, 2), each), (spacing,) * 3, shape)), shape, mode="nearest"
        )
        for each in ((1, 1, 1), signs)
    )
    flipped = [axis + 1 for axis, sign in enumerate(signs) if sign < 0]
    torch.testing.assert_close(other.as_tensor().flip(flipped), one.as_tensor())


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0, 1.5])
def test_labels_do_not_move_where_voxels_lie_halfway(start):
    """From 2 mm to 1 mm every other voxel does; were all of them taken from one side, the whole would move by half."""
    coarse, fine = np.diag([2.0, 2, 2, 1]), np.eye(4)
    coarse[:3, 3] = start
    middle = np.array([30.3, 31.1, 29.6])
    ball = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(31) * 2 + start] * 3, indexing="ij"), -1) - middle, axis=-1)
    source = MetaTensor(torch.from_numpy((ball < 15).astype(np.uint8))[None], affine=torch.from_numpy(coarse))
    found = resample_to(source, torch.from_numpy(fine), (64, 64, 64), mode="nearest")[0].numpy()
    np.testing.assert_allclose(np.argwhere(found).mean(axis=0), middle, atol=0.2)
    assert found.sum() == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.02)
