"""A checkpoint is complete when all of it is on the disk, whatever is trained meanwhile."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from dti_dist.ranks import Ranks
from dti_dist.runs import commits
from dti_dist.training import checkpoint, staging
from dti_dist.training.staging import HostCopies

SECONDS = 30
ALONE = Ranks(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


class Engine:
    """Hands out its weights as DeepSpeed does."""

    def __init__(self):
        self.weights = torch.zeros(1000)

    def save(self, folder, tag, write):
        (folder / tag).mkdir()
        write({"weights": self.weights}, str(folder / tag / "weights.pt"))
        write({"step": 1}, str(folder / tag / "step.pt"))


@pytest.fixture
def disk(monkeypatch):
    """Writes that wait until they may go on."""
    disk = SimpleNamespace(reached=threading.Event(), free=threading.Event())
    write = checkpoint._Counted.write

    def held(self, data):
        disk.reached.set()
        assert disk.free.wait(SECONDS)
        return write(self, data)

    monkeypatch.setattr(checkpoint._Counted, "write", held)
    yield disk
    disk.free.set()


def begin(folder, engine, background=True, committed=lambda: None, copies=None):
    saver = checkpoint.Saver(engine, folder, ALONE, copies or HostCopies(1))
    return saver.begin({"step": 1}, background, committed)


def complete(folder):
    return [commit.step for commit in commits.complete_checkpoints(folder)[0]]


def test_weights_may_change_while_they_are_written(tmp_path, disk):
    engine = Engine()
    save = begin(tmp_path, engine)
    assert disk.reached.wait(SECONDS)
    engine.weights += 1
    assert not save.is_done
    assert complete(tmp_path) == []
    disk.free.set()
    outcome = save.wait(SECONDS)
    assert complete(tmp_path) == [1]
    (commit,), _ = commits.complete_checkpoints(tmp_path)
    assert outcome.bytes == commit.size
    assert commits.altered(commit) is None
    assert torch.load(tmp_path / "step-00000001" / "weights.pt")["weights"].sum() == 0


def test_in_the_foreground_all_is_written_when_begin_returns(tmp_path, disk):
    disk.free.set()
    engine = Engine()
    save = begin(tmp_path, engine, background=False)
    engine.weights += 1
    save.wait(SECONDS)
    assert torch.load(tmp_path / "step-00000001" / "weights.pt")["weights"].sum() == 0


@pytest.mark.parametrize("at_once", [True, False])
def test_both_ways_write_the_same_files(tmp_path, at_once):
    begin(tmp_path, Engine(), background=not at_once).wait(SECONDS)
    content = json.loads((tmp_path / "step-00000001" / commits.COMMIT).read_text())
    (tmp_path / "other").mkdir()
    begin(tmp_path / "other", Engine(), background=at_once).wait(SECONDS)
    other = json.loads((tmp_path / "other" / "step-00000001" / commits.COMMIT).read_text())
    assert content == other


def test_committed_is_called_when_it_is(tmp_path):
    found = []
    begin(tmp_path, Engine(), committed=lambda: found.append(complete(tmp_path))).wait(SECONDS)
    assert found == [[1]]


def test_a_failed_write_leaves_nothing_and_is_told(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint._Counted, "write", full)
    called = []
    outcome = begin(tmp_path, Engine(), committed=lambda: called.append(1)).wait(SECONDS)
    assert "rank 0: " in outcome.error
    assert "No space left on device" in outcome.error
    assert list(tmp_path.iterdir()) == []
    assert called == []


def test_without_room_for_a_copy_it_is_written_at_once_and_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(staging, "free_memory_bytes", lambda: 0)
    engine = Engine()
    saver = checkpoint.Saver(engine, tmp_path, ALONE, HostCopies(1))
    for step in (1, 2):
        save = saver.begin({"step": step}, True, lambda: None)
        engine.weights += 1
        save.wait(SECONDS)
    assert complete(tmp_path) == [1, 2]
    for step in (1, 2):
        found = torch.load(tmp_path / commits.tag(step) / "weights.pt")["weights"]
        assert found.unique().tolist() == [step - 1]
    printed = capsys.readouterr().err
    assert printed.count("no room for a copy of a checkpoint") == 1
    assert "checkpoints.background=false" in printed


def test_an_error_of_the_thread_is_the_main_threads(tmp_path):
    def committed():
        raise PermissionError("not yours to remove")

    with pytest.raises(PermissionError, match="not yours"):
        begin(tmp_path, Engine(), committed=committed).wait(SECONDS)
