"""From a trained run to figures and to a folder that transformers loads."""

import json

import numpy as np
import pytest
import torch

from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data.dataset import Dataset
from dti_dist.data.stream import PackStream, Share
from dti_dist.inputs import Inputs
from dti_dist.ranks import Ranks
from dti_dist.scoring.predict import predict
from dti_dist.scoring.trained import choose_checkpoint, trained_model
from dti_dist.training.run_folder import RunFolder
from tests.launching import command, run, train, write_config

pytestmark = pytest.mark.slow
ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", params=["yes_no", "linear"])
def trained(request, synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"trained-{request.param}")
    config = write_config(folder / "config.yaml", synthetic)
    train(config, f"model.head={request.param}", ranks=2 if request.param == "linear" else 1)
    return folder / "run"


def predictions(run_dir, model=None, k=None):
    folder = RunFolder(run_dir)
    inputs = Inputs.open(folder.read_config(), folder.tokenizer)
    model = model or trained_model(inputs, choose_checkpoint(folder, "best"))
    plan = inputs.stream_plan("test", k=k)
    return predict(model, PackStream(plan, Share(1, 1)), ONE)


def test_evaluate_prints_json_and_keeps_it(trained, capsys):
    assert main(["evaluate", str(trained)]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((trained / "eval" / "test.json").read_text())
    assert printed == kept
    expected = {"auc", "log_loss", "f1", "accuracy", "gauc", "ne", "ece", "targets", "users"}
    assert expected | {"prompt", "checkpoint", "ceiling"} <= set(kept)
    assert kept["prompt"] == "sliding_window"
    config = load_config(trained / "config.yaml")
    assert kept["targets"] == Dataset.open(config.data.path).manifest.counts.splits["test"].targets


def test_both_kinds_of_prompt_give_the_same_predictions_under_budget(trained):
    streaming, sliding = predictions(trained), predictions(trained, k=1)
    assert np.array_equal(streaming.row, sliding.row)
    assert np.array_equal(streaming.position, sliding.position)
    np.testing.assert_allclose(streaming.probability, sliding.probability, atol=1e-5)
    assert streaming.probability.std() > 1e-3


def test_two_ranks_evaluate_like_one(trained, tmp_path):
    one = run([*command(1, "dti_dist"), "evaluate", str(trained)], tmp_path / "one")
    two = run([*command(2, "dti_dist"), "evaluate", str(trained)], tmp_path / "two")
    figures = [json.loads(text[text.index("{") : text.rindex("}") + 1]) for text in (one, two)]
    assert figures[0]["targets"] == figures[1]["targets"]
    assert figures[0]["auc"] == pytest.approx(figures[1]["auc"], abs=1e-9)
    assert figures[0]["log_loss"] == pytest.approx(figures[1]["log_loss"], abs=1e-6)


def test_max_targets_takes_whole_users(trained, capsys):
    assert main(["evaluate", str(trained), "--max-targets", "40"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 40 <= figures["targets"] < 60


def test_export_loads_in_transformers_and_predicts_the_same(trained, tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import AutoModelForSequenceClassification as Classifier

    out = tmp_path / "exported"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "dti_config.json"} <= names
    settings = json.loads((out / "dti_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("[SUM]") == settings["sum_token_id"]
    assert AutoConfig.from_pretrained(out).vocab_size > settings["sum_token_id"]

    folder = RunFolder(trained)
    inputs = Inputs.open(folder.read_config(), folder.tokenizer)
    kind = AutoModelForCausalLM if settings["head"] == "yes_no" else Classifier
    loaded, report = kind.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model = inputs.untrained_model()
    model.backbone.load_state_dict(loaded.base_model.state_dict())
    if settings["head"] == "linear":
        model.head.weight.data.copy_(loaded.score.weight)
    else:
        assert torch.equal(model.head.weight, loaded.get_output_embeddings().weight)
    np.testing.assert_array_equal(
        predictions(trained, model.eval()).probability, predictions(trained).probability
    )


def test_export_refuses_a_folder_that_is_not_empty(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["export", str(trained), "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch):
    from dti_dist.scoring import export

    monkeypatch.setattr(export, "dti_settings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(str(trained), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command_line", [["evaluate"], ["export", "--out", "x"]])
def test_a_folder_that_is_no_run_is_refused(command_line, tmp_path, capsys):
    assert main([command_line[0], str(tmp_path), *command_line[1:]]) == 2
    assert "is not a run's folder" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(trained, capsys):
    assert main(["evaluate", str(trained), "--checkpoint", "7"]) == 2
    assert "There are: best, last, " in capsys.readouterr().err
