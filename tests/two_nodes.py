"""``tests/two_nodes.py FOLDER ENDPOINT MODULE …`` on four ranks: those of two nodes.

Each goes on as ``python -m MODULE …`` would there: it has the hub's cache of its node, and an
address of the hub of its own.
"""

import os
import runpy
import sys

from huggingface_hub import constants

if __name__ == "__main__":
    _, folder, endpoint, module, *arguments = sys.argv
    rank, of_node = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) // 2
    os.environ |= {
        "LOCAL_RANK": str(rank % of_node),
        "LOCAL_WORLD_SIZE": str(of_node),
    }
    # As HF_HOME and HF_ENDPOINT would: a fork has imported huggingface_hub, which reads them then.
    constants.HF_HUB_CACHE = f"{folder}/node-{rank // of_node}/hub"
    constants.ENDPOINT = f"{endpoint}rank-{rank}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = (
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
