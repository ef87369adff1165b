"""Rows times the matrix of the group that each belongs to: the product that experts are made of."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from pallas_kernels.selection import this_device

MAX_BLOCK = 128
"""Rows of one group that are multiplied at a time: more of them do not make a product of matrices quicker."""

Rows = Float[Array, "N I"]
Matrices = Float[Array, "X I O"]
Sizes = Int32[Array, "X"]


def grouped_product(rows: Rows, matrices: Matrices, sizes: Sizes) -> Float[Array, "N O"]:
    """Row n times the matrix of its group, [N, O]. Rows are sorted by group; `sizes` [X] counts those of each, and sums
    to N. What a row becomes depends on no other row.

    On a CPU JAX makes of `jax.lax.ragged_dot` one product over all groups, of rows [X * I] with zeros in them, which
    takes 10 to 100 times as long (docs/findings/engine.md). A TPU has an instruction for it. On a GPU XLA may expand it
    likewise; that path was not measured.
    """
    if this_device().platform == "cpu":
        return by_blocks(rows, matrices, sizes)
    return jax.lax.ragged_dot(rows, matrices, sizes)


@jax.custom_vjp
def by_blocks(rows: Rows, matrices: Matrices, sizes: Sizes) -> Float[Array, "N O"]:
    """The same as a loop over blocks of rows of one group each; the last of a group may be partly empty. A matrix is
    read once a block, and none of a group without rows. Beside the result it holds the outputs of N rows and of at
    most a block for each group.

    It has a derivative of its own: JAX's would add a whole array of matrices up for every block.
    """
    return _multiplied(rows, matrices, sizes, axis=0)


def _multiplied(rows: Array, matrices: Matrices, sizes: Sizes, axis: int) -> Array:
    """Rows summed with that axis of their group's matrix."""
    num_outputs = matrices.shape[2 - axis]
    places, groups, is_used = _blocks(len(rows), sizes)

    def multiply(_: None, block: tuple[Array, Array, Array]) -> tuple[None, Array]:
        mine, group, used = block
        product = jax.lax.cond(
            used,
            lambda: jax.lax.dot_general(
                rows.at[mine].get(mode="fill", fill_value=0),
                jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False),
                (((1,), (axis,)), ((), ())),
            ),
            lambda: jnp.zeros((len(mine), num_outputs), rows.dtype),
        )
        return None, product

    _, products = jax.lax.scan(multiply, None, (places, groups, is_used))
    return jnp.zeros((len(rows), num_outputs), rows.dtype).at[places].set(products, mode="drop")


def _forward(rows: Rows, matrices: Matrices, sizes: Sizes) -> tuple[Array, tuple[Array, Array, Array]]:
    return by_blocks(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, None]:
    """Of rows the same product with matrices turned around; of a matrix the sum over its group's blocks."""
    rows, matrices, sizes = kept
    places, groups, is_used = _blocks(len(rows), sizes)

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        mine, group, used = block
        inputs, outputs = (part.at[mine].get(mode="fill", fill_value=0) for part in (rows, gradient))
        product = jax.lax.dot_general(inputs, outputs, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return total.at[group].add(jnp.where(used, product, 0)), None

    total, _ = jax.lax.scan(add, jnp.zeros(matrices.shape, jnp.float32), (places, groups, is_used))
    return _multiplied(gradient, matrices, sizes, axis=1), total.astype(matrices.dtype), None


by_blocks.defvjp(_forward, _backward)


def _blocks(num_rows: int, sizes: Sizes) -> tuple[Array, Array, Array]:
    """Blocks of rows: the places of each [M, block_len], `num_rows` where it has none, its group [M], and whether it
    has any rows [M]."""
    num_groups = len(sizes)
    block_len = block_len_of(num_rows, num_groups)
    # Of groups with n_x rows there are sum(ceil(n_x / block_len)) blocks, at most so many:
    num_blocks = num_rows if block_len == 1 else num_rows // block_len + min(num_groups, num_rows)
    counts = (sizes + block_len - 1) // block_len
    block_ends, row_ends = jnp.cumsum(counts), jnp.cumsum(sizes)
    numbers = jnp.arange(num_blocks, dtype=jnp.int32)
    groups = jnp.minimum(jnp.searchsorted(block_ends, numbers, side="right"), num_groups - 1)
    first = (row_ends - sizes)[groups] + (numbers - (block_ends - counts)[groups]) * block_len
    places = first[:, None] + jnp.arange(block_len, dtype=jnp.int32)[None, :]
    is_used = numbers < block_ends[-1]
    is_row = (places < row_ends[groups][:, None]) & is_used[:, None]
    return jnp.where(is_row, places, num_rows), groups, is_used


def block_len_of(num_rows: int, num_groups: int) -> int:
    """Rows of a block: a power of two, of about half the size that groups have on average."""
    half = max(1, num_rows // (2 * num_groups))
    return min(MAX_BLOCK, 1 << (half - 1).bit_length())
