"""Configs: what is read, and the message that each mistake gives."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dti_dist.config import RunConfig, load_config, validate_config
from dti_dist.errors import UserError
from dti_dist.runs.folder import RunFolder

LEAST = {"run_dir": "runs/a", "data": {"path": "prepared"}}


def fault(text: str) -> str:
    """The one line that says what is wrong with the settings in `text`."""
    settings = {**LEAST, **(yaml.safe_load(text) or {})}
    with pytest.raises(UserError) as raised:
        validate_config(settings)
    first, *faults = str(raised.value).splitlines()
    assert first == "config: 1 setting(s) to fix:"
    (line,) = faults
    return line.strip()


def load(tmp_path, text: str = "", *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: runs/a\n{text}")
    return load_config(path, ["data.path=prepared", *overrides])


def refusal(tmp_path, text: str = "", *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load(tmp_path, text, *overrides)
    return str(raised.value)


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("sample: {context: 0}", "sample.context: expected 1 or more, found 0."),
        ("sample: {targets: 0}", "sample.targets: expected 1 or more, found 0."),
        ("seed: -1", "seed: expected 0 or more, found -1."),
        (
            "sample: {context: 5, min_context: 6}",
            "sample.min_context: expected at most sample.context, which is 5, found 6.",
        ),
        ("training: {epochs: many}", "training.epochs: expected a whole number, found 'many'."),
        ("training: {epochs: 1.5}", "training.epochs: expected a whole number, found 1.5."),
        ("training: {epochs: }", "training.epochs: expected a whole number, found None."),
        ("training: {weight_decay: x}", "training.weight_decay: expected a number, found 'x'."),
        (
            "training: {learning_rate: 0}",
            "training.learning_rate: expected more than 0, found 0.",
        ),
        (
            "training: {learning_rate: .inf}",
            "training.learning_rate: expected a finite number, found inf.",
        ),
        (
            "training: {warmup_fraction: 1.5}",
            "training.warmup_fraction: expected 1 or less, found 1.5.",
        ),
        (
            "training: {betas: [0.9, 1]}",
            "training.betas: expected two numbers ≥ 0 and < 1, found [0.9, 1.0].",
        ),
        ("training: {betas: [1, 2, 3]}", "training.betas: expected 2 values, found [1, 2, 3]."),
        ("template: {time_gaps: 7}", "template.time_gaps: expected true or false, found 7."),
        (
            "template: {label_words: yes or no}",
            "template.label_words: expected a list, found 'yes or no'.",
        ),
        (
            "sample: {paradigm: sliding}",
            "sample.paradigm: expected 'dti' or 'sliding_window', found 'sliding'. "
            "Did you mean 'sliding_window'?",
        ),
        (
            "pack: {length: 4000}",
            "pack.length: expected a multiple of 128 (FlexAttention's block), found 4000; "
            "try 4096.",
        ),
        (
            "pack: {readout_slots: 1}",
            "pack.readout_slots: expected a multiple of 128 (FlexAttention's block), found 1; "
            "try 128.",
        ),
        (
            "model: {scratch: {heads: 3}}",
            "model.scratch: expected heads to divide hidden_size and key_value_heads to divide "
            "heads, found hidden_size 128, heads 3, key_value_heads 2.",
        ),
    ],
)
def test_a_bad_value_is_one_line_of_what_was_expected_and_found(settings, expected):
    assert fault(settings) == expected


@pytest.mark.parametrize("found", ["'evne'", "[4, -1]", "[4, x]", "7", "{even: 1}"])
def test_a_bad_budget_is_one_line_without_pydantics_names(found):
    line = fault(f"attention: {{budget: {found}}}")
    assert line.startswith(
        "attention.budget: expected 'even', 'early', 'late' or a list with the body window "
        "of each layer, whole numbers ≥ 0, found "
    )
    assert ("Did you mean 'even'?" in line) == (found == "'evne'")


def test_bare_yes_and_no_are_told_to_be_quoted():
    with pytest.raises(UserError) as raised:
        validate_config({**LEAST, **yaml.safe_load("template: {label_words: [No, Yes]}")})
    assert (
        "template.label_words.0: expected text, found False. "
        "Put it in quotes, or YAML reads it as true or false." in str(raised.value)
    )


def test_a_number_for_a_text_is_told_to_be_quoted():
    line = fault("run_dir: 7")
    assert (
        line == "run_dir: expected text, found 7. Put it in quotes, or YAML reads it as a number."
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("trainin: {epochs: 1}", "trainin: unknown key. Did you mean 'training'? Known: run_dir,"),
        ("training: {epoch: 1}", "training.epoch: unknown key. Did you mean 'epochs'? Known: ep"),
        ("model: {scratch: {head: 1}}", "model.scratch.head: unknown key. Did you mean 'heads'?"),
        ("sample: {qqq: 1}", "sample.qqq: unknown key. Known: paradigm, context, targets, min_"),
        ("1: 2", "1: expected a name, found 1."),
    ],
)
def test_an_unknown_key_names_the_nearest_and_all_known(settings, expected):
    assert fault(settings).startswith(expected)


def test_what_is_required_and_missing_is_named_in_full():
    with pytest.raises(UserError) as raised:
        validate_config({})
    assert str(raised.value).splitlines()[1:] == [
        "  run_dir: required, but not set.",
        "  data.path: required, but not set.",
    ]
    assert fault("data: {prefetch: 2}") == "data.path: required, but not set."


def test_every_fault_is_listed():
    with pytest.raises(UserError) as raised:
        validate_config({**LEAST, "sample": {"context": 0, "targets": "x"}, "sed": 1})
    message = str(raised.value)
    assert message.startswith("config: 3 setting(s) to fix:\n")
    assert all(key in message for key in ("sample.context:", "sample.targets:", "sed:"))


def test_a_prefix_under_an_exact_policy_is_refused_with_the_reason():
    line = fault("template: {prefix: 'Films:'}")
    assert line.startswith("template.prefix must be empty under attention.policy budget")
    assert "leave the prefix out or choose policy isolated, which is exact with one." in line
    windowed = {"template": {"prefix": "Films:"}, "attention": {"policy": "windowed"}}
    assert validate_config({**LEAST, **windowed}).template.prefix == "Films:"


# --- sections --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["3", "[1]", "text"])
def test_a_section_that_is_no_mapping_is_refused(value):
    assert fault(f"sample: {value}").startswith("sample: expected a section of settings, found ")


def test_an_empty_section_is_the_defaults(tmp_path):
    """As when all of its settings are commented out."""
    assert load(tmp_path, "sample:\nmodel:\n  scratch:\ndata:\n") == load(tmp_path)


def test_an_empty_optional_value_is_none(tmp_path):
    assert load(tmp_path, "training:\n  max_steps:\n").training.max_steps is None


# --- overrides -------------------------------------------------------------------------------


def test_overrides_reach_nested_keys_and_win_over_the_file(tmp_path):
    config = load(
        tmp_path,
        "training:\n  epochs: 3\nmodel:\n",
        "training.epochs=5",
        "model.scratch.layers=2",
        "attention.budget=[1, 0]",
        "seed=7",
        "template.item=a {title} = b",
        "template.label_words=[' No', ' Yes']",
        "training.epochs=6",
        "training.max_steps=",
    )
    assert config.training.epochs == 6
    assert config.model.scratch.layers == 2
    assert config.attention.budget == [1, 0]
    assert config.seed == 7
    assert config.template.item == "a {title} = b"
    assert config.training.max_steps is None
    assert config.data.path == "prepared"


@pytest.mark.parametrize("override", ["training.epochs", "=3", "", "training..epochs=2", ".seed=1"])
def test_an_override_of_another_form_is_refused_with_an_example(tmp_path, override):
    message = refusal(tmp_path, "", override)
    assert message == (
        f"Override {override!r} must have the form section.key=value, "
        "for example training.epochs=2."
    )


def test_an_override_with_a_value_that_is_no_yaml_is_named(tmp_path):
    message = refusal(tmp_path, "", "attention.budget=[1, 2")
    assert message.startswith("Override 'attention.budget=[1, 2': the value is not valid YAML: ")


def test_an_override_below_a_value_is_refused(tmp_path):
    assert "seed: expected a whole number, found {'low': 1}." in refusal(tmp_path, "", "seed.low=1")
    assert refusal(tmp_path, "seed: 3", "seed.low=1") == (
        "Override 'seed.low=1': seed is a value, not a section."
    )


@pytest.mark.parametrize("value", ["3", "", "{epochs: 2}"])
def test_an_override_of_a_whole_section_is_refused(tmp_path, value):
    """It would drop the section's other settings."""
    assert refusal(tmp_path, "training:\n  epochs: 3\n", f"training={value}") == (
        f"Override 'training={value}': training is a section, not a value. "
        "Override its keys one by one, as in training.key=value."
    )


def test_an_unknown_key_in_an_override_names_the_nearest(tmp_path):
    assert "training.epoch: unknown key. Did you mean 'epochs'?" in refusal(
        tmp_path, "", "training.epoch=2"
    )


# --- files -----------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert f"Config {path} could not be read: No such file or directory." in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"training: [1, 2", "is not valid YAML: "),
        (b"a: b: c", "is not valid YAML: "),
        (b"run_dir: \xff\xfe", "is not valid YAML: "),
        (b"", "expected a mapping of sections such as 'data: {path: …}', found an empty file."),
        (b"# all commented out\n", "found an empty file."),
        (
            b"- a\n- b\n",
            "expected a mapping of sections such as 'data: {path: …}', found ['a', 'b']",
        ),
    ],
)
def test_a_yaml_file_without_a_mapping_is_refused(tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert str(path) in str(raised.value)
    assert expected in str(raised.value)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    """Plain YAML would silently keep the last one."""
    text = "training:\n  epochs: 3\ntraining:\n  max_steps: 4\n"
    message = refusal(tmp_path, text)
    assert "the key 'training' is given twice" in message
    assert "line 4" in message  # after run_dir
    assert "'epochs' is given twice" in refusal(tmp_path, "", "training={epochs: 1, epochs: 2}")


def test_the_file_is_named_before_its_faults(tmp_path):
    assert refusal(tmp_path, "seed: -1").startswith(f"{tmp_path / 'run.yaml'}: 1 setting(s)")


# --- to YAML and back ------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


@given(
    item=words,
    label_words=st.tuples(words, words),
    cache=st.none() | words.map("/cache/{}".format),
    rate=st.floats(1e-9, 1.0),
    betas=st.tuples(*[st.floats(0, 0.9999)] * 2),
    budget=st.sampled_from(["even", "late"]) | st.lists(st.integers(0, 9), max_size=4),
    steps=st.none() | st.integers(1, 10**9),
)
def test_a_config_written_as_yaml_is_read_as_the_same(
    tmp_path_factory, item, label_words, cache, rate, betas, budget, steps
):
    config = validate_config(
        {
            **LEAST,
            "data": {"path": "s3://bucket/a", "cache_dir": cache},
            "template": {"item": item, "label_words": label_words},
            "training": {"learning_rate": rate, "betas": betas, "max_steps": steps},
            "attention": {"budget": budget},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-4, without a point, as text."""
    assert load(tmp_path, "training:\n  learning_rate: 1e-4\n").training.learning_rate == 1e-4


def test_sliding_window_has_one_target_a_prompt():
    sliding = {**LEAST, "sample": {"paradigm": "sliding_window", "targets": 50}}
    assert validate_config(sliding).sample.k == 1
    assert validate_config({**LEAST, "sample": {"targets": 7}}).sample.k == 7


def test_a_setting_that_is_gone_is_refused_with_what_does_its_work_and_read_in_a_run(tmp_path):
    gone = {**LEAST, "data": {"path": "d", "workers": 1}}
    with pytest.raises(
        UserError, match=r"data.workers: no longer a setting: a thread of each rank"
    ):
        validate_config(gone)
    run = RunFolder(tmp_path)
    run.config_file.write_text(yaml.safe_dump(gone))
    assert run.read_config() == validate_config({**LEAST, "data": {"path": "d"}})
