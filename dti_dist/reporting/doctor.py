"""What this machine has and lacks for a job, a line each, with what to do."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from dti_dist import host
from dti_dist.config import AUTO, RunConfig
from dti_dist.costs.memory import OVERHEAD, checkpoint_bytes, states
from dti_dist.costs.settings import MARGIN
from dti_dist.data import storage
from dti_dist.errors import UserError
from dti_dist.gpus import CPU
from dti_dist.model import sources
from dti_dist.ranks import Ranks, choose_device
from dti_dist.redaction import redact
from dti_dist.words import GIB
from dti_dist.zero.configuration import read_deepspeed

_SHARED_MEMORY_GIB = 1.0  # a rank's buffers of NCCL
_SKEW_S = 1.0  # beyond that, lines of several machines' logs can't be put in order
_OPEN_FILES = 4096  # libraries keep row groups, sockets and libraries open


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        fix: what to do where it is not fine.
    """

    verdict: Literal["fine", "warning", "failure"]
    what: str
    found: str
    fix: str = ""


def examine(config: RunConfig | None, ranks: Ranks | None) -> list[Finding]:
    """All checks, in order; those of a run's storage and disk need its config.

    Args:
        ranks: where several meet, their clocks are compared; the findings are of rank 0's machine.
    """
    findings = [
        finding
        for check in (_python, _packages, _accelerator, _compilers, _shared_memory, _limits, _host)
        for finding in _guarded(check)
    ]
    findings += _guarded(_slurm)
    findings += _guarded(lambda: _cores(_ranks_here(ranks)))
    of_model = config if ranks is None or ranks.is_main else None  # one rank asks the hub
    world = ranks.world if ranks is not None else 1
    findings += _guarded(lambda: _memory(of_model, _ranks_here(ranks), world))
    if ranks is not None and ranks.world > 1:
        findings += _clocks(ranks)
    if config is not None:
        findings += _guarded(lambda: _disks(config))
        findings += _guarded(lambda: _stores(config))
    return findings


def table(findings: list[Finding]) -> str:
    """A line each, and below it what to do where there is something."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<8} {finding.what}: {finding.found}")
        if finding.fix:
            lines.append(f"         → {finding.fix}")
    return "\n".join(lines)


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check that itself fails is one more thing to know."""
    try:
        return list(check())
    except UserError as error:
        return [Finding("failure", "settings", redact(str(error)))]
    except Exception as error:
        name = getattr(check, "__name__", "check").strip("_")
        return [Finding("warning", name, f"could not be examined: {redact(str(error))}")]


def _python() -> Iterator[Finding]:
    yield Finding("fine", "Python", f"{sys.version.split()[0]}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Versions against those that the package was released for."""
    from packaging.requirements import Requirement

    wrong, names = [], []
    for line in metadata.requires("dti-dist") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        names.append(f"{requirement.name} {version}")
        # A build like 2.13.0+cu126 counts as its release.
        if not requirement.specifier.contains(version.split("+")[0], prereleases=True):
            wrong.append(f"{requirement.name} {version}, expected {requirement.specifier}")
    if wrong:
        fix = "pip install --constraint constraints.txt --editable ."
        yield Finding("failure", "packages", "; ".join(wrong), fix)
    else:
        shown = [
            name for name in names if name.split()[0] in ("torch", "deepspeed", "transformers")
        ]
        yield Finding("fine", "packages", ", ".join(shown))


def _accelerator() -> Iterator[Finding]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding(
            "fine",
            "GPUs",
            f"{len(names)} x {names[0]}, {memory:.0f} GiB; driver {(driver or '?').split()[0]}, "
            f"CUDA {torch.version.cuda}, NCCL {nccl}",
        )
        if len(set(names)) > 1:
            yield Finding(
                "warning",
                "GPUs",
                f"of several kinds: {', '.join(sorted(set(names)))}",
                "Every step waits for the slowest; give a job GPUs of one kind.",
            )
        if not torch.cuda.is_bf16_supported():
            yield Finding(
                "warning", "bf16", "not supported by this GPU", "Set training.precision=fp32."
            )
        return
    if driver is not None and torch.version.cuda is None:
        yield Finding(
            "failure",
            "GPUs",
            f"driver {driver.split()[0]} is there, but torch {torch.__version__} is a CPU build",
            "Install the CUDA build of torch that fits the driver (nvidia-smi shows the newest "
            "CUDA it knows).",
        )
    elif driver is not None:
        yield Finding(
            "failure",
            "GPUs",
            f"driver {driver.split()[0]} is there, but torch {torch.__version__} for CUDA "
            f"{torch.version.cuda} can't use it",
            "Update the driver, or install a torch for an older CUDA; in a container check "
            "--gpus all, under Slurm --gpus-per-node.",
        )
    else:
        yield Finding(
            "warning",
            "GPUs",
            f"none; torch {torch.__version__}",
            "Jobs run on the CPU here: good for trying things, slow for training.",
        )


def _compilers() -> Iterator[Finding]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        if torch.cuda.is_available():
            yield Finding(
                "failure",
                "C compiler",
                "none",
                "FlexAttention's kernels need one: apt-get install gcc, or load its module.",
            )
        else:
            yield Finding("fine", "C compiler", "none, and none is needed without a GPU")
        return
    version = (_output(compiler, "-dumpfullversion") or "?").strip()
    yield Finding("fine", "C compiler", f"{compiler} {version}")
    if torch.cuda.is_available():
        nvcc = shutil.which("nvcc")
        if nvcc is None or shutil.which("ninja") is None:
            yield Finding(
                "warning",
                "DeepSpeed's own kernels",
                "nvcc or ninja is missing",
                "Only training.deepspeed=zero3_offload compiles them: install the CUDA toolkit and "
                "pip install ninja before using it.",
            )
        else:
            yield Finding("fine", "DeepSpeed's own kernels", f"can be compiled by {nvcc}")


def _shared_memory() -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("fine", "shared memory", "this system has no /dev/shm")
        return
    free = shutil.disk_usage(path).free / GIB
    ranks = max(torch.cuda.device_count(), 1)
    if free < _SHARED_MEMORY_GIB * ranks:
        yield Finding(
            "warning",
            "shared memory",
            f"{free:.2f} GiB free in /dev/shm for {ranks} rank(s)",
            "A rank that finds it full is killed by a bus error: docker run --shm-size=16g or "
            "--ipc=host, on Kubernetes a memory volume on /dev/shm.",
        )
    else:
        yield Finding("fine", "shared memory", f"{free:.1f} GiB free in /dev/shm")


def _ranks_here(ranks: Ranks | None) -> int:
    """Of a job on this machine: this one's, or as many as there are GPUs."""
    if ranks is not None and ranks.world > 1:
        return ranks.local_world
    return max(torch.cuda.device_count(), 1)


def _cores(ranks: int) -> Iterator[Finding]:
    cores, machine = host.cores(), os.cpu_count() or 1
    found = f"{cores} of this machine's {machine} for {ranks} rank(s)"
    if cores < ranks:
        yield Finding(
            "warning",
            "cores",
            found,
            "Ranks that share a core run in turn, and each waits for all: sbatch --exclusive or "
            "--cpus-per-gpu=8, docker --cpus, or resources.requests.cpu on Kubernetes.",
        )
    else:
        yield Finding("fine", "cores", found)


def _memory(config: RunConfig | None, ranks: int, world: int) -> Iterator[Finding]:
    memory = host.memory_bytes()
    found = f"{memory / GIB:.1f} GiB for {ranks} rank(s)"
    if config is None:
        yield Finding("fine", "memory", found)
        return
    held = _held(config, ranks, max(world, ranks))
    found += f", which hold about {held / GIB:.1f} GiB in it"
    if held > (1 - MARGIN) * memory:
        yield Finding(
            "warning",
            "memory",
            found,
            "sbatch --mem=0, docker --memory, more machines or fewer ranks on each, or "
            "checkpoints.background=false, which saves the copies of checkpoints.",
        )
    else:
        yield Finding("fine", "memory", found)


def _held(config: RunConfig, ranks: int, world: int) -> float:
    """Bytes of a machine's memory that so many of a job's ranks hold between steps, about."""
    training, parameters = config.training, _parameters(config)
    trained = 0 if config.model.lora.rank else parameters
    # Offloading is the last thing that `auto` chooses.
    name = CPU if training.deepspeed == AUTO else training.deepspeed
    zero = read_deepspeed(name)["zero_optimization"]
    held = states(parameters, trained, zero, training.precision, world, accumulates=True)
    of_rank = OVERHEAD[CPU] + held.host
    if choose_device(training.device).type == CPU:
        of_rank += held.on_device
    if config.checkpoints.background:
        of_rank += checkpoint_bytes(trained, 3, training.precision, world)[1]
    return ranks * of_rank


def _parameters(config: RunConfig) -> int:
    from transformers import AutoModelForCausalLM

    shape = sources.load_model_config(config.model, config.model.scratch.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    return sum(parameter.numel() for parameter in model.parameters())


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _OPEN_FILES:
        yield Finding(
            "warning",
            "open files",
            f"{files:,} allowed",
            f"ulimit -n {_OPEN_FILES}, or LimitNOFILE in slurmd's unit, or docker --ulimit nofile.",
        )
    else:
        yield Finding("fine", "open files", f"{files:,} allowed" if files > 0 else "no limit")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        yield Finding(
            "warning",
            "locked memory",
            f"{locked / 2**20:,.0f} MiB allowed, and there is InfiniBand",
            "NCCL registers memory with the card: ulimit -l unlimited, or docker --ulimit "
            "memlock=-1.",
        )


def _host() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding(
            "warning",
            "host name",
            f"{name} has no address",
            "Other machines can't meet this one by that name: give an address to "
            "launch/torchrun.sh, or MASTER_ADDR under Slurm.",
        )
        return
    if address.startswith("127."):
        yield Finding(
            "warning",
            "host name",
            f"{name} is {address}, which only this machine can reach",
            "Good for one machine. For several, give its address in the network.",
        )
    else:
        yield Finding("fine", "host name", f"{name} is {address}")


def _slurm() -> Iterator[Finding]:
    version = _output("sbatch", "--version") or "installed"
    if shutil.which("sbatch") is None:
        yield Finding("fine", "Slurm", "not here; launch/torchrun.sh starts jobs without it")
        return
    nodes = _output("sinfo", "--noheader", "--format=%P %D %T")
    if nodes is None:
        yield Finding(
            "warning",
            "Slurm",
            f"{version.strip()}, but sinfo got no answer from the controller",
            "scontrol ping; is SLURM_CONF that of the cluster?",
        )
        return
    shown = ", ".join(re.sub(r" +", " ", line) for line in nodes.strip().splitlines()[:4])
    yield Finding("fine", "Slurm", f"{version.strip()}: {shown}")


def _clocks(ranks: Ranks) -> list[Finding]:
    """Each rank's clock right after a barrier; its own delay is part of the difference."""
    best = float("inf")
    for _ in range(5):
        dist.barrier()
        times = ranks.each(time.time)
        best = min(best, max(times) - min(times))
    hosts = len(set(ranks.each(socket.gethostname)))
    found = f"{best * 1e3:.0f} ms apart on {ranks.world} ranks of {hosts} machine(s)"
    if best > _SKEW_S:
        fix = "Start a time service (chrony) on all machines: object stores refuse old requests."
        return [Finding("warning", "clocks", found, fix)]
    return [Finding("fine", "clocks", found)]


def _disks(config: RunConfig) -> Iterator[Finding]:
    run = Path(config.run_dir).absolute()
    there = next(path for path in (run, *run.parents) if path.exists())
    if not os.access(there, os.W_OK):
        fix = "Choose another run_dir, or have its rights changed."
        yield Finding("failure", "run_dir", f"{there} may not be written to", fix)
        return
    free = shutil.disk_usage(there).free / GIB
    checkpoints = config.checkpoints.keep_last + 2  # the best one, and the one being written
    from dti_dist.runs.commits import complete_checkpoints

    complete = complete_checkpoints(run / "checkpoints")[0]
    if complete:
        need = checkpoints * complete[-1].size / GIB
        found = f"{free:.1f} GiB free in {there}; {checkpoints} checkpoints take {need:.1f} GiB"
        if free + len(complete) * complete[-1].size / GIB < need:
            fix = "Free space, lower checkpoints.keep_last, or choose another run_dir."
            yield Finding("failure", "run_dir", found, fix)
            return
        yield Finding("fine", "run_dir", found)
    else:
        yield Finding(
            "fine",
            "run_dir",
            f"{free:.1f} GiB free in {there}; a checkpoint takes about 12 bytes a trained "
            f"parameter (14 in bf16 under ZeRO 1 and 2), and up to {checkpoints} are there at once",
        )


def _stores(config: RunConfig) -> Iterator[Finding]:
    began = time.perf_counter()
    file = storage.join(config.data.path, "dataset.json")
    quick = config.data.storage.model_copy(update={"retry_s": 0.0})
    try:
        there = storage.exists(file, quick)
    except UserError as error:
        yield Finding("failure", "data.path", str(error))
    else:
        took = (time.perf_counter() - began) * 1e3
        if there:
            found = f"{redact(config.data.path)} answers in {took:.0f} ms"
            yield Finding("fine", "data.path", found)
        else:
            fix = "dti-dist prepare makes a data set; or fix data.path."
            yield Finding("failure", "data.path", f"{redact(file)} does not exist", fix)
    copy_to = config.checkpoints.copy_to
    if copy_to is None:
        return
    probe = storage.join(copy_to, ".dti-dist-doctor")
    try:
        storage.write_atomic(probe, b"written and removed", quick)
        storage.remove(probe, quick)
    except (UserError, OSError) as error:
        yield Finding("failure", "checkpoints.copy_to", redact(str(error)))
    else:
        yield Finding("fine", "checkpoints.copy_to", f"{redact(copy_to)} can be written to")


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout
    return None
