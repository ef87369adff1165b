"""What queries still to come can be expected to attend to (Expected Attention, arXiv 2510.00636)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Attended, Compression, Noted, Shape, Slots, by_group
from kvlab.ledger.states import ArraySpec, PerToken
from kvlab.rotary import back, rotary_angles, rotate
from kvlab.schema import flag, integer, real
from pallas_kernels.masking import masked_softmax


@dataclass(frozen=True)
class ExpectedAttention(Compression):
    """Takes a head's queries, before their rotation, for normally distributed, rotates mean m and covariance C to the
    mean of the next `future` positions and keeps the slots with the largest expectation exp(m k + k C k / 2), as a
    softmax over the slots behind the sinks, averaged over the query heads of a group. With `values` that is multiplied
    by the length of the value; `epsilon` is added before. A soft cap is not part of the expectation.

    Queries of the first `sinks` tokens are left out of the statistics. These are D + D * D + 1 float32 numbers a query
    head and sequence, and follow every step, decoded tokens included."""

    name: ClassVar[str] = "expected"
    uses_readers: ClassVar[bool] = True

    future: int = integer(512, 1, 1 << 20)
    covariance: bool = flag(True)
    values: bool = flag(True)
    epsilon: float = real(0.0, 0.0, 1.0)

    def statistics(self, state: PerToken, shape: Shape) -> tuple[ArraySpec, ...]:
        assert state.readers is not None
        num_heads, dim = state.readers.num_heads, state.arrays[0].shape[1]
        mean = ArraySpec("mean", (num_heads, dim), "float32")
        scatter = [ArraySpec("scatter", (num_heads, dim, dim), "float32")] if self.covariance else []
        return mean, *scatter, ArraySpec("count", (1,), "float32")

    def observe(self, noted: Noted, seen: Attended) -> Noted:
        """Joins the step's mean and sum of squares about it with what there was (Chan et al.), so that nothing large
        is subtracted from anything large."""
        counted = seen.real & (seen.positions >= self.sinks)
        queries = jnp.where(counted[:, :, None, None], unrotated(seen), 0)
        before, new = noted["count"][:, 0], counted.sum(axis=1).astype(jnp.float32)
        total = jnp.maximum(before + new, 1)
        mean = queries.sum(axis=1) / jnp.maximum(new, 1)[:, None, None]
        apart = mean - noted["mean"]
        after = {
            "mean": noted["mean"] + apart * (new / total)[:, None, None],
            "count": (before + new)[:, None],
        }
        if self.covariance:
            centred = jnp.where(counted[:, :, None, None], queries - mean[:, None], 0)
            inside = jnp.einsum("bthd,bthe->bhde", centred, centred)
            between = jnp.einsum("bhd,bhe->bhde", apart, apart) * (before * new / total)[:, None, None, None]
            after["scatter"] = noted["scatter"] + inside + between
        return after

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        num_kv_heads, num_slots = slots.keys.shape[1:3]
        turn = _MeanTurn.of(slots, self.future)
        mean = by_group(turn(slots.noted["mean"]), num_kv_heads)
        expected = jnp.einsum("bkgd,bknd->bkgn", mean, slots.keys)
        if self.covariance:
            count = jnp.maximum(slots.noted["count"], 1)[:, :, None, None]
            half = turn(slots.noted["scatter"] / count)
            covariance = by_group(turn(half.swapaxes(2, 3)), num_kv_heads)
            expected += jnp.einsum("bknd,bkgde,bkne->bkgn", slots.keys, covariance, slots.keys) / 2
        behind = slots.valid & (jnp.arange(num_slots, dtype=jnp.int32)[None, :] >= self.sinks)
        weights = masked_softmax(expected, jnp.broadcast_to(behind[:, None, None, :], expected.shape))[0].mean(axis=2)
        if not self.values:
            return weights
        return (weights + self.epsilon) * jnp.linalg.norm(slots.values, axis=-1)


def unrotated(seen: Attended) -> Float[Array, "B T H D"]:
    """Queries as they were before their rotation, scaled."""
    rotary = seen.readers.rotary if seen.readers is not None else None
    if rotary is None:
        return seen.queries
    cos, sin = rotary_angles(seen.positions, rotary.dim, rotary.base, rotary.scaling)
    return rotate(seen.queries, *back(cos, sin, rotary.scaling), rotary.start)


class _MeanTurn(NamedTuple):
    """The mean of the rotations to positions that are still to come: cosines and sines [B, 1, 1, dim / 2]. Turning by
    it is linear, but no rotation: what turns fast shrinks."""

    cos: Array | None
    sin: Array | None
    start: int = 0

    @classmethod
    def of(cls, slots: Slots, future: int) -> "_MeanTurn":
        """To the `future` positions from each sequence's length on."""
        rotary = slots.readers.rotary if slots.readers is not None else None
        if rotary is None:
            return cls(None, None)
        positions = slots.lengths[:, None] + jnp.arange(future, dtype=jnp.int32)[None, :]
        angles = rotary_angles(positions, rotary.dim, rotary.base, rotary.scaling)
        cos, sin = (each.mean(axis=1, keepdims=True) for each in angles)
        return cls(cos, sin, rotary.start)

    def __call__(self, x: Float[Array, "B H *E D"]) -> Float[Array, "B H *E D"]:
        """Turns the last axis of every row."""
        if self.cos is None or self.sin is None:
            return x
        rows = x.reshape(x.shape[0], -1, 1, x.shape[-1])
        return rotate(rows, self.cos, self.sin, self.start).reshape(x.shape)
