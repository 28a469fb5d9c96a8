"""Starting the real job in processes of its own: as users do, or forked from one that is warm.

A rank imports for seconds before it works for one. Tests of what happens then use `job`, whose
ranks are forks of a process that has imported all of it; tests of starts and launchers `command`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from tests import warm
from tests.store_server import free_port

SECONDS = 240  # a start takes about 10, so a job that is still there hangs


def write_config(path: Path, data: Path | str, **sections: Any) -> Path:
    """A config of a model of two tiny layers; sections are merged over the defaults here."""
    config: dict[str, Any] = {
        "run_dir": str(path.parent / "run"),
        "data": {"path": str(data)},
        "sample": {"context": 5, "targets": 8},
        "template": {"item": "{title}"},
        "pack": {"length": 256},
        "model": {
            "name": "scratch",
            "scratch": {
                "vocab_size": 400,
                "hidden_size": 32,
                "intermediate_size": 48,
                "layers": 2,
                "heads": 2,
                "key_value_heads": 1,
            },
        },
        "training": {
            "epochs": 2,
            "max_steps": 20,
            "global_batch_packs": 4,
            "learning_rate": 0.003,
            "precision": "fp32",
            "deepspeed": "cpu",
            "device": "cpu",
            "cpu_threads": 1,  # tests run beside each other
            "log_every": 1,
        },
        "validation": {"max_targets": 200},
    }
    for name, value in sections.items():
        if isinstance(value, dict):
            config[name] = {**config.get(name, {}), **value}
        else:
            config[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def command(ranks: int, module: str = "dti_dist.training", script: Path | None = None) -> list[str]:
    """One process, or torchrun with several, of a module or a script."""
    program = [str(script)] if script else ["-m", module]
    if ranks == 1:
        return [sys.executable, *program]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(ranks), *program]


@dataclass(frozen=True)
class Job:
    """Ranks of a module or a script, laid out as by a launcher that leaves them alone: srun."""

    ranks: int
    arguments: list[str]
    program: str


def job(
    ranks: int,
    *arguments: object,
    module: str = "dti_dist.training",
    script: Path | None = None,
) -> Job:
    return Job(ranks, [str(word) for word in arguments], str(script) if script else module)


class Ranks:
    """The processes of a Job; to tests like the Popen of a launcher.

    Its exit code is the lowest of those that are not 0: a rank that ends for another's failure has
    2, and -N one that signal N ended.
    """

    def __init__(self, processes: list[ForkServerProcess]):
        self._processes = processes

    @property
    def pids(self) -> list[int]:
        """Of those that are still there."""
        return [process.pid for process in self._processes if process.is_alive()]

    def poll(self) -> int | None:
        if self.pids:
            return None
        return min((p.exitcode for p in self._processes if p.exitcode), default=0)

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("ranks", seconds)
        return code

    def send_signal(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)


def job_with(before_step: str, script: Path, first: str = "") -> Path:
    """The training job, with statements that run before each step; they see `engine` and `step`.

    `step` is the step about to be taken, from 1. `first` runs once, before the job.
    """
    body = "\n".join(f"    {line}" for line in before_step.strip().splitlines())
    script.write_text(
        "import os, signal, sys, time\n"
        "import torch\n"
        "from dti_dist import cli\n"
        "from dti_dist.training import loop\n"
        f"{first}\n"
        "original = loop.take_step\n"
        "def patched(engine, stream, number, rate, seed, ranks, stop):\n"
        "    step, rank = number + 1, ranks.rank\n"
        f"{body}\n"
        "    return original(engine, stream, number, rate, seed, ranks, stop)\n"
        "loop.take_step = patched\n"
        "cli.run(['train', *sys.argv[1:]])\n"
    )
    return script


def start(what: list[str] | Job, log: Path, **environment: str) -> subprocess.Popen[bytes] | Ranks:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK", "WORLD"))}
    environ.update(OMP_NUM_THREADS="1", **environment)
    with log.open("wb") as out:
        if isinstance(what, list):
            return subprocess.Popen(
                what, stdout=out, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )
    return _fork(what, log, environ)


def _fork(what: Job, log: Path, environ: dict[str, str]) -> Ranks:
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(warm.IMPORTS)
    if what.ranks > 1:
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(what.ranks))
    processes = []
    for rank in range(what.ranks):
        if what.ranks > 1:
            environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        arguments = (what.program, what.arguments, environ, log, os.getcwd())
        processes.append(forks.Process(target=warm.become, args=arguments))
        processes[-1].start()
    return Ranks(processes)


def run(what: list[str] | Job, log: Path, expect: int = 0, **environment: str) -> str:
    """Run to the end and return what was printed; fails when the exit code differs."""
    process = start(what, log, **environment)
    try:
        code = process.wait(SECONDS)
    finally:
        kill(process)
    text = log.read_text(errors="replace")
    assert code == expect, f"exit {code}, expected {expect}:\n{text[-4000:]}"
    return text


def kill(process: subprocess.Popen[bytes] | Ranks) -> None:
    """SIGKILL for the process and all that it started, and theirs.

    Torchrun puts its ranks into sessions of their own, so that a process group does not hold them.
    """
    if process.poll() is not None:
        return
    doomed = process.pids if isinstance(process, Ranks) else [process.pid]
    for pid in doomed:  # grows as it is walked
        doomed += _children(pid)
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task")
    try:
        lists = [(thread / "children").read_text() for thread in threads.iterdir()]
    except OSError:  # it ended
        return []
    return [int(child) for line in lists for child in line.split()]


def train(config: Path, *overrides: str, ranks: int = 1, expect: int = 0) -> str:
    return run(job(ranks, config, *overrides), config.with_suffix(".log"), expect)


def metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def losses(run_dir: Path | str) -> dict[int, float]:
    lines = [line for line in metrics(run_dir) if "loss" in line]
    by_step = {line["step"]: line["loss"] for line in lines}
    assert len(by_step) == len(lines), "a step is logged twice"
    return by_step


def wait_for_step(process: subprocess.Popen[bytes] | Ranks, run_dir: Path, step: int) -> None:
    """Return as soon as a step is logged; fails when the job ends before."""
    wait_until(
        process, lambda: any(line["step"] >= step for line in metrics(run_dir)), f"step {step}"
    )


def wait_until(
    process: subprocess.Popen[bytes] | Ranks, happened: Callable[[], bool], what: str
) -> None:
    """Return as soon as something happened; fails when the process ends before, or hangs."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if happened():
            return
        assert process.poll() is None, f"the process ended before {what}"
        time.sleep(0.01)
    raise AssertionError(f"no {what} within {SECONDS} s")


def run_dir(config: Path) -> Path:
    """Where the config's run lies."""
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def assert_same_losses(
    first: dict[int, float], second: dict[int, float], within: float = 1e-4, steps: int = 20
) -> None:
    assert set(first) == set(second) == set(range(1, steps + 1))
    assert max(abs(first[step] - second[step]) for step in first) < within
    assert len({round(loss, 3) for loss in first.values()}) > 5, "the losses don't move"
