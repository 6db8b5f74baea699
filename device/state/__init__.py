"""What a board has learned, as files: codec, store, and what is done to a stopped store."""
