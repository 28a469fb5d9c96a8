"""Benchmarks measure what they name; their figures are not tested."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dti_dist.attention.backend import AttentionPlans
from dti_dist.attention.dense import dense_mask
from dti_dist.attention.intervals import body_intervals, readout_intervals
from dti_dist.attention.policies import Windowed
from dti_dist.attention.scheme import AttentionScheme
from dti_dist.benchmarks import scale as scale_benchmark
from dti_dist.benchmarks.attention import HEAD_DIM, HEADS, KV_HEADS, TOKENS, N, full_pack
from dti_dist.benchmarks.data import data_table
from dti_dist.benchmarks.data_peers import SampleDigest, exchange
from dti_dist.benchmarks.paradigm import BASELINE, BY_REQUEST, TRAINER, VARIANTS, paradigm_table
from dti_dist.benchmarks.peer_loaders import PACKAGES, PEERS
from dti_dist.benchmarks.processes import cpu_seconds, resident_mib
from dti_dist.benchmarks.step import MODEL, PLANS, operators
from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data.layout import PackShape
from dti_dist.data.samples import SampleSettings
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from tests.launching import write_config
from tests.tiny import batch_of, item_tokens, users

PEERS_PYTHON = os.environ.get("DTI_TEST_PEERS")


def test_paradigm_trains_every_variant_on_the_same_targets_a_token_count_apart(
    capsys, synthetic, tmp_path, monkeypatch
):
    config = write_config(tmp_path / "config.yaml", synthetic, pack={"length": 1024})
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    few = ["--trainer-prompts", "8", "--trainer-batch", "4"]
    assert main(["benchmark", "paradigm", str(config), "--rounds", "2", "--json", *few]) == 0
    assert not list(here.iterdir())
    (result,) = json.loads(capsys.readouterr().out)["grid"]
    variants = result["variants"]
    assert list(variants) == [*(name for name in VARIANTS if name != BY_REQUEST), TRAINER]
    assert variants[BASELINE]["speedup"]["median"] == 1
    assert variants[BASELINE]["speedup_by_processor_time"]["median"] == 1
    assert variants[TRAINER]["speedup_over_trainer"]["median"] == 1
    # The same prompts, but for padding.
    one, padded = (variants[name]["tokens_per_target"] for name in (BASELINE, TRAINER))
    assert 0.8 * one < padded < 2 * one
    for name, figures in variants.items():
        assert figures["targets_per_s"]["min"] > 0
        if name.startswith("dti"):
            assert figures["tokens_per_target"] < variants[BASELINE]["tokens_per_target"]
    shared, each = (variants[f"dti, isolated{end}"] for end in ("", ", not shared"))
    assert shared["tokens_per_target"] < each["tokens_per_target"]
    assert result["surroundings"]["versions"]["torch"] == torch.__version__


def test_paradigm_on_requests_trains_one_prompt_a_request_beside(capsys, tmp_path):
    """Each request shows 5 items, of which one was clicked."""
    data = tmp_path / "data"
    size = ["--users", "30", "--requests-per-user", "30", "--popularity", "1"]
    assert main(["prepare", "synthetic", *size, "--out", str(data)]) == 0
    sample = {"context": 4, "targets": 20}
    config = write_config(tmp_path / "c.yaml", data, sample=sample, pack={"length": 1024})
    options = ["--rounds", "2", "--trainer-prompts", "4", "--trainer-batch", "4", "--json"]
    options += ["--policies", "isolated", "--out", str(tmp_path / "speed.png")]
    capsys.readouterr()
    assert main(["benchmark", "paradigm", str(config), *options]) == 0
    (result,) = json.loads(capsys.readouterr().out)["grid"]
    assert result["ideal"] == 20 * 5 / 24
    variants = result["variants"]
    streaming = ["dti, isolated", "dti, isolated, not shared"]
    assert list(variants) == [BASELINE, BY_REQUEST, *streaming, TRAINER]
    assert variants[BY_REQUEST]["speedup_over_request"]["median"] == 1
    one, by_request, shared, each = (
        variants[name]["tokens_per_target"] for name in (BASELINE, BY_REQUEST, *streaming)
    )
    assert shared < each < by_request < one / 2
    assert paradigm_table({"grid": [result]}).startswith("n = 4, k = 20, ideal 4.2\n")


def test_a_grid_of_n_and_k_is_measured_and_drawn(capsys, synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, pack={"length": 1024})
    grid = ["--grid-n", "3", "5", "--grid-k", "4", "8", "--policies", "budget"]
    options = ["--rounds", "1", "--trainer-prompts", "0", "--out", str(tmp_path / "grid.png")]
    assert main(["benchmark", "paradigm", str(config), *grid, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("dti, budget") == 4
    assert "n = 5, k = 8, ideal 3.7" in printed
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_attention_measures_body_and_readout_of_full_streaming_prompts(capsys):
    assert main(["benchmark", "attention", "--lengths", "1024", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["windows"]["20"]["1024"]
    assert {"dense", "plain causal", "plan, block masks"} < set(result["milliseconds"])
    assert set(result["of_matrix_product"]) == {"chunked", "dense", "plain causal"}
    masks = [
        dense_mask(intervals(full_pack(1024, torch.device("cpu")), N, False))
        for intervals in (body_intervals, readout_intervals)
    ]
    pairs = sum(int(mask.sum()) for mask in masks)
    assert result["gflop"]["chunked"] == pytest.approx(14e-9 * pairs * HEADS * HEAD_DIM)
    assert result["step_memory_mib"] > 0

    layout = full_pack(1024, torch.device("cpu"))
    q, k, v = (
        torch.randn(1, h, layout.unit.shape[1], HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    out = AttentionPlans(layout, AttentionScheme(Windowed(), N, 2)).attend(0, q, k, v, 1.0)
    assert (out != 0).any(dim=-1).all()
    seen = readout_intervals(layout, N, False)
    used = layout.unit[0, 1024:] >= 0
    context = (seen.end - seen.start)[0, 0][used]
    assert (context == (N + 1) * TOKENS - 1).all()  # n context interactions and the target's text
    assert body_intervals(layout, N, False).end.max() == 1024
    assert full_pack(128, torch.device("cpu")).unit.shape == (1, 256)  # no target fits


def test_step_counts_operators_beside_the_models_own(capsys):
    command = ["benchmark", "step", "--contexts", "20", "--layers", "2", "4", "--rounds", "1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attention_call_us"]["min"] > 0
    shallow, deep = found["cells"]
    for cell in (shallow, deep):
        assert set(cell["milliseconds"]) == {MODEL, PLANS, "zero1", "zero3"}
        assert cell["over_model"][MODEL]["median"] == 1
        assert cell["operators"][PLANS] < 250
        assert cell["operators"][MODEL] < cell["operators"]["zero1"]
    assert deep["windows"] > shallow["windows"]
    assert deep["operators"][PLANS] == shallow["operators"][PLANS]
    assert deep["operators"][MODEL] > 1.5 * shallow["operators"][MODEL]


def test_an_operator_is_counted_once_with_what_it_calls():
    x = torch.ones(3)
    # to() calls _to_copy, which calls empty_strided and copy_.
    assert operators(lambda: x.to(torch.float64).exp().unsqueeze(0)) == 3


@pytest.mark.parametrize("lengths", ["1000", "128,200", "0"])
def test_lengths_that_are_no_blocks_are_refused(lengths, capsys):
    assert main(["benchmark", "attention", "--lengths", lengths]) == 2
    assert f"expected multiples of 128, such as 2048,4096; found {lengths}" in " ".join(
        capsys.readouterr().err.split()
    )


def data_config(tmp_path, data, **sections):
    return write_config(tmp_path / "config.yaml", data, template={"item": "\n{title}:"}, **sections)


def test_scale_runs_the_ranks_of_jobs_that_follow_each_other(capsys, synthetic, tmp_path):
    """The command itself checks that targets come once and steps are equal."""
    path = write_config(
        tmp_path / "config.yaml",
        synthetic,
        sample={"context": 2, "targets": 2},
        pack={"length": 128},
        training={"global_batch_packs": 12},
    )
    small = "data.shuffle_interactions=300"
    arguments = ["benchmark", "scale", str(path), small, "--ranks", "4", "3", "--json"]
    assert main([*arguments, "--interactions", "1000000"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["jobs"]
    assert (first["ranks"], second["ranks"]) == (4, 3)
    assert 0 == first["steps"][0] < first["steps"][1] == second["steps"][0] < second["steps"][1]
    config = load_config(path)
    plan = Inputs.open(config, tmp_path / "tokenizer").stream_plan("train", shuffle=True)
    assert first["targets"] + second["targets"] == plan.index.total_targets
    measured, predicted = found["measured"], found["predicted"]
    assert measured["interactions"] == plan.index.interactions.sum()
    times = 1_000_000 / measured["interactions"]
    assert predicted["index_bytes"] == pytest.approx(measured["index_bytes"] * times)
    assert predicted["index_s"] == pytest.approx(measured["index_cpu_s"] * times / 4)
    assert main([*arguments[:-1], "--costs-only"]) == 0
    assert "10G" in capsys.readouterr().out


def test_scale_sees_a_target_that_is_lost_or_comes_twice(synthetic, tmp_path, monkeypatch):
    path = write_config(
        tmp_path / "config.yaml",
        synthetic,
        pack={"length": 128},
        training={"global_batch_packs": 12},
    )
    shares = scale_benchmark._shares
    monkeypatch.setattr(  # the second job counts its ranks wrongly: two read the same packs
        scale_benchmark,
        "_shares",
        lambda config, world: shares(config, world)[: world - 1] + shares(config, world)[:1],
    )
    with pytest.raises(AssertionError):
        scale_benchmark.benchmark_scale(load_config(path), [4, 3], 10**6)
    monkeypatch.undo()
    with pytest.raises(UserError, match="--ranks 5: expected a divisor"):
        scale_benchmark.benchmark_scale(load_config(path), [5], 10**6)


@pytest.mark.parametrize("policy", ["budget", "isolated"])
def test_data_counts_the_tokens_that_the_index_has_wherever_they_are_read(
    capsys, synthetic, tmp_path, policy
):
    config = data_config(tmp_path, synthetic, attention={"policy": policy})
    copy = shutil.copytree(synthetic, tmp_path / "copy")
    picture = tmp_path / "data.png"
    arguments = ["--also", str(copy), "--workers", "0", "--rounds", "2", "--epochs", "1"]
    command = ["benchmark", "data", str(config), *arguments, "--json", "--out", str(picture)]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)

    opened = Inputs.open(load_config(config), tmp_path / "tokenizer")
    index = opened.stream_plan("train").index
    assert result["targets"] == index.total_targets
    assert result["tokens"] == index.tokens.sum() + index.total_targets
    assert result["samples"] == len(index.tokens)
    assert result["packs"] > 1
    assert result["gather_tokens_per_core_s"]["min"] > 0
    assert result["peers"] is None
    assert [run["data"] for run in result["runs"]] == [str(synthetic), str(copy)]
    for run in result["runs"]:
        assert run["contestant"] == "dti-dist"
        assert run["workers"] == 0
        for figure in ("tokens_per_s", "tokens_per_core_s", "first_batch_s"):
            assert 0 < run[figure]["min"] <= run[figure]["median"] <= run[figure]["max"]
        assert run["targets_per_s"]["median"] < run["tokens_per_s"]["median"]
        assert run["resumed_first_batch_s"]["min"] > 0
        assert len(run["memory_mib"]) > 1
        assert run["highest_memory_mib"] >= max(run["memory_mib"]) > 10
    assert result["runs"][0]["ours_over_it"] == {"median": 1, "min": 1, "max": 1}
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = data_table(result)
    assert str(copy) in table
    assert "--peers PYTHON" in table


def test_data_elsewhere_must_be_a_copy(capsys, synthetic, tmp_path):
    from functools import partial

    from dti_dist.data.prepare.build import BuildOptions, build_dataset
    from dti_dist.data.prepare.synthetic import read_synthetic

    other = str(tmp_path / "other")
    read = partial(read_synthetic, users=20, items=48, interactions_per_user=40)
    build_dataset(read, other, BuildOptions())
    config = data_config(tmp_path, synthetic)
    assert main(["benchmark", "data", str(config), "--also", other, "--workers", "0"]) == 2
    assert "is not a copy" in capsys.readouterr().err


def test_peers_that_cannot_start_are_named(capsys, synthetic, tmp_path):
    config = data_config(tmp_path, synthetic)
    assert main(["benchmark", "data", str(config), "--peers", str(tmp_path / "python")]) == 2
    assert "expected the Python of an environment" in capsys.readouterr().err
    assert main(["benchmark", "data", str(config), "--peers", sys.executable]) == 2
    printed = capsys.readouterr().err
    assert f"made by: pip install {PACKAGES}" in printed
    assert "No module named 'datasets'" in printed
    assert main(["benchmark", "data", str(config), "template.time_gaps=true", "--peers", "p"]) == 2
    assert "template.time_gaps=false" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("share", [False, True])
def test_the_digest_is_of_samples_as_they_were_before_packing(share, prefix):
    rng = np.random.default_rng(0)
    tokens = item_tokens(rng, prefix=prefix)
    block = users(rng, [9, 1, 14, 30, 6])
    n, k = 4, 5
    digest = SampleDigest(tokens.sum_id)
    digest.add_packs(batch_of(block, tokens, n, k, PackShape(128, 128), share=share))

    samples = SampleSettings(n, k, 1).cut(block)
    expected, total = 0, 0
    for row, first, first_target, end, _ in zip(*vars(samples).values(), strict=True):
        ids = list(tokens.prefix)
        for position in range(first, end):
            at = block.offsets[row] + position
            item = block.item_ids[at]
            ids += list(tokens.tokens[tokens.offsets[item] : tokens.offsets[item + 1]])
            ids += [tokens.sum_id] * int(position >= first_target)
            ids.append(tokens.label_ids[block.labels[at]])
        part = hashlib.blake2b(np.array(ids, dtype="<i4").tobytes(), digest_size=8).digest()
        expected = (expected + int.from_bytes(part, "little")) % 2**64
        total += len(ids)
    assert digest.summary() == {
        "samples": len(samples),
        "tokens": total,
        "digest": f"{expected:016x}",
    }


def test_peers_are_given_the_users_that_the_stream_reads(synthetic, tmp_path):
    opened = Inputs.open(load_config(data_config(tmp_path, synthetic)), tmp_path / "tokenizer")
    plan = opened.stream_plan("train", max_targets=400)
    folder = tmp_path / "exchange"
    folder.mkdir()
    exchange(folder, opened, plan)
    given = pq.read_table(folder / "sequences")
    assert len(given) == len(plan.index.row_targets)
    train = pq.read_table(synthetic / "train").slice(0, len(given))
    assert given["item_ids"].equals(train["item_ids"])
    settings = json.loads((folder / "exchange.json").read_text())
    assert (settings["n"], settings["k"]) == (5, 8)
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "items.parquet"}


@pytest.mark.slow
@pytest.mark.skipif(PEERS_PYTHON is None, reason="DTI_TEST_PEERS names no Python with the peers")
def test_peers_read_the_same_samples(capsys, synthetic, tmp_path):
    config = data_config(tmp_path, synthetic)
    arguments = ["--peers", PEERS_PYTHON, "--workers", "0", "1", "--rounds", "1", "--epochs", "1"]
    command = ["benchmark", "data", str(config), *arguments, "--targets", "500", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["peers"]["same_samples"] == dict.fromkeys(PEERS, True)
    assert [run["contestant"] for run in result["runs"]] == ["dti-dist", *PEERS] * 2
    assert "MDS shards were written" in data_table(result)


def test_what_a_process_and_its_children_use_is_counted():
    me = os.getpid()
    assert resident_mib(me) > 10
    before = cpu_seconds(me)
    while cpu_seconds(me) - before < 0.03:
        sum(range(1000))
    assert cpu_seconds(me, without=me) == resident_mib(me, without=me) == 0


def test_evaluation_measures_metrics_by_request_where_several_were_shown(capsys, tmp_path):
    size = ["--targets", "3000", "--per-user", "30", "--work", str(tmp_path)]
    assert main(["benchmark", "evaluation", *size, "--shown", "7", "--slice"]) == 0
    printed = capsys.readouterr().out
    assert {"metrics by request", "ndcg@10", "request_auc"} < set(re.split(r"\s{2,}|\n", printed))
    found = pq.read_table(tmp_path / "predictions.parquet", columns=["row", "timestamp"])
    sizes = Counter(tuple(row.values()) for row in found.to_pylist())
    assert max(sizes.values()) == 7
    # 30 = 4 x 7 + 2, so requests go over into the next user's row.
    assert len(sizes) == 3000 // 7 + 1 + sum(1 for end in range(30, 3000, 30) if end % 7)
    assert main(["benchmark", "evaluation", *size]) == 0
    assert "request" not in capsys.readouterr().out
