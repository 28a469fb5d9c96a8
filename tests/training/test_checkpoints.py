"""Checkpoints of the real job: killed, damaged, full disks, other numbers of ranks, from a copy."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dti_dist.runs import commits
from tests.launching import (
    SECONDS,
    assert_same_losses,
    command,
    job,
    kill,
    losses,
    metrics,
    run,
    run_dir,
    start,
    train,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("DTI_DIST_TEST_KILLS", "3"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """float32 weights of the newest complete checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    newest = commits.complete_checkpoints(folder / "checkpoints")[0][-1]
    return dict(
        get_fp32_state_dict_from_zero_checkpoint(str(newest.folder.parent), newest.folder.name)
    )


def assert_bit_identical(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_run_killed_again_and_again_ends_with_the_same_bits(uninterrupted, synthetic, tmp_path):
    """DTI_DIST_TEST_KILLS says how often; a checkpoint a step, so that many kills hit a save."""
    config = write_config(tmp_path / "config.yaml", synthetic, checkpoints={"every_steps": 1})
    rng = random.Random(0)
    done, in_save = 0, 0
    for number in range(KILLS):
        process = start(job(2, config), tmp_path / f"{number}.log")
        try:
            goal = done + 1 + rng.randrange(max(1, (19 - done) // (KILLS - number)))
            wait_for_step(process, run_dir(config), min(goal, 19))
            time.sleep(rng.random() * 0.1)
        finally:
            kill(process)
        steps = {path.name for path in (run_dir(config) / "checkpoints").glob("step-*")}
        complete = commits.complete_checkpoints(run_dir(config) / "checkpoints")[0]
        in_save += len(steps) > len(complete)
        done = complete[-1].step if complete else 0
    printed = train(config, ranks=2)
    assert f"resuming from {commits.tag(done)}" in printed
    print(f"{KILLS} kills, {in_save} of them while a checkpoint was written")
    assert losses(run_dir(config)) == losses(run_dir(uninterrupted[0]))
    assert_bit_identical(run_dir(config), run_dir(uninterrupted[0]))


def test_another_number_of_ranks_goes_on_with_the_same_losses(uninterrupted, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    of_20 = run_dir(uninterrupted[0])
    for ranks, until in ((2, 7), (1, 14)):
        process = start(job(ranks, config), tmp_path / f"{until}.log")
        try:
            wait_for_step(process, run_dir(config), until)
            process.send_signal(signal.SIGUSR1)
            process.wait(SECONDS)
        finally:
            kill(process)
    printed = train(config, ranks=2)
    assert "was written by 1 rank(s), and this job has 2: converting it" in printed
    assert "was written by 2 rank(s), and this job has 1" in (tmp_path / "14.log").read_text()
    assert_same_losses(losses(of_20), losses(run_dir(config)))
    rates = {line["step"]: line["learning_rate"] for line in metrics(of_20) if "loss" in line}
    assert rates == {
        line["step"]: line["learning_rate"] for line in metrics(run_dir(config)) if "loss" in line
    }
    assert not list((run_dir(config) / "checkpoints").glob(".*"))


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_the_lower_stages_go_on_with_another_number_of_ranks_too(
    uninterrupted, synthetic, tmp_path, stage
):
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        training={"deepspeed": stage},
        checkpoints={"every_steps": 1},
    )
    process = start(job(1, config), tmp_path / "log")
    try:
        wait_for_step(process, run_dir(config), 7)
    finally:
        kill(process)
    assert "was written by 1 rank(s), and this job has 2: converting" in train(config, ranks=2)
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))


@pytest.mark.parametrize("stage", ["zero1", "zero2", "cpu"])
def test_bf16_with_gradients_summed_in_float32_goes_on_with_another_number_of_ranks(
    synthetic, tmp_path, stage
):
    """DeepSpeed has another optimizer for ZeRO-1 there, whose checkpoints can't be converted."""
    training = {"deepspeed": stage, "precision": "bf16", "max_steps": 8}
    config = write_config(
        tmp_path / "config.yaml", synthetic, training=training, checkpoints={"every_steps": 4}
    )
    train(config, ranks=2)
    straight = losses(run_dir(config))
    shutil.rmtree(run_dir(config) / "checkpoints" / "step-00000008")
    assert "was written by 2 rank(s), and this job has 1: converting" in train(config)
    again = losses(run_dir(config))
    assert max(abs(straight[step] - again[step]) for step in straight) < 1e-3  # bf16's own noise
    run([*command(1, "dti_dist"), "evaluate", str(run_dir(config))], tmp_path / "evaluated")


def damaged_copies(source: Path) -> dict[str, str]:
    """Copies of a checkpoint, each newer and with another fault: name → what is said of it."""

    def flip_a_bit(folder: Path) -> None:
        path = next(folder.glob("*optim*"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    faults = {
        "step-00000030": (lambda f: (f / "commit.json").unlink(), "never committed"),
        "step-00000031": (
            lambda f: os.truncate(next(f.glob("*optim*")), 1000),
            "has 1000 bytes, committed were",
        ),
        "step-00000032": (lambda f: next(f.glob("*model*")).unlink(), "is missing"),
        "step-00000033": (flip_a_bit, "was altered: SHA-256"),
    }
    for name, (damage, _) in faults.items():
        shutil.copytree(source, source.parent / name)
        damage(source.parent / name)
    return {name: said for name, (_, said) in faults.items()}


def test_damaged_checkpoints_are_passed_over_with_the_reason(uninterrupted, tmp_path):
    config, _ = uninterrupted
    copy = tmp_path / "run"
    shutil.copytree(run_dir(config), copy)
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    faults = damaged_copies(newest)
    printed = run(job(2, config, f"run_dir={copy}"), tmp_path / "log")
    for name, said in faults.items():
        assert re.search(rf"checkpoint passed over: {name}: .*{said}", printed), printed
    assert f"resuming from {newest.name}" in printed


def test_a_checkpoint_costs_time_that_is_on_record(uninterrupted):
    saved = [line for line in metrics(run_dir(uninterrupted[0])) if "checkpoint" in line]
    assert saved
    for line in saved:
        folder = run_dir(uninterrupted[0]) / "checkpoints" / commits.tag(line["step"])
        written = sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".pt")
        assert line["checkpoint"]["bytes"] == written
        assert 0 < line["checkpoint"]["seconds"] < 60


@pytest.fixture
def small_disk(tmp_path, uninterrupted):
    """A file system with room for one and a half checkpoints."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    one = commits.complete_checkpoints(run_dir(uninterrupted[0]) / "checkpoints")[0][-1].size
    options = f"size={one * 3 // 2}"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"a small file system needs root: {made.stderr.decode().strip()}")
    yield folder, one
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before_and_training_goes_on(
    uninterrupted, synthetic, tmp_path, small_disk
):
    folder, one = small_disk
    config = write_config(tmp_path / "config.yaml", synthetic, checkpoints={"every_steps": 8})
    printed = train(config, ranks=2, expect=1)
    for step in (12, 16, 20):
        assert re.search(
            rf"The checkpoint of step {step} could not be written: .*No space left on device.*"
            "step-00000008 is kept",
            printed,
        ), printed
    assert "step 20/20" in printed, "training went on"
    assert "its last checkpoint could not be written" in printed
    assert [path.name for path in folder.glob("step-*")] == ["step-00000008"]
    failed = [line["step"] for line in metrics(run_dir(config)) if "save_failed" in line]
    assert failed == [12, 16, 20], "once at each"

    options = f"remount,size={one * 4}"
    subprocess.run(["mount", "-o", options, str(folder)], check=True)
    printed = train(config, ranks=2)
    assert "resuming from step-00000008" in printed
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))


def test_a_full_disk_stops_the_run_where_that_is_asked_for(synthetic, tmp_path, small_disk):
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        checkpoints={"every_steps": 4, "on_failed_save": "stop"},
    )
    printed = train(config, ranks=1, expect=1)
    assert "The checkpoint of step 8 could not be written" in printed
    assert "step 9/20" not in printed
    assert "Traceback" not in printed


def test_a_run_goes_on_from_its_copies_alone(uninterrupted, synthetic, tmp_path):
    copies = tmp_path / "copies"
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        checkpoints={"every_steps": 5, "copy_to": str(copies)},
    )
    train(config)
    assert (copies / "step-00000020" / "commit.json").exists()
    shutil.rmtree(run_dir(config))
    shutil.rmtree(copies / "step-00000020")
    damaged = next((copies / "step-00000015").glob("*optim*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    left = run_dir(config) / "checkpoints" / ".step-00000012.partial-0123abcd"
    left.mkdir(parents=True)  # by a job that was killed

    printed = train(config)
    assert not list(left.parent.glob(".*"))
    assert re.search(r"copy passed over: \S+step-00000015: \S+optim\S+ has SHA-256", printed)
    assert "resuming from step-00000012" in printed, "the end of the first epoch"
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))

    shutil.rmtree(run_dir(config))
    printed = train(config, "seed=1", expect=2)
    assert f"{copies} has checkpoints of a run with other settings" in printed
    assert "seed: 0 there, 1 now" in printed
    assert json.loads((copies / "step-00000020" / "commit.json").read_text())["step"] == 20
