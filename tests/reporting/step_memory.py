"""What a training step's tensors really hold at their peak, beside what `dti-dist plan` says.

    python tests/reporting/step_memory.py CONFIG [key=value …]

or the same under torchrun. Prints one JSON line on rank 0, of its own memory on a CPU, in bytes.

Torch's profiler sees each allocation, temporaries of operators included, but not what other threads
free (Gloo's do); so the peak is what tensors hold before the step, found by walking them, and what
the profiler sees come on top of it within the step. A bucket that Gloo's thread is the last to hold
seems never freed then, which only adds: the least of several steps is taken.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch.profiler import ProfilerActivity, profile

from dti_dist.config import load_config
from dti_dist.data.stream import PackStream, Share
from dti_dist.inputs import Inputs
from dti_dist.model.heads import Head
from dti_dist.ranks import end_process, join_process_group, leave_process_group
from dti_dist.reporting.plan import plan
from dti_dist.training.engine import Engine

STEPS_BEFORE = 2  # the optimizer's state is made in the first
MEASURED_STEPS = 3


def held():
    """Bytes of all tensors' storages."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    # A gradient that no Python code has read is no object of Python's yet.
    found += [x.grad for x in found if x.is_leaf and x.grad is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return sum(storages.values())


def resident(when="VmRSS"):
    """Bytes of this process in memory: now, or at most until now (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(when))


def peak_within(events):
    """The most that a profile's allocations, in order, add up to."""
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = most = 0
    for _, size in memory:
        total += size
        most = max(most, total)
    return most


def measure(config, ranks, folder):
    inputs = Inputs.open(config, folder)
    stream_plan = inputs.stream_plan("train", shuffle=True)
    import deepspeed  # noqa: F401

    before_model = resident()
    model = inputs.untrained_model().train()
    if config.training.activation_checkpointing is True:
        model.enable_activation_checkpointing()
    engine = Engine(model, config.training, ranks)
    training = config.training
    share = Share(training.global_batch_packs, training.micro_batch_packs, ranks.rank, ranks.world)
    stream = iter(PackStream(stream_plan, share))

    def run(micro_steps):
        for _ in range(micro_steps):
            batch = next(stream)
            engine.backward(Head.loss(engine(batch), batch) / batch.step_targets)
            engine.step()

    run(STEPS_BEFORE * engine.micro_steps)
    del model
    at_rest = held()
    # So that the peak is of a step, and not of loading the model.
    Path("/proc/self/clear_refs").write_text("5")
    peaks, resident_peak = [], 0
    for _ in range(MEASURED_STEPS):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run(engine.micro_steps)
        peaks.append(peak_within(profiled.profiler.kineto_results.events()))
        resident_peak = resident_peak or resident("VmHWM")  # of the first
    run(1)
    return {
        "at_rest": at_rest,
        "after_a_micro_step": held(),
        "peak": at_rest + min(peaks),
        "resident_before_model": before_model,
        "resident_peak": resident_peak,
    }


def main(path, *overrides):
    # Not decided by what memory is free here, so that all measure the same.
    config = load_config(path, ["training.activation_checkpointing=false", *overrides])
    ranks = join_process_group("cpu", 10, 1)
    own = Path(config.run_dir) / "tokenizer"
    with tempfile.TemporaryDirectory() as scratch:
        folder = own if own.exists() else Path(scratch) / "tokenizer"
        found = measure(config, ranks, folder)
    leave_process_group()
    if ranks.is_main:
        planned = plan(config, ranks.world, "cpu")["memory"]["config"]
        print(json.dumps({"measured": found, "planned": planned}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
