"""Benchmarks beside the code: `make bench-science` runs them, `make bench-page` writes docs/benchmarks.md.

Nothing in the four rooms imports this folder, and the wheel does not hold it. It imports the rooms through their public
functions, all of ours through `ours`, so that a changed method is measured without a change here.
"""
