"""From samples to batches on the device, by processes that read ahead into memory that is taken once.

Each reader fills batches in turn in its ring of slots: what is sent between processes is that a slot is full, or free
again. New memory for each batch would cost more than half of what reading costs, in page faults and copies.
"""

from __future__ import annotations

import atexit
import traceback
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch.utils.data import Dataset

from medmim.errors import MedmimError, SpecError
from medmim_training.preemption import start_unreachable

SLOTS = 3  # of a reader: one is trained on, one is full, one is being filled
GRACE = 5  # seconds in which a reader ends by itself

Batch = dict[str, Tensor]


class ReadError(MedmimError):
    """A process that reads samples failed, or was killed."""


class Samples(Dataset):
    """Samples by number, each a dict of tensors whose sizes and types are those of every other."""

    @abstractmethod
    def __getitem__(self, index: int) -> Batch:
        """Sample `index`."""

    def read(self, index: int, out: Batch) -> None:
        """Writes sample `index` to `out`."""
        for name, tensor in self[index].items():
            out[name].copy_(tensor)


class Tensors(Sequence[Tensor]):
    """Tensors that samples are made of, which readers get in one piece of shared memory.

    For each tensor of its own torch would hand over an open file, of which a process may have some thousand.

    Args:
        tensors: Of one type.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors, self.piece = list(tensors), None

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, number: int) -> Tensor:
        return self.tensors[number]

    def __getstate__(self) -> dict[str, Any]:
        if self.piece is None:  # for the first reader; all others get the same
            self.piece = _share(self.tensors[0].new_empty(sum(tensor.numel() for tensor in self.tensors)))
            for tensor, part in zip(self.tensors, self._parts([tensor.shape for tensor in self.tensors]), strict=True):
                part.copy_(tensor)
                tensor.set_(part)  # so that there are not two of them, whoever else holds it
        return {"piece": self.piece, "shapes": [tensor.shape for tensor in self.tensors]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.piece = state["piece"]
        self.tensors = self._parts(state["shapes"])

    def _parts(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        parts = self.piece.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def batches(samples: Samples, order: range, *, size: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches of samples, each a dict of tensors, which are good until the next batch is asked for.

    Args:
        samples: Where they come from.
        order: Which ones, in order.
        size: Samples of a batch.
        workers: Processes that read ahead; 0 reads in this one.
        device: Where the batches go.

    Raises:
        MedmimError: What a reader met, or that it has ended.
    """
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    if not chunks:
        return
    example = samples[order[0]]
    if workers == 0:
        slot = {name: tensor.new_empty(size, *tensor.shape) for name, tensor in example.items()}
        for chunk in chunks:
            _fill(samples, chunk, slot)
            yield _on(device, slot, len(chunk))
        return
    with ExitStack() as open_readers:
        # Before multiprocessing's own end, which waits for processes that wait for this one.
        atexit.register(open_readers.close)
        open_readers.callback(atexit.unregister, open_readers.close)
        readers = []
        for number in range(min(workers, len(chunks))):
            readers.append(_Reader(samples, chunks[number::workers], _ring(example, size)))
            open_readers.callback(readers[-1].close)
        for number, chunk in enumerate(chunks):
            reader = readers[number % len(readers)]
            yield _on(device, reader.take(), len(chunk))
            reader.give_back()


def _ring(example: Batch, size: int) -> Batch:
    return {name: _share(torch.empty(SLOTS, size, *t.shape, dtype=t.dtype)) for name, t in example.items()}


def _share(tensor: Tensor) -> Tensor:
    """Moves a tensor to memory that other processes can read."""
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        raise SpecError(
            f"there are no {tensor.nbytes / 2**20:.0f} MiB of shared memory for a process that reads crops "
            f"({str(error).splitlines()[0]}); give more (docker run --shm-size), or set workers to 0"
        ) from None


def _fill(samples: Samples, chunk: range, slot: Batch) -> None:
    for row, index in enumerate(chunk):
        samples.read(index, {name: tensor[row] for name, tensor in slot.items()})


def _on(device: torch.device, slot: Batch, rows: int) -> Batch:
    if device.type == "cuda":  # from pinned memory, which torch keeps and uses again, the copy is not waited for
        return {name: tensor[:rows].pin_memory().to(device, non_blocking=True) for name, tensor in slot.items()}
    return {name: tensor[:rows].to(device) for name, tensor in slot.items()}


class _Reader:
    """A process that fills a ring of slots."""

    def __init__(self, samples: Samples, chunks: list[range], ring: Batch) -> None:
        self.ring, self.taken = ring, 0
        # Forking a process in which torch's threads run can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_read, args=(samples, chunks, ring, theirs), daemon=True)
        start_unreachable(self.process)
        theirs.close()  # the reader's is now the only one, and closes when it ends, however it does

    def take(self) -> Batch:
        """The next batch, when it is there."""
        try:
            problem = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(GRACE)
            raise ReadError(
                f"a process that reads crops ended with code {self.process.exitcode} "
                "(-9: killed, mostly for want of memory); the same command goes on from the last checkpoint"
            ) from None
        if problem is not None:
            raise problem
        slot = {name: tensor[self.taken % SLOTS] for name, tensor in self.ring.items()}
        self.taken += 1
        return slot

    def give_back(self) -> None:
        """Lets the reader fill the slot of the batch before the next one."""
        with suppress(ConnectionError):  # it has read everything, or `take` will find out
            self.connection.send(None)

    def close(self) -> None:
        """Ends the process."""
        self.connection.close()
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _read(samples: Samples, chunks: list[range], ring: Batch, connection: Connection) -> None:
    """What a reader does: until all is read, or the other end of the connection is gone, as when that was killed."""
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        try:
            for number, chunk in enumerate(chunks):
                if number >= SLOTS:
                    connection.recv()
                _fill(samples, chunk, {name: tensor[number % SLOTS] for name, tensor in ring.items()})
                connection.send(None)
        except (EOFError, ConnectionError):
            raise
        except MedmimError as error:
            connection.send(error)
        except Exception as error:
            traceback.print_exc()
            connection.send(ReadError(f"a process that reads crops failed: {type(error).__name__}: {error}"))
