"""Measurements: the continual protocol, and the benches of run time, search and novelty."""
