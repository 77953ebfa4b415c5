"""Tensors in and out of safetensors files, and into a model without leniency.

Pickles are never read: a file that is not safetensors is refused before anything interprets it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medmim.errors import WeightsError
from medmim.files import atomic_write, write_text
from medmim.limits import HEADER_BYTES

SHARD_BYTES = 95_000_000  # git hosts refuse files of 100 MB
BLOCK_BYTES = 2**24  # read at once; what a change of dtype needs beside the tensors
HALVES = (torch.float16, torch.bfloat16)
WRAPPERS = ("module.", "_orig_mod.")  # which data parallelism and torch.compile put before the names of tensors
LISTED = 6  # tensors named in an error, of each kind
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # of safetensors' headers, without those that no encoder has


# --- files ------------------------------------------------------------------------------------------------------------


def read_tensors(paths: Iterable[Path], *, widen: bool = False) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of all shards of one.

    Args:
        paths: The files.
        widen: Makes float32 of half precision; while a file is read, this takes less time than afterwards.

    Returns:
        Tensors on the CPU, in memory of their own.

    Raises:
        WeightsError: For a file that is missing, no safetensors, or not whole; for a tensor stored twice.
    """
    from safetensors import SafetensorError

    tensors: dict[str, Tensor] = {}
    blocks: list[_Block] = []
    for path in paths:
        _refuse_other_formats(path)
        try:
            for block, views in _lay_out(path, widen=widen):
                for key in views.keys() & tensors.keys():
                    raise WeightsError(f"{path}: {key} is stored in another shard already; save the model again")
                tensors |= views
                blocks.append(block)
        except (SafetensorError, OSError) as error:
            raise _not_whole(path, error) from None
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="medmim-read") as pool:
        list(pool.map(_read, blocks))
    return tensors


def _not_whole(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path}: not a whole safetensors file ({error}); fetch or save it again")


class _Block(NamedTuple):
    """Some tensors of a file, of one type of numbers, that are read at once.

    Attributes:
        path: The file.
        start: Where they start there.
        stored: What they are stored as.
        dtype: What they are to be.
        memory: Where they go, one after the other.
    """

    path: Path
    start: int
    stored: torch.dtype
    dtype: torch.dtype
    memory: memoryview


def _lay_out(path: Path, *, widen: bool) -> Iterator[tuple[_Block, dict[str, Tensor]]]:
    """The tensors of a file, yet without their values, in blocks.

    The library checks the header and says what there is; the bytes are read, not mapped: a mapped file takes the
    process down when somebody truncates it, and copies off it need their memory twice.
    """
    from safetensors import safe_open

    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # the length of the header, then the header
    with safe_open(path, framework="np") as header:
        # As they lie, without gaps, or the library would have refused the file.
        stored = {key: _Stored.of(header.get_slice(key), key, path) for key in header.offset_keys()}
    while stored:
        dtype, keys, count = next(iter(stored.values())).dtype, [], 0
        for key, tensor in stored.items():
            if keys and (tensor.dtype != dtype or (count + tensor.count) * dtype.itemsize > BLOCK_BYTES):
                break
            keys.append(key)
            count += tensor.count
        wanted = torch.float32 if widen and dtype in HALVES else dtype
        block = _Block(path, start, dtype, wanted, _memory(count * wanted.itemsize))
        views, at = {}, 0
        for key in keys:
            tensor = stored.pop(key)
            views[key] = _numbers(block.memory, wanted, tensor.count, at).view(tensor.shape)
            at += tensor.count
        yield block, views
        start += count * dtype.itemsize


def _memory(size: int) -> memoryview:
    """Bytes without values. They are numpy's, which takes large pages where it can: those are filled sooner."""
    return memoryview(np.empty(size, np.uint8))


def _numbers(memory: memoryview, dtype: torch.dtype, count: int, at: int = 0) -> Tensor:
    """So many numbers of a piece of memory, the first being that number `at`.

    To torch they are a storage of their own: it would save a whole one with each tensor that has a part of it.
    """
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=at * dtype.itemsize)


class _Stored(NamedTuple):
    """A tensor as the header of a file describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, described: Any, key: str, path: Path) -> _Stored:
        dtype = described.get_dtype()
        if dtype not in DTYPES:
            raise WeightsError(f"{path}: {key} has numbers of the type {dtype}; save it as one of {', '.join(DTYPES)}")
        return cls(tuple(described.get_shape()), DTYPES[dtype])

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _read(block: _Block) -> None:
    """Fills a block with the numbers of its file."""
    count = len(block.memory) // block.dtype.itemsize
    memory = block.memory if block.stored == block.dtype else _memory(count * block.stored.itemsize)
    try:
        with open(block.path, "rb") as file:
            file.seek(block.start)
            if file.readinto(memory) < len(memory):
                raise OSError(f"it ends before byte {block.start + len(memory)}")
    except OSError as error:
        raise _not_whole(block.path, error) from None
    if memory is not block.memory:
        _numbers(block.memory, block.dtype, count).copy_(_numbers(memory, block.stored, count))


def _refuse_other_formats(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    # Eight bytes of header length, then the header, which is JSON.
    if start[8:] == b"{":
        if int.from_bytes(start[:8], "little") > HEADER_BYTES:
            raise WeightsError(f"{path}: not a whole safetensors file (none has a header of over {HEADER_BYTES} bytes)")
        return
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise WeightsError(
            f"{path}: a pickle (.pth, .ckpt), which can run code when it is opened, so medmim does not; convert it "
            "once with torch.load(path, weights_only=True) and safetensors.torch.save_file"
        )
    raise WeightsError(f"{path}: not a safetensors file")


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, stem: str, *, shard: bool = True) -> list[str]:
    """Writes `stem`.safetensors, or shards of at most `SHARD_BYTES` and their index.

    Args:
        tensors: What to write; dtypes are kept.
        folder: Where to; files of the same name are replaced, each atomically.
        stem: Name without the suffix.
        shard: Whether a large file may become several.

    Returns:
        The names of the files with tensors, in order.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=SHARD_BYTES if shard else 2**63,
    )
    for name, keys in split.filename_to_tensors.items():
        with atomic_write(folder / name) as temporary:
            save_file({key: tensors[key] for key in keys}, temporary, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return list(split.filename_to_tensors)


# --- models -----------------------------------------------------------------------------------------------------------


@contextmanager
def without_values() -> Iterator[None]:
    """What is built within is on the meta device, and is not initialised: it costs neither memory nor time."""
    with torch.device("meta"), _WithoutInit():
        yield


class _WithoutInit(TorchFunctionMode):
    """Leaves out what initialises a tensor on the meta device, where there is nothing to fill.

    The first random fill there would make torch import its compiler, which takes longer than all the rest.
    """

    FILLS = frozenset((torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_))

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function in self.FILLS or getattr(function, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


def misfit(model: nn.Module, tensors: Mapping[str, Tensor], *, optional: Iterable[str] = ()) -> str | None:
    """What does not fit between a model (on any device) and stored tensors, in words; None when everything does.

    Args:
        model: The model.
        tensors: What would be loaded.
        optional: Keys that may be missing.
    """
    wanted, optional = model.state_dict(), set(optional)
    faults = {
        "missing": [
            f"{key} {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if key not in tensors and key not in optional
        ],
        "unexpected": [f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items() if key not in wanted],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} for {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if key in tensors and tensors[key].shape != tensor.shape
        ],
        "of another type": [
            f"{key} {tensors[key].dtype} for {tensor.dtype}"
            for key, tensor in wanted.items()
            if key in tensors and tensors[key].is_floating_point() != tensor.is_floating_point()
        ],
    }
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in faults.items() if names) or None


def load_strictly(
    model: nn.Module,
    tensors: dict[str, Tensor],
    *,
    source: str,
    optional: Iterable[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Fills a model that was built on the meta device; every key and every shape must fit.

    Args:
        model: The model; its parameters are replaced, those that are `optional` and missing stay on meta.
        tensors: As `read_tensors` gives them; emptied, so that a change of dtype does not need their memory twice.
        source: Where they are from, for the error.
        optional: Keys that may be missing.
        device: Where the parameters go; None for the CPU.
        dtype: Of floating-point parameters; None for the model's own, whatever the file has.

    Raises:
        WeightsError: With names and shapes of what does not fit.
    """
    fault = misfit(model, tensors, optional=optional)
    if fault:
        raise WeightsError(f"{source} does not fit the model ({fault}); {_cure(tensors)}")
    wanted = model.state_dict()
    fitted = {
        key: (tensor := tensors.pop(key)).to(
            device=device or "cpu",
            dtype=dtype if dtype is not None and tensor.is_floating_point() else wanted[key].dtype,
        )
        for key in list(tensors)
    }
    model.load_state_dict(fitted, strict=False, assign=True)


def _cure(tensors: Mapping[str, Tensor]) -> str:
    for wrapper in WRAPPERS:
        if tensors and all(key.startswith(wrapper) for key in tensors):
            inside = wrapper.rstrip(".")
            return f"its names start with {wrapper!r}, as of a wrapped model: save model.{inside}.state_dict()"
    return "check the architecture and its arguments"


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
