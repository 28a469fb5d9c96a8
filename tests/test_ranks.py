"""Which GPU is a rank's, and how many threads."""

from __future__ import annotations

import os

import pytest
import torch

from dti_dist import ranks
from tests.launching import job, run, write_config


@pytest.mark.parametrize(
    ("local_rank", "visible", "expected"), [(0, 1, 0), (3, 8, 3), (3, 1, 0)], ids=str
)
def test_deepspeed_finds_the_ranks_gpu_where_a_task_sees_one_alone(
    monkeypatch, local_rank, visible, expected
):
    """DeepSpeed takes the GPU of the number in LOCAL_RANK, in several places."""
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    device = torch.device("cuda", expected)
    assert ranks._use_gpu(local_rank) == device
    assert used == [device]
    assert os.environ["LOCAL_RANK"] == str(expected)
    ranks.leave_process_group()
    assert os.environ["LOCAL_RANK"] == str(local_rank)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("a", [0, 1, 2, 3])] * 2, 2),  # both ranks may run on all four
        ([("a", [0, 1, 2, 3]), ("a", [4, 5, 6, 7])], 4),  # srun bound each task to its own
        ([("a", [0, 1, 2, 3])] * 2 + [("b", [0, 1, 2, 3])] * 2, 2),  # two machines
    ],
    ids=["shared", "bound", "two machines"],
)
def test_ranks_share_the_cores_that_they_share_and_no_others(monkeypatch, places, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(places[0][1]))
    assert ranks._own_threads(places, places[0]) == expected


@pytest.mark.parametrize(
    ("device", "wanted", "expected"),
    [
        ("cpu", None, 3),
        ("cuda", None, 3),
        ("cuda", 2, 2),
    ],
)
def test_a_rank_gets_its_share_of_the_cores_whatever_the_launcher_set(
    monkeypatch, device, wanted, expected
):
    """Offloaded AdamW runs on a GPU rank's threads, and torchrun sets OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    monkeypatch.setattr(ranks, "choose_device", lambda wanted: torch.device(wanted))
    monkeypatch.setattr(ranks, "_use_gpu", lambda local_rank: torch.device("cpu"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    torch.set_num_threads(1)
    try:
        ranks.join_process_group(device, 1, wanted)
        assert torch.get_num_threads() == expected
    finally:
        ranks.leave_process_group()
        torch.set_num_threads(before)


def test_a_process_can_train_twice(synthetic, tmp_path):
    """DeepSpeed keeps groups of processes, which end with a job."""
    config = write_config(tmp_path / "config.yaml", synthetic, training={"max_steps": 1})
    lines = "\n".join(
        f'assert main(["train", {str(config)!r}, "run_dir={tmp_path / name}"]) == 0'
        for name in ("first", "second")
    )
    script = tmp_path / "twice.py"
    script.write_text(f"from dti_dist.cli import main\n{lines}\n")
    run(job(1, script=script), tmp_path / "log")
