"""Adaptor heads: their specification, search space, proxies, training, quantisation and archive format.

Rules of this room:

1. A leaf: it imports no other room, and works on plain arrays and tensors.
2. It knows nothing of streams, domains, messages or disks. Bytes come in and go out; others store them.
3. torch may be imported here, but the files that the inference process uses do without it, so that importing
   them stays cheap on a board.
4. Randomness comes from a seed passed in.
"""
