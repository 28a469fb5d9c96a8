"""Folders made by others: what is read of them runs no code and stays inside them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from dti_dist.config import ModelConfig, StorageConfig, load_config
from dti_dist.errors import UserError
from dti_dist.model import sources
from dti_dist.runs import commits
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_tensors
from dti_dist.runs.unpickling import without_code
from dti_dist.training import conversion
from dti_dist.training.copying import CheckpointCopies
from tests.launching import write_config
from tests.tiny import VOCABULARY, causal_lm, ctr_model

CODE = "import pathlib; pathlib.Path({!r}).touch()\n"


class Harmful:
    """Touches a file when its pickle is read by whoever lets pickles run."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def proof(tmp_path):
    """A path that is there if code of a folder has run."""
    place = tmp_path / "proof"
    torch.save({"x": Harmful(place)}, tmp_path / "check.pt")
    torch.load(tmp_path / "check.pt", weights_only=False)
    assert place.exists(), "the pickle is harmless"
    place.rmdir()
    yield place
    assert not place.exists(), "code of the folder has run"


@pytest.fixture
def folder(tmp_path):
    """A good model folder."""
    causal_lm("llama").float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder):
    return sources.load_causal_lm(ModelConfig(name=str(folder)), VOCABULARY, seed=0)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_folder_of_pickles_is_refused_with_how_to_convert_it(folder, proof, name):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harmful(proof)}, folder / name)
    with pytest.raises(UserError, match=f"as a pickle, {name}, and none as safetensors") as caught:
        load(folder)
    assert "If you trust its source, convert it" in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_a_pickle_beside_safetensors_is_not_read(folder, proof):
    torch.save({"model.norm.weight": Harmful(proof)}, folder / "pytorch_model.bin")
    load(folder)


def test_pickles_are_not_read_even_where_the_folder_was_not_checked(folder, proof, monkeypatch):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harmful(proof)}, folder / "pytorch_model.bin")
    monkeypatch.setattr(sources, "check_folder", lambda folder: None)
    with pytest.raises(UserError, match="could not be loaded"):
        load(folder)


def as_shards(folder: Path, shard: str) -> None:
    from safetensors.torch import load_file

    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_of_the_folder_are_read(folder):
    as_shards(folder, "model-00001-of-00001.safetensors")
    load(folder)


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/model.safetensors", "..", "weights.bin", "a\\b"]
)
def test_an_index_may_not_name_files_elsewhere(folder, shard):
    as_shards(folder, shard)
    with pytest.raises(UserError, match="expected the name of a safetensors file in the same"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(folder, content):
    as_shards(folder, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        load(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    elsewhere = tmp_path / "secret"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"is a link that points out of its folder, to .*secret"):
        load(folder)


def test_links_of_the_hub_cache_into_its_blobs_are_read(folder, tmp_path):
    repository = tmp_path / "models--someone--something"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    snapshot = folder.rename(repository / "snapshots" / "0123abc")
    for path in list(snapshot.iterdir()):
        path.rename(repository / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    load(snapshot)


def test_adapters_are_refused_as_a_model(folder, proof, tmp_path):
    settings = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({"lora_A": Harmful(proof)}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds adapters, whose adapter_config\.json names"):
        load(folder)


def test_python_files_beside_a_known_family_are_not_run(folder, proof):
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(CODE.format(str(proof)))
    load(folder)


def test_a_model_that_needs_code_of_its_own_is_refused_without_a_question(
    folder, proof, monkeypatch
):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(CODE.format(str(proof)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for read in (load, lambda folder: sources.load_model_config(ModelConfig(name=str(folder)), 9)):
        with pytest.raises(
            UserError, match="can be loaded only by running its own Python code"
        ) as caught:
            read(folder)
        assert "Choose a model of gemma, granite, llama" in str(caught.value)


# --- checkpoints ---------------------------------------------------------------------------------


def commit(folder: Path, files: dict[str, bytes], listed: dict[str, bytes] | None = None) -> Path:
    """A checkpoint that says of itself that it is whole."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in (listed or files).items()
    }
    state = {"step": 1, "base": None}
    content = {"step": 1, "world": 1, "state": state, "files": entries}
    (folder / commits.COMMIT).write_text(json.dumps(content))
    return folder


def test_a_commit_file_may_not_list_files_elsewhere(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "other").write_bytes(b"abc")
    commit(tmp_path / "checkpoints" / "step-00000001", {}, {"../../other": b"abc"})
    complete, passed_over = commits.complete_checkpoints(tmp_path / "checkpoints")
    assert not complete
    assert passed_over == [
        "step-00000001: commit.json lists '../../other', which is outside of the checkpoint"
    ]


@pytest.mark.parametrize("name", ["../../../stolen", "/{}/stolen"])
def test_a_copy_may_not_write_elsewhere(synthetic, tmp_path, capsys, name):
    name = name.format(tmp_path)
    config = load_config(write_config(tmp_path / "config.yaml", synthetic))
    run = RunFolder(tmp_path / "run")
    run.prepare(config)
    copies = tmp_path / "copies"
    (tmp_path / "away").mkdir()
    commit(copies / "step-00000001", {}, {name: b"abc"})
    for place in ("stolen", "copies/stolen"):
        (tmp_path / place).write_bytes(b"abc")
    before = sorted(path for path in tmp_path.rglob("*"))
    CheckpointCopies(run.path, str(copies), StorageConfig()).restore(config)
    assert "which is outside of the checkpoint" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*")) == before
    run.release()


@pytest.mark.parametrize("content", ["", "[]", '{"step": "../other"}', '{"step": null}'])
def test_a_file_of_the_best_checkpoint_that_names_none_is_refused(tmp_path, content):
    run = RunFolder(tmp_path)
    commit(run.checkpoints / "step-00000001", {})
    (run.checkpoints / commits.BEST).write_text(content)
    with pytest.raises(UserError, match=r"best\.json can't be read: .* Remove it"):
        choose_checkpoint(run, "best")
    assert choose_checkpoint(run, "last").step == 1


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path, proof):
    place = tmp_path / "states.pt"
    torch.save({"buffer_names": [], "module": Harmful(proof)}, place)
    run = RunFolder(tmp_path / "run")
    commit(
        run.checkpoints / "step-00000001",
        {
            "zero_pp_rank_0_mp_rank_00_model_states.pt": place.read_bytes(),
            "zero_pp_rank_0_mp_rank_00_optim_states.pt": place.read_bytes(),
        },
    )
    found = choose_checkpoint(run, "last")
    with pytest.raises(UserError, match=r"could run code, so it is not read: .*mkdir"):
        trained_tensors(ctr_model(), found)
    with pytest.raises(UserError, match="could not be converted"):
        conversion._convert(found, tmp_path / "universal", world=2)


class Attribute:
    """Pickled as some releases of Python (3.11.2) pickle an enum's member."""

    def __init__(self, *of):
        self.of = of

    def __reduce__(self):
        return getattr, self.of


def test_an_enum_of_deepspeed_is_read_however_python_pickled_it(tmp_path):
    for name, stage in (
        ("now", ZeroStageEnum.weights),
        ("before", Attribute(ZeroStageEnum, "weights")),
    ):
        torch.save({"zero_stage": stage}, tmp_path / name)
        with without_code():
            found = torch.load(tmp_path / name, weights_only=False)
        assert found == {"zero_stage": ZeroStageEnum.weights}


@pytest.mark.parametrize(
    "of", [(ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (LossScaler, "__init__")]
)
def test_no_other_attribute_is_read(tmp_path, of):
    torch.save({"zero_stage": Attribute(*of)}, tmp_path / "file")
    with (
        pytest.raises(UserError, match=r"could run code, so it is not read: .*getattr"),
        without_code(),
    ):
        torch.load(tmp_path / "file", weights_only=False)


def test_reading_tensors_alone_ends_with_its_block(tmp_path, proof, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with without_code():
        torch.save({"a": torch.ones(2), "b": [1, "x", None]}, tmp_path / "plain.pt")
        torch.load(tmp_path / "plain.pt", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    with pytest.raises(UserError, match="by another program"), without_code():
        torch.load(tmp_path / "check.pt", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
