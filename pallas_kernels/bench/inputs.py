"""What is asked of attention over pages: its shape, arrays for it, and who attends."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.bench.clock import is_accelerated
from pallas_kernels.formats import FORMATS, Stored, quantised
from pallas_kernels.paged_attention import Lists, Pages, api
from pallas_kernels.visible import NOWHERE

CACHE_BYTES = 120_000_000
"""Twice an H200's second-level cache: inputs are drawn from at least so much memory, so that none is found there."""


@dataclass(frozen=True)
class Shape:
    """One launch: sequences of `lengths` tokens stored, the last `num_queries` of each being asked. `keep` is the part
    of its pages that each KV head selects. `latent_dim`, where there is one, says that values are the first so many
    dims of keys, which a kernel could fetch once (MLA, arXiv 2405.04434). A `format` has scales by token."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    dim: int = 128
    page_size: int = 64
    num_queries: int = 1
    keep: float = 1.0
    latent_dim: int = 0
    format: str = "bfloat16"

    @property
    def value_dim(self) -> int:
        """Dims of values."""
        return self.latent_dim or self.dim

    @property
    def is_whole(self) -> bool:
        """Whether every token of every sequence is asked: attention without memory."""
        return set(self.lengths) == {self.num_queries}

    @property
    def table_len(self) -> int:
        """Pages that a sequence, or a KV head, lists at most."""
        return max(1, round(self.keep * -(-max(self.lengths) // self.page_size)))

    @property
    def live_bytes(self) -> int:
        """Keys and values that must be read, once."""
        tokens = sum(min(length, self.table_len * self.page_size) for length in self.lengths)
        dims = self.dim if self.latent_dim else self.dim + self.value_dim
        return tokens * self.num_kv_heads * bytes_of(dims, self.format)

    @property
    def flops(self) -> int:
        """Of both products, for the tokens that each query sees."""
        seen = sum(
            self.num_queries * length - self.num_queries * (self.num_queries - 1) // 2 for length in self.lengths
        )
        return int(2 * self.keep * seen * self.num_heads * (self.dim + self.value_dim))


def bytes_of(dims: int, format: str) -> int:
    """Bytes of so many numbers of a token and head, of keys and values; in a format with their two scales."""
    return dims * {"bfloat16": 16, "int4": 4}.get(format, 8) // 8 + (format in FORMATS) * 2 * 4


class Inputs(NamedTuple):
    """The arguments of one problem, with as many tables as keep their pages out of the cache."""

    queries: Array
    pages: Pages
    tables: Array
    starts: Array
    positions: Array
    lens: Array


def make_inputs(problem: Shape, seed: int = 0) -> Inputs:
    """Pages in random order; keys and values drawn on the device."""
    rng = np.random.default_rng(seed)
    num_tables = max(1, min(64, math.ceil(CACHE_BYTES / problem.live_bytes))) if is_accelerated() else 2
    batch, heads = len(problem.lengths), problem.num_kv_heads
    by_head = problem.keep < 1
    lists = (num_tables, batch, heads) if by_head else (num_tables, batch)
    per_sequence = -(-max(problem.lengths) // problem.page_size)
    num_pages = 1 + num_tables * batch * (problem.table_len if by_head else per_sequence)
    starts = np.full((*lists, problem.table_len), NOWHERE, np.int32)
    tables = np.zeros_like(starts)
    order = iter(rng.permutation(np.arange(1, num_pages)).reshape(num_tables * batch, -1))
    for number in range(num_tables):
        for row, length in enumerate(problem.lengths):
            held, pages = -(-length // problem.page_size), next(order)
            for head in range(heads) if by_head else (slice(None),):
                kept = np.arange(held)
                if by_head:  # the same page serves every head, with another part of the sequence in each
                    kept = np.sort(rng.permutation(held)[: problem.table_len])
                place = (number, row, head) if by_head else (number, row)
                starts[place][: len(kept)] = kept * problem.page_size
                tables[place][: len(kept)] = pages[: len(kept)]
    shape = (num_pages, heads, problem.page_size, problem.dim)
    keys = jax.random.split(jax.random.key(seed), 3)
    queries = jax.random.normal(keys[0], (batch, problem.num_queries, problem.num_heads, problem.dim), jnp.bfloat16)
    lens = np.array(problem.lengths, np.int32)
    positions = lens[:, None] - problem.num_queries + np.arange(problem.num_queries, dtype=np.int32)[None]

    def pool(key: Array) -> Stored:
        made = jax.random.normal(key, shape, jnp.bfloat16)
        return made if problem.format == "bfloat16" else jax.jit(quantised, static_argnums=1)(made, problem.format)

    lists, stored = map(jnp.asarray, (tables, starts, positions, lens)), pool(keys[1])
    if problem.latent_dim:
        return Inputs(queries, Pages(stored, value_dim=problem.latent_dim), *lists)
    return Inputs(queries, Pages(stored, pool(keys[2])), *lists)


class Attend(NamedTuple):
    """Somebody who attends: `run(queries, page table, starts, arrays)`; with `wait`, in a runtime of its own."""

    run: Callable[[Array, Array, Array, Any], Any]
    arrays: Any
    wait: Callable[[], None] | None = None


def dense(problem: Shape, inputs: Inputs) -> tuple[Array, Array]:
    """Keys and values [B, S, K, D] of the first table, as if nothing were paged: once, outside the clock. Raises
    NotImplementedError where that cannot be."""
    if problem.keep < 1:
        raise NotImplementedError("takes whole sequences")

    def rows(pool: Array) -> Array:
        tiles = pool[inputs.tables[0]].swapaxes(2, 3)  # [B, N, page, K, D]
        return tiles.reshape(len(problem.lengths), -1, *tiles.shape[3:])

    keys, values = plain(inputs)
    return rows(keys), rows(values)


def plain(inputs: Inputs) -> tuple[Array, Array]:
    """The pools, for those who take them as they are. Raises NotImplementedError for pages with scales."""
    if inputs.pages.per is not None:
        raise NotImplementedError("takes pages of 16 bits")
    pages = inputs.pages
    return pages.keys, pages.keys[..., : pages.value_dim] if pages.is_latent else pages.values


def bucket_of(inputs: Inputs) -> str:
    """A problem's shapes, as tile sizes are remembered."""
    return api.bucket_of(inputs.queries, inputs.pages, Lists(inputs.tables[0], inputs.starts[0]))
