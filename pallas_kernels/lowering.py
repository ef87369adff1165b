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
from pallas_kernels.alignment import aligned_copies
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


MOST_LAUNCHES = 3
"""Of a layer that decodes with a plan: queries in eights, attention, the merge of its pieces."""


def layers(target: Target) -> Lowered:
    """Whether one more layer that decodes by the same plan costs a program at most `MOST_LAUNCHES` launches on a Hopper GPU: 32
    sequences of 4,096 tokens, 32 query heads on 8 KV heads."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.launches import launches
    from pallas_kernels.paged_attention import gpu, plan_attention

    sharding = compilers.sharding_of(target)
    options = {"window": None, "num_sinks": 0, "soft_cap": None, "scale": 128**-0.5, "chip": "hopper"}

    def array(*dims: int, of: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, of, sharding=sharding)

    def program(num_layers: int) -> int:
        def decode(queries: Any, pools: Any, *tables: Any) -> Any:
            plan = plan_attention(*tables, num_kv_heads=8, page_size=64)
            for keys, values in pools:
                queries = gpu.paged_attention(queries, keys, values, *tables, plan=plan, **options)[0]
            return queries

        pool = array(2049, 8, 64, 128, of=jnp.bfloat16)
        queries, tables = (
            array(32, 1, 32, 128, of=jnp.bfloat16),
            (array(32, 64), array(32, 64), array(32, 1), array(32)),
        )
        traced = jax.jit(decode).trace(queries, [(pool, pool)] * num_layers, *tables)
        return launches(traced.lower(**compilers.platforms_of(target)).compile())

    began, error = time.perf_counter(), ""
    try:
        more = program(2) - program(1)
        if more > MOST_LAUNCHES:
            error = f"{more} launches a layer: must be at most {MOST_LAUNCHES}"
    except Exception as said:  # whatever a compiler refuses is an answer
        error = f"{type(said).__name__}: {(str(said).strip().splitlines() or ['without a word'])[0]}"
    name = f"a layer more takes at most {MOST_LAUNCHES} launches"
    return Lowered(target.name, "paged_attention", name, time.perf_counter() - began, error)


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
            with compilers.context_of(target), aligned_copies():
                return kernel(*arrays, **shaped, **static)

        shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding) for one in flat]
        lowered = jax.jit(call).trace(*shapes).lower(**compilers.platforms_of(target))
        if is_compiled:
            lowered.compile()
        raise Reached

    return lower_call
