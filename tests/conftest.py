import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("default")
