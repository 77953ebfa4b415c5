"""Processes that read ahead: the same batches as without them, and what happens when one fails."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from contextlib import closing

import pytest
import torch
from torch import Tensor

from medmim.errors import SpecError
from medmim_training import loading
from medmim_training.loading import ReadError, Samples, Tensors, batches

CPU = torch.device("cpu")


class Numbered(Samples):
    """Sample i is full of i; one of them may do something else, in a reader only."""

    def __init__(self, special: int = -1, what: str = "") -> None:
        self.special, self.what = special, what

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.special and multiprocessing.parent_process():
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "broken":
                raise SpecError("volumes/a.b2nd: damaged")
            raise RuntimeError("nobody thought of this")
        return {"x": torch.full((1, 2, 3), float(index)), "index": torch.tensor(index)}


class Held(Samples):
    """Sample i is the sum of tensor i."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"sum": self.tensors[index].sum()}


def read(samples: Samples, workers: int, order: range = range(3, 40, 2), size: int = 4) -> list[dict[str, Tensor]]:
    with closing(batches(samples, order, size=size, workers=workers, device=CPU)) as found:
        return [{name: tensor.clone() for name, tensor in batch.items()} for batch in found]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_readers(workers):
    found = read(Numbered(), workers)
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(3, 40, 2))
    assert [len(batch["x"]) for batch in found] == [4, 4, 4, 4, 3]
    for batch in found:
        assert torch.equal(batch["x"], batch["index"].float()[:, None, None, None].expand(-1, 1, 2, 3))
    assert multiprocessing.active_children() == []


def test_more_tensors_than_a_process_may_have_open_files():
    tensors = [torch.full((1, 2 + i % 3, 3), float(i)) for i in range(300)]
    sums = [tensor.sum().item() for tensor in tensors]
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = read(Held(Tensors(tensors)), 2, range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert torch.cat([batch["sum"] for batch in found]).tolist() == sums
    assert [tensor.sum().item() for tensor in tensors] == sums
    assert tensors[0].untyped_storage().data_ptr() == tensors[-1].untyped_storage().data_ptr()  # no second copy


def test_a_run_that_is_done_reads_nothing():
    assert read(Numbered(), 1, range(0)) == []


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("broken", SpecError, "^volumes/a.b2nd: damaged$"),
        ("killed", ReadError, "^a process that reads crops ended with code -9"),
        ("unforeseen", ReadError, "^a process that reads crops failed: RuntimeError: nobody thought of this$"),
    ],
)
def test_a_reader_that_fails_ends_the_run_with_a_sentence(what, error, message):
    """Also where it fails while the others go on."""
    with pytest.raises(error, match=message):
        read(Numbered(25, what), 2)
    assert multiprocessing.active_children() == []


def test_readers_end_with_the_batches():
    with closing(batches(Numbered(), range(10_000), size=2, workers=2, device=CPU)) as found:
        next(found)
        assert len(multiprocessing.active_children()) == 2
        start = time.monotonic()
    assert multiprocessing.active_children() == []
    assert time.monotonic() - start < loading.GRACE  # by themselves


def test_neither_a_scheduler_nor_ctrl_c_ends_a_reader():
    with closing(batches(Numbered(), range(100), size=2, workers=1, device=CPU)) as found:
        next(found)
        (reader,) = multiprocessing.active_children()
        os.kill(reader.pid, signal.SIGTERM)
        os.kill(reader.pid, signal.SIGINT)
        assert sum(len(batch["x"]) for batch in found) == 98


def test_shared_memory_that_is_not_there_is_named(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(SpecError, match=r"no 0 MiB of shared memory .*No space left.*--shm-size"):
        read(Numbered(), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu():
    with closing(batches(Numbered(), range(40), size=4, workers=1, device=torch.device("cuda"))) as found:
        for number, batch in enumerate(found):
            assert batch["x"].is_cuda
            assert batch["x"][:, 0, 0, 0].tolist() == [4 * number + row for row in range(4)]
