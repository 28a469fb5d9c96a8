"""A checkpoint's content in host memory, so that training goes on while it is written."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from dti_dist.host import free_memory_bytes

_SPARED = 0.1  # of the free memory: training allocates too while a checkpoint is written


class NoRoom(Exception):
    """The host's memory has no room for a copy."""


class HostCopies:
    """Copies what `torch.save` would write, into buffers that stay for the next checkpoint.

    A process's first touch of a page costs several times what copying it does, so keeping the
    buffers is what makes copying short. They are given out from the first again by `reuse`.

    Args:
        processes: on this machine that copy at once, each about as much.
    """

    def __init__(self, processes: int):
        self._processes = processes
        self._buffers: list[torch.UntypedStorage] = []
        self._used = 0

    def reuse(self) -> None:
        """Let the buffers of earlier copies be overwritten."""
        self._used = 0

    def copy(self, content: Any) -> Any:
        """A deep copy of which `torch.save` makes the same file, with all tensors on the CPU.

        Raises:
            NoRoom: nothing is copied then.
        """
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(content)
        copies = self._take([source.nbytes() for source in pickler.storages])
        for source, target in zip(pickler.storages, copies, strict=True):
            target.copy_(source, False)
        pickled.seek(0)
        return _Unpickler(pickled, copies).load()

    def _take(self, sizes: list[int]) -> list[torch.UntypedStorage]:
        first, end = self._used, self._used + len(sizes)
        if [buffer.nbytes() for buffer in self._buffers[first:end]] != sizes:
            del self._buffers[first:]
            need, free = self._processes * sum(sizes), (1 - _SPARED) * free_memory_bytes()
            if need > free:
                raise NoRoom(
                    f"{need / 2**30:.1f} GiB more are needed on this machine, and "
                    f"{free / 2**30:.1f} GiB may be taken"
                )
            self._buffers += map(torch.UntypedStorage, sizes)
        self._used = end
        return self._buffers[first:end]


class _Pickler(pickle.Pickler):
    """Leaves out what storages hold: a number stands for each, the same wherever it is shared."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
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
