"""How an op picks its implementation: `None` takes the best that is guaranteed to work here, a name is honoured or refused."""

from collections.abc import Callable, Mapping
from typing import Any


def select(
    op: str,
    implementation: str | None,
    available: Mapping[str, Callable[..., Any]],
    refused: Mapping[str, str] | None = None,
) -> tuple[str, Callable[..., Any]]:
    """The name and function of the implementation that will run.

    `available` is ordered from most to least preferred and holds only what works on this device; `refused` has the reasons of
    what does not. Raises ValueError for a name that is not available here.
    """
    if implementation is None:
        return next(iter(available.items()))
    if refused and implementation in refused:
        raise ValueError(
            f"{op}: implementation = {implementation!r} cannot run here: {refused[implementation]}; "
            f"legal: None, {', '.join(available)}"
        )
    if implementation not in available:
        raise ValueError(
            f"{op}: implementation = {implementation!r} is not available here; legal: None, {', '.join(available)}"
        )
    return implementation, available[implementation]
