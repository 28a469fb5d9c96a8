"""Learning rates by hand, and runs that go on after their end."""

import json
import math
import shutil
from pathlib import Path

import pytest

from dti_dist.config import TrainingConfig
from dti_dist.errors import UserError
from dti_dist.reporting.history import History
from dti_dist.runs import commits
from dti_dist.training.schedule import Schedule, Stretch, continued
from tests.launching import (
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
from tests.training.test_checkpoints import assert_bit_identical

RUN = Path("runs/a")


def stretch(begin: int, end: int, rate: float = 1.0, decay: float = 0.0) -> Stretch:
    return Stretch(begin, end, rate, 0.1, 0.25, decay)


def by_hand(begin: int, end: int, rate: float, floor: float, warmup: int) -> list[float]:
    rates = [rate * (step + 1) / warmup for step in range(warmup)]
    steps = end - begin - warmup
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / steps) for step in range(steps)]
    return rates + [rate * (floor + (1 - floor) * share) for share in cosine]


def test_rates_rise_and_fall_over_each_stretch():
    schedule = Schedule("data", [12, 12], 20, (stretch(0, 12), stretch(12, 20, rate=0.5)))
    found = [schedule.stretch(step).rate(step) for step in range(20)]
    expected = by_hand(0, 12, 1.0, 0.1, 3) + by_hand(12, 20, 0.5, 0.1, 2)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_stretch_that_validation_ended_keeps_the_rates_that_it_had():
    schedule = Schedule("data", [24], None, (stretch(0, 20), stretch(8, 24)))
    found = [schedule.stretch(step).rate(step) for step in range(24)]
    expected = by_hand(0, 20, 1.0, 0.1, 5)[:8] + by_hand(8, 24, 1.0, 0.1, 4)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_end_of_a_stretch_is_due_for_validation_and_a_checkpoint():
    schedule = Schedule("data", [12, 12], None, (stretch(0, 5), stretch(5, 24)))
    assert [step for step in range(1, 25) if schedule.is_due(step, 0)] == [5, 12, 24]


def test_a_stretch_takes_its_settings_from_the_config():
    training = TrainingConfig(learning_rate=0.5, warmup_fraction=0.2, weight_decay=0.3)
    assert Stretch.of(training, 3, 9) == Stretch(3, 9, 0.5, 0.1, 0.2, 0.3)


FIRST = stretch(0, 12)


@pytest.mark.parametrize(
    ("before", "wanted", "step", "gave_up", "expected"),
    [
        ([FIRST], FIRST, 7, False, [FIRST]),
        ([FIRST], FIRST, 12, False, [FIRST]),
        ([], FIRST, 7, False, [FIRST]),  # an earlier version's
        ([FIRST], stretch(0, 20), 12, False, [FIRST, stretch(12, 20)]),
        ([FIRST], stretch(0, 20, 0.5, 0.1), 12, False, [FIRST, stretch(12, 20, 0.5, 0.1)]),
        ([FIRST], stretch(0, 20), 8, True, [FIRST, stretch(8, 20)]),
        ([FIRST, stretch(12, 20)], stretch(0, 20), 15, False, [FIRST, stretch(12, 20)]),
        ([FIRST, stretch(12, 20)], stretch(0, 20), 9, False, [FIRST, stretch(12, 20)]),
        ([FIRST, stretch(12, 20)], stretch(0, 24, 2), 12, False, [FIRST, stretch(12, 24, 2)]),
        ([FIRST, stretch(12, 20)], FIRST, 12, False, [FIRST]),
        ([FIRST, stretch(8, 20)], stretch(0, 24), 8, False, [FIRST, stretch(8, 24)]),
    ],
    ids=[
        "the same",
        "the same at its end",
        "of an earlier version",
        "more steps",
        "more steps and another rate and decay",
        "where validation had ended it",
        "amid the second",
        "an older checkpoint",
        "another second, of which nothing is kept",
        "back to the first",
        "another second, after validation had ended the first",
    ],
)
def test_what_a_run_goes_on_with(before, wanted, step, gave_up, expected):
    assert continued(RUN, before, wanted, step, gave_up) == expected


@pytest.mark.parametrize(
    ("before", "wanted", "step", "gave_up", "said"),
    [
        ([FIRST], stretch(0, 20), 7, False, "at step 7 of a schedule that ends with step 12"),
        ([FIRST], stretch(0, 12, rate=2), 7, False, "training.learning_rate: 1 there, 2 now"),
        ([FIRST], stretch(0, 12, decay=1), 7, False, "training.weight_decay: 0 there, 1 now"),
        ([FIRST], stretch(0, 10), 12, False, "has done 12 steps: expected more of them"),
        ([FIRST], stretch(0, 12, rate=2), 12, False, "training.learning_rate: 1 there, 2 now"),
        ([FIRST], stretch(0, 6), 8, True, "found 6 by training.epochs and training.max_steps"),
        ([FIRST, stretch(12, 20)], stretch(0, 24), 15, False, "last step: 20 there, 24 now"),
        ([FIRST, stretch(12, 20)], stretch(0, 24), 9, False, "last step: 20 there, 24 now"),
    ],
)
def test_what_a_run_does_not_go_on_with(before, wanted, step, gave_up, said):
    with pytest.raises(UserError) as raised:
        continued(RUN, before, wanted, step, gave_up)
    assert said in str(raised.value)
    assert "choose another run_dir" in str(raised.value)


# --- the real job ----------------------------------------------------------------------------

MORE = (
    "training.max_steps=20",
    "training.learning_rate=0.002",
    "training.warmup_fraction=0.25",
    "training.weight_decay=0.3",
)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ended(request, synthetic, made_once):
    """A run that ended after 10 of an epoch's 12 steps, and one that then went on to step 20."""
    ranks = request.param

    def make(folder):
        config = write_config(
            folder / "config.yaml",
            synthetic,
            training={"max_steps": 10},
            checkpoints={"every_steps": 1, "keep_last": 20},
        )
        train(config, ranks=ranks)
        shutil.copytree(run_dir(config), folder / "prolonged")
        train(config, *MORE, f"run_dir={folder / 'prolonged'}", ranks=ranks)

    return ranks, made_once(f"ended-{ranks}", make)


@pytest.mark.slow
def test_a_run_that_ended_goes_on_with_a_schedule_of_its_own(ended, uninterrupted):
    ranks, folder = ended
    prolonged = folder / "prolonged"
    lines = [line for line in metrics(prolonged) if "loss" in line]
    straight = {line["step"]: line for line in metrics(run_dir(uninterrupted[0])) if "loss" in line}
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:  # the order of the data is that of a run with as many steps from the start
        for name in ("epoch", "targets", "tokens"):
            assert line[name] == straight[line["step"]][name]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        by_hand(0, 10, 0.003, 0.1, 0) + by_hand(10, 20, 0.002, 0.1, 2)
    )
    kept = json.loads((prolonged / "schedule.json").read_text())
    assert [(entry["begin"], entry["end"]) for entry in kept] == [(0, 10), (10, 20)]
    history = History.read(prolonged)
    assert history.config.training.max_steps == 20
    (event,) = history.events
    assert event.words.startswith(
        f"prolonged to step 20 with a learning rate of 0.002, from step 10 on {ranks} rank(s)"
    )
    assert "finished, 20 steps" in history.state.words


@pytest.mark.slow
def test_a_prolonged_run_that_is_killed_ends_with_the_same_bits(ended, tmp_path):
    ranks, folder = ended
    config, copy = folder / "config.yaml", tmp_path / "copy"
    shutil.copytree(folder / "run", copy)
    again = (*MORE, f"run_dir={copy}")
    process = start(job(ranks, config, *again), tmp_path / "log")
    try:
        wait_for_step(process, copy, 14)
    finally:
        kill(process)
    # Further back than its end: it is prolonged at the same step again.
    for commit in commits.complete_checkpoints(copy / "checkpoints")[0]:
        if commit.step > 8:
            shutil.rmtree(commit.folder)
    assert "resuming from step-00000008" in run(job(ranks, config, *again), tmp_path / "again")
    assert losses(copy) == losses(folder / "prolonged")
    assert_bit_identical(copy, folder / "prolonged")


@pytest.mark.slow
@pytest.mark.parametrize("ended", [1], indirect=True)  # rank 0 refuses
def test_a_refused_run_stays_as_it_is(ended, tmp_path):
    _, folder = ended
    config, copy = folder / "config.yaml", tmp_path / "copy"
    shutil.copytree(folder / "prolonged", copy)
    before = {path.name: path.read_bytes() for path in copy.glob("*.*")}
    for overrides, said in (
        (["training.max_steps=15"], "has done 20 steps: expected more of them to go on with"),
        ([*MORE, "training.learning_rate=0.1"], "training.learning_rate: 0.002 there, 0.1 now"),
        (["training.epochs=9", "training.max_steps=null", "seed=3"], "seed: 0 there, 3 now"),
    ):
        log = tmp_path / "log"
        arguments = [*overrides, f"run_dir={copy}"]
        assert said in run(job(1, config, *arguments), log, expect=2)
    assert {path.name: path.read_bytes() for path in copy.glob("*.*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "cpu"])
def test_decay_and_rates_of_groups_are_the_configs_under_every_stage(synthetic, tmp_path, stage):
    """A checkpoint brings those that it was saved with."""
    config = write_config(
        tmp_path / "config.yaml", synthetic, training={"max_steps": 2, "deepspeed": stage}
    )
    show = """
groups = engine._engine.optimizer.param_groups
rates = [round(group['lr'] / engine.learning_rate, 6) for group in groups]
print('decays', [group['weight_decay'] for group in groups], 'rates', rates)
"""
    script = job_with(show, tmp_path / "job.py")
    run(job(1, config, "training.new_rate_factor=7"), tmp_path / "first")
    more = ("training.max_steps=4", "training.weight_decay=0.3", "training.new_rate_factor=7")
    printed = run(job(1, config, *more, script=script), tmp_path / "log")
    assert printed.count("decays [0.3, 0.0, 0.0] rates [1.0, 1.0, 7.0]") == 2
