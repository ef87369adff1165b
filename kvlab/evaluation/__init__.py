"""Evaluation: quality through the memory it would be served from, and the bytes that this memory held."""
