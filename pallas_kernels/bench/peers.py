"""Others who attend: those that are not installed, or cannot, say so when they are made.

Dense rows, and cuDNN's own pool, are the first table's in every call: where a problem is small they stay in the cache
of the second level, which ours never find there. PyTorch is timed from outside, its calls queued one behind the other.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.bench.clock import is_accelerated
from pallas_kernels.bench.inputs import Attend, Inputs, Shape, dense, plain


def jax_paged(problem: Shape, inputs: Inputs) -> Attend:
    """jax's own kernel (Triton, deprecated): pages of all heads side by side, no lists by head, one query."""
    from jax.experimental.pallas.ops.gpu import paged_attention as peer

    if problem.num_queries > 1 or problem.keep < 1:
        raise NotImplementedError("takes one query, and one list for each sequence")
    pools = tuple(pool.swapaxes(0, 1) for pool in plain(inputs))
    scale, splits = problem.dim**-0.5, math.gcd(16, problem.table_len)
    block = math.gcd(8, problem.table_len // splits)

    def run(queries: Array, table: Array, starts: Array, given: Any) -> Array:
        del starts
        (keys, values), lens = given
        rows = (queries[:, 0] * scale).astype(queries.dtype)
        return peer.paged_attention(rows, keys, values, table, lens, k_splits=splits, pages_per_compute_block=block)[
            :, None
        ]

    return Attend(run, (pools, inputs.lens))


def jax_decode(problem: Shape, inputs: Inputs) -> Attend:
    """jax's dense decode kernel (Triton)."""
    from jax.experimental.pallas.ops.gpu import decode_attention as peer

    if problem.num_queries > 1:
        raise NotImplementedError("takes one query")

    def run(queries: Array, table: Array, starts: Array, given: Any) -> Array:
        del table, starts
        (keys, values), lens = given
        return peer.gqa(queries[:, 0], keys, values, kv_seq_len=lens)[:, None]

    return Attend(run, (dense(problem, inputs), inputs.lens))


def cudnn_dense(problem: Shape, inputs: Inputs) -> Attend:
    """cuDNN's fused attention over dense rows, through `jax.nn`."""
    if problem.num_queries > 1 and len(set(problem.lengths)) > 1:
        raise NotImplementedError("takes chunks at one place of all rows")

    def run(queries: Array, table: Array, starts: Array, given: Any) -> Array:
        del table, starts
        (keys, values), lens, positions = given
        attend = partial(jax.nn.dot_product_attention, queries, keys, values, implementation="cudnn")
        if problem.is_whole:
            return attend(is_causal=True)
        if problem.num_queries == 1:
            return attend(key_value_seq_lengths=lens)
        seen = jnp.arange(keys.shape[1])[None, :] <= positions[0][:, None]
        return attend(mask=seen[None, None])

    return Attend(run, (dense(problem, inputs), inputs.lens, inputs.positions))


def _of_torch(problem: Shape, inputs: Inputs) -> list[Any]:
    """Queries, keys and values [B, heads, tokens, D] as PyTorch's tensors. Raises NotImplementedError for what it has
    no plain call."""
    import torch  # pyright: ignore[reportMissingImports]

    if len(set(problem.lengths)) > 1 or not (problem.num_queries == 1 or problem.is_whole):
        raise NotImplementedError("takes rows of equal length, and one query or all")
    return [torch.from_dlpack(array.swapaxes(1, 2)) for array in (inputs.queries, *dense(problem, inputs))]


def torch_sdpa(problem: Shape, inputs: Inputs) -> Attend:
    """PyTorch's scaled_dot_product_attention over dense rows of equal length, in its own runtime."""
    import torch  # pyright: ignore[reportMissingImports]

    tensors = _of_torch(problem, inputs)

    def run(queries: Array, table: Array, starts: Array, given: Any) -> Any:
        del queries, table, starts
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*given, enable_gqa=True, is_causal=problem.num_queries > 1).transpose(1, 2)

    return Attend(run, tensors, _torch_waits())


def torch_flex(problem: Shape, inputs: Inputs) -> Attend:
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

    def run(queries: Array, table: Array, starts: Array, given: Any) -> Any:
        del queries, table, starts
        return compiled(*given, enable_gqa=True, block_mask=seen).transpose(1, 2)

    return Attend(run, tensors, _torch_waits())


def _torch_waits() -> Callable[[], None]:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.synchronize if is_accelerated() else lambda: None


def cudnn_paged(problem: Shape, inputs: Inputs) -> Attend:
    """cuDNN's paged attention, which jax keeps private: its pool must hold just these sequences' blocks [P, page, K,
    D]."""
    from jax._src.cudnn import fused_attention_stablehlo as peer

    if problem.num_queries > 1 or problem.keep < 1 or len(set(problem.lengths)) > 1:
        raise NotImplementedError("takes one query, and rows of equal length that fill its pool")
    blocks = inputs.tables[0].reshape(-1)
    pools = tuple(pool[blocks].swapaxes(1, 2) for pool in plain(inputs))
    batch, length = inputs.tables.shape[1:]
    numbers = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, 1, length, 1)

    def run(queries: Array, table: Array, starts: Array, given: Any) -> Array:
        del table, starts
        (keys, values), lens, numbers = given
        return peer.paged_attention(
            queries, keys, values, jnp.ones_like(lens), lens, numbers, numbers, scale=problem.dim**-0.5,
            mask_type=peer.MaskType.PADDING,
        )  # fmt: skip

    return Attend(run, (pools, inputs.lens, numbers))


PEERS: dict[str, Callable[[Shape, Inputs], Attend]] = {
    "jax paged_attention": jax_paged,
    "jax decode_attention, dense": jax_decode,
    "cuDNN, paged": cudnn_paged,
    "cuDNN, dense": cudnn_dense,
    "torch SDPA, dense": torch_sdpa,
    "torch FlexAttention, dense": torch_flex,
}
SLOW = ("torch FlexAttention, dense",)
"""Those that compile for half a minute."""
