"""How an op picks its implementation: `None` takes the best that is guaranteed to work here, a name is honoured or refused."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def select(
    op: str,
    implementation: str | None,
    implementations: Mapping[str, Callable[..., Any]],
    refused: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, Callable[..., Any]]:
    """The name and function of the implementation that will run.

    `implementations` is ordered from most to least preferred; `refused` has those that cannot run here, with the reason. Raises
    ValueError for a name that is unknown or refused.
    """
    available = {name: run for name, run in implementations.items() if name not in refused}
    if implementation is None:
        return next(iter(available.items()))
    if implementation not in available:
        reason = f"cannot run here: {refused[implementation]}" if implementation in refused else "is not available here"
        raise ValueError(f"{op}: implementation = {implementation!r} {reason}; legal: None, {', '.join(available)}")
    return implementation, available[implementation]
