"""Lowers the cases that the bench will run on a chip, for one that is not here.

The checks of `bench.verify` make arrays and compare answers; here the kernel that they call is lowered, or compiled, instead.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pallas_kernels import compilers
from pallas_kernels.chips import Target


@dataclass(frozen=True)
class Case:
    """One of `verify.cases`: its op, its name, and what its check is called with."""

    op: str
    name: str
    arguments: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Lowered:
    """What became of a case. `error` is empty where it was lowered, or compiled, as was asked."""

    target: str
    op: str
    name: str
    seconds: float = 0.0
    error: str = ""


class Reached(Exception):
    """The kernel of a case went as far as it was to; there is nothing to run it on."""


def cases(target: Target, num_generated: int) -> list[Case]:
    """The named cases of a target's platform and `num_generated` drawn ones of each op."""
    from pallas_kernels.bench import verify

    return [Case(*one) for one in verify.cases(target.backend, num_generated)]


def lower(
    target: Target, cases: list[Case], *, is_compiled: bool, kernels: dict[str, Callable[..., Any]] | None = None
) -> Iterator[Lowered]:
    """What becomes of each case: lowered by Pallas and Mosaic, and `is_compiled` to machine code as well. `kernels` stand in for the
    target's own, by op."""
    lower_call = _lowering(target, is_compiled=is_compiled)
    chip = {"chip": "blackwell" if target.name == "B200" else "hopper"} if target.backend == "gpu" else {}
    for case in cases:
        module = importlib.import_module(f"pallas_kernels.{case.op}.{target.backend}")
        kernel = (kernels or {}).get(case.op) or partial(getattr(module, case.op), **chip)
        began, error = time.perf_counter(), "its check returned without calling the kernel"
        try:
            _check_of(case.op)(partial(lower_call, kernel), **case.arguments, is_compiled=False)
        except Reached:
            error = ""
        except Exception as said:  # whatever a compiler refuses is an answer
            error = f"{type(said).__name__}: {(str(said).strip().splitlines() or ['without a word'])[0]}"
        yield Lowered(target.name, case.op, case.name, time.perf_counter() - began, error)


def _check_of(op: str) -> Callable[..., None]:
    from pallas_kernels.kv_write import proof as write_proof
    from pallas_kernels.paged_attention import proof

    return {
        "paged_attention": proof.check,
        "paged_prefill": partial(proof.check, prefill=True),
        "kv_write": write_proof.check,
    }[op]


def _lowering(target: Target, *, is_compiled: bool) -> Callable[..., None]:
    """A function that lowers `kernel(*arrays, **options)` for a target; it answers with `Reached`."""
    import jax

    sharding = compilers.sharding_of(target)

    def lower_call(kernel: Callable[..., Any], *arrays: Any, **options: Any) -> None:
        shaped = {name: one for name, one in options.items() if hasattr(one, "shape")}
        static = {name: one for name, one in options.items() if name not in shaped}
        flat, structure = jax.tree.flatten((arrays, shaped))

        def call(*flat: Any) -> Any:
            arrays, shaped = jax.tree.unflatten(structure, flat)
            with compilers.context_of(target):
                return kernel(*arrays, **shaped, **static)

        shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding) for one in flat]
        lowered = jax.jit(call).trace(*shapes).lower(**compilers.platforms_of(target))
        if is_compiled:
            lowered.compile()
        raise Reached

    return lower_call
