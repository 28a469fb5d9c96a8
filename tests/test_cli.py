"""The command line itself: its help, its refusals and its exit codes."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys

import pytest

from dti_dist import cli
from dti_dist.cli import check, main

COMMANDS = "prepare train evaluate compare score export report verify inspect plan doctor benchmark"
PAGES = [
    [],
    *([name] for name in COMMANDS.split()),
    *(["benchmark", name] for name in ("paradigm", "attention", "data", "scoring")),
    *(["prepare", name] for name in ("movielens", "events", "synthetic")),
]


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_help_is_plain_and_80_columns_wide(command, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main([*command, "--help"]) == 0
    page = capsys.readouterr().out
    assert "\x1b" not in page
    assert "None" not in page
    assert max(map(len, page.splitlines())) <= 80
    if command:
        assert "example:" in page


def test_help_lists_the_commands_in_the_order_of_the_work(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+): ", capsys.readouterr().out, re.M)
    assert listed == COMMANDS.split()


@pytest.mark.parametrize("command", [["--help"], ["evaluate", "--help"]], ids=" ".join)
def test_help_takes_little_cpu_time(command):
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "dti_dist", *command], check=True, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.7


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "expected a command, found none. Choose from: prepare, "),
        ("benchmark", "expected a command, found none. Choose from: paradigm, "),
        ("evalute runs/x", 'Did you mean "evaluate"?'),
        ("evaluate runs/x --splits test", "Did you mean --split?"),
        ("evaluate runs/x --split tset", 'Did you mean "test"?'),
        ("evaluate runs/x extra", "extra"),
        ("verify c.yaml --samples 0", "--samples"),
        ("verify c.yaml seed", "expected key=value, such as seed=1; found 'seed'"),
        ("plan c.yaml", "--gpus"),
        ("plan c.yaml --gpus 1 --mfu 2", "--mfu"),
        ("plan c.yaml --gpus 1 --price inf", "--price"),
        ("prepare synthetic --out x --fractions 0.8,a", "found '0.8,a'"),
        ("report", "RUNS"),
    ],
)
def test_refused_command_lines_say_why(line, said, capsys):
    assert main(line.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "train c.yaml",
        "train c.yaml seed=1 training.epochs=2",
        "verify c.yaml seed=1 --samples 3 data.path=x --json model.head=linear",
        "benchmark paradigm c.yaml --policies windowed budget --grid-n 10 20 --grid-k 5",
        "benchmark data c.yaml --workers 0 1 2 --also a --also b",
        "evaluate runs/x --slice day --slice activity --no-valid-threshold --no-pictures",
        "evaluate runs/x --pictures --split valid --split test",
        "score m --requests r --out o --items a b --force",
        "report a b c --out x.html",
        "doctor",
        "doctor c.yaml seed=1 --json",
    ],
)
def test_accepted_command_lines(line):
    assert check(line.split()) is None


def test_overrides_stand_before_between_and_after_options(monkeypatch):
    seen = []

    def stop(path, overrides):
        seen.append((path, list(overrides)))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_config", stop)
    assert main(["verify", "c.yaml", "a=1", "--samples", "3", "b=2", "--json", "c=3"]) == 1
    assert seen == [("c.yaml", ["a=1", "b=2", "c=3"])]


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dti-dist ")


def test_the_status_file_has_the_exit_code(tmp_path):
    status = tmp_path / "status"
    environ = {**os.environ, "DTI_DIST_STATUS_FILE": str(status)}
    code = subprocess.run([sys.executable, "-m", "dti_dist", "evalute"], env=environ).returncode
    assert code == 2
    assert status.read_text() == "2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["status"]
