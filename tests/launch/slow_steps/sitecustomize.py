"""On PYTHONPATH: each training step takes DTI_DIST_TEST_STEP_S seconds longer, and no core."""

import importlib.abc
import importlib.util
import os
import sys
import time


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "dti_dist.training.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def with_slow_steps(module):
            execute(module)
            take_step = module.take_step

            def slow_step(*arguments):
                time.sleep(float(os.environ["DTI_DIST_TEST_STEP_S"]))
                return take_step(*arguments)

            module.take_step = slow_step

        spec.loader.exec_module = with_slow_steps
        return spec


if "DTI_DIST_TEST_STEP_S" in os.environ:
    sys.meta_path.insert(0, _Finder())
