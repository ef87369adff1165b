"""The arrays behind the ledger's pages, and the views through which mixers read and write them inside a step.

Pools are pytrees of plain arrays, one per layer and state, donated to the step and returned by it. A view is a pool
joined with the step's plan; it exists only while the step is traced.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import ClassPlan
from kvlab.ledger.states import TokenState
from kvlab.typing import Counts, HeadOutputs, Keys, Positions, Queries, Values
from pallas_kernels.kv_write import kv_write
from pallas_kernels.masking import masked_softmax
from pallas_kernels.paged_attention import Lists, Pages, chunk_positions, paged_attention, plan_attention, takes_plan
from pallas_kernels.paged_attention import Plan as AttentionPlan
from pallas_kernels.selection import Asked
from pallas_kernels.visible import Visible

type Pool = dict[str, Any]
"""Arrays of one layer's state by name: token states [P, K, page, D], recurrent states [slots, ...]."""


def allocate(state: StateClass, fill: float = 0.0) -> Pool:
    """One layer's arrays of a class. `fill` is for tests, which poison what must not be read; the null page stays zero."""
    pool: Pool = {}
    for array in state.spec.arrays:
        if state.spec.per_token:
            heads, dim = array.shape
            shape: tuple[int, ...] = (state.num_pages, heads, state.page_size, dim)
        else:
            shape = (state.num_pages, *array.shape)
        filled = jnp.full(shape, fill, array.dtype)
        pool[array.name] = filled.at[0].set(0) if state.has_null_page else filled
    return pool


class TokenMemory(Protocol):
    """What an attention mixer needs of its memory, paged or dense."""

    def append(self, keys: Keys, values: Values) -> "TokenMemory":
        """The memory with the step's keys [B, T, K, D] and values [B, T, K, Dv] written; padding is dropped."""
        ...

    def attend(
        self, queries: Queries, positions: Positions, *, window: int | None, num_sinks: int, soft_cap: float | None
    ) -> HeadOutputs:
        """Causal attention of the step's queries over everything stored."""
        ...


def write_tokens(pool: Pool, plan: ClassPlan, keys: Keys, values: Values) -> Pool:
    """A pool with keys and values in their slots; a slot is (page, offset), and an index past the pool drops the write."""
    written = kv_write(Pages(pool["keys"], pool["values"]), keys, values, jnp.asarray(plan.write_slots))
    return pool | {"keys": written.keys, "values": written.values}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedTokens:
    """Keys and values in pages, read through the sequence's page table (arXiv 2309.06180)."""

    pool: Pool
    plan: Any  # ClassPlan; pytrees are rebuilt with placeholders, so fields are not checked at run time
    starts: Any  # [B] tokens already stored
    counts: Any  # [B] new tokens in this step
    attention: Any = None  # AttentionPlan | None: what the class's layers share where each sequence has one new token

    def append(self, keys: Keys, values: Values) -> "PagedTokens":
        return replace(self, pool=write_tokens(self.pool, self.plan, keys, values))

    def attend(
        self, queries: Queries, positions: Positions, *, window: int | None, num_sinks: int, soft_cap: float | None
    ) -> HeadOutputs:
        lists = Lists(jnp.asarray(self.plan.pages), jnp.asarray(self.plan.page_starts))
        memory = queries, Pages(self.pool["keys"], self.pool["values"]), lists
        options: dict[str, Any] = {"visible": Visible(window, num_sinks), "soft_cap": soft_cap}
        if queries.shape[1] > 1:
            return paged_attention(*memory, *chunk_positions(self.starts, self.counts, queries.shape[1]), **options)[0]
        return paged_attention(*memory, positions, self.starts + self.counts, plan=self.attention, **options)[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseTokens:
    """The baseline: one row of max_len slots a sequence. Queries travel to the rows, so that the cache is read in place."""

    pool: Pool
    plan: Any
    lens: Any

    def append(self, keys: Keys, values: Values) -> "DenseTokens":
        return replace(self, pool=write_tokens(self.pool, self.plan, keys, values))

    def attend(
        self, queries: Queries, positions: Positions, *, window: int | None, num_sinks: int, soft_cap: float | None
    ) -> HeadOutputs:
        keys, values = self.pool["keys"], self.pool["values"]
        num_rows, num_kv_heads, max_len, head_dim = keys.shape
        rows = jnp.asarray(self.plan.pages)[:, 0]

        def to_rows(x: Array) -> Array:
            return jnp.zeros((num_rows, *x.shape[1:]), x.dtype).at[rows].set(x, mode="drop")

        grouped = to_rows(queries)
        grouped = grouped.reshape(*grouped.shape[:2], num_kv_heads, -1, head_dim)
        slots = jnp.arange(max_len, dtype=jnp.int32)[None, None, :]
        seen = Visible(window, num_sinks).sees(to_rows(positions)[:, :, None], slots)
        seen = seen & (slots < to_rows(self.lens)[:, None, None])
        scores = jnp.einsum("btkgd,bksd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        scores = scores * head_dim**-0.5
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        weights, _ = masked_softmax(scores, seen[:, None, None])
        readable = jnp.where(seen.any(axis=1)[:, None, :, None], values, 0).astype(jnp.float32)
        outputs = jnp.einsum("bkgts,bksd->btkgd", weights, readable)
        outputs = outputs.reshape(*outputs.shape[:2], -1, values.shape[-1]).astype(queries.dtype)
        return outputs.at[rows].get(mode="fill", fill_value=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateSlots:
    """One state a sequence: read at the step's start (zero for a new sequence), written at its end."""

    pool: Pool
    plan: Any
    starts: Any  # [B] tokens already stored
    counts: Any  # [B] new tokens in this step

    def read(self) -> dict[str, Array]:
        """The states [B, ...] before the step; a sequence without tokens starts from zero, whatever its slot held."""
        slots = jnp.asarray(self.plan.pages)[:, 0]
        fresh = self.starts == 0

        def one(array: Array) -> Array:
            rows = array.at[slots].get(mode="fill", fill_value=0)
            return jnp.where(fresh.reshape(-1, *(1,) * (rows.ndim - 1)), 0, rows)

        return {name: one(array) for name, array in self.pool.items()}

    def write(self, states: dict[str, Array]) -> "StateSlots":
        """The memory with the states [B, ...] after the step, in the slots to write; padded rows are dropped."""
        slots = jnp.asarray(self.plan.write_slots)[:, 0]
        pool = {
            name: array.at[slots].set(states[name].astype(array.dtype), mode="drop")
            for name, array in self.pool.items()
        }
        return replace(self, pool=pool)

    def valid(self, num_tokens: int) -> Array:
        """[B, T] whether each token of the step is real rather than padding."""
        return jnp.arange(num_tokens, dtype=jnp.int32)[None, :] < self.counts[:, None]


type View = PagedTokens | DenseTokens | StateSlots


def attention_plan(
    state: StateClass,
    plan: ClassPlan,
    starts: Counts,
    counts: Counts,
    is_taken: Callable[[Asked], bool] = takes_plan,
) -> AttentionPlan | None:
    """What all layers of a class share when they decode: which pages are live and how they are shared out. None where nothing
    is decoded, or where no kernel that serves such pages here takes one, as `is_taken` says."""
    spec = state.spec
    if not isinstance(spec, TokenState) or state.contiguous or plan.write_slots.shape[1] != 1:
        return None
    if not is_taken(Asked(spec.dtype, state.page_size, (spec.key_dim, spec.value_dim), dtype=spec.dtype)):
        return None
    return plan_attention(
        Lists(jnp.asarray(plan.pages), jnp.asarray(plan.page_starts)),
        starts[:, None],
        starts + counts,
        num_kv_heads=spec.num_kv_heads,
        page_size=state.page_size,
        visible=Visible(spec.window, spec.num_sinks),
    )


def view(
    state: StateClass,
    pool: Pool,
    plan: ClassPlan,
    starts: Counts,
    counts: Counts,
    attention: AttentionPlan | None = None,
) -> View:
    """A pool joined with a step's plan, and with what its class's layers share."""
    if not state.spec.per_token:
        return StateSlots(pool, plan, starts, counts)
    if state.contiguous:
        return DenseTokens(pool, plan, starts + counts)
    return PagedTokens(pool, plan, starts, counts, attention)


def copy_pages(pool: Pool, sources: Array, destinations: Array) -> Pool:
    """A pool with pages copied, bit for bit; a destination past the pool drops the copy. All sources are read first."""
    return {
        name: array.at[destinations].set(array.at[sources].get(mode="clip"), mode="drop")
        for name, array in pool.items()
    }


def num_bytes(pools: Any) -> int:
    """Bytes of every array in a tree: the truth that statements are checked against."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pools))
