"""``python -m dti_dist COMMAND …``, for launchers that start a module on each rank."""

import sys

from dti_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
