"""Others who attend, each as a function of queries and a table: those that are not installed, or cannot, say so when they are made."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.bench.clock import is_accelerated
from pallas_kernels.bench.paged import Attend, Inputs, Problem, dense, plain


def jax_paged(problem: Problem, inputs: Inputs) -> Attend:
    """jax's own kernel (Triton, deprecated): pages of all heads side by side, no lists by head, one query."""
    from jax.experimental.pallas.ops.gpu import paged_attention as peer

    if problem.num_queries > 1 or problem.keep < 1:
        raise NotImplementedError("takes one query, and one list for each sequence")
    keys, values = (pool.swapaxes(0, 1) for pool in plain(inputs))
    scale, splits = problem.dim**-0.5, math.gcd(16, problem.table_len)
    block = math.gcd(8, problem.table_len // splits)

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del starts
        rows = (queries[:, 0] * scale).astype(queries.dtype)
        return peer.paged_attention(
            rows, keys, values, table, inputs.lens, k_splits=splits, pages_per_compute_block=block
        )[:, None]

    return run


def jax_decode(problem: Problem, inputs: Inputs) -> Attend:
    """jax's dense decode kernel (Triton)."""
    from jax.experimental.pallas.ops.gpu import decode_attention as peer

    if problem.num_queries > 1:
        raise NotImplementedError("takes one query")
    keys, values = dense(problem, inputs)

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del table, starts
        return peer.gqa(queries[:, 0], keys, values, kv_seq_len=inputs.lens)[:, None]

    return run


def cudnn_dense(problem: Problem, inputs: Inputs) -> Attend:
    """cuDNN's fused attention over dense rows, through `jax.nn`."""
    keys, values = dense(problem, inputs)
    if problem.num_queries > 1 and len(set(problem.lengths)) > 1:
        raise NotImplementedError("takes chunks at one place of all rows")

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del table, starts
        if problem.is_whole:
            return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="cudnn")
        if problem.num_queries == 1:
            return jax.nn.dot_product_attention(
                queries, keys, values, key_value_seq_lengths=inputs.lens, implementation="cudnn"
            )
        seen = jnp.arange(keys.shape[1])[None, :] <= inputs.positions[0][:, None]
        return jax.nn.dot_product_attention(queries, keys, values, mask=seen[None, None], implementation="cudnn")

    return run


def _of_torch(problem: Problem, inputs: Inputs) -> list[Any]:
    """Queries, keys and values [B, heads, tokens, D] as PyTorch's tensors. Raises NotImplementedError for what it has no plain call."""
    import torch  # pyright: ignore[reportMissingImports]

    if len(set(problem.lengths)) > 1 or not (problem.num_queries == 1 or problem.is_whole):
        raise NotImplementedError("takes rows of equal length, and one query or all")
    return [torch.from_dlpack(one.swapaxes(1, 2)) for one in (inputs.queries, *dense(problem, inputs))]


def torch_sdpa(problem: Problem, inputs: Inputs) -> Attend:
    """PyTorch's scaled_dot_product_attention over dense rows of equal length, in its own runtime."""
    import torch  # pyright: ignore[reportMissingImports]

    tensors = _of_torch(problem, inputs)

    def run(queries: Array, table: Array, starts: Array) -> Any:
        del queries, table, starts
        attend = torch.nn.functional.scaled_dot_product_attention
        found = attend(*tensors, enable_gqa=True, is_causal=problem.num_queries > 1)
        if found.is_cuda:
            torch.cuda.synchronize()
        return found.transpose(1, 2)

    run.own_runtime = True  # type: ignore[attr-defined]
    return run


def torch_flex(problem: Problem, inputs: Inputs) -> Attend:
    """PyTorch's FlexAttention over dense rows of equal length, compiled, in its own runtime."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
        create_block_mask,
        flex_attention,
    )

    tensors, num_queries = _of_torch(problem, inputs), problem.num_queries
    if not is_accelerated():
        raise NotImplementedError("is compiled for GPUs")
    seen = None
    if num_queries > 1:
        seen = create_block_mask(lambda b, h, query, key: query >= key, None, None, num_queries, num_queries)
    compiled = torch.compile(flex_attention)

    def run(queries: Array, table: Array, starts: Array) -> Any:
        del queries, table, starts
        found = compiled(*tensors, enable_gqa=True, block_mask=seen)
        torch.cuda.synchronize()
        return found.transpose(1, 2)

    run.own_runtime = True  # type: ignore[attr-defined]
    return run


def cudnn_paged(problem: Problem, inputs: Inputs) -> Attend:
    """cuDNN's paged attention, which jax keeps private: its pool must hold just these sequences' blocks [P, page, K, D]."""
    from jax._src.cudnn import fused_attention_stablehlo as peer

    if problem.num_queries > 1 or problem.keep < 1 or len(set(problem.lengths)) > 1:
        raise NotImplementedError("takes one query, and rows of equal length that fill its pool")
    blocks = inputs.tables[0].reshape(-1)
    keys, values = (pool[blocks].swapaxes(1, 2) for pool in plain(inputs))
    batch, length = inputs.tables.shape[1:]
    numbers = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, 1, length, 1)

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del table, starts
        ones = jnp.ones(batch, jnp.int32)
        return peer.paged_attention(
            queries, keys, values, ones, inputs.lens, numbers, numbers, scale=problem.dim**-0.5,
            mask_type=peer.MaskType.PADDING,
        )  # fmt: skip

    return run


PEERS: dict[str, Callable[[Problem, Inputs], Attend]] = {
    "jax paged_attention": jax_paged,
    "jax decode_attention, dense": jax_decode,
    "cuDNN, paged": cudnn_paged,
    "cuDNN, dense": cudnn_dense,
    "torch SDPA, dense": torch_sdpa,
    "torch FlexAttention, dense": torch_flex,
}
