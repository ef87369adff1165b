"""Latent attention's memory (MLA, arXiv 2405.04434): one row a token, which serves all heads as key and, in part, as
value."""

from dataclasses import dataclass
from typing import Self

import jax

from kvlab.ledger.classes import StateClass
from kvlab.ledger.plan import ClassPlan
from kvlab.memory.pools import stored
from kvlab.memory.views.base import PlannedTokens
from kvlab.memory.views.paged import attend_pages, attention_plan, lists_of
from kvlab.typing import Counts, HeadOutputs, Positions, Queries, SinkLogits
from pallas_kernels.paged_attention import Plan as AttentionPlan
from pallas_kernels.pages import Pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedLatents(PlannedTokens):
    """Pages of rows [P, 1, page, rank + rope_dim]: `append(keys=rows)`. Queries [B, T, H, rank + rope_dim] are
    absorbed, outputs are [B, T, H, rank]: a row's first `rank` numbers are its value. The state's `readers` say the
    scale: otherwise it is that of the rows' width. Layers of a class share a plan when they decode, as with
    `PagedTokens`."""

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
        return Pages(stored(self.state, self.pool, "keys"), value_dim=self.state.rank)
