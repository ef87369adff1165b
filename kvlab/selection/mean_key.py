"""Pages by their average key (MoBA, arXiv 2502.13189)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvlab.ledger.states import ArraySpec
from kvlab.schema import choice
from kvlab.selection.base import Candidates, Selection
from kvlab.selection.quest import over_group


@dataclass(frozen=True)
class MeanKey(Selection):
    """Reads the pages whose mean key has the largest product with the query; of the query heads that share a KV head
    the `group` takes the largest product, or the mean. Half of Quest's index.

    Memory grows by key_dim * itemsize bytes a page and head."""

    name: ClassVar[str] = "mean_key"

    group: str = choice("max", ("max", "mean"))

    def arrays(self, num_kv_heads: int, key_dim: int, dtype: str) -> tuple[ArraySpec, ...]:
        return (ArraySpec("key_mean", (num_kv_heads, key_dim), dtype, per_page=True, is_statistics=True),)

    def note(self, keys: Float[Array, "*pages K S D"], used: Bool[Array, "*pages S"], dtype: Any) -> dict[str, Array]:
        counts = jnp.maximum(used.sum(axis=-1), 1)[..., None, None].astype(keys.dtype)
        return {"key_mean": (jnp.where(used[..., None, :, None], keys, 0).sum(axis=-2) / counts).astype(dtype)}

    def score(self, candidates: Candidates) -> Float[Array, "B T K N"]:
        products = jnp.einsum("btkgd,bnkd->btkgn", candidates.queries, candidates.index["key_mean"])
        return over_group(products, self.group)
