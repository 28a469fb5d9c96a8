"""Paths of a run, seen from another working folder, after a move, and where they are gone."""

import shutil
from pathlib import Path

import pytest
import yaml

from dti_dist.cli import main
from dti_dist.config import validate_config
from dti_dist.errors import UserError
from dti_dist.runs.folder import RunFolder, going_on
from dti_dist.runs.places import DATA, DEEPSPEED, INIT, MODEL, absolute
from tests.launching import job, run, write_config

KEYS = ("data.cache_dir", "checkpoints.copy_to", DATA, MODEL, DEEPSPEED, INIT)


def config(**paths):
    raw = {"run_dir": paths.pop("run_dir", "runs/a"), "data": {"path": "data"}}
    for key, value in paths.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return validate_config(raw)


def kept(folder: Path, settings) -> RunFolder:
    """A run's folder with these settings as its config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    found = RunFolder(folder)
    found.keep(settings)
    return found


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with data, a model and a DeepSpeed file."""
    folder = tmp_path / "project"
    for name in ("data", "base/model", "cache", "copies"):
        (folder / name).mkdir(parents=True)
    (folder / "ds.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


def relative_to(folder):
    return config(
        data__path="data",
        data__cache_dir="cache",
        model__name="base/model",
        checkpoints__copy_to="copies",
        training__deepspeed="ds.json",
        model__init_from="runs/b",
    )


def test_every_path_of_a_config_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/tests")
    names = {key.replace(".", "__"): f"~/{key}" for key in KEYS}
    flat = config(run_dir="~/run_dir", **names).flat()
    assert {key: flat[key] for key in ("run_dir", *KEYS)} == {
        key: f"/home/of/tests/{key}" for key in ("run_dir", *KEYS)
    }


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ({"data__path": "~nobody-here/x"}, r"data\.path: expected ~ or ~user with a user of this"),
        (
            {"run_dir": "s3://bucket/run"},
            r"run_dir: expected a local path, found 's3://bucket/run'",
        ),
        ({"training__deepspeed": "s3://b/x.json"}, r"training\.deepspeed: expected a local path"),
        ({"run_dir": ""}, r"run_dir: expected a name or a path, found ''"),
        ({"model__name": ""}, r"model\.name: expected a name or a path, found ''"),
    ],
)
def test_what_can_be_no_path_is_refused(paths, said):
    with pytest.raises(UserError, match=said):
        config(**paths)


def test_urls_and_names_stay_as_they_are():
    given = config(
        data__path="s3://bucket/~/data",
        checkpoints__copy_to="gs://bucket/copies",
        model__name="org/model",
        training__deepspeed="zero1",
    )
    before, after = given.flat(), absolute(given).flat()
    assert {key for key in before if before[key] != after[key]} == {"run_dir"}


def test_a_kept_config_has_absolute_paths_that_another_working_folder_finds(
    project, tmp_path, monkeypatch
):
    of_run = kept(project / "runs/a", absolute(relative_to(project)))
    monkeypatch.chdir(tmp_path)
    flat = of_run.read_config(DATA, MODEL, DEEPSPEED).flat()
    assert [flat[key] for key in KEYS] == [
        str(project / name)
        for name in ("cache", "copies", "data", "base/model", "ds.json", "runs/b")
    ]


@pytest.mark.parametrize("as_kept_by", ["this version", "an earlier one"])
def test_a_run_that_moved_with_its_data_finds_it(project, tmp_path, monkeypatch, as_kept_by):
    settings = relative_to(project)
    kept(project / "runs/a", absolute(settings) if as_kept_by == "this version" else settings)
    moved = tmp_path / "elsewhere" / "mounted"
    moved.parent.mkdir()
    shutil.move(project, moved)
    monkeypatch.chdir(tmp_path)
    flat = RunFolder(moved / "runs/a").read_config(DATA, MODEL).flat()
    assert flat[DATA] == str(moved / "data")
    assert flat[MODEL] == str(moved / "base/model")


def test_a_run_that_moved_alone_finds_its_data_where_it_was(project, tmp_path):
    kept(project / "runs/a", absolute(relative_to(project)))
    shutil.move(project / "runs/a", tmp_path / "b")
    (tmp_path / "data").mkdir()  # not the run's
    assert RunFolder(tmp_path / "b").read_config(DATA).data.path == str(project / "data")


def test_a_model_of_the_hub_is_no_folder_beside_a_run_of_an_earlier_version(project, monkeypatch):
    (project / "scratch").mkdir()
    (project / "zero1").touch()
    old = kept(project / "runs/a", config(training__deepspeed="zero1"))
    monkeypatch.chdir("/")
    flat = old.read_config(DATA).flat()
    assert (flat[MODEL], flat[DEEPSPEED]) == ("scratch", "zero1")
    assert flat[DATA] == str(project / "data")


@pytest.mark.parametrize("key", [DATA, MODEL, DEEPSPEED])
def test_what_is_gone_is_named_with_where_it_was_looked_for_and_what_to_do(project, tmp_path, key):
    of_run = kept(project / "runs/a", absolute(relative_to(project)))
    gone = Path(of_run.read_config().flat()[key])
    shutil.move(gone, tmp_path / "gone")
    of_run.read_config()  # nothing is needed
    with pytest.raises(UserError) as raised:
        of_run.read_config(DATA, MODEL, DEEPSPEED)
    said = str(raised.value)
    assert f"expected the run's {key} at {gone}, found nothing there" in said
    assert f"write where it is now as {key} into {of_run.config_file}" in said


def test_a_relative_path_that_an_earlier_version_kept_says_what_it_is_relative_to(
    project, tmp_path, monkeypatch
):
    of_run = kept(tmp_path / "renamed", config(run_dir=str(tmp_path / "x"), data__path="data"))
    assert of_run.read_config(DATA).data.path == "data"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"at data, relative to {tmp_path}, found nothing"):
        of_run.read_config(DATA)


def test_a_run_goes_on_where_a_folder_lies_elsewhere_and_not_with_another(project, monkeypatch):
    old, there = absolute(relative_to(project)), "/workspace"
    places = {"training__deepspeed": f"{there}/ds.json", "model__init_from": f"{there}/b"}
    moved = config(model__name=f"{there}/model", **places)
    going_on("there", old, moved, "run_dir")
    going_on("there", relative_to(project), old, "run_dir")  # as an earlier version kept it
    places["model__name"] = f"{there}/model"
    for key, other, said in (
        ("model__name", f"{there}/x", r"model\.name: .*base/model' there, '/workspace/x' now"),
        ("model__init_from", f"{there}/x", r"model\.init_from: .*b' there, '/workspace/x' now"),
        ("training__deepspeed", "zero1", r"training\.deepspeed: .*ds.json' there, 'zero1' now"),
    ):
        new = config(**{**places, key: other})
        with pytest.raises(UserError, match=said):
            going_on("there", old, new, "run_dir")


@pytest.mark.slow
def test_a_run_with_relative_paths_is_evaluated_exported_and_goes_on_from_anywhere(
    synthetic, tmp_path, monkeypatch, capsys
):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    shutil.copytree(synthetic, project / "data", ignore=shutil.ignore_patterns("cache"))
    elsewhere.mkdir()
    settings = write_config(
        project / "config.yaml", "data", run_dir="runs/a", training={"max_steps": 2}
    )
    monkeypatch.chdir(project)
    run(job(1, "config.yaml"), tmp_path / "log")
    monkeypatch.chdir(elsewhere)
    few = ["--max-targets", "50", "--bootstrap", "0", "--no-pictures"]
    assert main(["evaluate", str(project / "runs/a"), *few]) == 0
    assert main(["report", str(project / "runs/a")]) == 0
    here = ["run_dir=../project/runs/a", "data.path=../project/data"]
    assert "resuming from step-00000002" in run(job(1, settings, *here), tmp_path / "again")
    shutil.move(project, tmp_path / "moved")
    moved = tmp_path / "moved/runs/a"
    assert main(["evaluate", str(moved), *few]) == 0
    assert main(["export", str(moved), "--out", "model"]) == 0
    shutil.rmtree(tmp_path / "moved/data")
    capsys.readouterr()
    assert main(["evaluate", str(moved), *few]) == 2
    assert f"data.path at {project / 'data'}, found nothing there nor at" in capsys.readouterr().err
    assert yaml.safe_load((moved / "config.yaml").read_text())["run_dir"] == str(project / "runs/a")
