"""A real Slurm with two nodes on this machine: its own munge, controller and node daemons.

Everything lies in one folder; nothing outside is touched. It takes root, as Slurm starts jobs for
users, and Debian's packages munge, slurmctld, slurmd and slurm-client.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_START_S = 60
CPUS = 4  # of a node, as told to Slurm
_GPUS = 2  # of a node; plain files, as Slurm wants a device file of each

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
FirstJobId={first_job}
JobRequeue=1
MailProg=/bin/true
KillWait=15
InactiveLimit=0
SlurmdTimeout=30
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=n[1-2] Gres=gpu:{gpus} NodeHostname={host} \
NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Commands for the running cluster; its jobs see `environment`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str, folder: Path, **environment: str) -> int:
        """sbatch in a folder; returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env={**self.environment, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def field(self, job: int, name: str) -> str:
        """A field of `scontrol show job`, such as JobState, Restarts or ExitCode."""
        shown = self.call("scontrol", "--oneliner", "show", "job", str(job))
        return next(word[len(name) + 1 :] for word in shown.split() if word.startswith(f"{name}="))

    def wait(self, job: int, seconds: float, states: tuple[str, ...] = ("COMPLETED",)) -> None:
        """Until the job is in one of the states; fails when it ended in another one."""
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in states:
            ended = state in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED", "OUT_OF_MEMORY")
            assert not ended, f"job {job} ended as {state}, expected {states}"
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds} s"
            time.sleep(0.3)

    def nodes_are_idle(self) -> bool:
        """Whether both can take a job."""
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return sorted(set(done.stdout.split())) == ["n1", "n2"]

    def cancel_all(self) -> None:
        jobs = self.call("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.call("scancel", *jobs)
        deadline = time.monotonic() + 40
        while self.call("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.3)


def has_freezer() -> bool:
    """Whether Slurm can track processes by cgroups here: it makes some under the freezer."""
    return os.access("/sys/fs/cgroup/freezer", os.W_OK)


@contextmanager
def slurm_cluster(folder: Path, proctrack: str) -> Iterator[SlurmCluster]:
    """The cluster, up; all its processes are ended after use. Skips where it can't be started.

    Args:
        proctrack: how Slurm knows a job's processes, and whom a signal reaches. ``cgroup``, which
            most sites have: the task alone. ``linuxproc``: all its descendants.
    """
    missing = [name for name in _PROGRAMS if _which(name) is None]
    if missing:
        pytest.skip(
            f"no Slurm on this machine ({', '.join(missing)} not found): "
            "apt-get install munge slurmctld slurmd slurm-client"
        )
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs for users, so it needs root")
    folder.mkdir(parents=True)
    started: list[subprocess.Popen[bytes]] = []
    host = socket.gethostname().split(".")[0]
    port, first, _ = _free_ports(3)
    (folder / "slurm.conf").write_text(
        _CONFIG.format(
            folder=folder,
            proctrack=proctrack,
            host=host,
            port=port,
            first=first,
            last=first + 1,
            cpus=CPUS,
            gpus=_GPUS,
            # Ranks meet at ports by the job number: not those of daemons or another cluster.
            first_job=7_000 + port % 5_000,
        )
    )
    for number in range(_GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{_GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    cluster = SlurmCluster(folder)
    munged = [
        *("munged", "--foreground", "--force", f"--key-file={key}"),
        *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"),
        *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
    ]
    daemons = [
        munged,
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    try:
        for command in daemons:
            with (folder / "daemons.log").open("ab") as log:
                started.append(
                    subprocess.Popen(
                        [_which(command[0]) or command[0], *command[1:]],
                        env=cluster.environment,
                        stdout=log,
                        stderr=log,
                    )
                )
            if command is munged:
                _wait_until(lambda: (folder / "munge.socket").exists(), folder)
        _wait_until(cluster.nodes_are_idle, folder)
        yield cluster
        cluster.cancel_all()
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _wait_until(true, folder: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not true():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.log")))
            raise AssertionError(f"Slurm did not come up in {_START_S} s:\n{logs}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Neighbouring ports that are free now."""
    for base in range(21_000 + os.getpid() % 5_000, 27_000, 7):
        probes = []
        try:
            for port in range(base, base + count):
                probe = socket.socket()
                probes.append(probe)
                probe.bind(("127.0.0.1", port))
            return list(range(base, base + count))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("found no free ports for Slurm")
