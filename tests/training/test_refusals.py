"""What train refuses before any work: exit 2, a message that says what to do, nothing written."""

import pytest
import torch

from dti_dist.cli import main
from tests.base_models import save_tokenizer_and_model
from tests.launching import job, run, write_config


def refused(capsys, config, *overrides):
    assert main(["train", str(config), *overrides]) == 2
    return capsys.readouterr().err


@pytest.fixture
def config(synthetic, tmp_path):
    return write_config(tmp_path / "config.yaml", synthetic)


def test_a_global_batch_that_the_ranks_do_not_divide(config, tmp_path):
    printed = run(job(2, config, "training.global_batch_packs=3"), tmp_path / "log", expect=2)
    assert (
        "global_batch_packs 3 must be a multiple of ranks x training.micro_batch_packs" in printed
    )
    assert "Set it to 4" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_where_one_is_required(capsys, config, tmp_path):
    message = refused(capsys, config, "training.device=cuda")
    assert "training.device is cuda, but torch sees no GPU" in message
    assert "training.device=cpu" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sample.context=0", "sample.context: "),
        ("sample.targets=0", "sample.targets: "),
        ("training.epoch=2", "Did you mean 'epochs'?"),
        ("training.epochs=many", "training.epochs: "),
        ("pack.length=128 sample.targets=40", "Set pack.length="),
        ("data.path=nowhere", "nowhere"),
        ("template.item=a {titel}", "Did you mean 'title'?"),
        ("template.label_words=[' certainly not', ' Yes']", "single token"),
        ("training.deepspeed=zero9", "Names: cpu, zero1, zero2, zero3, zero3_offload"),
        ("model.name=does/not-exist", "could not be loaded"),
        ("attention.budget=[9, 9]", "budget"),
        ("sample.context=9999", "--context-limit"),
    ],
)
def test_bad_settings_are_refused_with_what_to_do(
    capsys, config, tmp_path, monkeypatch, override, expected
):
    # Where there is no network the hub would be asked again and again.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    overrides = override.split(" ") if "pack" in override else [override]
    if "label_words" in override:  # a tokenizer that was not trained with these words
        overrides.append(f"model.name={save_tokenizer_and_model(tmp_path / 'model')}")
    assert expected in refused(capsys, config, *overrides)
    assert not (tmp_path / "run").exists()


def test_an_unsupported_family_lists_the_supported_ones(capsys, config, tmp_path):
    folder = save_tokenizer_and_model(tmp_path / "model", "gpt2")
    words = "template.label_words=['N', 'Y']"
    message = refused(capsys, config, f"model.name={folder}", words)
    assert "'gpt2' is not supported" in message
    assert "gemma, granite, llama" in message
    assert not (tmp_path / "run").exists()


def test_settings_of_another_run_in_the_same_folder_are_refused(capsys, config, tmp_path):
    import yaml

    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    from dti_dist.config import load_config

    (run_dir / "config.yaml").write_text(load_config(config).to_yaml())
    message = refused(capsys, config, "sample.targets=9", "training.log_every=3")
    assert "sample.targets: 8 there, 9 now" in message
    assert "log_every" not in message
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["sample"]["targets"] == 8


def test_a_folder_that_another_job_trains_in_is_refused(capsys, config, tmp_path, monkeypatch):
    from dti_dist.config import load_config
    from dti_dist.runs.folder import RunFolder

    monkeypatch.setattr("dti_dist.runs.folder._LOCK_PATIENCE_S", 0.2)
    other = RunFolder(tmp_path / "run")
    other.prepare(load_config(config))
    assert "Another job is training in" in refused(capsys, config)
    assert (tmp_path / "run" / "config.yaml").exists()
    other.release()
    run(job(1, config, "training.max_steps=1"), tmp_path / "log")
