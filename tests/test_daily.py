"""`dti-dist daily`: days whose tastes change, kills at every stage, and what it refuses."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist import daily
from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data.dataset import Dataset
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint
from tests.launching import SECONDS, job, run, start, train, wait_until, write_config
from tests.trained import opened

KINDS = ["boots", "lamps", "books", "games", "tents", "chairs"]
DAY, FIRST_DAY = 86_400, 1_714_521_600  # 2024-05-01
HISTORY, DAYS = 4, 5
ITEMS, USERS, EACH = 36, 80, 6
TURN = 30  # degrees a day that tastes turn: after six days what was liked is disliked
COLUMNS = [
    *("--user-col", "user", "--item-col", "item", "--time-col", "time", "--label", "clicked"),
    *("--text-cols", "title"),
]


def date_of(day):
    return f"2024-05-{day + 1:02}"


def write_day(folder, *days):
    """Interactions of these days with items of six kinds; those of the last day's own are new."""
    rows = []
    for day in days:
        rng = np.random.default_rng(day)
        for user in range(USERS + day):  # one is new each day
            for second in np.sort(rng.choice(DAY, EACH, replace=False)):
                item = int(rng.integers(ITEMS + day))
                angle = math.radians(360 / len(KINDS) * (item % len(KINDS)) - TURN * day)
                likes = 1 / (1 + math.exp(-3 * math.cos(angle)))
                at = FIRST_DAY + day * DAY + int(second)
                rows.append((f"u{user}", f"i{item}", at, bool(rng.random() < likes)))
    folder.mkdir(parents=True)
    names = ["user", "item", "time", "clicked"]
    table = pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))
    pq.write_table(table, folder / "events.parquet")
    first = 0 if days[0] == 0 else ITEMS + days[0] - 1
    items = range(first, ITEMS + days[-1])
    titles = [f"{KINDS[item % len(KINDS)]} {item}" for item in items]
    pq.write_table(pa.table({"item": [f"i{i}" for i in items], "title": titles}),
                   folder / "items.parquet")  # fmt: skip


@pytest.fixture(scope="session")
def template(made_once):
    """Days on disk, a data set of the first four, and a run that is trained on the first two."""

    def make(folder: Path) -> None:
        write_day(folder / "history", *range(HISTORY))
        for day in range(HISTORY, HISTORY + DAYS):
            write_day(folder / date_of(day), day)
        history = [str(folder / f"history/{name}.parquet") for name in ("events", "items")]
        prepare = ["prepare", "events", history[0], "--items", history[1], *COLUMNS]
        prepare += ["--split-times", f"{date_of(2)},{date_of(3)}", "--out", str(folder / "data")]
        assert main(prepare) == 0
        config = write_config(
            folder / "config.yaml",
            folder / "data",
            run_dir=str(folder / "base"),
            sample={"context": 3, "targets": 6},
            training={
                "epochs": 3,
                "max_steps": None,
                "global_batch_packs": 2,
                "learning_rate": 0.01,
            },
            checkpoints={"every_steps": 2},
        )
        train(config)

    return made_once("daily", make)


@pytest.fixture
def world(template, tmp_path):
    """A copy of it, whose run knows where its data are."""
    copy = tmp_path / "world"
    shutil.copytree(template, copy)
    for config in (copy / "config.yaml", copy / "base/config.yaml"):
        config.write_text(config.read_text().replace(str(template), str(copy)))
    return copy


def words(world, day, *overrides):
    """The command of a day."""
    name = date_of(day)
    files = [str(world / name / f"{what}.parquet") for what in ("events", "items")]
    return [
        *("daily", str(world / "config.yaml"), f"run_dir={world / 'days'}"),
        *(f"model.init_from={world / 'base'}", *overrides),
        *("--day", name, "--events", files[0], "--items", files[1], *COLUMNS),
    ]


def table(world):
    with (world / "days/days.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def here(monkeypatch):
    """Stages run in this process; gives their commands."""
    ran = []

    def in_process(launch, arguments):
        ran.append(arguments)
        return main(arguments)

    monkeypatch.setattr(daily, "start", in_process)
    return ran


@pytest.mark.slow
def test_models_updated_by_day_follow_tastes_that_one_of_the_first_days_does_not(
    world, here, capsys
):
    stale = []
    for day in range(HISTORY, HISTORY + DAYS):
        assert main(words(world, day)) == 0
        printed = capsys.readouterr().out
        folder = world / "stale" / date_of(day)
        quick = ["--no-valid-threshold", "--no-pictures", "--bootstrap", "0", "--out", str(folder)]
        assert main(["evaluate", str(world / "base"), *quick]) == 0
        stale.append(json.loads((folder / "test.json").read_text()))
        assert not (world / "base/eval").exists()
    rows = table(world)
    assert [row["day"] for row in rows] == [date_of(HISTORY + n) for n in range(DAYS)]
    assert [row["began_with"] for row in rows] == ["base", *(row["day"] for row in rows[:-1])]
    assert [(row["new_users"], row["new_items"]) for row in rows] == [("1", "1")] * DAYS
    for row, figures in zip(rows, stale, strict=True):
        assert int(row["targets"]) == figures["targets"]
        assert all(row[f"{name}_{when}"] for name in daily.METRICS for when in ("before", "after"))
        assert float(row["auc_after"]) > float(row["auc_before"])
        assert float(row["log_loss_after"]) < float(row["log_loss_before"])
    # On the first day they are one model.
    assert float(rows[0]["auc_before"]) == pytest.approx(stale[0]["auc"], abs=1e-6)
    updated = [float(row["auc_before"]) for row in rows]
    for auc, figures in zip(updated[1:], stale[1:], strict=True):
        assert auc > figures["auc"] + 0.1
    print("AUC, updated and not:", [(a, round(f["auc"], 3)) for a, f in zip(updated, stale)])  # noqa: B905
    assert all(name in printed for name in ("auc before", rows[-1]["day"], f"{updated[-1]:.4f}"))
    # Each day is trained on alone, with the first tokenizer.
    tokenizer = (world / "base/tokenizer/tokenizer.json").read_bytes()
    appends = Dataset.open(str(world / "data")).manifest.appends
    for row, record in zip(rows, appends, strict=True):
        of_day = RunFolder(world / "days" / row["day"])
        assert record.day == row["day"]
        assert (of_day.tokenizer / "tokenizer.json").read_bytes() == tokenizer
        (steps,) = {line["started"]["total_steps"] for line in lines(of_day) if "started" in line}
        targets = sum(line["targets"] for line in lines(of_day) if "loss" in line)
        assert targets == 3 * int(row["targets"])
        assert choose_checkpoint(of_day).step <= steps


def lines(folder):
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


# A day that is killed at a moment, by its stages: `end` is before a stage's end is written down.
KILLED = """
import os, signal, sys
from dti_dist import cli, daily
from dti_dist.data.prepare import append
from dti_dist.training import loop

moment = sys.argv.pop(1)

def pass_by(here):
    if here == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def around(owner, name, before=None, after=None):
    original = getattr(owner, name)
    def patched(*args, **options):
        before and pass_by(before(*args))
        found = original(*args, **options)
        after and pass_by(after(*args))
        return found
    setattr(owner, name, patched)

def in_process(launch, words):
    name = "train" if words[0] == "train" else words[words.index("--out") + 1].split("/")[-1]
    print("STAGE", name, flush=True)
    code = cli.main(words)
    pass_by(f"end of {name}")
    return code

daily.start = in_process
around(append, "write_manifest", before=lambda *_: "append")
around(append, "append_to_dataset", after=lambda *_: "end of append")
around(loop, "take_step", before=lambda *args: f"step {args[2]}")
of_file = lambda path, *_: path.name
around(daily, "write_atomically", before=lambda path, *_: f"before {path.name}",
       after=lambda path, *_: f"after {path.name}")
cli.run(sys.argv[1:])
"""
MOMENTS = [  # and the stages that begin until then
    ("before day.json", []),
    ("append", []),
    ("end of append", []),
    ("end of before", ["before"]),
    ("step 5", ["before", "train"]),
    ("end of train", ["train"]),
    ("end of after", ["train", "after"]),
    ("before days.csv", ["after"]),
    ("after days.csv", []),
    ("none", []),
]


@pytest.mark.slow
def test_a_day_that_is_killed_at_every_stage_ends_with_the_same_table(
    world, template, tmp_path, monkeypatch
):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    for number, (moment, stages) in enumerate(MOMENTS):
        log = tmp_path / f"{number}.log"
        code = 0 if moment == "none" else -signal.SIGKILL
        printed = run(job(1, moment, *words(world, HISTORY), script=script), log, code)
        assert [w.split()[1] for w in printed.splitlines() if w.startswith("STAGE")] == stages
        if moment == "end of train":
            assert "resuming from step-00000004" in printed
    (record,) = Dataset.open(str(world / "data")).manifest.appends
    assert record.day == date_of(HISTORY)
    assert date_of(HISTORY) in printed  # the table is printed again
    (row,) = table(world)

    whole = tmp_path / "whole"
    shutil.copytree(template, whole)
    for config in (whole / "config.yaml", whole / "base/config.yaml"):
        config.write_text(config.read_text().replace(str(template), str(whole)))
    run(job(1, "none", *words(whole, HISTORY), script=script), tmp_path / "whole.log")
    assert table(whole) == [row]


@pytest.mark.slow
def test_a_day_goes_on_with_two_ranks_that_a_launcher_starts(world, monkeypatch):
    def only_evaluates(launch, arguments):
        return main(arguments) if arguments[0] == "evaluate" else 1

    monkeypatch.setattr(daily, "start", only_evaluates)
    assert main(words(world, HISTORY)) == 1
    launch = f"{sys.executable} -m dti_dist.launcher --standalone --nproc-per-node 2 --"
    command = [sys.executable, "-m", "dti_dist", *words(world, HISTORY), "--launch", launch]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = table(world)
    assert done.stdout.splitlines()[1].split()[:2] == [row["day"], "base"]
    assert "2 rank(s) on cpu, DeepSpeed ZeRO stage 3" in done.stderr
    assert choose_checkpoint(RunFolder(world / "days" / row["day"])).world == 2


@pytest.mark.slow
def test_each_day_adds_vectors_for_its_new_items(world, here):
    base = world / "with_vectors"
    train(world / "config.yaml", f"run_dir={base}", "model.item_embeddings=4")
    overrides = (f"model.init_from={base}", "model.item_embeddings=4")
    runs = [base]
    for day in (HISTORY, HISTORY + 1):
        assert main(words(world, day, *overrides)) == 0
        runs.append(world / "days" / date_of(day))
    known = [np.load(run / "tokenizer/items.npy") for run in runs]
    assert [len(hashes) for hashes in known] == [
        ITEMS + HISTORY - 1,
        ITEMS + HISTORY,
        ITEMS + HISTORY + 1,
    ]
    for before, after in itertools.pairwise(known):
        assert np.array_equal(after[: len(before)], before)
    last = opened(runs[-1])[1].items.vectors
    assert len(last) == len(known[-1])
    assert last[-1].any(), "the day's own item was trained on"


def refused(capsys, command):
    assert main(command) == 2
    return capsys.readouterr().err


@pytest.fixture
def small(tmp_path):
    """A data set and a run with a checkpoint, without training."""
    for day in (HISTORY, HISTORY + 1):
        write_day(tmp_path / date_of(day), day)
    write_day(tmp_path / "history", *range(HISTORY))
    history = [str(tmp_path / f"history/{name}.parquet") for name in ("events", "items")]
    prepare = ["prepare", "events", history[0], "--items", history[1], *COLUMNS]
    assert main([*prepare, "--out", str(tmp_path / "data")]) == 0
    config = write_config(tmp_path / "config.yaml", tmp_path / "data")
    base = RunFolder(tmp_path / "base")
    (base.checkpoints / "step-00000001").mkdir(parents=True)
    commit = {"step": 1, "world": 1, "state": {}, "files": {}}
    (base.checkpoints / "step-00000001/commit.json").write_text(json.dumps(commit))
    shutil.copy(config, base.config_file)
    return tmp_path


@pytest.fixture
def faked(monkeypatch, small):
    """Stages that only write the figures of an evaluation; or fail, with the codes given."""
    ran, codes = [], []

    def fake(launch, arguments):
        ran.append(arguments)
        code = codes.pop(0) if codes else 0
        if arguments[0] == "evaluate":
            out = Path(arguments[arguments.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            figures = dict.fromkeys(daily.METRICS, 0.5) | {"auc": None}
            figures |= {"checkpoint": "step-1", "targets": 1000, "label_rate": 0.1}
            (out / "test.json").write_text(json.dumps(figures))
        elif code == 0:
            trained = load_config(arguments[1], arguments[2:]).run_dir
            shutil.copytree(small / "base", trained, dirs_exist_ok=True)
        return code

    monkeypatch.setattr(daily, "start", fake)
    return ran, codes


def test_a_stage_that_fails_is_done_again_with_what_follows(small, faked, capsys):
    ran, codes = faked
    codes += [0, 75]
    assert main(words(small, HISTORY)) == 75
    assert [arguments[0] for arguments in ran] == ["evaluate", "train"]
    assert not (small / "days/days.csv").exists()
    said = refused(capsys, words(small, HISTORY + 1))
    assert f"expected {date_of(HISTORY)} to be done, found it begun in" in said
    assert main(words(small, HISTORY)) == 0
    assert [arguments[0] for arguments in ran[2:]] == ["train", "evaluate"]
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:4] == [date_of(HISTORY), "base", "1,000", "0.1000"]
    assert "–" in printed  # all labels were equal
    assert main(words(small, HISTORY)) == 0
    assert len(ran) == 4
    assert main(words(small, HISTORY + 1)) == 0
    assert [Path(row["began_with"]).name for row in table(small)] == ["base", date_of(HISTORY)]


def test_what_each_stage_is_told(small, faked):
    ran, _ = faked
    settings = ["model.init_checkpoint=last", "evaluation.max_targets=500", "seed=1"]
    for day in (HISTORY, HISTORY + 1):
        assert main(words(small, day, *settings)) == 0
    before, train, after = ran[3:]
    own = small / "days" / date_of(HISTORY + 1)
    yesterday = small / "days" / date_of(HISTORY)
    assert before[1] == str(yesterday)
    assert after[1] == str(own)
    assert before[2:] == [
        *("--split", "test", "--prompt", "sliding_window", "--out", str(own / "eval/before")),
        *("--no-valid-threshold", "--no-pictures", "--no-floor"),
        *("--max-targets", "500", "--checkpoint", "last"),
    ]
    config = load_config(train[1], train[2:])
    assert config.run_dir == str(own)
    assert config.model.init_from == str(yesterday)
    assert config.data.train_on == "test"
    assert config.seed == 1


def test_several_chains_share_a_data_set_and_none_appends_a_day_twice(small, faked, capsys):
    ran, _ = faked
    assert main(words(small, HISTORY)) == 0
    other = [f"run_dir={small / 'others'}"]
    command = words(small, HISTORY)
    assert main([*command[:3], *other, *command[3:]]) == 0
    assert len(Dataset.open(str(small / "data")).manifest.appends) == 1
    assert len(ran) == 6
    assert main(words(small, HISTORY + 1)) == 0
    third = [f"run_dir={small / 'third'}"]
    said = refused(capsys, [*command[:3], *third, *command[3:]])
    assert "expected it to be what was last appended to the data set, found 2024-05-06" in said
    assert len(Dataset.open(str(small / "data")).manifest.appends) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: without(w, "model.init_from"), "expected model.init_from to be a run with a"),
        (lambda w: [*w, "model.init_from=nowhere"], "found"),
        (lambda w: [*w, "data.path=elsewhere"], "expected a run on the data set that the day is"),
        (lambda w: replaced(w, "--day", "5.5.2024"), "expected a date such as 2024-05-03; found"),
        (lambda w: replaced(w, "--day", "20240505"), "expected a date such as 2024-05-03; found"),
        (lambda w: replaced(w, "--label", "clicks"), "--label"),
    ],
)
def test_what_can_not_be_a_day_is_refused(small, faked, capsys, change, expected):
    ran, _ = faked
    before = (small / "data/dataset.json").read_bytes()
    assert expected in refused(capsys, change(words(small, HISTORY)))
    assert ran == []
    assert (small / "data/dataset.json").read_bytes() == before


def without(command, key):
    return [word for word in command if not word.startswith(f"{key}=")]


def replaced(command, option, value):
    at = command.index(option) + 1
    return [*command[:at], value, *command[at + 1 :]]


def test_a_day_before_the_last_and_a_second_command_are_refused(small, faked, capsys, monkeypatch):
    assert main(words(small, HISTORY)) == 0
    said = refused(capsys, replaced(words(small, HISTORY), "--day", "2024-05-01"))
    assert f"expected a day after {date_of(HISTORY)}, the last one in" in said
    with daily._alone(small / "days"):
        assert "Another dti-dist daily works in" in refused(capsys, words(small, HISTORY + 1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "expected one process, found 2" in refused(capsys, words(small, HISTORY + 1))


def test_interactions_of_other_dates_are_said_and_a_data_set_split_otherwise_is_refused(
    small, faked, capsys
):
    command = replaced(words(small, HISTORY), "--day", "2024-05-20")
    assert main(command) == 0
    assert "the interactions of 2024-05-20 are from 2024-05-05 00:" in capsys.readouterr().err
    manifest = json.loads((small / "data/dataset.json").read_text())
    manifest["split"]["rule"] = "leave-last"
    (small / "data/dataset.json").write_text(json.dumps(manifest))
    shutil.rmtree(small / "days")
    assert "found one split by leave-last" in refused(capsys, words(small, HISTORY + 1))


CHILD = """
import os, signal, sys, time
code, marker, parent = int(sys.argv[1]), sys.argv[2], os.getppid()
def stopped(number, frame):
    open(marker, "w").write(str(number))
    open(os.environ["DTI_DIST_STATUS_FILE"], "w").write(str(code))  # as dti-dist does
    sys.exit(code)
signal.signal(signal.SIGTERM, stopped)
signal.signal(signal.SIGUSR1, stopped)
open(marker + ".started", "w")
exec(sys.argv[3])
time.sleep(600)
"""


def test_a_stage_gives_its_exit_code_and_gets_the_signals_of_the_command(tmp_path):
    marker = str(tmp_path / "marker")
    child = [sys.executable, "-c", CHILD]
    assert daily.start(child, ["0", marker, "sys.exit(0)"]) == 0
    assert daily.start(child, ["0", marker, "sys.exit(2)"]) == 2
    signalled = "os.kill(parent, signal.SIGUSR1)"
    before = signal.getsignal(signal.SIGUSR1)
    assert daily.start(child, ["75", marker, signalled]) == 75
    assert Path(marker).read_text() == str(int(signal.SIGUSR1))
    assert daily.start(child, ["0", marker, signalled]) == 75  # no other stage follows
    assert daily.start(child, ["1", marker, signalled]) == 1
    by_default = f"signal.signal(signal.SIGUSR1, signal.SIG_DFL); {signalled}"
    assert daily.start(child, ["0", marker, by_default]) == 75
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_a_stage_is_stopped_when_the_command_is_killed(tmp_path):
    marker = tmp_path / "marker"
    code = "import sys; from dti_dist import daily; daily.start(sys.argv[1:], [])"
    command = [sys.executable, "-c", code, sys.executable, "-c", CHILD, "75", str(marker), "pass"]
    process = start(command, tmp_path / "log")
    wait_until(process, Path(f"{marker}.started").exists, "its start")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + SECONDS
    while not (marker.exists() and marker.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert marker.read_text() == str(int(signal.SIGTERM))
