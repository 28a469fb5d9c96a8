"""``python -m dti_dist COMMAND …``, for launchers that start a module on each rank."""

from dti_dist.cli import run

if __name__ == "__main__":
    run()
