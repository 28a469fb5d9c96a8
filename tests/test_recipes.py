"""Every recipe is valid, and names what exists."""

from pathlib import Path

import pytest

from dti_dist.config import AUTO, load_config
from dti_dist.data.dataset import Dataset
from dti_dist.data.template import Template
from dti_dist.zero.configuration import deepspeed_config, micro_steps_per_step
from tests.real_data import movielens_1m

RECIPES = sorted(Path(__file__).parent.parent.glob("launch/recipes/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_its_ranks_divide_the_batch(recipe):
    config = load_config(recipe)
    assert config.run_dir == f"runs/{recipe.stem}"
    for world in (1, 2):
        assert micro_steps_per_step(config.training, world) >= 1
    if config.training.device == "cpu":
        assert deepspeed_config(config.training, 2)["zero_optimization"]["stage"] == 3
    else:
        assert (config.training.deepspeed, config.training.activation_checkpointing) == (AUTO, AUTO)


def test_there_are_the_recipes_that_the_readme_names():
    names = {path.stem for path in RECIPES}
    assert names == {"demo", "ml1m_tiny", "ml1m_smollm2_135m", "ml1m_llama32_1b"}


def test_movielens_recipes_read_columns_that_movielens_has(tmp_path):
    from dti_dist.cli import main

    out = str(tmp_path / "ml1m")
    assert main(["prepare", "movielens", str(movielens_1m()), "--out", out]) == 0
    columns = Dataset.open(out).manifest.item_text_columns
    for recipe in RECIPES:
        if recipe.stem.startswith("ml1m"):
            Template.for_items(load_config(recipe).template, columns)
