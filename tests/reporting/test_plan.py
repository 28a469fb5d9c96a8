"""What `dti-dist plan` says beforehand is what runs, models and engines then really do."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dti_dist import gpus as gpu_table
from dti_dist.attention import backend
from dti_dist.attention.backend import AttentionPlans
from dti_dist.cli import main
from dti_dist.config import LoraConfig, load_config
from dti_dist.costs.flops import flops_of_pack, flops_of_token
from dti_dist.costs.goodput import Failures
from dti_dist.costs.memory import checkpoint_bytes, states
from dti_dist.costs.shape import ModelShape
from dti_dist.costs.workload import count_pairs, steps_for, workload
from dti_dist.data.dataset import Dataset
from dti_dist.data.layout import PackShape
from dti_dist.data.stream import PackStream, Share
from dti_dist.errors import UserError
from dti_dist.gpus import find_gpu, gpu_at_hand, gpu_of_device
from dti_dist.inputs import Inputs
from dti_dist.model.heads import Head
from dti_dist.model.lora import add_adapters
from dti_dist.options import FailureOptions
from dti_dist.reporting.plan import plan, plan_table
from dti_dist.runs.commits import complete_checkpoints
from tests import tiny
from tests.impressions import prepare_impressions
from tests.launching import job, metrics, run, train, write_config
from tests.reporting.failing_job import simulated_goodput

POLICIES = ["windowed", "reset", "budget", "isolated"]
SCRIPT = __file__.replace("test_plan.py", "step_memory.py")


@pytest.fixture
def config_of(synthetic, tmp_path):
    def make(**sections):
        return write_config(tmp_path / "config.yaml", synthetic, **sections)

    return make


def planned(path, *overrides, gpus=1, gpu="H100", **options):
    return plan(load_config(path, list(overrides)), gpus, gpu, **options)


# Counts


RUNS = {
    "dti": [],
    "sliding_window": ["sample.paradigm=sliding_window"],
    "isolated": ["attention.policy=isolated"],
    "isolated, prefix, time gaps": [
        "attention.policy=isolated",
        "template.prefix=Did they click?",
        "template.time_gaps=true",
    ],
    "isolated, hours": ["attention.policy=isolated", "template.item='{title} at {hour}'"],
    "cut by max_steps": ["training.max_steps=7"],
    "isolated, cut": ["attention.policy=isolated", "training.max_steps=9"],
}
RUNS_WITH_REQUESTS = {  # of fewer steps
    **RUNS,
    "cut by max_steps": ["training.max_steps=3"],
    "isolated, cut": ["attention.policy=isolated", "training.max_steps=3"],
}


@pytest.fixture(scope="module")
def impressions(tmp_path_factory):
    return prepare_impressions(tmp_path_factory.mktemp("impressions"))


@pytest.fixture
def config_of_impressions(impressions, tmp_path):
    def make(**training):
        pack = {"length": 4096}  # one request shows 300 items
        return write_config(tmp_path / "config.yaml", impressions, pack=pack, training=training)

    return make


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_counts_are_those_of_the_stream(config_of, tmp_path, overrides):
    config = load_config(config_of(), ["training.max_steps=1000", *overrides])
    are_those_of_the_stream(config, tmp_path)


@pytest.mark.parametrize("overrides", RUNS_WITH_REQUESTS.values(), ids=RUNS_WITH_REQUESTS)
def test_counts_with_requests_are_those_of_the_stream(config_of_impressions, tmp_path, overrides):
    config = load_config(config_of_impressions(max_steps=1000), overrides)
    are_those_of_the_stream(config, tmp_path)


def are_those_of_the_stream(config, tmp_path):
    plan_of_run = Inputs.open(config, tmp_path / "tokenizer").stream_plan(
        "train", epochs=2, shuffle=True
    )
    found = workload(plan_of_run, 4, config.training.max_steps)
    steps, tokens, targets, samples = 0, 0, 0, 0
    for batch in PackStream(plan_of_run, Share(4, 4)):
        if steps == config.training.max_steps:
            break
        steps += 1
        targets += batch.step_targets
        tokens += batch.body_tokens + int(batch.used.sum())
        real = batch.target_row[batch.used > 0], batch.target_position[batch.used > 0]
        samples += len(np.unique(np.stack([x.numpy() for x in real]), axis=1)[0])
    assert (found.steps, found.targets, found.tokens) == (steps, targets, tokens)
    assert samples == targets  # each target once an epoch, as the stream promises
    assert found.as_dict()["samples"] == sum(epoch.samples for epoch in found.epochs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dti", "sliding_window", "isolated, prefix, time gaps"])
def test_a_run_takes_the_steps_tokens_and_targets_of_its_plan(config_of, tmp_path, name):
    path = config_of(training={"epochs": 2, "max_steps": None})
    takes_what_is_planned(path, tmp_path, RUNS[name])


@pytest.mark.slow
def test_a_run_with_requests_takes_the_steps_tokens_and_targets_of_its_plan(
    config_of_impressions, tmp_path
):
    path = config_of_impressions(epochs=2, max_steps=None)
    takes_what_is_planned(path, tmp_path, RUNS["isolated, prefix, time gaps"])


def takes_what_is_planned(path, tmp_path, overrides):
    overrides = [*overrides, "training.log_every=3"]
    found = planned(path, *overrides, gpus=2)
    train(path, *overrides, ranks=2)
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    counted = found["data"][found["sample"]["paradigm"]]
    assert lines[-1]["step"] == counted["steps"] == sum(e["steps"] for e in counted["epochs"])
    assert sum(line["tokens"] for line in lines) == counted["tokens"]
    assert sum(line["targets"] for line in lines) == counted["targets"]


def test_a_plan_says_what_requests_there_are(config_of_impressions, config_of, impressions):
    found = planned(config_of_impressions())
    statistics = Dataset.open(str(impressions)).manifest.statistics
    assert found["requests"] == statistics.requests.model_dump()
    line = f"of {statistics.requests.requests:,} requests"
    assert line in plan_table(found)
    without = planned(config_of())
    assert without["requests"] is None
    assert "requests" not in plan_table(without)


def test_sliding_window_beside_it_is_the_plan_of_a_sliding_window_run(config_of):
    path = config_of(training={"max_steps": None})
    beside = planned(path)["data"]["sliding_window"]
    alone = planned(path, "sample.paradigm=sliding_window", "attention.policy=windowed")["data"]
    assert beside == alone["sliding_window"]
    assert alone["fewer_tokens_per_target"] == 1


def test_of_a_cut_run_sliding_window_takes_the_steps_for_as_many_targets(config_of, tmp_path):
    data = planned(config_of(), "training.max_steps=5")["data"]
    mine, base = data["dti"], data["sliding_window"]
    assert mine["steps"] == 5 < base["steps"]
    assert mine["targets"] <= base["targets"]
    config = load_config(config_of(), ["sample.paradigm=sliding_window"])
    stream = Inputs.open(config, tmp_path / "tokenizer").stream_plan("train", shuffle=True)
    one_less = workload(stream, 4, base["steps"] - 1)
    assert one_less.targets < mine["targets"]
    assert steps_for(stream, 4, 10**9) == sum(stream.steps_per_epoch(4))


# FLOPs


def a_batch(share=False, prefix=0, profiles=False):
    rng = np.random.default_rng(3)
    tokens = tiny.item_tokens(rng, prefix=prefix)
    block = tiny.users(rng, [25, 9, 14, 30], items=12)
    if profiles:
        tokens, block = tiny.with_profiles(tokens, block)
    return tiny.batch_of(block, tokens, 4, 6, PackShape(256, 128), share=share)


def counted_flops(model, batch):
    """Matrix products that torch really runs; the CPU's fused attention is not among them."""
    with FlopCounterMode(display=False) as counter:
        Head.loss(model(batch), batch).backward()
    return counter.get_total_flops()


def linear_flops(model, batch, checkpointing=False, heads=0):
    """Of the linear layers, and `heads` products of the head: torch counts those where it is
    frozen, and not a product with a vector."""
    packs = len(batch.tokens)
    shape = ModelShape.of(model)
    slots = batch.labels.shape[1]
    pack = PackShape(batch.tokens.shape[1] - slots, slots)
    found = flops_of_pack(shape, pack, 0.0, checkpointing)
    of_head = 3 if shape.head_table else 2
    return packs * (found.total + (heads - of_head) * found.forward_head)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_linear_flops_are_those_that_torch_counts(family):
    model, batch = tiny.ctr_model(family), a_batch()
    assert counted_flops(model, batch) == linear_flops(model, batch)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_linear_flops_of_each_policy(family, policy, checkpointing):
    model = tiny.ctr_model(family, policy).train()
    if checkpointing:
        model.enable_activation_checkpointing()
    batch = a_batch(share=policy == "isolated")
    counted = counted_flops(model, batch)
    assert counted == linear_flops(model, batch, checkpointing)


@pytest.mark.parametrize("policy", ["windowed", "isolated"])
def test_flops_of_a_token_times_tokens_are_a_packs_without_attention(policy):
    """What the logged mfu counts."""
    model, batch = tiny.ctr_model("llama", policy), a_batch(share=policy == "isolated")
    packs, slots = batch.labels.shape
    pack = PackShape(256, slots, batch.tokens.shape[1] - slots)
    found = packs * batch.tokens.shape[1] * flops_of_token(ModelShape.of(model), pack)
    assert found == pytest.approx(linear_flops(model, batch, heads=3))


def test_linear_flops_with_adapters_leave_out_the_frozen_weights_gradients():
    pytest.importorskip("peft")
    model, batch = tiny.ctr_model("llama"), a_batch()
    whole = counted_flops(model, batch)
    add_adapters(model, LoraConfig(rank=2), tiny.SUM, seed=0)
    model.double()
    counted = counted_flops(model, batch)
    assert counted == linear_flops(model, batch, heads=2)
    assert counted < 0.8 * whole


@pytest.mark.parametrize(
    ("policy", "prefix"),
    [("budget", 0), *((p, n) for p in POLICIES for n in (0, 3) if p != "budget")],
)
def test_attention_pairs_are_those_of_the_dense_masks(policy, prefix):
    share = policy == "isolated"
    model = tiny.ctr_model("llama", policy, prefix=prefix, backend="dense")
    batch = a_batch(share, prefix)
    plans = AttentionPlans(batch.layout, model.scheme, model.backbone.rotary_emb.inv_freq)
    visible = sum(int(plans._body[window].mask.sum()) for window in plans._planned)
    visible += sum(int(plans._readout[w].mask.sum()) for w in model.scheme.windows.readout)
    found = count_pairs(model, [batch])
    packs = len(batch.tokens)
    assert found.visible * packs == visible
    assert found.visible < found.chunked
    assert found.visible < found.flex
    # A square of all tokens in all layers would be several times that.
    assert visible < 0.35 * model.config.num_hidden_layers * batch.tokens.shape[1] ** 2 * packs


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_doubled_pairs_are_those_of_attention_on_twice_the_dimensions(
    policy, positions, monkeypatch
):
    pairs = Counter()

    def attention(q, k, v, plan, scale):
        pairs[q.shape[-1] // v.shape[-1]] += int(plan.mask.sum())
        return dense.attention(q, k, v, plan, scale)

    dense = backend._BACKENDS["dense"]
    monkeypatch.setitem(backend._BACKENDS, "dense", replace(dense, attention=attention))
    model = tiny.ctr_model("llama", policy, positions=positions, backend="dense")
    for profiles in (True, False):
        batch = a_batch(share=policy == "isolated", profiles=profiles)
        pairs.clear()
        model(batch)
        found, packs = count_pairs(model, [batch]), len(batch.tokens)
        assert found.visible * packs == pairs[1] + pairs[2]
        assert found.doubled * packs == pairs[2]
        assert bool(pairs[2]) == (profiles and positions == "rope")


def test_attention_on_twice_the_dimensions_has_torchs_flops():
    """The products of a forward and a backward pass, which makes the scores once more."""
    heads, queries, keys, width = 4, 32, 48, 8
    q, k = (torch.randn(1, heads, n, 2 * width, requires_grad=True) for n in (queries, keys))
    v = torch.randn(1, heads, keys, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ((q @ k.mT).softmax(-1) @ v).sum().backward()
        _ = q @ k.mT
    shape = ModelShape.of(tiny.ctr_model("llama"))
    shape = replace(shape, heads=heads, head_dim=width)
    pairs, pack = queries * keys, PackShape(8, 4)
    found = flops_of_pack(shape, pack, pairs, False, pairs)
    without = flops_of_pack(shape, pack, 0.0, False)
    assert found.total - without.total == counter.get_total_flops()


def test_attention_flops_are_torchs_for_as_many_pairs():
    heads, queries, keys, width = 4, 32, 32, 8
    x = torch.randn(1, heads, queries, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x @ x.mT).softmax(-1) @ x
    shape = SimpleNamespace(heads=heads, head_dim=width)
    assert counter.get_total_flops() == 4 * shape.heads * shape.head_dim * queries * keys


# The model's shape


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_the_hollow_model_has_the_parameters_of_the_run(config_of, tmp_path, head):
    inputs = Inputs.open(load_config(config_of(model={"head": head})), tmp_path / "tokenizer")
    real, hollow = inputs.untrained_model(), inputs.hollow_model()
    assert all(p.untyped_storage().nbytes() == p.itemsize for p in hollow.backbone.parameters())
    assert [p.shape for p in hollow.parameters()] == [p.shape for p in real.parameters()]
    assert ModelShape.of(hollow) == ModelShape.of(real)


# Memory


def memory_of(path, *overrides, gpus=1, gpu="H100"):
    return planned(path, *overrides, gpus=gpus, gpu=gpu)["memory"]["config"]


@pytest.mark.parametrize(("stage", "weights", "gradients"), [(1, 2, 4), (2, 2, 2), (3, 1, 2)])
def test_states_in_bf16_are_those_of_the_zero_paper(config_of, stage, weights, gradients):
    """Rajbhandari et al., arXiv 1910.02054, section 3.1: 2 + 2 + 12 bytes a parameter.

    Here gradients take 4 bytes: several micro-steps are added up in float32.
    """
    found = planned(
        config_of(),
        "training.precision=bf16",
        f"training.deepspeed=zero{stage}",
        "training.global_batch_packs=8",
        gpus=2,
    )
    total, own = found["model"]["parameters"], found["memory"]["config"]
    assert own["states"] == (weights + gradients + 12 / 2) * total


@pytest.mark.parametrize(("stage", "gradients"), [(1, 0), (2, 0), (3, 4 * 300 / 2)])
def test_below_stage_3_a_single_micro_step_keeps_no_gradients(stage, gradients):
    held = states(1000, 300, {"stage": stage}, "fp32", world=2, accumulates=False)
    assert (held.gradients, held.optimizer, held.host) == (gradients, 12 * 300 / 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "cpu"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_copy_of_a_checkpoint_is_what_rank_0_writes(config_of, tmp_path, stage, precision):
    training = {"max_steps": 1, "precision": precision, "deepspeed": stage}
    path = config_of(model=MODEL, training=training)
    found = planned(path, gpus=2)
    train(path, ranks=2)
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    files = [*folder.glob("*rank_0_*.pt"), *folder.glob("mp_rank_00_model*.pt")]
    written = sum(file.stat().st_size for file in files)
    assert found["memory"]["config"]["copy"] == pytest.approx(written, rel=0.01)
    assert f"a copy that takes {written / 2**30:.2f} GiB" in plan_table(found)
    alone = planned(path, "checkpoints.background=false", gpus=2)
    assert alone["memory"]["config"]["copy"] == 0
    assert "a copy" not in plan_table(alone)


def test_what_is_offloaded_is_on_the_host():
    zero = {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "cpu"}}
    held = states(1000, 1000, zero, "bf16", world=2, accumulates=True)
    assert (held.on_device, held.host) == (1000, (4 + 12) * 1000 / 2)


SETTINGS = {
    "bf16, ZeRO-3": [],
    "fp32, ZeRO-3": ["training.precision=fp32"],
    "bf16, ZeRO-3, checkpointing": ["training.activation_checkpointing=true"],
    "bf16, ZeRO-3, isolated": ["attention.policy=isolated"],
    "bf16, ZeRO-3, reset": ["attention.policy=reset"],
    "bf16, ZeRO-1": ["training.deepspeed=zero1"],
    "bf16, ZeRO-1, twice the packs": ["training.deepspeed=zero1", "training.micro_batch_packs=2"],
    "fp32, ZeRO-2": ["training.deepspeed=zero2", "training.precision=fp32"],
}
MODEL = {
    "name": "scratch",
    "scratch": {
        "vocab_size": 400,
        "hidden_size": 256,
        "intermediate_size": 704,
        "layers": 4,
        "heads": 4,
        "key_value_heads": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_tensors_of_a_step_peak_where_the_plan_says(config_of, tmp_path, overrides, ranks):
    training = {"max_steps": None, "global_batch_packs": 4, "precision": "bf16"}
    path = config_of(model=MODEL, training=training, pack={"length": 512})
    log = run(job(ranks, path, *overrides, script=SCRIPT), tmp_path / "log")
    found = json.loads(next(line for line in log.splitlines() if line.startswith('{"measured')))
    expected, measured = found["planned"], found["measured"]
    assert expected["tensors"] == pytest.approx(measured["peak"], rel=0.15)
    kept = ["weights", "optimizer", *(["gradients"] if expected["stage"] == 3 else [])]
    at_rest = sum(expected[part] for part in [*kept, "kept_buckets"])
    assert at_rest == pytest.approx(measured["at_rest"], rel=0.02)
    added = expected["gradients"] if expected["stage"] < 3 else 0
    if expected["stage"] == 1 and added:  # stage 1 frees its buckets only at the end of a step
        added += expected["buckets"]
    kept = measured["after_a_micro_step"] - measured["at_rest"]
    assert kept == pytest.approx(added, rel=0, abs=0.03 * expected["weights"])


# What it says


def test_it_names_the_fastest_setting_that_fits(config_of):
    path = config_of()
    roomy = planned(path)["memory"]["choice"]
    assert (roomy["deepspeed"], roomy["activation_checkpointing"]) == ("zero1", False)
    assert roomy["micro_batch_packs"] == 4  # all of the step's


def test_what_does_not_fit_is_said_with_what_would(config_of, monkeypatch):
    large = {"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "heads": 64}
    path = config_of(
        model={"scratch": {**MODEL["scratch"], **large, "key_value_heads": 8}},
        training={"precision": "bf16", "device": "auto", "deepspeed": "zero3"},
    )
    found = planned(path, gpu="A10G")
    assert not found["memory"]["config"]["fits"]
    text = plan_table(found)
    assert "DOES NOT FIT" in text
    on_gpu = [entry for entry in found["memory"]["settings"] if not entry["host"]]
    assert not any(entry["fits"] for entry in on_gpu)
    monkeypatch.setitem(gpu_table._DATASHEETS, "A10G", (70, 35, 2))
    found = planned(path, gpu="A10G")
    assert found["memory"]["choice"] is None
    assert "Nothing fits. What would: " in plan_table(found)
    assert "a GPU with" in plan_table(found)


def test_offloading_moves_states_to_the_host(config_of):
    path = config_of()
    on_gpu = memory_of(path, "training.deepspeed=zero3")
    offloaded = memory_of(path, "training.deepspeed=zero3_offload")
    assert offloaded["states"] == 0 < on_gpu["states"]
    assert offloaded["host"] > on_gpu["states"]
    assert offloaded["live"] > 0  # parameters come over as they are used


def test_time_and_cost_follow_from_flops_peak_and_mfu(config_of):
    path = config_of(training={"precision": "bf16"})
    found = planned(path, gpus=4, price=2.5, mfu=0.5)
    of = found["time"]["dti"]
    assert of["train_s"] == pytest.approx(found["flops"]["dti"]["train"] / (4 * 989e12 * 0.5))
    assert of["cost"] == pytest.approx(of["gpu_hours"] * 2.5)
    assert found["time"]["sliding_window"]["cost"] > of["cost"]
    assert "cost" not in planned(path)["time"]["dti"]  # no price is made up


def test_validations_are_counted(config_of):
    path = config_of(training={"max_steps": 6})
    once = planned(path)["flops"]["dti"]["validation"]
    often = planned(path, "validation.every_steps=2")["flops"]["dti"]["validation"]
    assert often == 3 * once > 0


def test_the_command_prints_tables_or_json(config_of, capsys):
    path = str(config_of())
    assert main(["plan", path, "--gpus", "2", "--gpu", "a100-40gb", "training.epochs=1"]) == 0
    text = capsys.readouterr().out
    for words in ("tokens a target", "k(n+1)/(n+k)", "FLOPs", "Fastest that fits", "assumed: 40%"):
        assert words in text
    assert main(["plan", path, "--gpus", "2", "--gpu", "l4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "forward" in found["flops"]["formula"]
    assert found["gpu"]["name"] == "L4"


def test_nothing_is_made_in_the_run_folder(config_of, tmp_path):
    planned(config_of())
    assert not (tmp_path / "run").exists()


# Errors and hardware


def refused(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_gpus_that_do_not_divide_the_batch_are_refused_with_those_that_do(config_of, capsys):
    said = refused(capsys, config_of(), "--gpus", 3, "training.global_batch_packs=8")
    assert "--gpus can be 1, 2, 4, 8" in said
    assert "global_batch_packs=9" in said


def test_an_unknown_gpu_is_refused_with_the_nearest(config_of, capsys):
    said = refused(capsys, config_of(), "--gpus", 1, "--gpu", "L40X")
    assert "Did you mean 'L40S'?" in said or "Did you mean 'L40'?" in said


def test_bf16_is_refused_where_there_is_none(config_of, capsys):
    arguments = (config_of(), "--gpus", 1, "--gpu", "V100")
    assert "V100-32GB computes none" in refused(capsys, *arguments, "training.precision=bf16")
    assert main(["plan", *map(str, arguments), "training.precision=fp32"]) == 0


def test_calibration_of_another_gpu_than_this_machine_is_refused(config_of, capsys):
    said = refused(capsys, config_of(), "--gpus", 1, "--gpu", "H100", "--calibrate")
    assert "Leave one out" in said


def test_a_missing_data_set_is_refused(config_of, capsys):
    assert "/nowhere" in refused(capsys, config_of(), "--gpus", 1, "data.path=/nowhere")


@pytest.mark.parametrize(
    ("name", "gigabytes", "key", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "H100-SXM", 989),
        ("NVIDIA H100 PCIe", 79, "H100-PCIe", 756),
        ("NVIDIA H100 NVL", 93, "H100-NVL", 835),
        ("NVIDIA H200", 140, "H200", 989),
        ("NVIDIA A100-SXM4-40GB", 39, "A100-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 79, "A100-80GB", 312),
        ("NVIDIA A10G", 22, "A10G", 70),
        ("NVIDIA L4", 22, "L4", 121),
        ("NVIDIA L40S", 44, "L40S", 362),
        ("Tesla V100-SXM2-16GB", 16, "V100-16GB", None),
        ("NVIDIA GeForce RTX 4090", 24, "RTX-4090", 165.2),
        ("NVIDIA B200", 178, "B200", 2250),
    ],
)
def test_drivers_names_are_found_in_the_table(monkeypatch, name, gigabytes, key, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    properties = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = gpu_at_hand()
    assert found is not None
    assert (found.name, found.memory) == (key, properties.total_memory)
    assert found.bf16 == (None if peak is None else peak * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA GB200", "NVIDIA H20"),
        *("NVIDIA H200 NVL", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D"),
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_gpu_that_is_not_in_the_table_gets_no_other_ones_peak(name):
    assert gpu_of_device(name, 16 * 2**30) is None


def test_the_cpu_is_measured_and_its_memory_shared():
    one, two = find_gpu("cpu"), find_gpu("CPU", ranks_here=2)
    assert one.memory == pytest.approx(2 * two.memory, abs=2)
    assert one.fp32 > 1e8
    with pytest.raises(UserError, match="Did you mean 'H100"):
        find_gpu("H1000-SXM")


@pytest.mark.slow
def test_calibration_measures_steps_and_predicts_from_them(config_of, tmp_path):
    path = config_of(training={"max_steps": None, "epochs": 1})
    log = run(
        job(1, "plan", path, "--gpus", "2", "--calibrate", "--json", module="dti_dist"),
        tmp_path / "log",
    )
    found = json.loads(log[log.index("{\n") : log.rindex("}") + 1])
    took = found["calibration"]
    assert min(took[name] for name in ("micro_step", "forward", "step", "data")) > 0
    assert took["memory_gib"] > 0.1
    assert took["forward"] < took["micro_step"]
    steps = found["data"]["dti"]["steps"]
    of_step = 2 * took["micro_step"] + took["step"] / 2  # a thread packs meanwhile
    assert found["time"]["dti"]["train_s"] == pytest.approx(steps * of_step)
    ratio = found["flops"]["sliding_window"]["train"] / found["flops"]["dti"]["train"]
    times = [found["time"][name]["train_s"] for name in ("sliding_window", "dti")]
    assert times[0] / times[1] == pytest.approx(ratio, rel=0.5)


# Failures


@pytest.mark.parametrize(
    "failures",
    [
        Failures(mtbf=10_000, stall=10, write=0, restart=600),
        Failures(mtbf=10_000, stall=10, write=300, restart=600),
        Failures(mtbf=3_000, stall=30, write=500, restart=600),
        Failures(mtbf=1_000, stall=5, write=60, restart=300),
    ],
    ids=repr,
)
def test_goodput_is_that_of_a_simulated_job_and_greatest_where_it_says(failures):
    best = failures.best_work()
    found = []
    for work in (best / 2, best, best * 2):
        simulated = simulated_goodput(failures, work, count=30_000, seed=0)
        assert failures.goodput(work) == pytest.approx(simulated, rel=0.01)
        found.append(simulated)
    assert found[1] == max(found)
    around = [failures.goodput(best * factor) for factor in np.geomspace(0.1, 10, 401)]
    assert failures.goodput(best) == pytest.approx(max(around), rel=1e-9)


def test_how_often_to_save_is_youngs_where_the_stall_is_short_and_the_write_hidden():
    failures = Failures(mtbf=1e6, stall=1, write=100, restart=600)
    assert failures.best_work() == pytest.approx((2 * 1 * 1e6) ** 0.5, rel=1e-3)
    assert failures.goodput(1e9) == 0.0  # it never gets there
    assert Failures(mtbf=1e6, stall=0, write=100, restart=600).best_work() == 100


def test_plan_says_how_often_to_save_where_gpus_fail(config_of):
    path = config_of(checkpoints={"every_steps": 7})
    assert planned(path)["failures"] is None
    given = FailureOptions(mtbf_hours=1, stall_s=2, disk_gb_s=1e-3, restart_s=60)
    found = planned(path, gpus=4, failures=given)
    failures = found["failures"]
    assert (failures["mtbf"], failures["stall"], failures["restart"]) == (900, 2, 60)
    assert failures["write"] == failures["checkpoint_bytes"] / 1e6
    assert failures["config"]["every_steps"] == 7
    assert failures["best"]["goodput"] >= failures["config"]["goodput"]
    assert f"checkpoints.every_steps={failures['best']['every_steps']}" in plan_table(found)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["cpu", "zero1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_a_checkpoint(synthetic, tmp_path, stage, precision):
    """Beside the numbers there are names and shapes, about a hundred bytes for each weight."""
    model = {"vocab_size": 4000, "hidden_size": 192, "intermediate_size": 384, "layers": 2}
    path = write_config(
        tmp_path / "config.yaml",
        synthetic,
        model={"scratch": {**model, "heads": 4, "key_value_heads": 2}},
        training={"max_steps": 1, "deepspeed": stage, "precision": precision},
    )
    train(path, ranks=2)
    (commit,), _ = complete_checkpoints(tmp_path / "run/checkpoints")
    trained = planned(path)["model"]["trained"]
    by_rank = [
        sum(file.stat().st_size for file in commit.folder.glob(f"*zero_pp_rank_{rank}_*"))
        for rank in range(2)
    ]
    by_rank[0] += sum(file.stat().st_size for file in commit.folder.glob("mp_rank_00_*"))
    number = 3 if stage == "cpu" else 1
    total, of_rank = checkpoint_bytes(trained, number, precision, 2)
    assert commit.size == sum(by_rank) == pytest.approx(total, rel=0.03)
    assert max(by_rank) == pytest.approx(of_rank, rel=0.03)
