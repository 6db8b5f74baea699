"""A fleet of real daemons in one process, and what it must show: `edgeear simulate --devices N`."""
