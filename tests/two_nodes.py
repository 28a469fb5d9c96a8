"""``torchrun --nproc-per-node 4 tests/two_nodes.py FOLDER ENDPOINT MODULE …``: ranks of two nodes.

Each goes on as ``python -m MODULE …`` would there: it has the hub's cache of its node, and an
address of the hub of its own.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    _, folder, endpoint, module, *arguments = sys.argv
    rank, of_node = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) // 2
    # Before huggingface_hub is imported: it reads them then.
    os.environ |= {
        "LOCAL_RANK": str(rank % of_node),
        "LOCAL_WORLD_SIZE": str(of_node),
        "HF_HOME": f"{folder}/node-{rank // of_node}",
        "HF_ENDPOINT": f"{endpoint}rank-{rank}",
    }
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
