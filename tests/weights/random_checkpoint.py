"""Checkpoints whose every number follows from a tensor's name: numpy alone, so that both sides draw the same
weights."""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...], scale: float = 0.3, norms_near: float = 1.0) -> np.ndarray:
    """The float32 tensor of that name: norms near one, decays and time steps in their usual ranges, the rest normal.

    A wide scale makes random models say many different tokens. `norms_near` 0 is for files that have norms less one,
    all but those of linear layers.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("A_log"):
        # Delta rules remember for longer: where only the newest key is left, the norm behind them divides by its chance
        # product with the query, and blows rounding up.
        values = np.log(rng.uniform(0.05, 1.0, shape) if "attn" in name else rng.uniform(1.0, 16.0, shape))
    elif name.endswith("dt_bias"):
        values = np.log(np.expm1(rng.uniform(1e-3, 1e-1, shape)))
    elif name.endswith("recurrent_param"):  # of RG-LRU: the inverse softplus of -log radius
        values = np.log(np.expm1(-np.log(rng.uniform(0.9, 0.999, shape))))
    elif name.endswith(("norm.weight", "layernorm.weight", "norm_f.weight", ".D")):
        values = (1 if "linear_attn" in name else norms_near) + 0.1 * rng.standard_normal(shape)
    else:
        values = scale * rng.standard_normal(shape)
    return values.astype(np.float32)


def prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt, from its length."""
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()
