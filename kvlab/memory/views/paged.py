"""Keys and values in pages, read through the sequence's page table (arXiv 2309.06180)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from jax import Array

from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import ClassPlan
from kvlab.ledger.states import LatentState, TokenState
from kvlab.memory.pools import stored
from kvlab.memory.rotation import turned, turned_back
from kvlab.memory.views.base import PlannedTokens
from kvlab.typing import Counts, HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.masking import share_of_tokens
from pallas_kernels.paged_attention import Lists, Pages, chunk_positions, paged_attention, plan_attention, takes_plan
from pallas_kernels.paged_attention import Plan as AttentionPlan
from pallas_kernels.selection import Asked
from pallas_kernels.visible import Visible


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedTokens(PlannedTokens):
    """Pages of keys and values. `shared` is the plan of attention that the class's layers have in common when they
    decode."""

    @classmethod
    def share(cls, state: StateClass, plan: ClassPlan, starts: Counts, counts: Counts) -> AttentionPlan | None:
        return attention_plan(state, plan, starts, counts)

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        return attend_pages(self, queries, self.pages, lists_of(self.plan), sink_logits), self

    @property
    def pages(self) -> Pages:
        """The pool as kernels take it."""
        return Pages(stored(self.state, self.pool, "keys"), stored(self.state, self.pool, "values"))


def lists_of(plan: ClassPlan) -> Lists:
    """The pages that each sequence reads in a step, and which of their slots count."""
    valid = None if plan.valid is None else jnp.asarray(plan.valid)
    return Lists(jnp.asarray(plan.pages), jnp.asarray(plan.page_starts), valid)


def attend_pages(
    view: PlannedTokens,
    queries: Queries,
    pages: Pages,
    lists: Lists,
    sink_logits: SinkLogits | None,
) -> HeadOutputs:
    """Attention of a step's queries over pages, in slots: a chunk of each sequence, or one token, for which layers
    share a plan."""
    num_tokens = queries.shape[1]
    if num_tokens > 1:
        places = chunk_positions(view.starts, view.counts, num_tokens)
    else:
        places = view.query_slots(1), view.slot_lens
    plan = view.shared if num_tokens == 1 else None
    found = attended(view.state, queries, pages, lists, *places, plan=plan)
    return beside_sinks(turned_back(view.state, found[0]), found[1], sink_logits)


def attended(
    state: Any,
    queries: Queries,
    pages: Pages,
    lists: Lists,
    *places: Any,
    visible: Visible | None = None,
    plan: AttentionPlan | None = None,
) -> tuple[HeadOutputs, Array]:
    """`paged_attention` over what a state stores, as its readers read it: outputs [B, T, H, Dv], of a state that is
    rotated still turned, and log-sum-exps [B, T, H]. `visible` in the place of the state's own mask."""
    options: dict[str, Any] = {"scale": state.scale(queries.shape[-1]), "soft_cap": state.soft_cap}
    options["visible"] = state.visible if visible is None else visible
    outputs, log_sums = paged_attention(turned(state, queries), pages, lists, *places, plan=plan, **options)[:2]
    return outputs, log_sums


def beside_sinks(outputs: HeadOutputs, log_sums: Array, sink_logits: SinkLogits | None) -> HeadOutputs:
    """Outputs with what tokens keep beside the heads' sink logits."""
    if sink_logits is None:
        return outputs
    share = share_of_tokens(log_sums, sink_logits[None, None, :])[..., None]
    return (outputs.astype(jnp.float32) * share).astype(outputs.dtype)


def attention_plan(
    state: StateClass,
    plan: ClassPlan,
    starts: Counts,
    counts: Counts,
    is_taken: Callable[[Asked], bool] = takes_plan,
) -> AttentionPlan | None:
    """What all layers of a class share when they decode: which pages are live and how they are shared out. None where
    nothing is decoded, where each layer reads pages of its own choice, or where no kernel that serves such pages here
    takes one, as `is_taken` says."""
    spec = cast(TokenState | LatentState, state.spec)
    if plan.write_slots.shape[1] != 1 or spec.reading is not None:
        return None
    kind, num_kv_heads = spec.dtype if spec.format == "model" else spec.format, 1
    if is_latent := isinstance(spec, LatentState):
        head_dims = spec.rank + spec.rope_dim, spec.rank
    else:
        head_dims, num_kv_heads = (spec.key_dim, spec.value_dim), spec.num_kv_heads
    if not is_taken(Asked(kind, state.page_size, head_dims, dtype=spec.dtype, is_latent=is_latent)):
        return None
    return plan_attention(
        lists_of(plan),
        starts[:, None],
        starts + counts,
        num_kv_heads=num_kv_heads,
        page_size=state.page_size,
        visible=cast(Visible, spec.visible),
    )
