"""The engine: running a model over its memory, one planned step at a time."""
