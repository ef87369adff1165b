"""Kernels for paged sequence memory: one contract an op, one file a backend. Needs only jax; imports nothing of
kvlab."""
