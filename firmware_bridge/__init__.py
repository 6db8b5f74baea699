"""The link to firmware: a microcontroller front-end that delivers sensor frames and receives updates.

Rules of this room:

1. Protocol code takes bytes and returns events. `device` opens ports, sockets and timers and passes them in.
2. What the peer sends is checked here. A broken frame is `edgeear.errors.FormatError`, never a wrong array.
3. Imports reach down to `edgeear` and `adaptors`. torch is never imported.
"""
