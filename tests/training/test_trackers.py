"""TensorBoard, Weights & Biases and MLflow, each really run: offline, or in a local folder."""

import json
import math

import pytest

from dti_dist.config import load_config
from dti_dist.errors import UserError
from dti_dist.training import trackers
from dti_dist.training.trackers import Trackers, check_packages
from tests.launching import metrics, run_dir, train, write_config

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
pytest.importorskip("mlflow")
ALL = ["tensorboard", "wandb", "mlflow"]


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Servers of none but this folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def in_tensorboard(folder):
    """(name, step) → value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }


def wandb_records(content):
    """The records of a .wandb file: LevelDB's log format, behind a header of 7 bytes."""
    place, parts = 7, []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little room in a block for another head
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or a last part
            yield b"".join(parts)
            parts = []


def in_wandb(folder):
    """What the files of offline runs hold: (name, step) → value, of two the later one."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in wandb_records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") != "history":
                continue
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = row.pop("optimizer_step")
            found.update({(k, step): v for k, v in row.items() if not k.startswith("_")})
    return found


def in_mlflow(project="dti-dist"):
    """The runs of the experiment: [(run, {(name, step): value})]."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(project)
    return [
        (
            run,
            {
                (name, metric.step): metric.value
                for name in run.data.metrics
                for metric in client.get_metric_history(run.info.run_id, name)
            },
        )
        for run in client.search_runs([experiment.experiment_id])
    ]


def test_a_run_is_in_all_three_as_it_is_in_metrics_jsonl(local, synthetic):
    config = write_config(
        local / "config.yaml", synthetic, training={"max_steps": 6}, tracking={"to": ALL}
    )
    train(config)
    folder = run_dir(config)
    lines = metrics(folder)
    expected = {("train/loss", line["step"]): line["loss"] for line in lines if "loss" in line}
    expected |= {
        (f"valid/{name}", line["step"]): line["valid"][name]
        for line in lines
        for name in ("auc", "log_loss")
        if "valid" in line
    }
    assert len(expected) > 6
    ((run, mlflow_values),) = in_mlflow()
    for found in (in_tensorboard(folder), in_wandb(folder), mlflow_values):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-6), key
        assert found["checkpoint/bytes", 6] > 1000
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["sample.context"] == "5"


def started(local, synthetic, step, to=ALL):
    config = load_config(write_config(local / "config.yaml", synthetic, tracking={"to": to}))
    folder = local / "run"
    folder.mkdir(exist_ok=True)
    return Trackers(config, folder, step), folder


def test_a_resumed_run_is_the_same_run_and_steps_taken_again_count_anew(local, synthetic):
    first, folder = started(local, synthetic, 0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step), "module": "no number", "odd": math.nan})
    first.close()
    second, _ = started(local, synthetic, 2)
    for step in (3, 4):
        second.write({"step": step, "loss": 10.0 * step})
    second.close()
    expected = {("train/loss", step): loss for step, loss in ((1, 1), (2, 2), (3, 30), (4, 40))}
    assert in_tensorboard(folder) == expected
    assert in_wandb(folder) == expected
    ((_, mlflow_values),) = in_mlflow()
    assert mlflow_values == expected


def test_mlflow_gets_one_request_per_step_however_many_figures_it_has(
    local, synthetic, monkeypatch
):
    from mlflow.store.tracking.file_store import FileStore

    calls = []
    monkeypatch.setattr(
        FileStore,
        "log_batch",
        lambda self, run_id, metrics, **others: calls.append([m.key for m in metrics]),
    )
    monkeypatch.setattr(FileStore, "log_metric", lambda self, run_id, metric: calls.append(metric))
    found, _ = started(local, synthetic, 0, ["mlflow"])
    for step in (1, 2):
        found.write({"step": step, "loss": 0.5, "rate": 0.1, "valid": {"auc": 0.6}})
    found.close()
    assert calls == [["train/loss", "train/rate", "valid/auc"]] * 2


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(
    local, synthetic, monkeypatch, capsys
):
    def unreachable(*arguments):
        raise ConnectionError("no route to tracker.example")

    def fails_later(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", unreachable)
    monkeypatch.setattr(trackers.WeightsAndBiases, "write", fails_later)
    found, folder = started(local, synthetic, 0)
    for step in (1, 2):
        found.write({"step": step, "loss": 0.5})
    found.close()
    said = capsys.readouterr().err
    assert said.count("mlflow failed and gets no more figures: no route to tracker.example") == 1
    assert said.count("wandb failed and gets no more figures: the disk is full") == 1
    assert in_tensorboard(folder) == {("train/loss", 1): 0.5, ("train/loss", 2): 0.5}


def test_a_server_that_hangs_holds_up_neither_a_step_nor_the_end(
    local, synthetic, monkeypatch, capsys
):
    from threading import Event

    hangs = Event()

    def hang(*arguments):
        hangs.wait()
        raise ConnectionError

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", hang)
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.2)
    found, _ = started(local, synthetic, 0, ["mlflow"])
    for step in range(100):
        found.write({"step": step, "loss": 0.5})
    found.close()
    hangs.set()
    assert "not all figures were sent within 0 s" in capsys.readouterr().err


def test_a_missing_package_is_refused_before_any_work(local, synthetic, monkeypatch):
    config = load_config(write_config(local / "config.yaml", synthetic, tracking={"to": ALL}))
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(UserError, match=r"tracking.to names mlflow.*pip install mlflow-skinny"):
        check_packages(config.tracking)
