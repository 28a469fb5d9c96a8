"""benchmarks/gpu.sh, whose parts run here with tiny shapes on the CPU."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["inputs", "attention", "verify", "resume", "scorer", "steps"]
PARTS += ["paradigm", "backends", "run"]


def rehearse(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "benchmarks/gpu.sh"), str(out), "--cpu", *arguments]
    environ = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    ended = rehearse(tmp_path)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    assert {name: entry["verdict"] for name, entry in found.items()} == dict.fromkeys(PARTS, "done")
    assert ended.returncode == 0, ended.stderr
    table = (tmp_path / "table.md").read_text()
    for name, entry in found.items():
        assert f"| {name} | done | {entry['seconds']:.0f} |" in table
    assert "figures mean nothing" in table
    # The oracle is one: it compared logits and gradients that are not all equal.
    (logits, gradients), *_ = (
        case["error of logits, gradients"]
        for name, case in found["attention"]["found"].items()
        if "bf16" in name
    )
    assert 0 < logits < 0.1
    assert 0 < gradients < 0.1
    assert 3 <= found["resume"]["found"]["killed after step"] < 6


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_rest(tmp_path):
    ended = rehearse(tmp_path, "--only", "verify", "inputs")
    verdicts = [
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("verify", "inputs")
    ]
    assert [entry["verdict"] for entry in verdicts] == ["failed", "done"]  # it came before its data
    assert "error" in verdicts[0]["found"]
    assert ended.returncode == 1

    rehearse(tmp_path, "--limit", "1", "--only", "attention", "inputs")
    verdicts = [
        json.loads((tmp_path / f"{name}.json").read_text())["verdict"]
        for name in ("attention", "inputs")
    ]
    assert verdicts == ["stopped at its limit of 1 s"] * 2


def test_limits_and_parts_of_the_gpu_benchmark():
    gpu = runpy.run_path(str(ROOT / "benchmarks/gpu.py"))
    assert list(gpu["PARTS"]) == PARTS
    assert gpu["WITHIN_S"] <= 9 * 60
