"""The learning process: one job in a process of its own, as bytes in and out."""
