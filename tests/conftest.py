import os
import shutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from filelock import FileLock
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
def made_once(tmp_path_factory):
    """``made_once(name, make)``: the folder that ``make(folder)`` filled, once for all workers.

    What lies in it is read, never written to: other workers read it at the same time.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name, make):
        folder = shared / name
        with FileLock(f"{folder}.lock"):
            if not (folder / "made").exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                (folder / "made").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def uninterrupted(synthetic, made_once):
    """20 steps of fp32 ZeRO-3 on two ranks, to compare with: the config and what it printed.

    Started by torchrun, so that the forks that most tests train in are compared with real starts.
    """
    from tests.launching import command, run, write_config

    def make(folder):
        config = write_config(folder / "config.yaml", synthetic)
        run([*command(2), str(config)], folder / "log")

    folder = made_once("uninterrupted", make)
    return folder / "config.yaml", (folder / "log").read_text()
