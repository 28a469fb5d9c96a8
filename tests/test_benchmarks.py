"""Benchmarks measure what they name; their figures are not tested."""

import json

import pytest
import torch

from dti_dist.attention.backend import AttentionPlans, AttentionScheme
from dti_dist.attention.intervals import body_intervals, readout_intervals
from dti_dist.attention.policies import layer_windows
from dti_dist.benchmarks.attention import HEAD_DIM, HEADS, KV_HEADS, TOKENS, N, full_pack
from dti_dist.benchmarks.paradigm import BASELINE, VARIANTS
from dti_dist.cli import main
from tests.launching import write_config


def test_paradigm_trains_every_variant_on_the_same_targets_a_token_count_apart(
    capsys, synthetic, tmp_path
):
    config = write_config(tmp_path / "config.yaml", synthetic, pack={"length": 1024})
    assert main(["benchmark", "paradigm", str(config), "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    variants = result["variants"]
    assert list(variants) == list(VARIANTS)
    assert variants[BASELINE]["speedup"]["median"] == 1
    for name, figures in variants.items():
        assert figures["targets_per_s"]["min"] > 0
        if name != BASELINE:
            assert figures["tokens_per_target"] < variants[BASELINE]["tokens_per_target"]
    shared, each = (variants[f"dti, isolated{end}"] for end in ("", ", not shared"))
    assert shared["tokens_per_target"] < each["tokens_per_target"]
    assert result["surroundings"]["versions"]["torch"] == torch.__version__
    assert main(["benchmark", "paradigm", str(config), "--rounds", "1"]) == 0
    assert "by tokens alone" in capsys.readouterr().out


def test_attention_measures_body_and_readout_of_full_streaming_prompts(capsys):
    assert main(["benchmark", "attention", "--lengths", "1024", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["lengths"]["1024"]
    assert {"dense", "plain causal", "plan, block masks"} < set(result["milliseconds"])
    assert result["step_memory_mib"] > 0

    layout = full_pack(1024, torch.device("cpu"))
    windows = layer_windows("windowed", N, 2)
    q, k, v = (
        torch.randn(1, h, layout.unit.shape[1], HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    out = AttentionPlans(layout, AttentionScheme(windows)).attend(0, q, k, v, 1.0)
    assert (out != 0).any(dim=-1).all()
    seen = readout_intervals(layout, N, False)
    used = layout.unit[0, 1024:] >= 0
    context = (seen.end - seen.start)[0, 0][used]
    assert (context == (N + 1) * TOKENS - 1).all()  # n context interactions and the target's text
    assert body_intervals(layout, N, False).end.max() == 1024


@pytest.mark.parametrize("lengths", ["1000", "128,200", "0"])
def test_lengths_that_are_no_blocks_are_refused(lengths, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "attention", "--lengths", lengths])
    assert stop.value.code == 2
