"""The proof that users run: it holds where it must, measures where it must not, and can fail."""

import json

import pytest
import torch

from dti_dist.attention import backend, intervals, scheme
from dti_dist.cli import main
from tests.impressions import prepare_impressions
from tests.launching import write_config


@pytest.fixture
def config(synthetic, tmp_path):
    return write_config(tmp_path / "config.yaml", synthetic)


def verify(capsys, config, *arguments, expect=0):
    assert main(["verify", str(config), "--json", *arguments]) == expect
    checks = json.loads(capsys.readouterr().out)
    assert len(checks) >= 6
    assert all(check["compared"] > 0 for check in checks)
    return [check["verdict"] for check in checks], [check["largest"] for check in checks]


@pytest.mark.parametrize("head", ["yes_no", "linear"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_all_promises_hold_under_budget(capsys, config, head, dtype):
    verdicts, largest = verify(capsys, config, f"model.head={head}", "--dtype", dtype)
    assert verdicts == ["holds"] * 6
    assert largest[0] == largest[1] == 0


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_all_promises_hold_under_isolated_and_sharing_changes_nothing(capsys, config, positions):
    settings = ["attention.policy=isolated", f"attention.positions={positions}"]
    verdicts, _ = verify(capsys, config, *settings)
    assert verdicts == ["holds"] * 8
    verdicts, _ = verify(capsys, config, *settings, "attention.share_interactions=false")
    assert verdicts == ["holds"] * 6


def test_fewer_targets_than_context_interactions_are_checked_too(capsys, config):
    verdicts, _ = verify(capsys, config, "sample.targets=2", "--samples", "8")
    assert verdicts == ["holds"] * 6


def test_shared_states_of_the_wrong_interaction_are_found_out(capsys, config, monkeypatch):
    right = backend._rows_of
    monkeypatch.setattr(backend, "_rows_of", lambda shared: right(shared).roll(1, dims=1))
    verdicts, _ = verify(capsys, config, "attention.policy=isolated", expect=1)
    assert verdicts[6:] == ["BROKEN"] * 2


@pytest.mark.parametrize("policy", ["windowed", "reset"])
def test_the_leak_is_measured_and_explained(capsys, config, policy):
    arguments = ["verify", str(config), f"attention.policy={policy}"]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    checks = json.loads(printed.out)
    measured = [check for check in checks if check["verdict"] == "measured"]
    assert len(measured) == 3
    assert all(check["largest"] > 1e-7 for check in measured)
    assert "see beyond n" in printed.err
    assert main(arguments) == 0
    assert "none promised  measured" in capsys.readouterr().out


def _one_interaction_too_far(layout, unit, window):
    return right_window_start(layout, unit, window + 1)


right_window_start = intervals._window_start


def test_one_interaction_too_many_in_the_window_is_found_out(capsys, config, monkeypatch):
    monkeypatch.setattr(intervals, "_window_start", _one_interaction_too_far)
    verdicts, _ = verify(capsys, config, expect=1)
    assert verdicts[1] == "BROKEN"


def test_a_readout_that_sees_its_own_label_is_found_out(capsys, config, monkeypatch):
    right = intervals.readout_intervals

    def sees_label(layout, window, prefix_visible):
        seen = right(layout, window, prefix_visible)
        end = seen.end.clone()
        samples = end.select(-3, 0)
        samples += (samples > 0).int()
        return intervals.VisibleIntervals(seen.start, end, seen.key_length)

    monkeypatch.setattr(scheme, "readout_intervals", sees_label)
    verdicts, _ = verify(capsys, config, expect=1)
    assert verdicts[0] == "BROKEN"


def test_samples_that_see_each_other_are_found_out(capsys, config, monkeypatch):
    right = intervals.body_intervals

    def sees_all(layout, window, prefix_visible):
        seen = right(layout, window, prefix_visible)
        return intervals.VisibleIntervals(torch.zeros_like(seen.start), seen.end, seen.key_length)

    monkeypatch.setattr(scheme, "body_intervals", sees_all)
    verdicts, _ = verify(capsys, config, expect=1)
    assert verdicts[2] == "BROKEN"


def test_verifying_leaves_no_run_behind(capsys, config, tmp_path):
    verify(capsys, config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["budget", "isolated", "windowed"])
def test_nothing_that_was_shown_at_once_reaches_a_target_and_a_fault_is_found_out(
    capsys, tmp_path, policy, monkeypatch
):
    data = prepare_impressions(tmp_path)
    config = write_config(
        tmp_path / "config.yaml", data, pack={"length": 4096}, attention={"policy": policy}
    )
    capsys.readouterr()
    arguments = ["verify", str(config), "--json", "--samples", "6"]
    assert main(arguments) == 0
    own = json.loads(capsys.readouterr().out)[0]
    assert "what was shown with it" in own["claim"]
    assert (own["verdict"], own["largest"]) == ("holds", 0)
    right = intervals._in_window

    def sees_what_lies_between(*about):
        ranges = right(*about)
        return [(ranges[0][0], ranges[-1][1])]

    monkeypatch.setattr(intervals, "_in_window", sees_what_lies_between)
    assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == "BROKEN"
