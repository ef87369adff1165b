"""How an op picks its implementation: `None` takes the best that is guaranteed to work here, a name is honoured or
refused."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels.formats import FORMATS, Scaling, Scheme
from pallas_kernels.pages import Pages

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
    is_latent: bool = False
    """Whether values are columns of the keys."""
    schemes: tuple[Scheme, Scheme] | None = None
    """Of keys and values, where `format` and `per` do not say all."""
    num_queries: int = 1
    """Of each sequence."""

    @staticmethod
    def of(pages: Pages, group: int, dtype: Any, num_queries: int = 1) -> "Asked":
        """What such pages ask for."""
        return Asked(
            pages.format,
            pages.page_size,
            pages.head_dims,
            group,
            pages.per or "token",
            dtype,
            pages.is_latent,
            None if pages.is_plain else pages.schemes,
            num_queries,
        )

    @property
    def pools(self) -> tuple[Scheme, Scheme] | None:
        """The schemes of keys and values, whether they are plain or not; None: they are not quantised."""
        if self.schemes is not None or self.format not in FORMATS:
            return self.schemes
        both = Scheme(self.format, self.per)
        return both, both

    @property
    def stored_as(self) -> str:
        """How keys and values are stored, in words."""
        if self.schemes is None:
            return f"{self.format} by {self.per}" if self.format in FORMATS else self.format
        keys, values = self.schemes
        return str(keys) if keys == values else f"keys of {keys}; values of {values}"


@dataclass(frozen=True)
class Device:
    """What ops ask of a device, in place of a `jax.Device`: stands for one that is not here."""

    platform: str
    device_kind: str
    compute_capability: str = ""


type Taken = dict[str, dict[str, set[str]]]
"""Of every op the names of the implementations that were taken, and of each why the kernels for this device were
not."""

_recorders: list[Taken] = []
_assumed: list[Device] = []


@contextmanager
def as_if_on(device: Device) -> Iterator[None]:
    """Inside, ops pick their implementations as on that device: to compile for one that is not here. Nothing can
    run."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.remove(device)


def this_device() -> Any:
    """The process' first device, or that of `as_if_on`."""
    return _assumed[-1] if _assumed else jax.devices()[0]


@contextmanager
def recording() -> Iterator[Taken]:
    """Of every op that is called, or traced, inside by any thread: the implementations that were taken, and why.

    What was compiled before is not traced again, and leaves no name."""
    taken: Taken = {}
    _recorders.append(taken)
    try:
        yield taken
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not taken]


def wrong_device(backend: str, device: Any = None) -> str | None:
    """Why kernels for "gpu" or "tpu" cannot run on a `Device` or `jax.Device` (None: this process' first); None: they
    can."""
    device = device or this_device()
    generation = str(getattr(device, "compute_capability", "")).split(".")[0]
    if backend == "gpu" and (device.platform != "gpu" or generation not in ("9", "10")):
        return f"it needs a Hopper or Blackwell GPU, this is {device.device_kind}"
    if backend == "tpu" and device.platform != "tpu":
        return f"it needs a TPU, this is {device.device_kind}"
    return None


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """An op's kernel, imported when it is first called: that takes a second, for nothing on most machines. Layers that
    call it alike share what it is lowered to."""

    def run(*arrays: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten((arrays, options))
        static = tuple(None if isinstance(leaf, (jax.Array, np.ndarray)) else Static(leaf) for leaf in leaves)
        given = [leaf for leaf, kept in zip(leaves, static, strict=True) if kept is None]
        function = getattr(importlib.import_module(f"pallas_kernels.{op}.{backend}"), op)
        return _call(function, tree, static, given)

    return run


class Static(NamedTuple):
    """What a kernel is given beside arrays."""

    value: Any


@partial(jax.jit, static_argnums=(0, 1, 2))
def _call(function: Callable[..., Any], tree: Any, static: tuple[Static | None, ...], given: list[Any]) -> Any:
    """A function of `jit`'s own is lowered once in a program. A kernel takes its compiler half a second, or two."""
    arrays = iter(given)
    positional, named = jax.tree.unflatten(tree, [next(arrays) if kept is None else kept.value for kept in static])
    return function(*positional, **named)


def refusals(op: str, asked: Asked | None = None, device: Any = None) -> dict[str, str]:
    """Why a kernel of an op cannot serve what is asked on a device (None: this process' first), for those that
    cannot."""
    found = {}
    for backend in BACKENDS:
        reason = wrong_device(backend, device)
        if not reason:
            reason = importlib.import_module(f"pallas_kernels.{op}.{backend}").refusal(asked or Asked())
        if reason:
            found[f"mosaic_{backend}"] = reason
    return found


def passed_over(taken: str, refused: Mapping[str, str], platform: str) -> str:
    """Why not the kernel that was written for such a device; empty where there is none, or where it is what was
    taken."""
    kernel = f"mosaic_{platform}"
    return f"{kernel}: {refused[kernel]}" if kernel in refused and taken != kernel else ""


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

    `implementations` is ordered from most to least preferred; `refused` has those that cannot run here, with the
    reason. Raises ValueError for a name that is unknown or refused."""
    legal = available(implementations, refused)
    reason = ""
    if implementation is None:
        implementation = next(iter(legal))
        reason = passed_over(implementation, refused, this_device().platform)
    if implementation not in legal:
        refusal = (
            f"cannot run here: {refused[implementation]}" if implementation in refused else "is not available here"
        )
        raise ValueError(f"{op}: implementation = {implementation!r} {refusal}; legal: None, {', '.join(legal)}")
    for taken in _recorders:
        reasons = taken.setdefault(op, {}).setdefault(implementation, set())
        reasons.update([reason] if reason else [])
    return implementation, legal[implementation]
