"""Speed, measured: each command compares ways of doing the same work, turn by turn in one run."""
