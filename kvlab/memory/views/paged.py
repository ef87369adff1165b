"""Keys and values in pages, read through the sequence's page table (arXiv 2309.06180)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import ClassPlan
from kvlab.ledger.states import TokenState
from kvlab.memory.pools import stored
from kvlab.memory.views.base import PlannedTokens
from kvlab.typing import Counts, HeadOutputs, Positions, Queries
from pallas_kernels.formats import Pages
from pallas_kernels.paged_attention import Plan as AttentionPlan
from pallas_kernels.paged_attention import paged_attention, plan_attention, takes_plan
from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.selection import Asked
from pallas_kernels.visible import Visible


class Lists(NamedTuple):
    """Which pages each sequence reads."""

    table: Array
    """[B, num_pages] physical pages."""
    starts: Array
    """[B, num_pages] the first slot of each; `NOWHERE` where unused."""
    valid: Array | None = None
    """[B, num_pages, page] which of their slots may be read; None: all."""

    @staticmethod
    def of(plan: ClassPlan) -> "Lists":
        """What the ledger planned."""
        return Lists(jnp.asarray(plan.pages), jnp.asarray(plan.page_starts))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedTokens(PlannedTokens):
    """Pages of keys and values. `shared` is the plan of attention that the class's layers have in common when they decode."""

    @classmethod
    def share(cls, state: StateClass, plan: ClassPlan, starts: Counts, counts: Counts) -> AttentionPlan | None:
        return attention_plan(state, plan, starts, counts)

    def attend(
        self, queries: Queries, positions: Positions, *, scale: float | None = None, soft_cap: float | None = None
    ) -> HeadOutputs:
        pages = stored(self.state, self.pool, "keys"), stored(self.state, self.pool, "values")
        return attend_pages(self, queries, pages, Lists.of(self.plan), scale=scale, soft_cap=soft_cap)


def attend_pages(
    view: PlannedTokens,
    queries: Queries,
    pages: tuple[Pages, Pages],
    lists: Lists,
    *,
    scale: float | None,
    soft_cap: float | None,
) -> HeadOutputs:
    """Attention of a step's queries over pages of keys and values, in slots: a chunk of each sequence, or one token."""
    visible: Visible = view.state.visible
    options: dict[str, Any] = {"window": visible.window, "num_sinks": visible.num_sinks, "valid_slots": lists.valid}
    options |= {"scale": scale, "soft_cap": soft_cap}
    memory = queries, *pages, lists.table, lists.starts
    if queries.shape[1] > 1:
        return paged_prefill(*memory, view.slot_starts, view.counts, **options)[0]
    return paged_attention(*memory, view.query_slots(1), view.slot_lens, plan=view.shared, **options)[0]


def attention_plan(
    state: StateClass,
    plan: ClassPlan,
    starts: Counts,
    counts: Counts,
    is_taken: Callable[[Asked], bool] = takes_plan,
) -> AttentionPlan | None:
    """What all layers of a class share when they decode: which pages are live and how they are shared out. None where nothing
    is decoded, or where no kernel that serves such pages here takes one, as `is_taken` says."""
    if plan.write_slots.shape[1] != 1:
        return None
    spec = cast(TokenState, state.spec)
    kind = spec.dtype if spec.format == "model" else spec.format
    if not is_taken(Asked(kind, state.page_size, (spec.key_dim, spec.value_dim), dtype=spec.dtype)):
        return None
    visible = cast(Visible, spec.visible)
    return plan_attention(
        jnp.asarray(plan.pages),
        jnp.asarray(plan.page_starts),
        starts[:, None],
        starts + counts,
        num_kv_heads=spec.num_kv_heads,
        page_size=state.page_size,
        window=visible.window,
        num_sinks=visible.num_sinks,
    )
