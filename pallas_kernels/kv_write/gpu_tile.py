"""What every kernel for GPUs does with a tile of 64 rows: turning them into numbers and scales, in registers."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import numbers, scales_of
from pallas_kernels.rounding import in_bytes, inverses
from pallas_kernels.tensor_cores import ROWS

STEP = 32
"""Columns that are turned into numbers at once."""


def stored(halves: list[Array], dtype: Any) -> Array:
    """Numbers as a payload holds them: two halves of dims in a byte."""
    if len(halves) == 1:
        return halves[0].astype(dtype)
    return in_bytes(*halves).astype(dtype)


@dataclass(kw_only=True)
class Tile:
    """Tokens in shared memory, and what they become."""

    tokens: Any
    """[64, D]."""
    format: str
    payload: Any = None
    """[64, W], of pages that are quantised."""
    is_tiled: bool = True
    """Whether both lie in shared memory as registers want them."""

    def each_stripe(self, do: Any, state: Any = None) -> Any:
        """`do(into, columns, state)` with columns of a payload, and those of the tokens that they hold: two where
        numbers are packed. A loop: what the compiler infers of a longer program takes minutes."""
        width = self.payload.shape[1]
        step = min(STEP, width)
        seconds = [width] if self.payload.dtype == jnp.uint8 else []

        def stripe(number, state):
            at = number * step
            return do(pl.ds(at, step), [pl.ds(first + at, step) for first in (0, *seconds)], state)

        return lax.fori_loop(0, width // step, stripe, state)

    def load(self, columns: Any) -> Array:
        return self.load_from(self.tokens, columns).astype(jnp.float32)

    def load_from(self, rows: Any, columns: Any) -> Array:
        return plgpu.load(rows.at[:, columns], layout=plgpu.Layout.WGMMA, optimized=self.is_tiled)

    def scales_by_token(self) -> Array:
        """[64]: of every row."""

        def larger(_, columns, largest):
            for half in columns:
                largest = jnp.maximum(largest, jnp.abs(self.load(half)).max(axis=1))
            return largest

        nothing = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        return scales_of(self.each_stripe(larger, nothing), self.format)

    def quantise_by_token(self, scale: Array, store: Any) -> None:
        """`store(columns, payload)` with stripes of what they become."""
        inverse = inverses(scale)

        def quantise(into, columns, _):
            halves = [
                numbers(self.load(half) * lax.broadcast_in_dim(inverse, (ROWS, half.size), [0]), self.format)
                for half in columns
            ]
            store(into, stored(halves, self.payload.dtype))

        self.each_stripe(quantise)
