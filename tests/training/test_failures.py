"""What goes wrong in one rank ends the job soon, and says so once."""

import json
import math
import re

import pytest

from tests.launching import (
    command,
    job,
    job_with,
    losses,
    metrics,
    run,
    run_dir,
    write_config,
)

pytestmark = pytest.mark.slow


def test_an_error_of_one_rank_ends_the_job_and_is_the_only_one_shown(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    script = job_with(
        """
if step == 3 and rank == 1:
    raise KeyError("the shelf is empty")
""",
        tmp_path / "job.py",
    )
    printed = run([*command(2, script=script), str(config)], tmp_path / "log", expect=1)
    # Torchrun gives the others 30 s to end by themselves.
    assert "forcefully exiting" not in printed
    assert "rank 1 of 2 failed:" in printed
    assert "KeyError: 'the shelf is empty'" in printed
    assert "Connection" not in printed, "what it does to the other rank is no news"
    assert printed.index("KeyError") < printed.index("torch.distributed.elastic")


def test_a_killed_rank_is_reported_as_lost(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    script = job_with(
        "if step == 3 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)", tmp_path / "job.py"
    )
    printed = run([*command(2, script=script), str(config)], tmp_path / "log", expect=1)
    assert "rank 0: another rank of the job ended without a message" in printed
    assert "Start the same command again" in printed


@pytest.mark.parametrize("by_torchrun", [True, False], ids=["torchrun", "srun"])
def test_a_rank_that_hangs_is_ended_with_the_stacks_of_all(synthetic, tmp_path, by_torchrun):
    # Torchrun ends the other ranks as soon as one has; without it rank 0 hosts what they share.
    config = write_config(tmp_path / "config.yaml", synthetic, training={"watchdog_minutes": 0.05})
    script = job_with("if step == 3 and rank == 1: time.sleep(1000)", tmp_path / "job.py")
    torchrun = [*command(2, script=script), str(config)]
    ranks = torchrun if by_torchrun else job(2, config, script=script)
    printed = run(ranks, tmp_path / "log", expect=1)
    assert printed.count("no step, batch of a validation or save ended for 0.05 minutes") == 1
    stacks = [(run_dir(config) / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "in patched" in stacks[1], "where rank 1 sleeps"
    assert "in take_step" in stacks[0]
    assert "in patched" not in stacks[0].split("in take_step")[0]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic)
    script = job_with(
        """
if step == 3:
    for name, weight in engine.model.named_parameters():
        if "layers.1" in name and "down_proj" in name:
            weight.data.fill_(torch.nan)
            weight.ds_tensor.fill_(torch.nan)
""",
        tmp_path / "job.py",
    )
    printed = run(job(2, config, script=script), tmp_path / "log", expect=1)
    assert printed.count("Step 3: the loss is nan: not finite.") == 1
    assert "the weights are those after step 2" in printed
    assert "training.max_skipped_steps is 0" in printed
    assert "loop.py" not in printed, "no traceback"
    assert max(losses(run_dir(config))) == 2
    folder = run_dir(config) / "nonfinite" / "step-00000003"
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(diagnosis["step"] == 3 and diagnosis["targets"] for diagnosis in found)
    assert {"row", "position", "label", "logit", "loss"} == set(found[0]["targets"][0])
    assert found[0]["first_module_not_finite"].endswith("layers.1.mlp.down_proj")
    odd = found[0]["weights"][0]
    assert "down_proj" in odd["name"]
    assert odd["not_finite"] > 0
    assert found[0]["weights"][1]["not_finite"] == 0
    assert not list((run_dir(config) / "checkpoints").glob("step-*")), (
        "no checkpoint of such weights"
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_bad_step_is_left_out_where_that_is_allowed(synthetic, tmp_path, what, stage):
    """An infinite loss with finite gradients, and the other way round: on one rank, in the first
    of its micro-steps."""
    value = "loss.detach() * 0 + math.inf" if what == "loss" else "loss"
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        training={"max_skipped_steps": 1, "max_steps": 8, "deepspeed": f"zero{stage}"},
    )
    script = job_with(
        f"""
import math
from dti_dist.model.heads import Head
def bad(logits, batch, good=Head.loss):
    loss = good(logits, batch)
    if batch.step != 2 or batch.last_of_step or rank == 0: return loss
    if {what!r} == "gradients": logits.register_hook(lambda gradient: gradient * math.nan)
    return loss - loss.detach() + {value}
if step == 1: Head.loss = staticmethod(bad)
""",
        tmp_path / "job.py",
    )
    printed = run(job(2, config, script=script), tmp_path / "log")
    assert re.search(rf"Step 3: the {what} (is|are).*Left out so far: 1 of 1 allowed", printed)
    found = losses(run_dir(config))
    assert set(found) - {3} == {1, 2, 4, 5, 6, 7, 8}
    assert all(math.isfinite(loss) for loss in found.values())
    (line,) = [line for line in metrics(run_dir(config)) if "not_finite" in line]
    assert line["step"] == 3


def test_running_out_of_memory_is_reported_with_remedies(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, training={"micro_batch_packs": 4})
    script = job_with("if step == 2: torch.empty(1 << 50)  # a pebibyte", tmp_path / "job.py")
    printed = run(job(1, config, script=script), tmp_path / "log", expect=1)
    assert "rank 0: CPU memory ran out when 4503599627370496 bytes more were asked for" in printed
    assert "Weights, gradients and optimizer take 0.00 GiB a rank" in printed
    assert "training.micro_batch_packs=1 (now 4)" in printed
    assert "training.activation_checkpointing=true" in printed
    assert "Traceback" not in printed
