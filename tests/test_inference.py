"""Features of a whole scan are those of its windows, each at its place."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import medmim
from fakes import tiny_model
from medmim.errors import ScanError, SpecError
from medmim.heads.segmenter import Segmenter
from medmim.inference import dense_features, embed, foreground_patches, save_embeddings
from medmim.models.vit import VisionTransformer3D
from medmim.spec import PartSpec, VolumeSpec, Window
from medmim.volumes import Volume

PATCH, WINDOW = (4, 8, 2), (16, 24, 12)  # a token grid of 4 x 3 x 6
SPEC = VolumeSpec(orientation="RAS", spacing=(2, 1, 3), intensity={"CT": Window(low=-1000, high=1000)})


class PatchMeans(nn.Module):
    """An encoder whose token is the mean of its patch and that of its window, behind two prefix tokens."""

    patch_size, img_size, grid_size, in_chans = PATCH, WINDOW, (4, 3, 6), 1
    num_features, num_prefix_tokens, spec = 2, 2, None

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.batches = []

    def forward_features(self, x):
        self.batches.append(len(x))
        assert tuple(x.shape[1:]) == (1, *WINDOW)
        means = nn.functional.avg_pool3d(x, PATCH).flatten(1)[..., None]  # (B, N, 1)
        tokens = torch.cat([means, means.mean(dim=1, keepdim=True).expand_as(means)], dim=2)  # (B, N, 2)
        tokens = torch.cat([torch.full_like(tokens[:, :2], 1e6), tokens], dim=1)
        return self.dropout(tokens * self.scale)


def vit() -> VisionTransformer3D:
    torch.manual_seed(0)
    return VisionTransformer3D(WINDOW, PATCH, embed_dim=24, depth=2, num_heads=3, class_token=True).eval()


def noise(*shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# --- dense features ---------------------------------------------------------------------------------------------------


def test_volume_of_one_window_is_the_plain_forward_pass():
    model, x = vit(), noise(1, *WINDOW)
    with torch.no_grad():
        tokens = model.forward_features(x[None])[0, model.num_prefix_tokens :]
        features = dense_features(model, x)
        pooled = model(x[None])[0]
    torch.testing.assert_close(features.flatten(1).T, tokens, atol=1e-5, rtol=1e-5)
    assert tuple(features.shape[1:]) == model.grid_size
    torch.testing.assert_close(features.mean(dim=(1, 2, 3)), pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_two_windows_side_by_side_are_two_volumes(axis):
    model, first, second = vit(), noise(1, *WINDOW), 1 - noise(1, *WINDOW)
    together = dense_features(model, torch.cat([first, second], dim=axis), overlap=0)
    apart = torch.cat([dense_features(model, first), dense_features(model, second)], dim=axis)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(16, 24, 12), (20, 48, 13), (37, 25, 31), (3, 5, 1), (16, 100, 12)])
def test_every_patch_lies_at_its_place(shape, overlap):
    x = noise(1, *shape)
    features = dense_features(PatchMeans(), x, overlap=overlap)
    grid = tuple(max(math.ceil(side / p), w // p) for side, p, w in zip(shape, PATCH, WINDOW, strict=True))
    padded = torch.full((1, *(side * p for side, p in zip(grid, PATCH, strict=True))), float(x.min()))
    padded[:, : shape[0], : shape[1], : shape[2]] = x
    torch.testing.assert_close(features[0], nn.functional.avg_pool3d(padded[None], PATCH)[0, 0], atol=1e-5, rtol=1e-5)


def test_windows_overlap_and_blend():
    x = torch.zeros(1, 28, 24, 12)  # a grid of 7 along the first axis: windows at 0, 2 and 3 with half overlap
    x[:, :16] = 1
    blended = dense_features(PatchMeans(), x, overlap=0.5)[1, :, 0, 0]
    assert float(blended[0]) == pytest.approx(1)
    assert float(blended[-1]) == pytest.approx(0.25)
    assert bool((blended.diff() <= 1e-6).all())


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batches_change_nothing_but_the_batches(batch_size):
    model, calls = PatchMeans(), []
    x = noise(1, 30, 40, 20)
    features = dense_features(model, x, batch_size=batch_size, progress=lambda *call: calls.append(call))
    torch.testing.assert_close(features, dense_features(PatchMeans(), x), atol=1e-6, rtol=0)
    total = sum(model.batches)
    assert max(model.batches) == min(batch_size, total)
    assert calls[-1] == (total, total)
    assert len(calls) == len(model.batches)


# --- encoders of the catalog ------------------------------------------------------------------------------------------


def encoders() -> dict[str, nn.Module]:
    """One of each family, pruned to maps of another stride, and inside of a segmenter."""
    families = {medmim.model_info(name).family: name for name in medmim.list_models()}
    models = {family: tiny_model(name, in_chans=2) for family, name in families.items()}
    for family in ("resenc", "swin"):
        models[f"{family}-pruned"] = tiny_model(families[family], in_chans=2)
        models[f"{family}-pruned"].prune_intermediate_layers([0])
    for family, model in list(models.items())[: len(families)]:
        decoder = PartSpec(kind="linear")
        models[f"{family}-segmenter"] = Segmenter(model, decoder, num_classes=2)
    return {name: model.eval() for name, model in models.items()}


ENCODERS = encoders()


@pytest.mark.parametrize("model", ENCODERS.values(), ids=ENCODERS.keys())
def test_every_encoder_embeds(model):
    encoder = getattr(model, "encoder", model)
    x = noise(2, *encoder.img_size)
    with torch.no_grad():
        final, maps = encoder.forward_intermediates(x[None], [-1], norm=True)
        pooled = encoder.forward_head(final, pre_logits=True)[0]
    features = dense_features(model, x)
    torch.testing.assert_close(features, maps[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.mean(dim=(1, 2, 3)), pooled, atol=1e-4, rtol=1e-4)
    for axis in (1, 2, 3):
        together = dense_features(model, torch.cat([x, 1 - x], dim=axis), overlap=0)
        apart = torch.cat([features, dense_features(model, 1 - x)], dim=axis)
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)

    shape = tuple(side + 3 for side in encoder.img_size)
    scan = Volume(noise(2, *shape).numpy(), np.diag([2.0, 1.0, 3.0, 1.0]))
    embedding = embed(model, scan, volume=SPEC, modality="CT")
    stride = encoder.feature_info[-1]["reduction"]
    assert tuple(embedding.features.shape[1:]) == tuple(
        math.ceil(side / step) for side, step in zip(shape, stride, strict=True)
    )
    np.testing.assert_allclose(np.diag(embedding.affine.numpy())[:3], np.multiply(stride, SPEC.spacing))
    np.testing.assert_allclose(embedding.affine[:3, 3], (np.array(stride) - 1) / 2 * SPEC.spacing)
    assert embedding.pooled.shape == (encoder.num_features,)
    assert torch.isfinite(embedding.pooled).all()


def test_input_that_the_strides_do_not_divide_is_refused():
    model = tiny_model("swin_t_simmim3d", img_size=(32, 40, 16))
    with pytest.raises(SpecError, match=r"img_size \(32, 40, 16\) is no multiple of \(16, 16, 8\), the stride of"):
        dense_features(model, noise(1, 32, 40, 16))


# --- memory and modes -------------------------------------------------------------------------------------------------


class LargeStorages(TorchDispatchMode):
    """Collects the storages of at least `size` float32 values that operations return."""

    def __init__(self, size):
        super().__init__()
        self.size, self.storages = size, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= 4 * self.size:
            self.storages.add(result.untyped_storage().data_ptr())
        return result


def test_feature_map_is_held_once():
    model, x = vit(), torch.from_numpy(np.random.default_rng(0).normal(size=(1, 64, 96, 48)).astype(np.float32))
    grid = math.prod(side // p for side, p in zip(x.shape[1:], PATCH, strict=True))
    with LargeStorages(model.num_features * grid) as seen:
        dense_features(model, x)
    # The feature map; the volume itself comes by as the source of views.
    assert len(seen.storages - {x.untyped_storage().data_ptr()}) == 1


def test_training_flags_and_gradients_are_as_before():
    model = PatchMeans().train()
    model.dropout.eval()  # as a frozen part would be
    features = dense_features(model, noise(1, *WINDOW))
    assert model.training
    assert not model.dropout.training
    assert not features.requires_grad
    # Features are ordinary tensors: a probe can be trained on them.
    nn.Linear(2, 1)(features.flatten(1).T).sum().backward()


def test_dropout_is_off_while_encoding():
    model, x = PatchMeans().train(), noise(1, *WINDOW)
    torch.testing.assert_close(dense_features(model, x), dense_features(model.eval(), x))


@pytest.mark.parametrize("overlap", [-0.1, 1, 1.5])
def test_impossible_overlap_is_refused(overlap):
    with pytest.raises(ValueError, match="overlap"):
        dense_features(PatchMeans(), noise(1, *WINDOW), overlap=overlap)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_no_windows_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be at least 1"):
        dense_features(PatchMeans(), noise(1, *WINDOW), batch_size=batch_size)


# --- a whole scan -----------------------------------------------------------------------------------------------------


def body(shape=(24, 30, 18), affine=None) -> Volume:
    """Air with a block of tissue whose value is its place along R, in mm."""
    affine = np.diag([-2.0, 1.0, 3.0, 1.0]) if affine is None else affine
    array = np.full((1, *shape), -1000, np.float32)
    right = affine[0, 0] * np.arange(shape[0]) + affine[0, 3]
    array[:, 4:-4, 8:-6, 4:-4] = right[4:-4, None, None]
    return Volume(array, affine)


def test_features_lie_where_their_patch_lies():
    embedding = embed(PatchMeans(), body(), volume=SPEC, modality="CT")
    grid = embedding.features.shape[1:]
    index = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    place = index @ embedding.affine.numpy()[:3, :3].T + embedding.affine.numpy()[:3, 3]
    inside = (2, 2, 4)  # a patch in the middle of the tissue
    assert float(embedding.features[0][inside]) == pytest.approx((place[inside][0] + 1000) / 2000, abs=1e-5)
    np.testing.assert_allclose(nib.affines.voxel_sizes(embedding.affine.numpy()), np.multiply(PATCH, SPEC.spacing))
    assert embedding.affine.dtype == torch.float64


def test_pooled_vector_leaves_out_air_and_padding():
    tissue = Volume(np.full((1, 16, 24, 12), 200, np.int16), np.diag([2.0, 1.0, 3.0, 1.0]))
    padded = np.full((1, 48, 72, 36), -1000, np.int16)
    padded[:, 16:32, 24:48, 12:24] = 200
    around = Volume(padded, np.diag([2.0, 1.0, 3.0, 1.0]))
    for scan in (tissue, around):
        embedding = embed(PatchMeans(), scan, volume=SPEC, modality="CT")
        assert float(embedding.pooled[0]) == pytest.approx(0.6, abs=1e-4)
    assert tuple(embedding.features.shape[1:]) == (12, 9, 18)


def test_scan_smaller_than_a_patch():
    scan = Volume(np.full((1, 3, 5, 2), 200, np.int16), np.diag([2.0, 1.0, 3.0, 1.0]))
    scan.array[:, 0] = -1000
    embedding = embed(PatchMeans(), scan, volume=SPEC)
    assert tuple(embedding.features.shape[1:]) == PatchMeans.grid_size
    assert torch.isfinite(embedding.pooled).all()


def test_constant_volume_is_foreground_throughout():
    assert foreground_patches(torch.full((1, 9, 9, 9), 0.3), PATCH).all()


def test_partial_patches_count_by_the_voxels_they_have():
    x = torch.zeros(1, 5, 8, 2)
    x[:, 4] = 1  # one slice of the second patch is all it has
    assert foreground_patches(x, PATCH).flatten().tolist() == [False, True]


def test_embed_of_a_file_and_its_saved_form(tmp_path):
    volume = body()
    nib.save(nib.Nifti1Image(volume.array[0], volume.affine), tmp_path / "scan.nii.gz")
    embedding = embed(vit(), tmp_path / "scan.nii.gz", volume=SPEC)
    save_embeddings(tmp_path / "features.safetensors", {"first": embedding})
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        assert file.metadata() == {"model": "VisionTransformer3D", "first/scan": str(tmp_path / "scan.nii.gz")}
        for name in ("features", "pooled", "affine"):
            torch.testing.assert_close(file.get_tensor(f"first/{name}"), getattr(embedding, name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.safetensors", "scan.nii.gz"]


def test_embed_passes_errors_on(tmp_path):
    with pytest.raises(ScanError, match="no such file"):
        embed(PatchMeans(), tmp_path / "nowhere.nii.gz", volume=SPEC)
    with pytest.raises(SpecError, match="pass volume=VolumeSpec"):
        embed(PatchMeans(), body())
