"""The real job on real DeepSpeed ZeRO, in processes of its own."""

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from dti_dist.config import TrainingConfig
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.training.bad_start import of_bad_start
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
    write_config,
)

pytestmark = pytest.mark.slow


def test_two_ranks_of_zero_3_train_and_say_what_they_do(uninterrupted):
    config, printed = uninterrupted
    assert "2 rank(s) on cpu, DeepSpeed ZeRO stage 3" in printed
    assert "step 20/20" in printed
    lines = [line for line in metrics(run_dir(config)) if "loss" in line]
    expected = {
        *("step", "epoch", "loss", "learning_rate", "grad_norm", "targets", "tokens"),
        *("targets_per_s", "tokens_per_s", "data_wait_s", "step_s", "memory_gib"),
    }
    assert all(expected <= set(line) for line in lines)
    assert all(line["grad_norm"] > 0 and line["targets"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["training.micro_batch_packs=4", "training.activation_checkpointing=true"]),
        (2, ["training.deepspeed=zero1"]),
        (2, ["training.deepspeed=zero2", "training.micro_batch_packs=2", "data.prefetch=0"]),
    ],
    ids=["one process, one micro-step, recomputed", "ZeRO-1", "ZeRO-2, packed between steps"],
)
def test_losses_do_not_depend_on_how_the_work_is_shared_out(
    uninterrupted, synthetic, tmp_path, ranks, overrides
):
    config = write_config(tmp_path / "config.yaml", synthetic)
    train(config, *overrides, ranks=ranks)
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))


@pytest.mark.parametrize(
    "attention",
    [
        {"policy": "windowed", "positions": "alibi"},
        {"policy": "reset", "positions": "alibi"},
        {"policy": "isolated", "positions": "rope"},
    ],
    ids=lambda attention: "-".join(attention.values()),
)
def test_the_other_policies_train_the_same_on_one_rank_and_on_two_of_zero_3(
    synthetic, tmp_path, attention
):
    found = []
    for ranks, packs, recompute in ((1, 2, False), (2, 1, True)):
        config = write_config(
            tmp_path / f"{ranks}" / "config.yaml",
            synthetic,
            attention=attention,
            training={
                "max_steps": 10,
                "micro_batch_packs": packs,
                "activation_checkpointing": recompute,
            },
        )
        train(config, ranks=ranks)
        found.append(losses(run_dir(config)))
    assert_same_losses(*found, steps=10)


def test_a_signal_makes_a_checkpoint_and_an_exit_code_of_its_own(
    uninterrupted, synthetic, tmp_path
):
    config = write_config(tmp_path / "config.yaml", synthetic)
    process = start(job(1, config), tmp_path / "log")
    try:
        wait_for_step(process, run_dir(config), 3)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(SECONDS) == 75
    finally:
        kill(process)
    stopped_at = max(losses(run_dir(config)))
    assert stopped_at < 20
    assert f"stopped by a signal after step {stopped_at}" in (tmp_path / "log").read_text()
    train(config)
    assert_same_losses(losses(run_dir(uninterrupted[0])), losses(run_dir(config)))


def test_a_signal_while_a_job_starts_is_not_lost(synthetic, tmp_path):
    """Libraries take seconds to import, and the index of much data takes longer."""
    config = write_config(tmp_path / "config.yaml", synthetic)
    early = tmp_path / "job.py"
    early.write_text(
        "import os, signal, sys\n"
        "from dti_dist import cli\n"
        "config = cli._config\n"
        "def signalled(*args):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return config(*args)\n"
        "cli._config = signalled\n"
        "cli.run(['train', *sys.argv[1:]])\n"
    )
    printed = run(job(1, config, script=early), tmp_path / "log", expect=75)
    assert "stopped by a signal after step 1; its checkpoint is complete" in printed


def test_a_job_compiles_no_extension(synthetic, tmp_path):
    """Killed while it compiles, a job would leave a lock that every later job waits for."""
    config = write_config(tmp_path / "config.yaml", synthetic)
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    one_step = job(1, config, "training.max_steps=1")
    run(one_step, tmp_path / "log", TORCH_EXTENSIONS_DIR=str(extensions))
    assert list(extensions.iterdir()) == []


def test_bf16_trains_and_rotary_frequencies_stay_float32(uninterrupted, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    train(config, "training.precision=bf16", ranks=2)
    fp32, bf16 = losses(run_dir(uninterrupted[0])), losses(run_dir(config))
    assert max(abs(fp32[step] - bf16[step]) for step in fp32) < 0.05
    assert any(abs(fp32[step] - bf16[step]) > 1e-6 for step in fp32)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_gradients_of_micro_steps_are_summed_in_float32_under_bf16(tmp_path, stage):
    """What is left of the error is of bf16 in forward and backward."""
    script = Path(__file__).with_name("accumulation.py")
    dtypes = ("default", "fp32", "bf16")
    printed = run(job(1, stage, *dtypes, script=script), tmp_path / "log")
    error = {name: float(of) for name, of in re.findall(r"(\w+): relative error (\S+)", printed)}
    assert set(error) == set(dtypes)
    assert error["default"] == error["fp32"] < 0.6 * error["bf16"]


def test_a_start_far_above_the_labels_entropy_is_said_with_what_helps():
    settings = TrainingConfig(global_batch_packs=1, warmup_fraction=0.03, learning_rate=0.0002)
    told = of_bad_start(1.38, [(1.0, 0.575)], settings, 10, 6)
    assert told.startswith(
        "The loss of the first 10 steps is 1.38; always predicting the label rate"
    )
    assert "0.575, has 0.682" in told
    assert "warmup_fraction (now 0.03)" in told
    assert of_bad_start(0.7, [(1.0, 0.575)], settings, 10, 6) is None
    assert of_bad_start(0.1, [(1.0, 0.0)], settings, 10, 6) is None
    assert of_bad_start(0.7, [(1.0, 0.01)], settings, 10, 6), (
        "an even guess, where one label in a hundred is 1"
    )
    of_two = [(1.0, 0.575), (0.5, 0.1)]
    assert of_bad_start(1.34, of_two, settings, 10, 6) is None
    assert "label rate, 0.575, 0.1, has 0.844" in of_bad_start(1.35, of_two, settings, 10, 6)


@pytest.mark.parametrize(("warmup", "behind"), [(0, 10), (6, 20), (10, 20), (11, 30)])
def test_a_loss_above_the_labels_entropy_after_the_warm_up_is_said_once(warmup, behind):
    settings = TrainingConfig()
    told = {
        step: of_bad_start(0.72, [(1.0, 0.575)], settings, step, warmup)
        for step in range(10, 100, 10)
    }
    assert [step for step, said in told.items() if said] == [behind]
    assert f"in steps {behind - 9} to {behind}, the loss is 0.72" in told[behind]
    assert of_bad_start(0.69, [(1.0, 0.575)], settings, behind, warmup) is None


def test_a_start_far_above_the_labels_entropy_is_printed(synthetic, tmp_path):
    """By weights that say no to everything with great certainty, after so many bad steps."""
    config = write_config(tmp_path / "config.yaml", synthetic)
    bad = ["training.max_steps=8", "training.learning_rate=3", "training.log_every=8"]
    assert "From such a start gradients spike." in train(config, *bad)


def test_validation_marks_the_best_checkpoint_keeps_it_and_stops_early(synthetic, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        training={"learning_rate": 1e-30, "max_steps": 20},  # learns nothing
        validation={"every_steps": 2, "patience": 3, "metric": "log_loss"},
        checkpoints={"every_steps": 2, "keep_last": 1},
    )
    train(config)
    folder = run_dir(config) / "checkpoints"
    validations = [line for line in metrics(run_dir(config)) if "valid" in line]
    assert max(line["step"] for line in validations) < 20
    best = json.loads((folder / "best.json").read_text())
    by_step = {line["step"]: line["valid"]["log_loss"] for line in validations}
    assert best == {
        "step": min(by_step, key=by_step.get),
        "metric": "log_loss",
        "value": min(by_step.values()),
    }
    kept = {int(path.name.removeprefix("step-")) for path in folder.glob("step-*")}
    assert kept == {best["step"], max(by_step)}


def test_a_run_does_not_go_on_with_other_data(uninterrupted, tmp_path):
    config, _ = uninterrupted
    copy, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run_dir(config), copy)
    read = partial(read_synthetic, users=50, items=48, interactions_per_user=40)
    build_dataset(read, str(data), BuildOptions())
    overrides = [f"run_dir={copy}", f"data.path={data}"]
    printed = run(job(1, config, *overrides), tmp_path / "log", expect=2)
    assert "counts its steps in other data" in printed


def test_a_validation_that_a_signal_skipped_is_made_up_for(synthetic, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        training={"max_steps": 3},
        validation={"every_steps": 3},
    )
    signalled = job_with("if step == 3: os.kill(os.getpid(), signal.SIGTERM)", tmp_path / "job.py")
    printed = run(job(1, config, script=signalled), tmp_path / "log", expect=75)
    assert "stopped by a signal after step 3" in printed
    assert not any("valid" in line for line in metrics(run_dir(config)))
    train(config)
    assert [line["step"] for line in metrics(run_dir(config)) if "valid" in line] == [3]
    assert json.loads((run_dir(config) / "checkpoints" / "best.json").read_text())["step"] == 3


def test_another_metric_begins_a_new_best(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, validation={"every_steps": 10})
    train(config, "training.max_steps=20", "validation.metric=auc")
    folder = run_dir(config) / "checkpoints"
    assert json.loads((folder / "best.json").read_text())["metric"] == "auc"
    shutil.rmtree(folder / "step-00000020")
    train(config, "training.max_steps=20", "validation.metric=log_loss")
    assert json.loads((folder / "best.json").read_text())["metric"] == "log_loss"


def test_a_finished_run_started_again_takes_no_step(uninterrupted, tmp_path):
    config, _ = uninterrupted
    copy = tmp_path / "run"
    shutil.copytree(run_dir(config), copy)
    printed = run(job(2, config, f"run_dir={copy}"), tmp_path / "log")
    assert "resuming from step-00000020" in printed
    assert losses(copy) == losses(run_dir(config))


def test_a_bad_shard_ends_the_job_or_is_left_out_by_both_ranks_alike(synthetic, tmp_path):
    data = tmp_path / "data"
    options = BuildOptions(shard_interactions=1000, row_group_interactions=200)
    build_dataset(
        partial(read_synthetic, users=150, items=60, interactions_per_user=20), str(data), options
    )
    parts = sorted((data / "train").iterdir())
    assert len(parts) > 1
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[: len(content) // 2])
    config = write_config(tmp_path / "config.yaml", data, training={"epochs": 4})
    printed = train(config, ranks=2, expect=2)
    said = [line for line in printed.splitlines() if line.startswith("dti-dist train: ")]
    assert len(said) == 1, "one rank says it"
    assert re.search(rf"train/{parts[1].name}: expected [\d,]+ bytes", said[0])

    printed = train(config, "data.on_bad_shard=skip", ranks=2)
    assert "train: 1 files or row groups" in printed
    assert printed.count("left out of train:") == 1
    (line,) = [line for line in metrics(run_dir(config)) if "skipped" in line]
    assert parts[1].name in line["skipped"][0]
    of_two = losses(run_dir(config))
    alone = write_config(tmp_path / "one" / "config.yaml", data, training={"epochs": 4})
    train(alone, "data.on_bad_shard=skip", ranks=1)
    assert_same_losses(of_two, losses(run_dir(alone)))
