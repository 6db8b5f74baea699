"""The frozen encoder: its file, its session, the sessions of the heads, and how one is exported."""
