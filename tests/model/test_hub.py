"""Models from a hub: one process of each node asks, and all read the same commit from its cache.

Real clients of a hub on the loopback (tests/hub_server.py), which counts who asks for what.
"""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dti_dist.config import ModelConfig
from dti_dist.data.dataset import Dataset
from dti_dist.data.index import SINGLE_PROCESS
from dti_dist.errors import UserError
from dti_dist.model import sources
from tests.base_models import save_base_model
from tests.hub_server import running_hub
from tests.launching import job, losses, run, write_config

MODEL = "lab/tiny"
TWO_NODES = Path(__file__).parents[1] / "two_nodes.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's folder as repositories are, with weights in other forms and what nobody reads."""
    folder = save_base_model(tmp_path_factory.mktemp("base"), tied=True)
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "a.png"):
        (folder / name).write_bytes(b"not asked for")
    return folder


@pytest.fixture
def hub(base):
    with running_hub() as hub:
        hub.publish(MODEL, base)
        yield hub


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """This process, with an empty cache, as a client of the hub."""
    at = "huggingface_hub.constants"
    monkeypatch.setattr(f"{at}.ENDPOINT", hub.endpoint("here"))
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{at}.HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint("here") + path)
    monkeypatch.setattr(f"{at}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{at}.HF_HUB_OFFLINE", False)


def fetch(name=MODEL, revision=None, group=SINGLE_PROCESS):
    return sources.fetch(ModelConfig(name=name, revision=revision), group)


def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_fetched_model_is_a_folder_that_is_loaded_without_the_hub(hub, here):
    fetched = fetch()
    hub.askers()
    assert fetched.revision is None
    held = {path.relative_to(fetched.name).as_posix() for path in Path(fetched.name).rglob("*")}
    assert held == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    sources.load_causal_lm(fetched, 300, seed=0)
    sources.load_model_config(fetched, 300)
    assert not hub.askers()


def test_the_revision_is_respected(hub, here, tmp_path):
    first = next(iter(hub.commits[MODEL]))
    other = save_base_model(tmp_path / "other", tied=True, seed=1)
    newest = hub.publish(MODEL, other)
    assert Path(fetch().name).name == Path(fetch(revision="main").name).name == newest
    assert Path(fetch(revision=first).name).name == first


def test_a_folder_is_read_where_it_is_and_nothing_is_asked(hub, here, base):
    for name in (str(base), "scratch", sources.SMOLLM2):
        config = ModelConfig(name=name)
        assert sources.fetch(config, SINGLE_PROCESS) is config
    assert not hub.requests


def test_offline_the_cache_is_read(hub, here, monkeypatch):
    online = fetch()
    hub.askers()
    offline(monkeypatch)
    assert fetch() == online
    assert not hub.requests


def test_where_the_hub_is_away_the_cache_is_read(hub, here, monkeypatch):
    online = fetch()
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert fetch() == online


@pytest.mark.parametrize(
    ("name", "revision", "found"),
    [
        ("lab/gated", None, "Access to model lab/gated is restricted"),
        ("lab/missing", None, "404"),
        (MODEL, "no-such-tag", r"'lab/tiny@no-such-tag'.*404"),
        ("lab/no name", None, "Repo id must"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(hub, here, base, name, revision, found):
    hub.publish("lab/gated", base)
    hub.gated.add("lab/gated")
    with pytest.raises(UserError, match=found) as caught:
        fetch(name, revision)
    assert "could not be loaded from the hub" in str(caught.value)
    assert "hf auth login" in str(caught.value)


def test_offline_without_a_cache_is_said_with_what_to_do(hub, here, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(UserError, match="hf download"):
        fetch()
    assert not hub.requests


class Rank:
    """One process of a group whose others are not there: it gets what rank 0 found."""

    world = 4

    def __init__(self, rank, found):
        self.rank, self.local_rank, self.found = rank, rank % 2, found

    def each(self, make):
        assert make() is None, "only rank 0 asks which commit it is"
        return [self.found]

    def first_on_node(self, make):
        return make()


def test_ranks_read_the_commit_that_rank_0_found_though_main_has_moved(hub, here, tmp_path):
    commit = next(iter(hub.commits[MODEL]))
    hub.publish(MODEL, save_base_model(tmp_path / "other", tied=True, seed=1))
    assert Path(fetch(group=Rank(2, commit)).name).name == commit
    assert hub.askers()
    assert Path(fetch(group=Rank(3, commit)).name).name == commit
    assert not hub.askers()


@pytest.mark.slow
def test_one_rank_of_each_node_asks_the_hub(hub, synthetic, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        synthetic,
        model={"name": MODEL},
        template={"label_words": ["N", "Y"], "max_item_tokens": 8},
        training={"max_steps": 2},
    )
    run_dir = Path(yaml.safe_load(config.read_text())["run_dir"])

    def on_two_nodes(module, *arguments, expect=0):
        ranks = job(4, tmp_path, hub.endpoint(""), module, *arguments, script=TWO_NODES)
        return run(ranks, tmp_path / "log", expect)

    on_two_nodes("dti_dist.training", config)
    assert len(losses(run_dir)) == 2
    assert set(hub.askers()) == {"rank-0", "rank-2"}
    kept = [sorted(p.name for p in tmp_path.glob(f"node-{n}/hub/*/snapshots/*")) for n in (0, 1)]
    assert kept[0] == kept[1] == list(hub.commits[MODEL])

    requests = tmp_path / "requests.parquet"
    item = Dataset.open(str(synthetic)).items_table()["source_id"][0].as_py()
    pq.write_table(
        pa.Table.from_pylist(
            [
                {"request_id": 0, "history_items": [item], "history_labels": [1]}
                | {"history_timestamps": [1], "candidates": [item], "timestamp": 2}
            ]
        ),
        requests,
    )
    on_two_nodes("dti_dist", "score", run_dir, "--requests", requests, "--out", tmp_path / "out")
    assert set(hub.askers()) <= {"rank-0", "rank-2"}
    assert json.loads((tmp_path / "out" / "_scores.json").read_text())["requests"] == 1

    hub.gated.add(MODEL)
    moved = [f"run_dir={tmp_path / 'other'}", "model.revision=main"]
    for node in (0, 1):
        (tmp_path / f"node-{node}").rename(tmp_path / f"was-{node}")
    printed = on_two_nodes("dti_dist.training", config, *moved, expect=2)
    assert len(re.findall(r"Access to model lab/tiny is restricted", printed)) == 1
    assert set(hub.askers()) == {"rank-0"}
