"""Which checkpoint of a run is taken, and the data set that it was trained on."""

import json
import re
import shutil
from functools import partial

import pytest

from dti_dist.data.dataset import Dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.errors import UserError
from dti_dist.evaluation.evaluate import of_one_label
from dti_dist.runs import commits
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint
from dti_dist.runs.trained_on import keep_manifest, since_training
from tests.data.test_prepare_append import append, at_different_times, build, days_of
from tests.data.test_prepare_events import random_events


def with_commits(folder, *steps):
    """A run's folder with complete checkpoints that hold no files."""
    for step in steps:
        target = folder / "checkpoints" / commits.tag(step)
        target.mkdir(parents=True)
        content = {"step": step, "world": 1, "state": {}, "files": {}}
        (target / commits.COMMIT).write_text(json.dumps(content))
    return RunFolder(folder)


def test_the_best_checkpoint_is_taken_where_it_is(tmp_path, capsys):
    run = with_commits(tmp_path, 3, 6)
    commits.mark_best(run.checkpoints, 3, "auc", 0.7)
    assert choose_checkpoint(run).step == choose_checkpoint(run, "best").step == 3
    assert choose_checkpoint(run, "last").step == choose_checkpoint(run, "6").step == 6
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (lambda best: shutil.rmtree(best), "step-00000003, which best.json names, is not there"),
        (
            lambda best: (best / commits.COMMIT).unlink(),
            r"step-00000003, which best.json names, is not complete \(step-00000003: never commit",
        ),
        (
            lambda best: (best.parent / commits.BEST).unlink(),
            r"no validation has chosen one \(best.json is not there\)",
        ),
    ],
    ids=["removed", "damaged", "never chosen"],
)
def test_where_the_best_is_gone_that_is_said_and_refused_to_who_asked_for_it(
    tmp_path, capsys, lose, why
):
    run = with_commits(tmp_path, 3, 6)
    commits.mark_best(run.checkpoints, 3, "auc", 0.7)
    lose(run.checkpoints / commits.tag(3))
    assert choose_checkpoint(run).step == 6
    said = capsys.readouterr().err
    assert re.search(why, said)
    assert "The last checkpoint is taken instead, step-00000006" in said
    assert choose_checkpoint(run, aloud=False).step == 6
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=f"{why}.*Choose another with --checkpoint: last, .*6"):
        choose_checkpoint(run, "best")


def prepared(folder, seed):
    read = partial(read_synthetic, users=20, items=30, interactions_per_user=12, seed=seed)
    build_dataset(read, str(folder), BuildOptions())
    return Dataset.open(str(folder)).manifest


def test_another_data_set_at_the_same_path_is_said_with_what_differs(tmp_path):
    file = tmp_path / "dataset.json"
    first, other = prepared(tmp_path / "a", 0), prepared(tmp_path / "b", 1)
    keep_manifest(file, first)
    assert since_training(file, first, "data") is None
    said = since_training(file, other, "data")
    assert said.startswith("WARNING: data holds another data set than the one that the run was")
    assert re.search(r"its (items and train differ|train differs) \(", said)
    assert re.search(r"\(30 items and [\d,]+ targets in train", said)
    only_train = other.model_copy(
        update={
            "files": {
                path: (first if path.startswith("items/") else other).files[path]
                for path in first.files
            }
        }
    )
    assert "its train differs" in since_training(file, only_train, "data")
    assert since_training(tmp_path / "none", other, "data") is None


@pytest.mark.parametrize("append_to", ["roll", "train", "test"])
def test_a_data_set_that_was_appended_to_is_no_other(tmp_path, append_to):
    half, days = days_of(at_different_times(random_events(users=25)))
    build(tmp_path, half, tmp_path / "data")
    file = tmp_path / "dataset.json"
    keep_manifest(file, Dataset.open(str(tmp_path / "data")).manifest)
    for day in days[:2]:
        append(tmp_path, day, tmp_path / "data", append_to)
    said = since_training(file, Dataset.open(str(tmp_path / "data")).manifest, "data")
    if append_to == "test":
        assert said is None or "appended to 2 times" in said  # new items
    else:
        assert said.startswith("data was appended to 2 times since the run was trained")


def test_what_a_run_was_trained_on_in_test_may_have_rolled_into_other_splits(tmp_path):
    """`dti-dist daily` trains on a day that is test until the next one is."""
    half, days = days_of(at_different_times(random_events(users=25)))
    build(tmp_path, half, tmp_path / "data")
    file = tmp_path / "dataset.json"
    keep_manifest(file, Dataset.open(str(tmp_path / "data")).manifest)
    for day, times in zip(days, ("once", "2 times"), strict=False):
        append(tmp_path, day, tmp_path / "data", "roll")
        now = Dataset.open(str(tmp_path / "data")).manifest
        said = since_training(file, now, "data", "test")
        assert said == f"data was appended to {times} since the run was trained."
    build(tmp_path, half[10:], tmp_path / "other")
    append(tmp_path, days[0], tmp_path / "other", "roll")
    other = Dataset.open(str(tmp_path / "other")).manifest
    assert "differ" in since_training(file, other, "data", "test")


def test_targets_of_one_label_are_said_with_the_expression_that_made_it():
    said = of_one_label("test", False, {"kind": "events", "label": "event = 'click'"})
    assert said.startswith("WARNING: all targets of test have the label 0, so auc, gauc and ne")
    assert "prepared with the label \"event = 'click'\"" in said
    assert "have the label 1" in of_one_label("valid", True, {})
