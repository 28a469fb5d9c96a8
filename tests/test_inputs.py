"""What a config names, opened: refusals, caches and streams."""

from __future__ import annotations

import os

import pytest

from dti_dist import inputs
from dti_dist.config import load_config
from dti_dist.data.dataset import Dataset
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from tests.launching import write_config


@pytest.fixture
def open_inputs(synthetic, tmp_path):
    def open_with(*overrides):
        path = write_config(tmp_path / "config.yaml", synthetic)
        cache = f"data.cache_dir={tmp_path / 'cache'}"
        return Inputs.open(load_config(path, [cache, *overrides]), tmp_path / "tokenizer")

    return open_with


def test_more_context_than_the_data_set_keeps_is_refused(open_inputs, synthetic, tmp_path):
    limit = Dataset.open(str(synthetic)).manifest.context_limit
    open_inputs(f"sample.context={limit}")
    with pytest.raises(UserError) as raised:
        open_inputs(f"sample.context={limit + 1}")
    assert f"keeps only {limit} interactions" in str(raised.value)
    assert f"--context-limit {limit + 1}" in str(raised.value)


def test_a_split_without_targets_is_refused(open_inputs):
    with pytest.raises(UserError) as raised:
        open_inputs("sample.context=50", "sample.min_context=50").stream_plan("train")
    assert (
        "the split train has no target with at least sample.min_context = 50 interactions before "
        "it. Lower sample.min_context" in str(raised.value)
    )


def test_a_stream_has_the_same_targets_for_any_k(open_inputs):
    opened = open_inputs()
    plans = [opened.stream_plan("valid", k=k, max_targets=50) for k in (None, 1, 3)]
    rows = [len(plan.index.row_targets) for plan in plans]
    assert len(set(rows)) == 1
    assert {plan.samples.k for plan in plans} == {8, 1, 3}
    assert len({plan.index.total_targets for plan in plans}) == 1


def test_shuffling_a_part_of_the_users_is_a_mistake_in_the_program(open_inputs):
    with pytest.raises(AssertionError):
        open_inputs().stream_plan("train", shuffle=True, max_targets=5)


def test_the_tokenizer_is_kept_and_read_again(open_inputs, tmp_path, monkeypatch):
    first = open_inputs()
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    caches = sorted(path.name for path in first.cache_dir.iterdir())

    def fail(*arguments):
        raise AssertionError("made again")

    monkeypatch.setattr(inputs.sources, "load_tokenizer", fail)
    again = open_inputs()
    assert again.tokens.sum_id == first.tokens.sum_id
    assert again.tokens.fingerprint == first.tokens.fingerprint
    assert again.vocabulary == first.vocabulary == first.tokens.sum_id + 1
    assert sorted(path.name for path in again.cache_dir.iterdir()) == caches


# --- where caches lie ------------------------------------------------------------------------


def cache_dir(synthetic, tmp_path, uri=None, *overrides):
    config = load_config(write_config(tmp_path / "config.yaml", synthetic), list(overrides))
    manifest = Dataset.open(str(synthetic)).manifest
    dataset = Dataset(uri or str(synthetic), manifest)
    return inputs.cache_dir_of(dataset, config.data.cache_dir)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_beside_a_local_data_set(synthetic, tmp_path, scheme):
    assert cache_dir(synthetic, tmp_path, f"{scheme}{synthetic}") == synthetic / "cache"


def test_in_the_users_cache_for_a_remote_data_set(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = cache_dir(synthetic, tmp_path, "s3://bucket/ml-1m")
    assert found.parent == tmp_path / "home" / "dti-dist"
    assert found.is_dir()
    assert cache_dir(synthetic, tmp_path, "s3://bucket/ml-1m") == found
    assert cache_dir(synthetic, tmp_path, "s3://bucket/other") != found


def test_in_the_users_cache_for_a_local_data_set_that_is_read_only(
    synthetic, tmp_path, monkeypatch
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write all
    found = cache_dir(synthetic, tmp_path)
    assert found.parent == tmp_path / "home" / ".cache" / "dti-dist"


def test_where_the_config_says(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = cache_dir(synthetic, tmp_path, None, "data.cache_dir=~/mine")
    assert found == tmp_path / "mine"
    assert found.is_dir()


def test_a_url_is_no_place_for_a_memory_map(synthetic, tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_dir: expected a local path, found 's3://b'"):
        cache_dir(synthetic, tmp_path, None, "data.cache_dir=s3://b")


def test_a_folder_that_cannot_be_made_is_named(synthetic, tmp_path):
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "cache"
    with pytest.raises(UserError, match=f"{inside} can't be made: .*Set data.cache_dir"):
        cache_dir(synthetic, tmp_path, None, f"data.cache_dir={inside}")
