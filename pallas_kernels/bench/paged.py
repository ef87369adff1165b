"""Problems of attention over pages: the floor of each, and what we do there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.bench import peers
from pallas_kernels.bench.clock import Work
from pallas_kernels.bench.goals import NONE, Goals
from pallas_kernels.bench.inputs import Attend, Inputs, Shape, dense, make_inputs
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.ops import OPS
from pallas_kernels.paged_attention import Lists, api, chunk_positions, paged_attention, plan_attention
from pallas_kernels.selection import Asked

MOST_SCORES = 16_000_000_000
"""Bytes of scores that XLA's gather may write out."""
PLANNED, LAYERS = ", planned", 8
"""Behind the name of an implementation: each call has a plan, as it has in the layers of a model. In a turn are so many
layers, or one for each table; what the plan itself takes, once a step, is in the line without it."""
LONGEST_UNROLLED = 2048
"""Queries, of what is unrolled over them."""


@dataclass(frozen=True)
class Problem(Shape):
    """What is measured: a shape, what is wanted of us there, and everybody who can try."""

    goals: Goals = NONE

    @property
    def ops(self) -> tuple[str, ...]:
        """Those of ours that it asks."""
        return ("paged_attention",)

    def floor_us(self, limits: dict[str, float]) -> float:
        """What reading and multiplying take at least, whichever is longer."""
        return 1e6 * max(self.live_bytes / limits["read_bytes_per_s"], self.flops / limits["product_flops_per_s"])

    def works(self, *, alone: bool = False) -> dict[str, Callable[[], Work]]:
        """Ours, the one that `None` takes first and alone; then every peer. What is made says why it cannot be run."""
        inputs = make_inputs(self)
        names = self.implementations(inputs)
        layers = {}
        if names[0] in api.PLANNED and self.num_queries == 1:
            layers = {f"{names[0]}{PLANNED}": partial(planned, self, inputs, names[0])}
        if alone and layers:
            return layers
        made = {name: partial(ours, self, inputs, name) for name in (names[:1] if alone else names)}
        if not alone and self.is_whole:
            made |= {
                f"flash_attention, {name}": partial(flash, self, inputs, name)
                for name in OPS["flash_attention"].implementations
            }
        made |= {} if alone else {name: partial(make, self, inputs) for name, make in peers.PEERS.items()}
        return layers | {name: lambda make=make: work_of(make(), inputs) for name, make in made.items()}

    def implementations(self, inputs: "Inputs") -> list[str]:
        """Ours that can run here, the one that `None` takes first."""
        group = self.num_heads // self.num_kv_heads
        asked = Asked.of(inputs.pages, group, inputs.queries.dtype, self.num_queries)
        return OPS["paged_attention"].available(asked)

    def wanted(self) -> Any:
        """The answer that all are compared with."""
        inputs = make_inputs(self)
        work = work_of(ours(self, inputs, "blocked"), inputs)
        return jax.jit(work.answer)(work.arrays)


def work_of(attend: Attend, inputs: Inputs) -> Work:
    """One call after another, each with the next table."""
    num_tables = len(inputs.tables)

    def turn(number: Array, queries: Array, arrays: Any) -> Array:
        _, tables, starts, mine = arrays
        pick = partial(lax.dynamic_index_in_dim, index=number % num_tables, keepdims=False)
        outputs = attend.run(queries, pick(tables), pick(starts), mine)
        return queries + (outputs.sum(axis=-1, keepdims=True) * 1e-30).astype(queries.dtype)

    def answer(arrays: Any) -> Any:
        queries, tables, starts, mine = arrays
        return attend.run(queries, tables[0], starts[0], mine)

    arrays = inputs.queries, inputs.tables, inputs.starts, attend.arrays
    if attend.wait:
        return Work(lambda number, state, arrays: answer(arrays), None, arrays, answer, wait=attend.wait)
    return Work(turn, inputs.queries, arrays, answer)


def ours(problem: Problem, inputs: Inputs, implementation: str | None, tiles: dict[str, int] | None = None) -> Attend:
    """`paged_attention` by that implementation. Raises NotImplementedError for what would fill the device."""
    how: dict[str, Any] = {"implementation": implementation, "tiles": tiles}
    scores = 4 * len(problem.lengths) * problem.num_heads * problem.num_queries * max(problem.lengths)
    if implementation == "reference" and scores > MOST_SCORES:
        raise NotImplementedError(f"scores would take {scores / 1e9:.0f} GB")

    def run(queries: Array, table: Array, starts: Array, inputs: Inputs) -> Array:
        asked = inputs.positions, inputs.lens
        if problem.num_queries > 1:
            lens = jnp.full_like(inputs.lens, problem.num_queries)
            asked = chunk_positions(inputs.positions[:, 0], lens, problem.num_queries)
        return paged_attention(queries, inputs.pages, Lists(table, starts), *asked, **how)[0]

    return Attend(run, inputs)


def planned(problem: Problem, inputs: Inputs, implementation: str) -> Work:
    """Layers one after another, each with its table and a plan that was made before: nothing of it is launched
    again."""
    make = jax.jit(
        partial(
            plan_attention,
            num_kv_heads=problem.num_kv_heads,
            page_size=problem.page_size,
        )
    )
    layers = [
        (lists, make(lists, inputs.positions, inputs.lens))
        for lists in map(Lists, inputs.tables[:LAYERS], inputs.starts[:LAYERS])
    ]

    def attend(queries: Array, layer: Any, inputs: Inputs) -> Array:
        lists, plan = layer
        memory = queries, inputs.pages, lists, inputs.positions, inputs.lens
        return paged_attention(*memory, plan=plan, implementation=implementation)[0]

    def turn(number: Array, queries: Array, arrays: Any) -> Array:
        del number
        layers, inputs = arrays
        for layer in layers:
            outputs = attend(queries, layer, inputs)
            queries = queries + (outputs.sum(axis=-1, keepdims=True) * 1e-30).astype(queries.dtype)
        return queries

    def answer(arrays: Any) -> Array:
        layers, inputs = arrays
        return attend(inputs.queries, layers[0], inputs)

    return Work(turn, inputs.queries, (layers, inputs), answer, num_calls=len(layers))


def flash(problem: Problem, inputs: Inputs, implementation: str) -> Attend:
    """`flash_attention` of whole sequences, whose keys and values were never paged. Raises NotImplementedError for long
    ones."""
    if implementation == "reference" and problem.num_queries > LONGEST_UNROLLED:
        raise NotImplementedError("is unrolled over blocks of 64 queries: minutes to compile")

    def run(queries: Array, table: Array, starts: Array, rows: Any) -> Array:
        del table, starts
        return flash_attention(queries, *rows, implementation=implementation)

    return Attend(run, dense(problem, inputs))
