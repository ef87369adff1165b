"""Causal attention of whole sequences: the parallel form, for training and scoring."""

from jax import Array

from pallas_kernels.flash_attention import reference
from pallas_kernels.masking import Scoring
from pallas_kernels.selection import select
from pallas_kernels.typing import Float
from pallas_kernels.visible import CAUSAL, Visible

IMPLEMENTATIONS = {"reference": reference.flash_attention}


def flash_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K Dv"],
    *,
    visible: Visible = CAUSAL,
    soft_cap: float | None = None,
    scale: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"]:
    """Attention of token t over the tokens of [0, t] that are `visible`; options as in `paged_attention`. A
    head's sink logit takes part in its softmax and has no value (gpt-oss, arXiv 2508.10925).

    Softmax in float32. Raises ValueError for shapes that do not fit together, options out of range and an unavailable
    `implementation`.
    """
    scoring = Scoring(queries.shape[-1] ** -0.5 if scale is None else scale, soft_cap, visible)
    batch, num_tokens, _, dim = queries.shape
    for name, array, wanted in (("keys", keys, (batch, num_tokens, dim)), ("values", values, (batch, num_tokens))):
        found = (*array.shape[:2], *array.shape[3:])[: len(wanted)]
        if array.ndim != 4 or found != wanted or array.shape[2] != keys.shape[2]:
            raise ValueError(f"{name} = {array.shape}: must be [B, T, K, D] that fit queries {queries.shape} and keys")
    if queries.shape[2] % keys.shape[2]:
        raise ValueError(f"num_heads = {queries.shape[2]}: must be a multiple of num_kv_heads = {keys.shape[2]}")
    if sink_logits is not None and sink_logits.shape != queries.shape[2:3]:
        raise ValueError(f"sink_logits = {sink_logits.shape}: must be {queries.shape[2:3]}, one a query head")
    _, run = select("flash_attention", implementation, IMPLEMENTATIONS)
    return run(queries, keys, values, scoring, sink_logits)
