"""Tokens that stand out from those that follow (LagKV, arXiv 2504.04704)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Compression, Slots
from kvlab.schema import flag, integer


@dataclass(frozen=True)
class LagKV(Compression):
    """Behind the sinks, slots are cut into parts of `lag`. Each channel of a part is measured by the range that it has
    in the next part; a token scores by the standard deviation of that over channels, as a softmax over its part, keys
    and values averaged. By rank every part keeps as much as any other; `across` compares the scores themselves. The
    last complete part and what follows it come before everything else, the newest first: with fewer than two parts it
    is recency. Parts are of the slots there are, so that a second compaction cuts what the first has left anew."""

    name: ClassVar[str] = "lagkv"
    by_place: ClassVar[bool] = True

    lag: int = integer(128, 2, 65536)
    across: bool = flag(False)

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        num_slots = slots.keys.shape[2]
        num_parts = max(0, num_slots - self.sinks) // self.lag
        if num_parts < 2:
            return jnp.ones(slots.keys.shape[:3], jnp.float32)

        def parts_of(array: Array) -> Float[Array, "B K P L D"]:
            inside = array[:, :, self.sinks : self.sinks + num_parts * self.lag]
            return inside.reshape(*array.shape[:2], num_parts, self.lag, array.shape[3])

        found = (_standing_out(parts_of(slots.keys)) + _standing_out(parts_of(slots.values))) / 2
        if not self.across:
            found = _ranks(found) / self.lag
        complete = jnp.maximum(slots.stored - self.sinks, 0) // self.lag
        has_next = jnp.arange(num_parts - 1, dtype=jnp.int32)[None, :] + 1 < complete[:, None]
        found = jnp.where(has_next[:, None, :, None], found, 1)
        padding = (self.sinks, num_slots - self.sinks - (num_parts - 1) * self.lag)
        return jnp.pad(found.reshape(*found.shape[:2], -1), ((0, 0), (0, 0), padding), constant_values=1)


def _standing_out(parts: Float[Array, "B K P L D"]) -> Float[Array, "B K P-1 L"]:
    """How far each token of a part lies from the next part's range, as a softmax over the part. A channel in which the
    next part does not vary says nothing."""
    measured, following = parts[:, :, :-1], parts[:, :, 1:]
    low, high = following.min(axis=3, keepdims=True), following.max(axis=3, keepdims=True)
    varies = high > low
    relative = jnp.where(varies, (measured - low) / jnp.where(varies, high - low, 1), 0)
    deviation = relative.std(axis=-1, ddof=min(1, relative.shape[-1] - 1))
    weights = jnp.exp(deviation - deviation.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _ranks(scores: Float[Array, "*part L"]) -> Float[Array, "*part L"]:
    """0 for the lowest of each part, L - 1 for the highest; the newer of two equal ones is higher."""
    order = jnp.argsort(scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.float32)
