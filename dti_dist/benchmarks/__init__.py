"""Speed and quality, measured in comparisons; what is timed takes turns in one run."""
