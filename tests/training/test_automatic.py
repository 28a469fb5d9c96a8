"""`auto`: what is chosen is what fits, is what `plan` says, and stays a run's own."""

from dataclasses import replace

import pytest
import yaml

from dti_dist.config import load_config
from dti_dist.costs import settings
from dti_dist.costs.memory import Demand, memory
from dti_dist.costs.settings import Room, alternatives, decide, fastest
from dti_dist.costs.shape import ModelShape
from dti_dist.data.layout import PackShape
from dti_dist.gpus import CPU
from dti_dist.inputs import Inputs
from dti_dist.options import NodeOptions
from dti_dist.reporting.plan import plan, plan_table
from tests.launching import job, run, train, write_config

AUTO = ["training.deepspeed=auto", "training.activation_checkpointing=auto"]
PACK = PackShape(8192, 600)
# Layers, widths and vocabularies of Llama 3.
LLAMAS = {
    "1B": (2048, 8192, 16, 32, 128_256),
    "3B": (3072, 8192, 28, 24, 128_256),
    "8B": (4096, 14_336, 32, 32, 128_256),
    "70B": (8192, 28_672, 80, 64, 128_256),
}


@pytest.fixture(scope="module")
def demands(synthetic, tmp_path_factory):
    """Of each Llama, trained in bf16 with two micro-steps a step of 16 packs."""
    folder = tmp_path_factory.mktemp("demands")
    training = {"global_batch_packs": 16, "precision": "bf16", "deepspeed": "auto"}
    found = {}
    for name, (hidden, feed_forward, layers, heads, vocabulary) in LLAMAS.items():
        shape = {"hidden_size": hidden, "intermediate_size": feed_forward, "layers": layers}
        shape |= {"heads": heads, "key_value_heads": 8, "vocab_size": vocabulary}
        model = {"name": "scratch", "scratch": shape}
        path = write_config(folder / "config.yaml", synthetic, model=model, training=training)
        config = load_config(path)
        inputs = Inputs.open(load_config(path, ["model.scratch.vocab_size=400"]), folder)
        inputs = replace(inputs, config=config, model=config.model)
        found[name] = Demand(config, ModelShape.of(inputs.hollow_model()), PACK, 1e6, 0.0)
    return found


def chosen(demand, memory_gb, world=8, host_gb=None):
    host = None if host_gb is None else host_gb * 1e9
    found = decide(demand, world, Room(memory_gb * 1e9, "cuda", host))
    return found.setting.deepspeed, found.setting.checkpointing, found.fits


def test_zero_1_without_recomputation_up_to_3b_and_zero_3_where_it_must_be(demands):
    """On H100s of 80 GB: the rule of thumb, and what the memory makes of it."""
    assert chosen(demands["1B"], 80) == ("zero1", False, True)
    assert chosen(demands["3B"], 80) == ("zero1", False, True)
    assert chosen(demands["70B"], 80, world=64) == ("zero3", True, True)
    assert chosen(demands["8B"], 80, world=16)[:2] == ("zero3", False)


def test_with_less_memory_slower_settings_are_chosen_and_at_last_the_leanest(demands):
    found = [chosen(demands["1B"], gigabytes) for gigabytes in (80, 40, 24, 16, 12, 8, 2)]
    assert found[0] == ("zero1", False, True)
    assert found[-1] == ("zero3_offload", True, False)
    assert [fits for *_, fits in found] == sorted((fits for *_, fits in found), reverse=True)
    assert len(set(found)) >= 4


def test_offloading_is_not_chosen_where_the_host_has_no_room(demands):
    assert chosen(demands["1B"], 12, world=1, host_gb=64) == ("zero3_offload", True, True)
    assert not chosen(demands["1B"], 12, world=1, host_gb=16)[2]


@pytest.mark.parametrize("gigabytes", [2, 10, 20, 40, 80, 200])
def test_it_is_the_fastest_of_all_that_plan_lists_with_as_many_packs(demands, gigabytes):
    for demand in demands.values():
        room = Room(gigabytes * 1e9, "cuda")
        listed = [
            option
            for option in alternatives(demand, 8, room)
            if option.setting.micro_batch_packs == demand.config.training.micro_batch_packs
        ]
        best = fastest(listed)
        found = decide(demand, 8, room)
        assert found.fits == (best is not None)
        if best:
            assert found == best
        else:
            assert found.memory.peak == min(option.memory.peak for option in listed)


def test_what_is_said_is_kept(demands):
    training = {"deepspeed": "zero2", "activation_checkpointing": True}
    config = demands["1B"].config
    config = config.model_copy(update={"training": config.training.model_copy(update=training)})
    found = decide(replace(demands["1B"], config=config), 8, Room(80e9, "cuda"))
    assert (found.setting.deepspeed, found.setting.checkpointing) == ("zero2", True)
    assert settings.decided(config, found) == config


def test_on_cpus_it_is_the_configuration_for_cpus(demands):
    found = decide(demands["1B"], 2, Room(64e9))
    assert (found.setting.deepspeed, found.fits) == (CPU, True)
    assert found.memory == memory(demands["1B"], found.setting, 2, CPU)


def test_plan_compares_a_node_with_its_ranks(synthetic, tmp_path):
    config = load_config(write_config(tmp_path / "config.yaml", synthetic))
    node = plan(config, 2, "H100", node=NodeOptions(node_memory=64))["memory"]["node"]
    assert (node["ranks"], node["memory"], node["fits"]) == (2, 64e9, True)
    assert node["needed"] == node["processes"] + node["copies"]
    alone = plan(config, 2, "H100", node=NodeOptions(node_gpus=1))["memory"]["node"]
    assert (alone["ranks"], alone["fits"]) == (1, None)
    assert alone["processes"] == node["processes"] / 2
    small = plan(config, 2, "H100", node=NodeOptions(node_memory=0.5))
    assert not small["memory"]["node"]["fits"]
    assert "DOES NOT FIT" in plan_table(small)
    assert plan(config, 2, "cpu")["memory"]["node"] is None


@pytest.mark.slow
def test_a_run_takes_what_plan_says_and_one_that_was_begun_keeps_its_own(synthetic, tmp_path):
    path = write_config(tmp_path / "config.yaml", synthetic, training={"max_steps": 2})
    log = run(job(2, path, *AUTO), tmp_path / "log")
    assert "training.deepspeed=cpu, training.activation_checkpointing=false; a rank takes" in log
    planned = plan(load_config(path, AUTO), 2, "cpu")["memory"]["config"]
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    for name in ("deepspeed", "activation_checkpointing"):
        assert kept[name] == planned[name]

    begun = ["training.deepspeed=zero1", f"run_dir={tmp_path / 'begun'}"]
    train(path, *begun)
    log = run(job(1, path, *begun, *AUTO), tmp_path / "log")
    assert "resuming from step-00000002" in log
    assert "DeepSpeed ZeRO stage 1" in log
    kept = yaml.safe_load((tmp_path / "begun" / "config.yaml").read_text())["training"]
    assert kept["deepspeed"] == "zero1"


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_copy_alone_keeps_its_own(synthetic, tmp_path):
    path = write_config(tmp_path / "config.yaml", synthetic, training={"max_steps": 2})
    copies = f"checkpoints.copy_to={tmp_path / 'copies'}"
    train(path, copies, "training.deepspeed=zero2")
    log = run(job(1, path, copies, *AUTO, f"run_dir={tmp_path / 'elsewhere'}"), tmp_path / "log")
    assert "resuming from step-00000002" in log
    assert "DeepSpeed ZeRO stage 2" in log
