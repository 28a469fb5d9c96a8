"""dti-dist with processor time for its clock, which other jobs on the machine hardly change.

python tests/reporting/cpu_clock.py plan CONFIG --gpus 1 --calibrate
torchrun --nproc-per-node 2 tests/reporting/cpu_clock.py train CONFIG training.log_every=1
"""

import time

time.perf_counter = time.process_time  # before anything imports it by name

from dti_dist import cli  # noqa: E402

if __name__ == "__main__":
    cli.run()
