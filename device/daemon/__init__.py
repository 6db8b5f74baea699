"""The daemon of an edge board: configuration, sources, the learning process, telemetry and the loop that joins them."""
