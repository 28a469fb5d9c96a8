"""A checkpoint's content in host memory, so that training goes on while it is written."""

from __future__ import annotations

import io
import pickle
import threading
from typing import Any

import torch

from dti_dist.host import free_memory_bytes

_SPARED = 0.1  # of the free memory: training allocates too while a checkpoint is written


class NoRoom(Exception):
    """The host's memory has no room for a copy."""


class HostCopies:
    """Copies what `torch.save` would write, into buffers that stay for the next checkpoint.

    A process's first touch of a page costs many times what copying it does, so keeping the buffers,
    and a thread that makes the first ones, is what makes copying short.

    Args:
        processes: on this machine that copy at once, each about as much.
    """

    def __init__(self, processes: int):
        self._processes = processes
        self._buffers: list[torch.UntypedStorage] = []
        self._used = 0
        self._making: threading.Thread | None = None

    def expect(self, contents: list[Any]) -> None:
        """Have a thread make buffers for such contents, copied in this order, if there is room."""
        sizes = [storage.nbytes() for content in contents for storage in _pickled(content).storages]
        if self._lacking(sizes) is None:
            self._making = threading.Thread(target=self._make, args=(sizes,), daemon=True)
            self._making.start()

    def reuse(self) -> None:
        """Let the buffers of earlier copies be overwritten."""
        self._used = 0

    def copy(self, content: Any) -> Any:
        """A deep copy of which `torch.save` makes the same file, with all tensors on the CPU.

        Raises:
            NoRoom: nothing is copied then.
        """
        pickled = _pickled(content)
        copies = self._take([source.nbytes() for source in pickled.storages])
        for source, target in zip(pickled.storages, copies, strict=True):
            target.copy_(source, False)
        return _Unpickler(io.BytesIO(pickled.file.getvalue()), copies).load()

    def _take(self, sizes: list[int]) -> list[torch.UntypedStorage]:
        if self._making is not None:
            self._making.join()
            self._making = None
        first, end = self._used, self._used + len(sizes)
        if [buffer.nbytes() for buffer in self._buffers[first:end]] != sizes:
            del self._buffers[first:]
            if lacking := self._lacking(sizes):
                raise NoRoom(lacking)
            self._make(sizes)
        self._used = end
        return self._buffers[first:end]

    def _lacking(self, sizes: list[int]) -> str | None:
        need, free = self._processes * sum(sizes), (1 - _SPARED) * free_memory_bytes()
        if need <= free:
            return None
        return (
            f"{need / 2**30:.1f} GiB more are needed on this machine, and {free / 2**30:.1f} GiB "
            "may be taken"
        )

    def _make(self, sizes: list[int]) -> None:
        for size in sizes:
            touched = torch.zeros(size, dtype=torch.uint8)
            self._buffers.append(touched.untyped_storage())


def _pickled(content: Any) -> _Pickler:
    pickler = _Pickler(io.BytesIO())
    pickler.dump(content)
    return pickler


class _Pickler(pickle.Pickler):
    """Leaves out what storages hold: a number stands for each, the same wherever it is shared."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.file = file
        self.storages: list[torch.UntypedStorage] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype] | None:
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        storage = obj._untyped_storage
        number = self._numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return number, obj.dtype


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: list[torch.UntypedStorage]):
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, pid: tuple[int, torch.dtype]) -> torch.storage.TypedStorage:
        number, dtype = pid
        return torch.storage.TypedStorage(
            wrap_storage=self._storages[number], dtype=dtype, _internal=True
        )
