"""launch/train.slurm on a real Slurm with two nodes."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launching import SECONDS, assert_same_losses, losses, metrics, run_dir, write_config
from tests.slurm_cluster import CPUS, SlurmCluster, has_freezer, slurm_cluster

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "train.slurm")
NODES = ("--nodes=2", "--ntasks-per-node=1")


@contextmanager
def running_cluster(folder: Path, proctrack: str) -> Iterator[SlurmCluster]:
    with slurm_cluster(folder, proctrack) as running:
        running.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        running.environment["PYTHONPATH"] = f"{ROOT}:{Path(__file__).with_name('slow_steps')}"
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A signal reaches a step's tasks alone, as at most sites."""
    # Without cgroups by process groups: the launcher's ranks are in one of their own.
    proctrack = "cgroup" if has_freezer() else "pgid"
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster", proctrack) as running:
        yield running


@pytest.fixture(scope="module")
def cluster_that_signals_all(tmp_path_factory):
    """A signal reaches the tasks and all their descendants."""
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster", "linuxproc") as running:
        yield running


def wait(cluster: SlurmCluster, job: int, folder: Path) -> None:
    """For the job's good end; what it printed is shown otherwise."""
    try:
        cluster.wait(job, SECONDS)
    except AssertionError as error:
        printed = "\n".join(path.read_text()[-4000:] for path in folder.glob("slurm-*"))
        raise AssertionError(f"{error}\n{printed}") from None


def wait_for_step(cluster: SlurmCluster, job: int, run: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while not any(line["step"] >= step for line in metrics(run)):
        assert time.monotonic() < deadline, f"no step {step}"
        assert cluster.field(job, "JobState") in ("PENDING", "RUNNING")
        time.sleep(0.2)


def test_sbatch_trains_on_two_nodes_of_two_ranks_to_the_end(
    cluster, uninterrupted, synthetic, tmp_path
):
    config = write_config(tmp_path / "config.yaml", synthetic)
    nodes = ("--nodes=2", "--ntasks-per-node=2")
    job = cluster.submit(*nodes, "--time=10", SCRIPT, str(config), folder=tmp_path)
    wait(cluster, job, tmp_path)
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))
    printed = (tmp_path / f"slurm-{job}.out").read_text()
    assert "4 rank(s) on cpu, DeepSpeed ZeRO stage 3" in printed
    logs = tmp_path / "logs" / str(job) / "0"
    assert (logs / "exit-code").read_text() == "0\n"
    of_ranks = {
        (path.relative_to(logs).parts[0], path.parent.name) for path in logs.rglob("stderr.log")
    }
    assert of_ranks == {(f"node-{node}", str(rank)) for node in (0, 1) for rank in (0, 1)}


def test_a_job_near_its_time_limit_is_saved_and_requeued_with_unchanged_losses(
    cluster, uninterrupted, synthetic, tmp_path
):
    config = write_config(tmp_path / "config.yaml", synthetic)
    job = cluster.submit(
        *(*NODES, "--time=2", "--signal=USR1@40", SCRIPT, str(config)),
        folder=tmp_path,
        DTI_DIST_TEST_STEP_S="4.5",
    )
    deadline = time.monotonic() + SECONDS
    while cluster.field(job, "Restarts") == "0":
        assert time.monotonic() < deadline, [p.read_text() for p in tmp_path.glob("slurm-*")]
        time.sleep(0.5)
    cluster.call("scontrol", "update", f"jobid={job}", "timelimit=10")  # once is enough here
    wait(cluster, job, tmp_path)
    printed = (tmp_path / f"slurm-{job}.out").read_text()
    assert "stopped by a signal after step" in printed
    assert f"requeueing job {job}" in printed
    assert "resuming from step-" in printed
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)), within=1e-9)


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_signal_to_every_process_of_the_job_is_a_checkpoint_too(
    cluster_that_signals_all, uninterrupted, synthetic, tmp_path, signal
):
    cluster = cluster_that_signals_all
    config = write_config(tmp_path / "config.yaml", synthetic)
    job = cluster.submit(
        *(*NODES, "--time=10", SCRIPT, str(config)), folder=tmp_path, DTI_DIST_TEST_STEP_S="0.5"
    )
    wait_for_step(cluster, job, run_dir(config), 3)
    cluster.call("scancel", f"--signal={signal}", str(job))
    wait(cluster, job, tmp_path)
    printed = (tmp_path / f"slurm-{job}.out").read_text()
    assert "stopped by a signal after step" in printed
    assert cluster.field(job, "Restarts") == "1"
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)), within=1e-9)


def test_a_lost_node_costs_no_more_than_the_steps_since_the_checkpoint(
    cluster, uninterrupted, synthetic, tmp_path
):
    config = write_config(tmp_path / "config.yaml", synthetic, checkpoints={"every_steps": 2})
    job = cluster.submit(
        *(*NODES, "--time=10", SCRIPT, str(config)), folder=tmp_path, DTI_DIST_TEST_STEP_S="0.5"
    )
    wait_for_step(cluster, job, run_dir(config), 5)
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait(job, SECONDS, ("PENDING",))
    if not cluster.nodes_are_idle():  # one that is heard of again may be back by itself
        cluster.call("scontrol", "update", "nodename=n2", "state=resume")
    wait(cluster, job, tmp_path)
    assert cluster.field(job, "Restarts") == "1"
    assert "resuming from step-" in (tmp_path / f"slurm-{job}.out").read_text()
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)), within=1e-9)


def test_an_array_is_a_sweep(cluster, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, training={"max_steps": 2})
    overrides = (f"run_dir={tmp_path}/sweep-%a", "seed=%a")
    job = cluster.submit("--array=1-2", SCRIPT, str(config), *overrides, folder=tmp_path)
    deadline = time.monotonic() + SECONDS
    runs = [tmp_path / f"sweep-{number}" for number in (1, 2)]
    while not all(len(losses(run)) == 2 for run in runs):
        assert time.monotonic() < deadline, [p.read_text() for p in tmp_path.glob("slurm-*")]
        time.sleep(0.3)
    assert losses(runs[0]) != losses(runs[1])
    assert job


def test_a_container_sees_the_folder_the_logs_and_the_mounts(cluster, synthetic, tmp_path):
    """Apptainer is a script here that says how it was called; the rest of the job is real."""
    programs = tmp_path / "bin"
    programs.mkdir()
    apptainer = programs / "apptainer"
    apptainer.write_text(
        f'#!/usr/bin/env bash\nprintf \'%s\\n\' "${{@:1:7}}" >{tmp_path}/called\nexec "${{@:8}}"\n'
    )
    apptainer.chmod(0o755)
    config = write_config(tmp_path / "config.yaml", synthetic)
    job = cluster.submit(
        *(SCRIPT, str(config), "training.epochz=1"),
        folder=tmp_path,
        PATH=f"{programs}:{cluster.environment['PATH']}",
        DTI_DIST_CONTAINER="/images/dti-dist.sif",
        DTI_DIST_MOUNTS="/data:/data,/scratch/cache:/cache",
    )
    cluster.wait(job, SECONDS, ("FAILED",))
    logs = f"{tmp_path}/logs/{job}/0"
    mounts = f"{tmp_path}:{tmp_path},{logs}:{logs},/data:/data,/scratch/cache:/cache"
    image = "/images/dti-dist.sif"
    called = ["exec", "--nv", "--bind", mounts, "--pwd", str(tmp_path), image]
    assert (tmp_path / "called").read_text().splitlines() == called
    assert "unknown key" in (tmp_path / f"slurm-{job}.out").read_text()


def test_a_job_can_share_its_nodes_and_has_a_rank_per_gpu(cluster, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    shared = ("--oversubscribe", "--gpus-per-node=2", "--cpus-per-gpu=1", "--mem=200M")
    job = cluster.submit(*shared, SCRIPT, str(config), "training.epochz=1", folder=tmp_path)
    cluster.wait(job, SECONDS, ("FAILED",))
    fields = {name: cluster.field(job, name) for name in ("NumCPUs", "OverSubscribe")}
    assert fields == {"NumCPUs": "2", "OverSubscribe": "YES"}
    logs = (tmp_path / "logs" / str(job)).rglob("stderr.log")
    assert {path.parent.name for path in logs} == {"0", "1"}


def test_a_job_gets_whole_nodes(cluster, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    job = cluster.submit(SCRIPT, str(config), "training.epochz=1", folder=tmp_path)
    cluster.wait(job, SECONDS, ("FAILED",))
    assert cluster.field(job, "OverSubscribe") == "NO"
    assert cluster.field(job, "NumCPUs") == str(CPUS)


def test_a_mistake_fails_the_job_with_its_exit_code_and_is_not_requeued(
    cluster, synthetic, tmp_path
):
    config = write_config(tmp_path / "config.yaml", synthetic)
    job = cluster.submit(SCRIPT, str(config), "training.epochz=1", folder=tmp_path)
    cluster.wait(job, SECONDS, ("FAILED",))
    printed = (tmp_path / f"slurm-{job}.out").read_text()
    assert "unknown key" in printed
    assert cluster.field(job, "ExitCode") == "2:0", printed
