"""One seed, folded by name: a new consumer of randomness does not shift the others."""

import zlib

import jax
from jax import Array


def named_key(seed: int, *names: str | int) -> Array:
    """The key of one consumer: `named_key(0, "data", "train")`. Names are hashed by CRC-32, integers taken as is."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return key
