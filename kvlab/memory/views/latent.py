"""Latent attention's memory (MLA, arXiv 2405.04434): one row a token, which serves all heads as key and, in part, as value."""

from dataclasses import dataclass
from typing import cast

import jax

from kvlab.ledger.states import LatentState, State
from kvlab.memory.pools import stored
from kvlab.memory.views.base import PlannedTokens
from kvlab.memory.views.paged import Lists, attend_pages
from kvlab.typing import HeadOutputs, Positions, Queries
from pallas_kernels.formats import Pages, Quantised


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedLatents(PlannedTokens):
    """Pages of rows [P, 1, page, rank + rope_dim]: `append(keys=rows)`. Queries [B, T, H, rank + rope_dim] are absorbed, outputs
    are [B, T, H, rank]: a row's first `rank` numbers are its value. Give `scale`: the default is that of the rows' width."""

    @classmethod
    def check(cls, state: State) -> None:
        super().check(state)
        if cast(LatentState, state).format == "int4":
            raise ValueError("latent rows are values in their first numbers, which share bytes with others")

    def attend(
        self, queries: Queries, positions: Positions, *, scale: float | None = None, soft_cap: float | None = None
    ) -> HeadOutputs:
        rows = stored(self.state, self.pool, "keys")
        pages = rows, _leading(rows, self.state.rank)
        return attend_pages(self, queries, pages, Lists.of(self.plan), scale=scale, soft_cap=soft_cap)


def _leading(rows: Pages, num_columns: int) -> Pages:
    """The first columns of rows."""
    if isinstance(rows, Quantised):
        return Quantised(rows.payload[..., :num_columns], rows.scales, rows.per)
    return rows[..., :num_columns]
