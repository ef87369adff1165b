"""How an op picks its implementation: `None` takes the best that is guaranteed to work here, a name is honoured or refused."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax

from pallas_kernels.formats import Pages, Quantised, Scaling, format_of

BACKENDS = ("gpu", "tpu")
"""Those that have kernels: `mosaic_gpu` in an op's `gpu.py`, `mosaic_tpu` in its `tpu.py`."""


@dataclass(frozen=True)
class Asked:
    """What an op of paged memory is to serve; by default the pages that kernels like best."""

    format: str = "bfloat16"
    """One of `formats.FORMATS`, or the name of the type that pages are stored in as they are."""
    page_size: int = 64
    head_dims: tuple[int, int] = (128, 128)
    """Of keys and values."""
    group: int = 1
    """Query heads for a KV head."""
    per: Scaling = "token"
    dtype: Any = "bfloat16"
    """Of the queries, or of the tokens to write."""

    @staticmethod
    def of(key_pages: Pages, value_pages: Pages, group: int, dtype: Any) -> "Asked":
        """What such pools ask for."""
        per: Scaling = key_pages.per if isinstance(key_pages, Quantised) else "token"
        head_dims = key_pages.shape[3], value_pages.shape[3]
        return Asked(format_of(key_pages), key_pages.shape[2], head_dims, group, per, dtype)


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


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """An op's kernel, imported when it is first called: that takes a second, for nothing on most machines."""

    def run(*arrays: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"pallas_kernels.{op}.{backend}"), op)(*arrays, **options)

    return run


def refusals(op: str, asked: Asked | None = None) -> dict[str, str]:
    """Why a kernel of an op cannot serve what is asked on this process' first device, for those that cannot."""
    found = {}
    for backend in BACKENDS:
        reason = wrong_device(backend)
        if not reason:
            reason = importlib.import_module(f"pallas_kernels.{op}.{backend}").refusal(asked or Asked())
        if reason:
            found[f"mosaic_{backend}"] = reason
    return found


def available(
    implementations: Mapping[str, Callable[..., Any]], refused: Mapping[str, str]
) -> dict[str, Callable[..., Any]]:
    """What can run, the most preferred first."""
    return {name: run for name, run in implementations.items() if name not in refused}


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
    legal = available(implementations, refused)
    if implementation is None:
        implementation = next(iter(legal))
    if implementation not in legal:
        reason = f"cannot run here: {refused[implementation]}" if implementation in refused else "is not available here"
        raise ValueError(f"{op}: implementation = {implementation!r} {reason}; legal: None, {', '.join(legal)}")
    for taken in _recorders:
        taken.setdefault(op, set()).add(implementation)
    return implementation, legal[implementation]
