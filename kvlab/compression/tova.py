"""What the newest query attends to (TOVA, arXiv 2401.06104)."""

from dataclasses import dataclass
from typing import ClassVar

from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Attended, Compression, Noted, Shape, Slots
from kvlab.compression.last_queries import last_queries, query_statistics, window_weights
from kvlab.ledger.states import ArraySpec, PerToken
from kvlab.schema import integer


@dataclass(frozen=True)
class TOVA(Compression):
    """Keeps what the newest query attends to, averaged over all heads of the layer, which keep the same tokens. As
    published it is applied after every token (`every=1`) and protects nothing; here, as in kvpress, the newest token
    is, which the paper leaves to its weight."""

    name: ClassVar[str] = "tova"
    uses_readers: ClassVar[bool] = True
    of_last_layer: ClassVar[bool] = True

    sinks: int = integer(0, 0, 65536)
    recent: int = integer(1, 0, 1 << 20)

    def statistics(self, state: PerToken, shape: Shape) -> tuple[ArraySpec, ...]:
        return query_statistics(state, 1)

    def observe(self, noted: Noted, seen: Attended) -> Noted:
        return last_queries(noted, seen, 1)

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        return slots.everywhere(window_weights(slots).mean(axis=1))
