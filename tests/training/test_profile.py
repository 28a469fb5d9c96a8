"""`training.profile`: traces of steps; and what torch is told where the site says nothing."""

import gzip
import json
from pathlib import Path

import pytest

from dti_dist.training.job import set_defaults
from tests.launching import losses, train, write_config


def steps_and_operators(file):
    """(names of the steps, operators inside them) of a trace."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    steps = {e["name"]: e for e in spans if e["name"].startswith("step ")}
    inside = {
        event["name"]
        for event in spans
        for step in steps.values()
        if step["ts"] <= event["ts"] <= step["ts"] + step["dur"]
    }
    return set(steps), inside


@pytest.mark.slow
def test_chosen_steps_are_traced_and_change_nothing(synthetic, tmp_path):
    plain, traced = (
        write_config(tmp_path / name / "config.yaml", synthetic, training={"max_steps": 5})
        for name in ("plain", "traced")
    )
    train(plain, ranks=2)
    printed = train(traced, "training.profile={from_step: 2, steps: 2, ranks: [1]}", ranks=2)
    run = tmp_path / "traced" / "run"
    assert losses(run) == losses(tmp_path / "plain" / "run")
    assert [file.name for file in (run / "profile").iterdir()] == ["rank-1-steps-2-3.json.gz"]
    assert f"steps 2 to 3 are traced in {run / 'profile'}" in printed
    steps, operators = steps_and_operators(run / "profile" / "rank-1-steps-2-3.json.gz")
    assert steps == {"step 2", "step 3"}
    assert {"aten::mm", "aten::embedding"} <= operators
    train(traced, "training.profile.from_step=4", ranks=2)  # a run goes on with another profile


def test_a_trace_that_a_signal_cuts_short_is_written(tmp_path):
    import torch

    from dti_dist.config import ProfileConfig
    from dti_dist.ranks import Ranks
    from dti_dist.training.profile import Profiler

    one = Ranks(0, 1, 0, 1, torch.device("cpu"))
    with Profiler(ProfileConfig(from_step=3, steps=10), one, tmp_path) as profiler:
        for step in range(1, 6):
            with profiler.around(step):
                torch.ones(2, 2) @ torch.ones(2, 2)
    (file,) = tmp_path.iterdir()
    assert file.name == "rank-0-steps-3-5.json.gz"
    steps, operators = steps_and_operators(file)
    assert steps == {"step 3", "step 4", "step 5"}
    assert "aten::matmul" in operators


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    import torch

    from dti_dist.config import ProfileConfig
    from dti_dist.ranks import Ranks
    from dti_dist.training.profile import Profiler

    (tmp_path / "file").touch()
    one = Ranks(0, 1, 0, 1, torch.device("cpu"))
    profiler = Profiler(ProfileConfig(from_step=1, steps=1), one, tmp_path / "file")
    with profiler.around(1):
        pass
    assert "The trace of steps 1 to 1 was not written" in capsys.readouterr().err


def test_torch_is_told_what_the_site_does_not_say():
    told: dict[str, str] = {}
    set_defaults(told, Path("/runs/shop/stacks"))
    assert told == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "/runs/shop/stacks/nccl-rank-",
    }
    for site in (
        dict.fromkeys(told, "the site's"),
        {
            "PYTORCH_CUDA_ALLOC_CONF": "backend:native",
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "9",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/scratch/nccl-",
        },
    ):
        kept = dict(site)
        set_defaults(kept, Path("/runs/shop/stacks"))
        assert kept == site
