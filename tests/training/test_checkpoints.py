"""Checkpoints of the real job: killed, damaged, full disks, other numbers of ranks, from a copy."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from dti_dist.runs import commits
from tests.launching import (
    SECONDS,
    assert_same_losses,
    job,
    job_with,
    kill,
    losses,
    metrics,
    run,
    run_dir,
    start,
    train,
    wait_for_step,
    wait_until,
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


KILLS_OF_A_RUN = 10


@pytest.mark.timeout(600 + 60 * KILLS)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(uninterrupted, synthetic, tmp_path):
    """DTI_DIST_TEST_KILLS says how often; a checkpoint a step, so that many kills hit a save."""
    rng = random.Random(KILLS)
    found: Counter[str] = Counter()
    for first in range(0, KILLS, KILLS_OF_A_RUN):
        kills = min(KILLS - first, KILLS_OF_A_RUN)
        config = write_config(
            tmp_path / str(first) / "config.yaml", synthetic, checkpoints={"every_steps": 1}
        )
        done = 0
        for number in range(kills):
            process = start(job(2, config), tmp_path / f"{first + number}.log")
            try:
                goal = done + 1 + rng.randrange(max(1, (19 - done) // (kills - number)))
                wait_for_step(process, run_dir(config), min(goal, 19))
                time.sleep(rng.random() * 0.3)
            finally:
                kill(process)
            found[where_it_was(run_dir(config) / "checkpoints")] += 1
            complete = commits.complete_checkpoints(run_dir(config) / "checkpoints")[0]
            done = complete[-1].step if complete else 0
        printed = train(config, ranks=2)
        assert f"resuming from {commits.tag(done)}" in printed
        assert losses(run_dir(config)) == losses(run_dir(uninterrupted[0]))
        assert_bit_identical(run_dir(config), run_dir(uninterrupted[0]))
        assert commits.best_step(run_dir(config) / "checkpoints") == commits.best_step(
            run_dir(uninterrupted[0]) / "checkpoints"
        )
        print(f"{first + kills} kills so far: {dict(found)}", flush=True)


def where_it_was(checkpoints: Path) -> str:
    """Where the save was that a kill hit, by what it left."""
    complete = commits.complete_checkpoints(checkpoints)[0]
    newest = complete[-1].folder.name if complete else ""
    begun = [path for path in checkpoints.glob("step-*") if path.name > newest]
    if not begun:
        return "between saves"
    (folder,) = begun
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.pt")}
    if not sizes:
        return "copying"
    as_before = [complete[-1].folder / name for name in complete[-1].files] if complete else []
    if sizes == {path.name: path.stat().st_size for path in as_before}:
        return "written, not committed"
    return "writing"


# Moments of the save of a step, for a job in which rank `RANK` then stays there.
_HOLD = """
import threading
from pathlib import Path
from dti_dist.training import checkpoint, saving, signals, staging
MOMENT, STEP, RANK, MARKER = {moment!r}, {step}, "{rank}", Path({marker!r})
now = 0
def stay():
    MARKER.touch()
    while not ({until}):
        time.sleep(0.01)
def hold(owner, name, moment, when=lambda *args: True):
    original = getattr(owner, name)
    def held(*args, **options):
        if moment == MOMENT and now == STEP and os.environ["RANK"] == RANK and when(*args):
            stay()
        return original(*args, **options)
    setattr(owner, name, held)
begin = checkpoint.Saver.begin
def noted(saver, state, *rest):
    global now
    now = state["step"]
    return begin(saver, state, *rest)
checkpoint.Saver.begin = noted
hold(staging.HostCopies, "copy", "copying", lambda copies, content: copies._used > 0)
hold(checkpoint._Counted, "write", "writing", lambda counted, data: counted.size > 10_000)
hold(checkpoint, "write_atomically", "written")
hold(saving.Saving, "_committed", "committed")
hold(saving.shutil, "rmtree", "removing")
"""


def held_job(
    folder: Path, moment: str, rank: int, step: int, until: str = "False", before_step: str = "pass"
) -> tuple[Path, Path]:
    """A job that stays at a moment of a save until something holds: its script, and a file that is
    there from then on."""
    marker = folder / f"{moment}-{step}"
    script = folder / f"{moment}-{step}.py"
    first = _HOLD.format(moment=moment, step=step, rank=rank, marker=str(marker), until=until)
    return job_with(before_step, script, first), marker


def test_a_kill_at_any_moment_of_a_save_loses_nothing(uninterrupted, synthetic, tmp_path):
    config = write_config(
        tmp_path / "config.yaml", synthetic, checkpoints={"every_steps": 4, "keep_last": 2}
    )
    checkpoints = run_dir(config) / "checkpoints"
    for moment, rank, step, complete, left in (
        ("copying", 1, 12, [4, 8], "copying"),
        ("writing", 1, 12, [4, 8], "writing"),
        ("written", 0, 12, [4, 8], "written, not committed"),
        ("committed", 0, 12, [4, 8, 12], "between saves"),
        ("removing", 0, 16, [8, 12, 16], "between saves"),  # of step 4 only the commit file is gone
    ):
        script, marker = held_job(tmp_path, moment, rank, step)
        process = start(job(2, config, script=script), tmp_path / f"{moment}.log")
        try:
            wait_until(process, marker.exists, moment)
            if moment != "copying":
                wait_for_step(process, run_dir(config), step + 2)
        finally:
            kill(process)
        assert [c.step for c in commits.complete_checkpoints(checkpoints)[0]] == complete, moment
        assert where_it_was(checkpoints) == left
    assert commits.best_step(checkpoints) == 12, "the job after marked it"
    assert any((checkpoints / commits.tag(4)).iterdir())
    assert "resuming from step-00000016" in train(config, ranks=2)
    assert losses(run_dir(config)) == losses(run_dir(uninterrupted[0]))
    assert_bit_identical(run_dir(config), run_dir(uninterrupted[0]))
    straight = run_dir(uninterrupted[0]) / "checkpoints"
    assert (checkpoints / "best.json").read_text() == (straight / "best.json").read_text()
    assert {path.name for path in checkpoints.glob("step-*")} == {
        commits.tag(step) for step in (16, 20, commits.best_step(checkpoints))
    }


def test_a_signal_during_a_save_leaves_both_checkpoints(uninterrupted, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, checkpoints={"every_steps": 4})
    script, marker = held_job(tmp_path, "writing", 1, 4, until="signals._received")
    process = start(job(2, config, script=script), tmp_path / "log")
    try:
        wait_until(process, marker.exists, "the save")
        wait_for_step(process, run_dir(config), 6)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(SECONDS) == 75
    finally:
        kill(process)
    stopped_at = max(losses(run_dir(config)))
    assert 6 <= stopped_at <= 8
    complete = commits.complete_checkpoints(run_dir(config) / "checkpoints")[0]
    assert [commit.step for commit in complete] == [4, stopped_at]
    train(config, ranks=2)
    assert losses(run_dir(config)) == losses(run_dir(uninterrupted[0]))


def test_a_failure_during_a_save_leaves_the_checkpoint(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, checkpoints={"every_steps": 4})
    fail = "if step == 6: raise ValueError('a fault of the test')"
    script, _ = held_job(tmp_path, "writing", 1, 4, until="ending", before_step=fail)
    noted = """
ending = []
last_moments = saving.Saving._last_moments
def noted(self):
    ending.append(True)
    last_moments(self)
    print("complete at the end:", self._writing.is_done, flush=True)
saving.Saving._last_moments = noted
original = """
    script.write_text(script.read_text().replace("\noriginal = ", noted))
    printed = run(job(2, config, script=script), tmp_path / "log", expect=1)
    assert "a fault of the test" in printed
    assert printed.count("complete at the end: True") == 2
    assert "resuming from step-00000004" in train(config, ranks=2)


def test_a_disk_that_hangs_behind_training_is_said_and_in_the_end_stops_it(synthetic, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        checkpoints={"every_steps": 0},
        training={"watchdog_minutes": 0.1},
    )
    script, _ = held_job(tmp_path, "writing", 1, 12, before_step="if step > 12: time.sleep(1.2)")
    printed = run(job(2, config, script=script), tmp_path / "log", expect=1)
    (said,) = re.findall(r"rank \d: the checkpoint of step 12 is not complete after.*", printed)
    assert said.startswith("rank 1:")
    assert "this rank is writing" in said
    assert "step 20/20" in printed, "training went on"
    assert "no step, batch of a validation or save ended for 0.1 minutes" in printed
    stacks = (run_dir(config) / "stacks" / "rank-1.txt").read_text()
    assert "in _write" in stacks, "where it hangs"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["zero1", "cpu"])
def test_files_are_the_same_as_without_the_background(synthetic, tmp_path, stage, precision):
    """Of all ranks; and without room for copies."""
    digests = []
    no_room = job_with(
        "pass",
        tmp_path / "job.py",
        "from dti_dist.training import staging\nstaging.free_memory_bytes = lambda: 0",
    )
    made_ahead = job_with(
        "pass",
        tmp_path / "noting.py",
        """
import os, threading
from dti_dist.training import staging
make = staging.HostCopies._make
def noted(copies, sizes):
    by_main = threading.current_thread() is threading.main_thread()
    os.write(1, f"made by the main thread: {by_main}\\n".encode())
    make(copies, sizes)
staging.HostCopies._make = noted
""",
    )
    for name, script in (("true", made_ahead), ("false", None), ("true", no_room)):
        config = write_config(
            tmp_path / str(len(digests)) / "config.yaml",
            synthetic,
            training={"deepspeed": stage, "precision": precision, "max_steps": 3},
            checkpoints={"every_steps": 2, "background": name == "true"},
        )
        printed = run(job(2, config, script=script), tmp_path / f"{len(digests)}.log")
        assert ("no room for a copy" in printed) == (script == no_room)
        if script == made_ahead:
            assert printed.count("made by the main thread: False") == 2, "by a thread of each rank"
            assert "made by the main thread: True" not in printed
        (first, _), _ = commits.complete_checkpoints(run_dir(config) / "checkpoints")
        assert first.step == 2
        digests.append(first.files)
    assert digests[0] == digests[1] == digests[2]


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
    run(job(1, "evaluate", run_dir(config), module="dti_dist"), tmp_path / "evaluated")


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
        seconds, total = line["checkpoint"]["seconds"], line["checkpoint"]["total_seconds"]
        assert 0 < seconds <= total < 60


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
    assert "step 13/20" not in printed, "the checkpoint of step 12 would wait for that of step 8"
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
