"""Predictions on their way from the ranks to rank 0."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dti_dist.config import load_config
from dti_dist.data.stream import PackStream, Share
from dti_dist.errors import UserError
from dti_dist.evaluation import spool as module
from dti_dist.evaluation.predict import predict
from dti_dist.evaluation.spool import scratch_folder, spool
from dti_dist.inputs import Inputs
from dti_dist.ranks import Ranks
from tests.launching import write_config

CPU = torch.device("cpu")
ONE = Ranks(0, 1, 0, 1, CPU)


@pytest.fixture(scope="module")
def untrained(synthetic, tmp_path_factory):
    """A model with random weights, and a way to stream the targets of valid."""
    folder = tmp_path_factory.mktemp("untrained")
    config = load_config(write_config(folder / "config.yaml", synthetic))
    inputs = Inputs.open(config, folder / "tokenizer")
    plan = inputs.stream_plan("valid", k=1)
    return inputs.untrained_model().eval(), lambda: PackStream(plan, Share(1, 1))


def test_a_spool_is_written_in_pieces_and_holds_every_target(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 50)
    model, stream = untrained
    file = tmp_path / "spool.parquet"
    seen = []
    assert spool(model, stream(), CPU, file, seen.append) == []
    assert pq.ParquetFile(file).num_row_groups > 3
    found, expected = pq.read_table(file), predict(model, stream(), ONE)
    assert sum(batch.step_targets for batch in seen) == len(found) == len(expected.row)
    order = np.lexsort((found["position"].to_numpy(), found["row"].to_numpy()))
    for name in found.column_names:
        assert np.array_equal(found[name].to_numpy()[order], getattr(expected, name))


def test_a_prediction_that_is_not_a_number_is_refused_with_its_place(untrained, tmp_path):
    model, stream = untrained

    def broken(batch):
        logits = model(batch)
        logits[(batch.target_row == 3) & (batch.used > 0)] = float("nan")
        return logits

    with pytest.raises(UserError, match=r"not a number for \d+ of \d+ targets.*first at row 3,"):
        spool(broken, stream(), CPU, tmp_path / "spool.parquet")


def test_a_full_disk_says_what_was_to_go_there(untrained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"can't be written: No space left.*Free some space"):
        spool(*[untrained[0], untrained[1]()], CPU, tmp_path / "spool.parquet")


def test_the_scratch_of_a_killed_evaluation_is_removed_and_that_of_a_live_one_is_not(tmp_path):
    stale = tmp_path / ".scratch-00000000"
    stale.mkdir()
    (stale / "lock").touch()
    with scratch_folder(tmp_path, ONE) as first:
        assert not stale.exists()
        with scratch_folder(tmp_path, ONE) as second:
            assert first.exists()
            assert second != first
        assert not second.exists()
    assert not list(tmp_path.iterdir())


def test_the_scratch_is_removed_after_a_failure(tmp_path):
    def fail():
        with scratch_folder(tmp_path, ONE) as folder:
            (folder / "spool.parquet").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_rank_that_does_not_see_the_scratch_folder_says_so(tmp_path):
    class Elsewhere(Ranks):
        calls = 0

        def each(self, make):
            Elsewhere.calls += 1
            made = [make()]
            if Elsewhere.calls == 1:
                shutil.move(made[0], tmp_path / "elsewhere")
            return made

    with (
        pytest.raises(UserError, match=r"does not see .*every node can read and write"),
        scratch_folder(tmp_path / "eval", Elsewhere(**vars(ONE))),
    ):
        pass
