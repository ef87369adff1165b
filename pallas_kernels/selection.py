"""How an op picks its implementation: `None` takes the best that is guaranteed to work here, a name is honoured or refused."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax

_recorders: list[dict[str, set[str]]] = []


@contextmanager
def recording() -> Iterator[dict[str, set[str]]]:
    """Of every op that is called, or traced, inside by any thread: the names of the implementations that were taken.

    What was compiled before is not traced again, and leaves no name."""
    taken: dict[str, set[str]] = {}
    _recorders.append(taken)
    try:
        yield taken
    finally:
        _recorders[:] = [one for one in _recorders if one is not taken]


def wrong_device(backend: str) -> str | None:
    """Why kernels for "gpu" or "tpu" cannot run on this process' first device; None: they can."""
    device = jax.devices()[0]
    generation = str(getattr(device, "compute_capability", "")).split(".")[0]
    if backend == "gpu" and (device.platform != "gpu" or generation not in ("9", "10")):
        return f"it needs a Hopper or Blackwell GPU, this is {device.device_kind}"
    if backend == "tpu" and device.platform != "tpu":
        return f"it needs a TPU, this is {device.device_kind}"
    return None


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
        implementation = next(iter(available))
    if implementation not in available:
        reason = f"cannot run here: {refused[implementation]}" if implementation in refused else "is not available here"
        raise ValueError(f"{op}: implementation = {implementation!r} {reason}; legal: None, {', '.join(available)}")
    for taken in _recorders:
        taken.setdefault(op, set()).add(implementation)
    return implementation, available[implementation]
