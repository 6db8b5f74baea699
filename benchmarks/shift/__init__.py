"""The guarantees of verdicts and shifts, measured: `make bench-shift` runs `python -m benchmarks.shift`."""
