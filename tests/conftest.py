import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("default")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A small prepared data set: 60 users, 40 interactions each."""
    from functools import partial

    from dti_dist.data.prepare.build import BuildOptions, build_dataset
    from dti_dist.data.prepare.synthetic import read_synthetic

    out = tmp_path_factory.mktemp("synthetic") / "data"
    read = partial(read_synthetic, users=60, items=48, interactions_per_user=40)
    build_dataset(read, str(out), BuildOptions())
    return out


@pytest.fixture(scope="session")
def uninterrupted(synthetic, tmp_path_factory):
    """20 steps of fp32 ZeRO-3 on two ranks, to compare with: the config and what it printed."""
    from tests.launching import train, write_config

    config = write_config(tmp_path_factory.mktemp("two") / "config.yaml", synthetic)
    return config, train(config, ranks=2)
