"""The doctor's findings on this machine, as it is and as it is made to look."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from dti_dist import cli
from dti_dist.config import load_config
from dti_dist.reporting import doctor
from dti_dist.reporting.doctor import examine, table
from tests.launching import job, run, write_config


def by_name(findings):
    return {finding.what: finding for finding in findings}


def test_this_machine_can_train(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for what in ("Python", "packages", "GPUs", "C compiler", "shared memory", "Slurm"):
        assert f" {what}: " in printed
    assert "torch 2." in printed


def test_json_has_a_verdict_each(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["verdict"] for finding in findings} <= {"fine", "warning"}
    assert all(finding["found"] for finding in findings)


def test_a_package_of_another_version_is_a_failure(monkeypatch):
    version = doctor.metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "1.0.1" if name == "torch" else version(name)
    )
    finding = by_name(examine(None, None))["packages"]
    assert finding.verdict == "failure"
    assert "torch 1.0.1, expected" in finding.found
    assert "pip install" in finding.fix


@pytest.mark.parametrize("build", [None, "13.0"])
def test_a_driver_that_torch_can_not_use_is_a_failure(monkeypatch, build):
    monkeypatch.setattr(doctor, "_output", lambda *command: "580.65.06\n")
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.torch.version, "cuda", build)
    finding = by_name(examine(None, None))["GPUs"]
    assert finding.verdict == "failure"
    assert "driver 580.65.06 is there" in finding.found
    assert ("CUDA build" if build is None else "Update the driver") in finding.fix


def test_fewer_cores_than_ranks_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(doctor.host, "cores", lambda: 1)
    finding = by_name(examine(None, None))["cores"]
    assert finding.verdict == "warning"
    assert finding.found.startswith("1 of this machine's ")
    assert finding.found.endswith(" for 8 rank(s)")
    assert "--cpus-per-gpu" in finding.fix


@pytest.mark.parametrize(("gib", "verdict"), [(4, "warning"), (64, "fine")])
def test_memory_is_compared_with_what_ranks_hold(tmp_path, monkeypatch, gib, verdict):
    monkeypatch.setattr(doctor.host, "memory_bytes", lambda: int(gib * 2**30))
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 8)
    config = load_config(write_config(tmp_path / "config.yaml", tmp_path))
    finding = by_name(examine(config, None))["memory"]
    assert finding.verdict == verdict
    assert "GiB for 8 rank(s), which hold about 4.6 GiB in it" in finding.found


def test_ranks_hold_their_shares_of_a_model_and_copies_of_them(tmp_path, monkeypatch):
    """In units of parameters: weights 2/2, gradients 4/2, float32 and moments 12/2, copies 12/2."""
    monkeypatch.setattr(doctor, "_parameters", lambda config: 10**9)
    config = load_config(write_config(tmp_path / "config.yaml", tmp_path))
    training = {"precision": "bf16", "deepspeed": "auto"}
    config = config.model_copy(update={"training": config.training.model_copy(update=training)})
    both = doctor._held(config, ranks=2, world=2)
    assert both == 2 * 0.58 * 2**30 + (2 + 4 + 12 + 12) * 10**9
    assert doctor._held(config, ranks=1, world=2) == both / 2


def test_little_shared_memory_is_a_warning_with_the_flags_that_help(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(1 << 26, 0, 1 << 26))
    finding = by_name(examine(None, None))["shared memory"]
    assert finding.verdict == "warning"
    assert "--shm-size" in finding.fix


def test_a_config_has_its_data_disk_and_copies_examined(synthetic, tmp_path):
    path = write_config(
        tmp_path / "config.yaml", synthetic, checkpoints={"copy_to": str(tmp_path / "copies")}
    )
    found = by_name(examine(load_config(path), None))
    assert found["data.path"].verdict == "fine"
    assert found["checkpoints.copy_to"].verdict == "fine"
    assert found["run_dir"].verdict == "fine"
    assert not list((tmp_path / "copies").glob("*")), "the probe is removed"


def test_data_that_is_not_there_fails_the_command(tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", tmp_path / "nothing")
    assert cli.main(["doctor", str(path)]) == 1
    assert "failure  data.path" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="no Slurm: apt-get install slurm-client")
def test_a_slurm_whose_controller_does_not_answer_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert by_name(examine(None, None))["Slurm"].verdict == "warning"


@pytest.mark.slow
def test_ranks_compare_their_clocks(tmp_path):
    printed = run(job(2, "doctor", module="dti_dist"), tmp_path / "log")
    assert printed.count("clocks: ") == 1
    assert "on 2 ranks of 1 machine(s)" in printed


def test_a_check_that_fails_itself_is_a_warning(monkeypatch):
    def broken():
        raise OSError("no such luck")
        yield

    monkeypatch.setattr(doctor, "_compilers", broken)
    assert "could not be examined: no such luck" in table(examine(None, None))


def test_the_module_starts_without_a_config():
    done = subprocess.run(
        [sys.executable, "-m", "dti_dist", "doctor", "--help"], capture_output=True, text=True
    )
    assert "example: torchrun" in done.stdout
