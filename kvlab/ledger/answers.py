"""What the ledger answers to a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """The step is reserved: the sequence can be part of the next plan."""

    ready = True


@dataclass(frozen=True)
class Wait:
    """Not now: pages are missing that others hold. When all who could go on wait, release or swap one of them."""

    reason: str
    ready = False


@dataclass(frozen=True)
class Never:
    """Not ever: the request does not fit an empty pool; says why, with the arithmetic."""

    reason: str
    ready = False


READY = Ready()
