"""Every parser of bytes from outside, as a table: a file that it reads, and the function that reads it.

The property-based tests and the fuzz target run over it; a parser that is added later is one line in `PARSERS`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from safetensors.torch import save

import medmim
from fakes import RECORD, TINY, TRAINING, save_tiny
from medmim import hub, registry
from medmim.cards import render_card
from medmim.checkpoints import read_tensors
from medmim.convert.dynamic_network_architectures import from_residual_encoder, from_unet_decoder
from medmim.convert.monai_swin import from_swin_transformer
from medmim.volumes import load_volume
from medmim_training.checkpoint import load_latest, save_checkpoint
from medmim_training.recipe import load_recipe, recipe_folder
from medmim_training.record import MetricsLog
from medmim_training.store.index import Store, open_array, read_array, write_array
from medmim_training.store.sources import find_sources

SHAPE = (4, 5, 6)


@dataclass(frozen=True)
class Parser:
    """One kind of file.

    Attributes:
        name: Of the file in its folder.
        example: Bytes of an honest one.
        parse: Reads the file at a path; raises a `MedmimError` for anything that is wrong with it.
        folder: Files beside it that stay honest.
    """

    name: str
    example: Callable[[], bytes]
    parse: Callable[[Path], Any]
    folder: Callable[[], dict[str, bytes]] = field(default=dict)

    def __call__(self, content: bytes) -> Any:
        """Parses `content` as such a file in a folder of its own."""
        with TemporaryDirectory(prefix="medmim-parser-") as folder:
            for name, other in {**self.folder(), self.name: content}.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(other)
            return self.parse(Path(folder) / self.name)


# --- honest files -----------------------------------------------------------------------------------------------------


@cache
def model_folder() -> dict[str, bytes]:
    """A model folder with everything, and a training record so that it has a card."""
    with TemporaryDirectory() as folder:
        save_tiny(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    config = json.loads(files["config.json"])
    config["weights"]["training"] = TRAINING
    return {**files, "config.json": json.dumps(config).encode()}


@cache
def bare_config() -> bytes:
    return json.dumps({"medmim": 1, "architecture": "vit_t_mae3d", "family": "vit", "args": TINY["vit"]}).encode()


@cache
def written(suffix: str, write: Callable[[Path], Any]) -> bytes:
    """What `write` writes to a path that ends in `suffix`."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        write(path)
        return path.read_bytes()


def image() -> sitk.Image:
    scan = sitk.GetImageFromArray(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE[::-1]))
    scan.SetSpacing((1.0, 2.0, 3.0))
    return scan


def nifti(cls=nib.Nifti1Image) -> bytes:
    return cls(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes()


def itk(suffix: str) -> bytes:
    return written(suffix, write_image)


def write_image(path: Path) -> None:
    sitk.WriteImage(sitk.Cast(image(), sitk.sitkUInt16), str(path))


def packed_dicom() -> bytes:
    def write(path: Path) -> None:
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(path))
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.Execute(sitk.Cast(image(), sitk.sitkUInt16))

    return written(".dcm", write)


def store_entry() -> bytes:
    entry = {
        "id": "scan-0123abcd",
        "source": "scan.nii.gz",
        "modality": "CT",
        "channels": 1,
        "shape": SHAPE,
        "offset": (0, 0, 0),
        "spacing": (1.0, 2.0, 3.0),
        "foreground": 100,
        "minimum": 0.0,
        "percentiles": list(range(9)),
        "low": -1000.0,
        "high": 1000.0,
        "clip": True,
    }
    return (json.dumps(entry) + "\n").encode()


def array_file() -> bytes:
    def write(path: Path) -> None:
        write_array(path.parent, "scan", np.zeros((1, *SHAPE), np.float32) + 0.5)
        (path.parent / "volumes" / "scan.b2nd").rename(path)

    return written(".b2nd", write)


def checkpoint_file() -> bytes:
    def write(path: Path) -> None:
        state = {"step": 1, "best": 0.5, "spent": {"wall": 1.0}, "method": {"w": torch.zeros(2)}, "optimizer": {}}
        save_checkpoint(path.parent, 1, state, keep=1, best=False)
        (path.parent / "step-00000001.pt").rename(path)

    return written(".pt", write)


def index_of_shards() -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()


def tensors() -> bytes:
    return save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})


def foreign_keys() -> bytes:
    keys = [
        "encoder.stem.convs.0.conv.weight",
        "decoder.encoder.stages.1.blocks.0.conv1.all_modules.0.weight",
        "decoder.stages.0.convs.0.norm.bias",
        "decoder.seg_layers.1.weight",
        "swinViT.layers1.0.blocks.0.attn.qkv.weight",
        "swinViT.patch_embed.proj.weight",
    ]
    return "\n".join(keys).encode()


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_card(path: Path) -> Any:
    spec, _ = hub.read_model(hub.Folder(path.parent))
    return render_card(spec)


def parse_array(path: Path) -> Any:
    return read_array(open_array(path, (1, *SHAPE)))


def convert(path: Path) -> Any:
    """Each converter on a state dict with the lines of the file as its names; each may refuse it."""
    state = {key: torch.zeros(2) for key in path.read_text("latin-1").splitlines()}
    for converter in (from_residual_encoder, from_unet_decoder, from_swin_transformer):
        with suppress(medmim.MedmimError):
            converter(state)


def catalog() -> bytes:
    return (registry.CATALOG / "vit.toml").read_bytes()


def catalog_weights() -> bytes:
    return (registry.CATALOG / "weights" / "vit_t_mae3d.open_mix.toml").read_bytes()


def parse_catalog_weights(path: Path) -> Any:
    return registry.read_weights("vit_t_mae3d", "open_mix", path)


def recipe() -> bytes:
    return (recipe_folder() / "small" / "vit_t_mae3d.yaml").read_bytes()


def create(path: Path) -> Any:
    return medmim.create_model(f"local-dir:{path.parent}", pretrained=True)


def build(path: Path) -> Any:
    return medmim.create_model(f"local-dir:{path.parent}")


PARSERS = {
    "config": Parser("config.json", lambda: model_folder()["config.json"], create, model_folder),
    "arguments": Parser("config.json", bare_config, build),
    "card": Parser("config.json", lambda: model_folder()["config.json"], parse_card),
    "shard index": Parser(
        "model.safetensors.index.json",
        index_of_shards,
        lambda path: hub.fetch_encoder(hub.Folder(path.parent), None),
        lambda: {"model-1.safetensors": b"", "model-2.safetensors": b""},
    ),
    "safetensors": Parser("model.safetensors", tensors, lambda path: read_tensors([path])),
    "catalog": Parser("vit.toml", catalog, registry.read_catalog),
    "catalog, weights": Parser("vit_t_mae3d.open_mix.toml", catalog_weights, parse_catalog_weights),
    "foreign keys": Parser("keys.txt", foreign_keys, convert),
    "recipe": Parser("recipe.yaml", recipe, lambda path: load_recipe(str(path))),
    "data list, CSV": Parser("data.csv", lambda: b"file,modality,group\na.nii,CT,x\nb.nii,MR T1,y\n", find_sources),
    "data list, JSON": Parser(
        "data.json",
        lambda: json.dumps({"modality": {"0": "CT"}, "training": [{"image": "a.nii"}], "test": ["b.nii"]}).encode(),
        find_sources,
    ),
    "store": Parser(
        "store.json",
        lambda: json.dumps({"volume": RECORD["volume"]}).encode(),
        lambda path: Store(path.parent),
        lambda: {"index.jsonl": store_entry()},
    ),
    "store index": Parser(
        "index.jsonl",
        lambda: store_entry() * 2,
        lambda path: Store(path.parent),
        lambda: {"store.json": json.dumps({"volume": RECORD["volume"]}).encode()},
    ),
    "store array": Parser("scan.b2nd", array_file, parse_array),
    "checkpoint": Parser("step-00000001.pt", checkpoint_file, lambda path: load_latest(path.parent)),
    "metrics": Parser("metrics.jsonl", lambda: b'{"step": 1, "loss": 0.5}\n' * 2, lambda path: MetricsLog(path, 1)),
    "NIfTI-1": Parser("scan.nii", nifti, load_volume),
    "NIfTI-2": Parser("scan.nii", lambda: nifti(nib.Nifti2Image), load_volume),
    "NIfTI, packed": Parser("scan.nii.gz", lambda: gzip.compress(nifti(), mtime=0), load_volume),
    "NRRD": Parser("scan.nrrd", lambda: itk(".nrrd"), load_volume),
    "NRRD, header": Parser("scan.nhdr", lambda: itk(".nhdr"), load_volume, lambda: {"file.raw": bytes(240)}),
    "MetaImage": Parser("scan.mha", lambda: itk(".mha"), load_volume),
    "MetaImage, header": Parser("scan.mhd", lambda: itk(".mhd"), load_volume, lambda: {"file.raw": bytes(240)}),
    "DICOM": Parser("scan.dcm", lambda: itk(".dcm"), load_volume),
    "DICOM, packed": Parser("scan.dcm", packed_dicom, load_volume),
}
