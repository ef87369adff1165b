"""The lightning indexer (DeepSeek Sparse Attention, arXiv 2512.02556): what a query thinks of each token's index key,
which tokens it selects by that, and how far its opinion is from the attention that it stands for.

    I_ts = sum_j w_tj relu(q_tj . k_s)        over the index heads j
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


class IndexQueries(NamedTuple):
    """A step's queries of an index: several heads, and the weight of each."""

    queries: Float[Array, "B T J I"]
    weights: Float[Array, "B T J"]


class WarmUp(NamedTuple):
    """How an indexer is trained: its divergence from attention counts `weight` times beside the loss, and the first
    `dense_share` of the training's steps attend to everything."""

    weight: float
    dense_share: float


def index_scores(asked: IndexQueries, index: Float[Array, "B S I"]) -> Float[Array, "B T S"]:
    """I, in float32 and in full precision, since a choice hangs on it. NaN where the index holds NaN."""
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    products = jnp.einsum("btji,bsi->btjs", asked.queries, index, **exact)
    weights = asked.weights.astype(jnp.float32)
    return jnp.einsum("btj,btjs->bts", weights, jax.nn.relu(products), precision=jax.lax.Precision.HIGHEST)


def select(scores: Float[Array, "B T S"], seen: Bool[Array, "B T S"], num_selected: int) -> Bool[Array, "B T S"]:
    """Which tokens each query selects: of those that it sees, the `num_selected` with the highest scores, the newer one
    where two are equal. Tokens lie in the order of their positions. What a query does not see may hold NaN.

    A relu gives exact zeros, so equal scores are common; the order among them is said here, and is no sort's."""
    if num_selected >= scores.shape[2]:
        return seen
    scores = jnp.where(seen, scores, -jnp.inf)
    lowest = jax.lax.top_k(scores, num_selected)[0][..., -1:]
    above, equal = scores > lowest, (scores == lowest) & seen
    newer = jnp.cumsum(equal[..., ::-1], axis=2, dtype=jnp.int32)[..., ::-1]  # of the equal ones, itself among them
    return above | (equal & (newer <= num_selected - above.sum(axis=2, keepdims=True, dtype=jnp.int32)))


def select_blocks(
    scores: Float[Array, "B T S"], seen: Bool[Array, "B T S"], num_selected: int, block: int
) -> Bool[Array, "B T S"]:
    """Which tokens each query selects, by whole blocks: block n is [n * block, (n + 1) * block). Of the num_selected //
    block blocks the first one and the query's own are always among them; the others are those of the highest score of
    a token that it sees (MiniMax-M3), the newer one where two are equal. The first token of the axis is token 0."""
    num_tokens = scores.shape[2]
    padding = [(0, 0), (0, 0), (0, -num_tokens % block)]
    visible = jnp.pad(seen, padding).reshape(*seen.shape[:2], -1, block)
    by_block = jnp.pad(jnp.where(seen, scores, -jnp.inf), padding, constant_values=-jnp.inf)
    by_block = by_block.reshape(visible.shape).max(axis=3)
    is_seen = visible.any(axis=3)
    numbers = jnp.arange(is_seen.shape[2], dtype=jnp.int32)[None, None, :]
    own = jnp.where(is_seen, numbers, -1).max(axis=2, keepdims=True)
    by_block = jnp.where((numbers == 0) | (numbers == own), jnp.inf, by_block)
    blocks = select(by_block, is_seen, num_selected // block)
    return jnp.repeat(blocks, block, axis=2)[..., :num_tokens] & seen


def divergence(
    weights: Float[Array, "B K G T S"], scores: Float[Array, "B T S"], selected: Bool[Array, "B T S"]
) -> Float[Array, ""]:
    """KL(p || softmax of the scores over what is selected), the mean over queries, in nats. p is the attention of all
    heads together, a share of one; nothing of it is trained by this."""
    together = jax.lax.stop_gradient(weights.sum(axis=(1, 2)))
    together = jnp.where(selected, together, 0)
    total = together.sum(axis=2, keepdims=True)
    target = together / jnp.where(total == 0, 1, total)
    guessed = jax.nn.log_softmax(jnp.where(selected, scores, -1e30), axis=2)
    counts = target > 0
    terms = jnp.where(counts, target * (jnp.log(jnp.where(counts, target, 1)) - jnp.where(counts, guessed, 0)), 0)
    return terms.sum(axis=2).mean()
