"""Training that reads from a real S3 server and copies its checkpoints there."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml

from dti_dist.data import storage
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from tests.launching import (
    SECONDS,
    job,
    kill,
    losses,
    run,
    start,
    train,
    wait_for_step,
    wait_until,
    write_config,
)
from tests.s3_server import KEY, SECRET, s3_server

pytestmark = pytest.mark.slow
CLOSE = 1e-4


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as server:
        read_users = partial(read_synthetic, users=60, items=48, interactions_per_user=40)
        options = BuildOptions(shard_interactions=500, row_group_interactions=150)
        build_dataset(read_users, server.uri("shop"), options)
        yield server


@pytest.fixture
def server(running):
    with running.up():
        yield running


@pytest.fixture
def on_disk(server, tmp_path):
    """The data set of the server, on disk."""
    for name in storage.list_files(server.uri("shop")):
        storage.write_atomic(
            str(tmp_path / "disk" / name), storage.read_bytes(server.uri(f"shop/{name}"))
        )
    return tmp_path / "disk"


def config_of(folder: Path, path: Path | str, limits: dict | None = None, prefetch=1, **sections):
    config = write_config(folder / "config.yaml", path, **sections)
    settings = yaml.safe_load(config.read_text())
    settings["data"] = {
        "path": str(path),
        "prefetch": prefetch,
        "shuffle_interactions": 300,  # so that row groups are read all along
        "cache_dir": str(folder / "cache"),
        "storage": {"timeout_s": 5, "greatest_wait_s": 1, **(limits or {})},
    }
    config.write_text(yaml.safe_dump(settings))
    return config


def run_dir(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def test_a_run_whose_server_is_killed_and_comes_back_learns_the_same(server, on_disk, tmp_path):
    """Two ranks, checkpoints copied to the same server."""
    straight = config_of(tmp_path / "straight", on_disk)
    train(straight, ranks=2)
    copies = server.uri("copies")
    config = config_of(
        tmp_path / "disturbed",
        server.uri("shop"),
        {"retry_s": 90},
        checkpoints={"every_steps": 5, "copy_to": copies},
    )
    log = tmp_path / "log"
    process = start(job(2, config), log)
    try:
        wait_for_step(process, run_dir(config), 2)
        server.kill()
        wait_until(process, lambda: "Trying again in" in log.read_text(), "a failed attempt")
        server.start()
        assert process.wait(SECONDS) == 0, log.read_text()[-3000:]
    finally:
        kill(process)
    expected, found = losses(run_dir(straight)), losses(run_dir(config))
    assert set(expected) == set(found) == set(range(1, 21))
    assert max(abs(expected[step] - found[step]) for step in expected) < CLOSE
    said = log.read_text()
    assert "Trying again in" in said
    assert "Traceback" not in said

    local = run_dir(config) / "checkpoints" / "step-00000020"
    commit = json.loads((local / "commit.json").read_text())
    there = storage.list_files(f"{copies}/step-00000020")
    assert there == {
        **{name: entry["bytes"] for name, entry in commit["files"].items()},
        "commit.json": (local / "commit.json").stat().st_size,
    }
    copied = json.loads(storage.read_bytes(f"{copies}/step-00000020/commit.json"))
    assert copied["state"]["data"]["fingerprint"] == commit["state"]["data"]["fingerprint"]
    assert copied["step"] == 20


def test_a_run_goes_on_from_a_copy_in_the_store_alone(server, tmp_path):
    copies = server.uri("to-go-on")
    config = config_of(tmp_path / "first", server.uri("shop"), checkpoints={"copy_to": copies})
    train(config)
    elsewhere = tmp_path / "second" / "run"
    printed = train(config, f"run_dir={elsewhere}")
    assert f"fetching step-00000020 from {copies}" in printed
    assert "resuming from step-00000020" in printed
    assert losses(elsewhere) == losses(run_dir(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        before = (run_dir(config) / "tokenizer" / name).read_bytes()
        assert (elsewhere / "tokenizer" / name).read_bytes() == before


@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_run_whose_server_is_gone_ends_in_time_with_a_clear_error(server, tmp_path, prefetch):
    config = config_of(tmp_path, server.uri("shop"), {"timeout_s": 1, "retry_s": 3}, prefetch)
    log = tmp_path / "log"
    endless = ["training.epochs=60", "training.max_steps=9999"]
    process = start(job(1, config, *endless), log)
    try:
        wait_for_step(process, run_dir(config), 2)
        (server.kill if prefetch else server.stall)()
        assert process.wait(SECONDS) == 2
    finally:
        kill(process)
    said = log.read_text()
    attempts = re.search(r"gave no usable answer for \d+ s in (\d+) attempt", said)
    assert attempts, said
    assert int(attempts[1]) <= 1 + 3 / 0.25  # retry_s over the shortest wait
    assert f"dti-dist train: {server.uri('shop')}/train/part-" in said
    assert "data.storage.retry_s (3 s)" in said
    assert "Traceback" not in said
    assert SECRET not in said


def test_no_secret_is_in_anything_that_a_run_leaves(server, tmp_path):
    """A run that succeeds, one that is refused, and one that has its secret in the wrong place."""
    good = config_of(tmp_path / "good", server.uri("shop"), {"cache_gib": 0.1})
    copy = f"checkpoints.copy_to={server.uri('secretly')}"
    run(job(1, good, "training.max_steps=2", copy), tmp_path / "good.log")
    wrong = {"AWS_SECRET_ACCESS_KEY": "WrongSecretThatMayNotBeShown"}
    run(job(1, good, f"run_dir={tmp_path / 'no'}"), tmp_path / "bad.log", 2, **wrong)
    misplaced = [f"data.storage.options.s3.secret={SECRET}", f"data.path=s3://a:{SECRET}@b/c"]
    run(job(1, good, misplaced[0]), tmp_path / "misplaced0.log", 2)
    run(job(1, good, misplaced[1]), tmp_path / "misplaced1.log", 2)
    assert "access refused" in (tmp_path / "bad.log").read_text()
    assert "expected no credentials" in (tmp_path / "misplaced0.log").read_text()
    assert "expected a URL without credentials" in (tmp_path / "misplaced1.log").read_text()
    looked_at = 0
    for path in [
        *(tmp_path / "good").rglob("*"),
        *tmp_path.glob("*.log"),
        *tmp_path.glob("no/**/*"),
    ]:
        if path.is_file():
            content = path.read_bytes()
            looked_at += 1
            for secret in (SECRET, KEY, *wrong.values()):
                assert secret.encode() not in content, path
    assert looked_at > 8


def test_a_copy_that_fails_is_said_and_the_run_goes_on(server, tmp_path):
    config = config_of(
        tmp_path, server.uri("shop"), {"retry_s": 1, "timeout_s": 1}, training={"epochs": 1}
    )
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made here")
    printed = train(config, f"checkpoints.copy_to={blocked}/copies", "training.max_steps=3")
    assert "step-00000003 was not copied to" in printed
    assert "and the run goes on:" in printed


def test_a_copy_to_nowhere_is_refused_before_any_work(server, tmp_path):
    config = config_of(tmp_path, server.uri("shop"))
    printed = train(config, "checkpoints.copy_to=s3://not-there/copies", expect=2)
    assert "has no bucket 'not-there'" in printed
    assert not run_dir(config).exists()
