"""The link to firmware: a microcontroller that delivers sensor frames and receives updates.

Rules of this room:

1. Protocol code takes bytes and returns events. `device` opens ports, sockets and timers and passes them in.
2. Data from the peer is checked here. A broken frame is dropped and counted, never returned as a wrong array.
3. Imports reach down to `edgeear` and `adaptors`. torch is never imported.
"""
