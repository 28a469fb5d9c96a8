"""Which of the job's processes this is, its device, and the process group."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from dti_dist.errors import OtherRankFailed, UserError
from dti_dist.host import place, rank_threads

T = TypeVar("T")

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
_UNTIL_THE_JOB_ENDS = timedelta(days=7)  # whoever lets others wait is the watchdog's concern


@dataclass(frozen=True)
class Ranks:
    """This process among all of the job."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def each(self, make: Callable[[], T]) -> list[T]:
        """Call `make` on all ranks and return all results, in the order of the ranks.

        An error of one rank ends all ranks, instead of leaving them waiting; the others raise
        OtherRankFailed.
        """
        if self.world == 1:
            return [make()]
        result: T | None = None
        error: Exception | None = None
        try:
            result = make()
        except Exception as caught:
            error = caught
        outcomes: list[Any] = [None] * self.world
        dist.all_gather_object(outcomes, (error is not None, result))
        if error is not None:
            raise error
        failed = [failed for failed, _ in outcomes]
        if any(failed):
            raise OtherRankFailed(f"rank {failed.index(True)} failed; its message says why.")
        return [result for _, result in outcomes]

    def first_on_node(self, make: Callable[[], T]) -> T:
        """Call `make` on one rank of each node first, so that the others find its files.

        Errors are as with `each`.
        """
        first = self.local_rank == 0
        made: list[T] = []
        self.each(lambda: made.append(make()) if first else None)
        self.each(lambda: None if first else made.append(make()))
        return made[0]

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any] | None:
        """All ranks' values on rank 0; None elsewhere."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value on all ranks."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def choose_device(wanted: str) -> torch.device:
    """The device for ``auto``, ``cuda`` or ``cpu``. Raises UserError where there is no GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "training.device is cuda, but torch sees no GPU on this machine. Check nvidia-smi and "
            f"that torch is a CUDA build (found {torch.__version__}), or set training.device=cpu."
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def join_process_group(device: str, timeout_minutes: int, cpu_threads: int | None) -> Ranks:
    """Join the process group that torchrun, deepspeed, accelerate or srun laid out.

    One process alone is a group of one. Raises UserError where CUDA is asked for and absent.

    Args:
        cpu_threads: of this rank; None: its share of the cores.
    """
    _complete_environment()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    cuda = choose_device(device).type == "cuda"
    if not cuda:
        # Before deepspeed is imported: it picks its accelerator then.
        os.environ["DS_ACCELERATOR"] = "cpu"
        chosen = torch.device("cpu")
    else:
        chosen = _use_gpu(local_rank)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates, once per call and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    ranks = Ranks(rank, world, local_rank, local_world, chosen)
    # A GPU's rank too: it packs, and runs AdamW where that is offloaded. Torchrun gives it 1.
    torch.set_num_threads(cpu_threads or _own_threads(ranks.each(place), place()))
    return ranks


def _own_threads(places: list[Any], own: Any) -> int:
    """Threads of a rank where a scheduler gave each its own cores, or one set to several."""
    return rank_threads(places.count(own))


def _use_gpu(local_rank: int) -> torch.device:
    """This rank's GPU, which DeepSpeed too is to take: it goes by LOCAL_RANK alone.

    Where each task sees one GPU, that is 0 on all ranks.
    """
    index = local_rank % torch.cuda.device_count()
    if index != local_rank:
        _set(LOCAL_RANK=str(index))
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def leave_process_group() -> None:
    """Leave the process group, and leave the environment as it was."""
    if dist.is_initialized():
        used = sys.modules.get("deepspeed.comm.comm")
        if used is not None and used.is_initialized():
            used.destroy_process_group()  # and DeepSpeed's own references to groups
        else:
            dist.destroy_process_group()
    while _set_here:
        name, before = _set_here.pop()
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def end_process(code: int) -> NoReturn:
    """End a process that has joined a process group: run the exit functions, then leave at once.

    Deepspeed keeps references to process groups, so Gloo's threads outlive the group. One that lets
    go of a tensor while the interpreter is being finalised aborts the process ("terminate called
    without an active exception"), and a job that is done would count as failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def own_store() -> Any:
    """A connection of one's own to the job's store: another's may be waiting for an answer."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)


class Messages:
    """What one thread of each rank tells that of the others, beside the main threads' collectives.

    Collectives of two threads could meet in another order on another rank; keys in the job's store
    can't. Values are plain JSON, and a name is used once in a job.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._store = own_store() if ranks.world > 1 else None

    def gather(self, name: str, value: T) -> list[T] | None:
        """All ranks' values on rank 0, which waits for them; None elsewhere."""
        if self._store is None:
            return [value]
        self._store.set(f"{name}/{self._ranks.rank}", json.dumps(value))
        if not self._ranks.is_main:
            return None
        return [self._take(f"{name}/{rank}") for rank in range(self._ranks.world)]

    def broadcast(self, name: str, value: T) -> T:
        """Rank 0's value on all ranks."""
        if self._store is None:
            return value
        if self._ranks.is_main:
            self._store.set(name, json.dumps(value))
        self._store.wait([name], _UNTIL_THE_JOB_ENDS)
        return json.loads(self._store.get(name))

    def _take(self, name: str) -> Any:
        assert self._store is not None
        self._store.wait([name], _UNTIL_THE_JOB_ENDS)
        value = json.loads(self._store.get(name))
        self._store.delete_key(name)
        return value


_set_here: list[tuple[str, str | None]] = []  # environment variables, and what they were before


def _set(**variables: str) -> None:
    for name, value in variables.items():
        _set_here.append((name, os.environ.get(name)))
        os.environ[name] = value


def _tasks_on_this_node(environ: Mapping[str, str]) -> str:
    """Slurm's list counts nodes in their order, as in ``2(x3),1``: three nodes of 2, one of 1."""
    counts: list[str] = []
    for entry in environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_NTASKS"]).split(","):
        tasks, _, times = entry.partition("(x")
        counts += [tasks] * int(times.rstrip(")") or 1)
    return counts[int(environ.get("SLURM_NODEID", "0"))]


def _complete_environment() -> None:
    environ = os.environ
    if "RANK" not in environ:
        if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            _set(
                RANK=environ["SLURM_PROCID"],
                WORLD_SIZE=environ["SLURM_NTASKS"],
                LOCAL_RANK=environ["SLURM_LOCALID"],
                LOCAL_WORLD_SIZE=_tasks_on_this_node(environ),
            )
        else:
            _set(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    if "MASTER_ADDR" not in environ:
        if environ["WORLD_SIZE"] != "1":
            raise UserError(
                "This job has several ranks but no MASTER_ADDR, so they can't form a process "
                "group. Start it with torchrun, or set MASTER_ADDR to the first rank's machine and "
                "MASTER_PORT to a free port there."
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        _set(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
