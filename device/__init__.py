"""The shell: command line, configuration, daemon, messages, store, worker process and sources.

Rules of this room:

1. The only place with side effects: it reads clock, disk and network, and hands the core plain values.
2. The inference process never imports torch. `export`, `efficientnet` and `worker` are the learning side, and
   no module that serves predictions imports them.
3. Nothing becomes live except by the store's `commit`, and nothing stays live except by its `confirm`.
4. The command line starts without the optional packages; a command that needs one names the extra with it.
"""
