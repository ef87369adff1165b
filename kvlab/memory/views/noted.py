"""Tokens in pages under a compression that remembers who was attended to: a view of two parts, the tokens and what the
method noted."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression import Attended
from kvlab.memory.pools import stored
from kvlab.memory.views.dealt import DealtTokens
from kvlab.memory.views.paged import lists_of
from kvlab.memory.views.sealed import SealedTokens
from kvlab.typing import HeadOutputs, Positions, Queries
from pallas_kernels.formats import Quantised
from pallas_kernels.masking import masked_softmax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NotedTokens:
    """`tokens` as they are without a method, and `noted`, its statistics: read before a step, written after it. A step
    of a second pass `listens`: see `Compression.listen`."""

    method: Any = field(metadata={"static": True})
    tokens: Any
    noted: Any
    listens: bool = field(default=False, metadata={"static": True})

    @classmethod
    def of_parts(cls, method: Any, parts: Mapping[str, Any], *, listens: bool = False) -> Self:
        """From the views of the parts."""
        return cls(method, parts[""], parts["noted"], listens)

    def parts(self) -> dict[str, Any]:
        """The views of the parts, by the names that a compression gives them."""
        is_joined = isinstance(self.tokens, DealtTokens | SealedTokens)
        tokens = self.tokens.parts() if is_joined else {"": self.tokens}
        return {**tokens, "noted": self.noted}

    def append(self, **tokens: Array) -> Self:
        return replace(self, tokens=self.tokens.append(**tokens))

    def attend(
        self, queries: Queries, positions: Positions, *, scale: float | None = None, soft_cap: float | None = None
    ) -> tuple[HeadOutputs, Self]:
        outputs, tokens = self.tokens.attend(queries, positions, scale=scale, soft_cap=soft_cap)
        num_tokens, dim = queries.shape[1], queries.shape[3]
        scaled = queries.astype(jnp.float32) * (dim**-0.5 if scale is None else scale)
        slots = tokens.query_slots(num_tokens)

        def weigh() -> Float[Array, "B T H S"]:
            return paged_weights(tokens, scaled, slots, soft_cap)

        seen = Attended(scaled, positions, slots, self.noted.valid(num_tokens), weigh)
        note = self.method.listen if self.listens else self.method.observe
        noted = note(self.noted.read(), seen)
        return outputs, replace(self, tokens=tokens, noted=self.noted.write(noted))


def gathered(state: Any, pool: Any, name: str, pages: Array) -> Float[Array, "B K S D"]:
    """An array's slots in the pages [B, N] of each sequence, in their order, in float32."""
    tiles = jax.tree.map(lambda array: array[pages], stored(state, pool, name))
    tiles = tiles.values() if isinstance(tiles, Quantised) else tiles
    batch, _, heads = tiles.shape[:3]
    return tiles.astype(jnp.float32).transpose(0, 2, 1, 3, 4).reshape(batch, heads, -1, tiles.shape[-1])


def paged_weights(tokens: Any, queries: Queries, slots: Positions, soft_cap: float | None) -> Float[Array, "B T H S"]:
    """The softmax weights of scaled queries over the slots of a sequence's pages: what attention kernels do not give
    back. Keys are gathered, which reads them once more."""
    lists = lists_of(tokens.plan)
    keys = gathered(tokens.state, tokens.pool, "keys", lists.table)
    batch, num_tokens, num_heads, dim = queries.shape
    asked = queries.reshape(batch, num_tokens, keys.shape[1], -1, dim)
    places = jnp.arange(keys.shape[2], dtype=jnp.int32)[None, None, :]
    seen = tokens.state.visible.sees(slots[:, :, None], places) & (places < tokens.slot_lens[:, None, None])
    keys = jnp.where(seen.any(axis=1)[:, None, :, None], keys, 0)
    scores = jnp.einsum("btkgd,bksd->bkgts", asked, keys, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights, _ = masked_softmax(scores, seen[:, None, None])
    return weights.transpose(0, 3, 1, 2, 4).reshape(batch, num_tokens, num_heads, -1)
