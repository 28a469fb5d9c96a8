"""Dynamic Target Isolation as visible intervals, and its execution on GPUs and CPUs."""
