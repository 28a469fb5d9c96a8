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

COMMANDS = (
    "prepare train evaluate compare score export daily report verify inspect plan doctor benchmark"
)
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
        ("report s3://bucket/run", "expected a local path, found 's3://bucket/run'"),
        ("benchmark quality collm-ml1m --out x --seeds 1,-2", "found '1,-2'"),
        ("export runs/x --out ~nobody-here/x", "found '~nobody-here/x'. Give the whole path"),
        ("export runs/x --out=", "expected a name or a path, found ''"),
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


PATHS = [
    "train ~/a",
    "evaluate ~/a --predictions ~/b --out ~/c",
    "compare ~/a ~/b",
    "score ~/a --requests ~/b --out ~/c --data ~/d --items ~/e ~/f",
    "export ~/a --out ~/b",
    "daily ~/a --day 2024-05-03 --events ~/b ~/c --items ~/d --user-col u --item-col i "
    "--time-col t --label l --text-cols x --temp-directory ~/e",
    "report ~/a ~/b --out ~/c",
    "verify ~/a",
    "inspect ~/a --out ~/b",
    "plan ~/a --gpus 1",
    "doctor ~/a",
    "benchmark paradigm ~/a --out ~/b",
    "benchmark data ~/a --also ~/b --also ~/c --peers ~/d --out ~/e",
    "benchmark scale ~/a",
    "benchmark scoring ~/a",
    "benchmark ablation ~/a --work ~/b",
    "benchmark quality collm-ml1m --ml1m ~/a --config ~/b --out ~/c",
    "benchmark evaluation --work ~/a",
    "prepare movielens ~/a --cache-dir ~/b --out ~/c --temp-directory ~/d",
    "prepare mind ~/a --valid ~/b --out ~/c",
    "prepare mind --train ~/a --test ~/b --out ~/c",
    "prepare synthetic --out ~/a",
    "prepare events ~/a ~/b --items ~/c ~/d --user-col u --item-col i --time-col t --label l "
    "--text-cols x --out ~/e --temp-directory ~/f",
]


@pytest.mark.parametrize("line", PATHS)
def test_every_path_on_a_command_line_may_begin_with_the_home_folder(line, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/tests")
    _, taken, _ = cli.app.parse_args(line.split(), exit_on_error=False, print_error=False)
    found = repr((taken.args, taken.kwargs))
    assert "~" not in found
    assert found.count("'/home/of/tests/") == line.count("~/")


def test_every_command_is_among_those_with_paths():
    """A new one is added there, or here where it takes no path."""
    pages = [f"{a} {b}" for a in ("prepare", "benchmark") for b in cli.app[a] if b[0] != "-"]
    pages += [a for a in cli.app if a[0] != "-" and a not in ("prepare", "benchmark")]
    missing = [page for page in pages if not any(line.startswith(f"{page} ") for line in PATHS)]
    assert set(missing) == {"benchmark attention", "benchmark step"}


def test_a_url_on_a_command_line_stays_as_it_is():
    line = "export runs/x --out s3://bucket/~/x"
    _, taken, _ = cli.app.parse_args(line.split(), exit_on_error=False, print_error=False)
    assert taken.kwargs["out"] == "s3://bucket/~/x"


@pytest.mark.parametrize("option", ["text-cols", "event-cols", "user-text-cols", "columns"])
def test_a_list_that_is_given_twice_is_one(option):
    line = (
        "prepare events x --items y --user-col u --item-col i --time-col t --label l --out o "
        f"--text-cols t1 --{option} a,b --{option} b,c"
    )
    _, taken, _ = cli.app.parse_args(line.split(), exit_on_error=False, print_error=False)
    found = repr((taken.args, taken.kwargs))
    first = "'t1', " if option == "text-cols" else ""
    assert f"({first}'a', 'b', 'c')" in found


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
