"""A small ledger of three classes: full, windowed and recurrent."""

from kvlab.ledger.answers import Ready
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.states import ArraySpec, RecurrentState, TokenState
from pallas_kernels.visible import Visible

FULL = TokenState(2, 4, 4)
WINDOWED = TokenState(2, 4, 4, visible=Visible(window=5, num_sinks=2))
STATE = RecurrentState((ArraySpec("ssm", (3, 3), "float32"),))


def make_ledger(
    page_size=4, full_pages=9, window_pages=12, slots=3, max_len=24, chunk_len=6, recurrent=True, host=0, **options
) -> Ledger:
    classes = (
        StateClass("full", FULL, page_size, full_pages, 24, num_layers=2, num_host_pages=host),
        StateClass("windowed", WINDOWED, page_size, window_pages, 24, num_layers=1, num_host_pages=host),
        StateClass("state", STATE, 1, slots, 1, num_layers=3, num_host_pages=host),
    )
    return Ledger(classes if recurrent else classes[:2], max_len, chunk_len, page_size=page_size, **options)


def grow(ledger: Ledger, name, count: int, step: int | None = None) -> None:
    """Reserves and commits `count` tokens."""
    for start in range(0, count, step or ledger.chunk_len):
        num_new = min(step or ledger.chunk_len, count - start)
        assert ledger.reserve(name, num_new) == Ready()
        ledger.commit(name, num_new)
        ledger.check()
