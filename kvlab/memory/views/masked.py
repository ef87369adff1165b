"""Complete sequences of which each head sees only a part: the parallel form under the mask that compactions and
selections imply. What such a memory computes must be this, to rounding."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.memory.views.dense import weights_beside_sinks
from kvlab.memory.views.sealed import schemes
from kvlab.memory.views.whole import Appended, taken
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.formats import quantised
from pallas_kernels.masking import soft_capped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskedTokens(Appended):
    """Keys and values, or latent rows, of the call's own tokens. `gone_at` [B, K, T] is the length at which a head
    dropped a token: queries at positions from there on do not see it. `is_read` [B, K, T, T] says, of each
    layer that reads them in turn, which tokens each query read of those that it could see; None: all of them. `reader`
    is whose turn it is."""

    gone_at: Any = None
    is_read: Any = None
    reader: int = field(default=0, metadata={"static": True})

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        keys = self.pool["keys"]
        values = self.pool["values"] if "values" in self.pool else keys[..., : self.state.rank]
        num_tokens, num_kv_heads, dim = keys.shape[1:]
        grouped = queries.reshape(*queries.shape[:2], num_kv_heads, -1, dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        scores = soft_capped(scores * self.state.scale(dim), self.state.soft_cap)
        places = jnp.arange(num_tokens, dtype=jnp.int32)
        weights = weights_beside_sinks(scores, self._seen(places)[:, :, None], sink_logits)
        outputs = jnp.einsum("bkgts,bskd->btkgd", weights, values.astype(jnp.float32))
        outputs = outputs.reshape(*outputs.shape[:2], -1, values.shape[-1]).astype(queries.dtype)
        return outputs, replace(self, reader=self.reader + 1)

    def _seen(self, places: Array) -> Array:
        """[B, K, T, T] which tokens each query sees."""
        causal = self.state.visible.sees(places[:, None], places[None, :])
        seen = causal[None, None] & (places[None, None, :, None] < self.gone_at[:, :, None, :])
        return seen if self.is_read is None else seen & self.is_read[self.reader]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SealedMasked(MaskedTokens):
    """The same where pages are sealed: from the length `sealed_at` [B, K, T] on, a token is read as it was rounded
    together with the others of its page. `order` [B, K, S] are the positions of sealed tokens, page by page; past their
    end -1. `sealed` are what sealed pages gave back in that order, by array [B, K, S, D], as `given` is of what is not
    sealed."""

    order: Any = None
    sealed_at: Any = None
    sealed: Any = None
    rounding: Any = field(default=None, metadata={"static": True})
    page_size: int = field(default=1, metadata={"static": True})

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        exact = {name: self.pool[name].swapaxes(1, 2) for name in ("keys", "values")}  # [B, K, T, D]
        rounded, excess = self._rounded(exact)
        num_kv_heads, num_tokens, dim = exact["keys"].shape[1:]
        grouped = queries.reshape(*queries.shape[:2], num_kv_heads, -1, dim)
        keys, values = (
            jnp.concatenate([exact[name].astype(jnp.float32), rounded[name]], axis=2) for name in ("keys", "values")
        )
        scores = jnp.einsum("btkgd,bksd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        scores = soft_capped(scores * self.state.scale(dim), self.state.soft_cap)
        places = jnp.arange(num_tokens, dtype=jnp.int32)
        is_open = self._seen(places) & (places[None, None, :, None] < self.sealed_at[:, :, None, :])
        since = jnp.take_along_axis(self.sealed_at, jnp.maximum(self.order, 0), axis=2)
        is_sealed = (self.order >= 0)[:, :, None] & (places[None, None, :, None] >= since[:, :, None, :])
        seen = jnp.concatenate([is_open, is_sealed], axis=3)[:, :, None]
        weights = weights_beside_sinks(scores, seen, sink_logits)
        outputs = jnp.einsum("bkgts,bksd->btkgd", weights, values)
        outputs = outputs.reshape(*outputs.shape[:2], -1, values.shape[-1]).astype(queries.dtype)
        return outputs, replace(self, excess=excess, reader=self.reader + 1)

    def _rounded(self, exact: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        """Keys and values [B, K, S, D] of sealed tokens as sealed pages give them back; and as `taken` has it."""
        place = jnp.maximum(self.order, 0)[..., None]
        found, excess = {}, jnp.zeros(())
        for (name, array), scheme in zip(exact.items(), schemes(self.rounding), strict=True):
            tiles = jnp.take_along_axis(array, place, axis=2)
            tiles = tiles.reshape(*tiles.shape[:2], -1, self.page_size, tiles.shape[3])
            rounded = quantised(tiles, scheme).values()
            if self.sealed is not None:
                axis = -2 if scheme.per == "channel" else -1
                rounded, further = taken(tiles, rounded, self.sealed[name].reshape(tiles.shape), axis)
                excess = jnp.maximum(excess, further)
            found[name] = rounded.reshape(*self.order.shape, -1)
        return found, excess
