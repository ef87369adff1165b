"""Lowers the cases that the bench will run on a chip, for one that is not here.

The ops' proofs make arrays and compare answers; here the kernel that they call is lowered, or compiled, instead.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pallas_kernels import compilers
from pallas_kernels.alignment import aligned_copies
from pallas_kernels.chips import Target
from pallas_kernels.ops import OPS, WITH_KERNELS


@dataclass(frozen=True)
class Case:
    """One of an op's cases: the op, its name, and what its check is called with."""

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
    return [
        Case(op.name, name, case)
        for op in WITH_KERNELS.values()
        for name, case in op.cases(target.backend, num_generated).items()
    ]


def lower(
    target: Target, cases: list[Case], *, is_compiled: bool, kernels: dict[str, Callable[..., Any]] | None = None
) -> Iterator[Lowered]:
    """What becomes of each case: lowered by Pallas and Mosaic, and `is_compiled` to machine code as well. `kernels`
    stand in for the target's own, by op."""
    lower_call = _lowering(target, is_compiled=is_compiled)
    for case in cases:
        op = OPS[case.op]
        kernel = (kernels or {}).get(case.op) or partial(op.kernel(target.backend), **target.options)
        began, error = time.perf_counter(), "its check returned without calling the kernel"
        try:
            op.check(partial(lower_call, kernel), **case.arguments, is_compiled=False)
        except Reached:
            error = ""
        except Exception as said:  # whatever a compiler refuses is an answer
            error = f"{type(said).__name__}: {(str(said).strip().splitlines() or ['without a word'])[0]}"
        yield Lowered(target.name, case.op, case.name, time.perf_counter() - began, error)


MOST_LAUNCHES = 3
"""Of a layer that decodes with a plan: queries in eights, attention, the merge of its pieces."""


def layers(target: Target) -> Lowered:
    """Whether one more layer that decodes by the same plan costs a program at most `MOST_LAUNCHES` launches on a Hopper
    GPU: 32 sequences of 4,096 tokens, 32 query heads on 8 KV heads."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.launches import launches
    from pallas_kernels.masking import Scoring
    from pallas_kernels.paged_attention import Lists, Pages, gpu, plan_attention

    sharding, scoring = compilers.sharding_of(target), Scoring(128**-0.5)

    def array(*dims: int, of: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, of, sharding=sharding)

    def program(num_layers: int) -> int:
        def decode(queries: Any, layers: Any, lists: Lists, positions: Any, lens: Any) -> Any:
            plan = plan_attention(lists, positions, lens, num_kv_heads=8, page_size=64)
            for pages in layers:
                asked = queries, pages, lists, positions, lens, scoring
                queries = gpu.paged_attention(*asked, plan=plan, chip="hopper")[0]
            return queries

        pool = array(2049, 8, 64, 128, of=jnp.bfloat16)
        queries = array(32, 1, 32, 128, of=jnp.bfloat16)
        asked = Lists(array(32, 64), array(32, 64)), array(32, 1), array(32)
        traced = jax.jit(decode).trace(queries, [Pages(pool, pool)] * num_layers, *asked)
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


def _lowering(target: Target, *, is_compiled: bool) -> Callable[..., None]:
    """A function that lowers `kernel(*arguments)` for a target; it answers with `Reached`."""
    import jax

    sharding = compilers.sharding_of(target)

    def lower_call(kernel: Callable[..., Any], *arguments: Any) -> None:
        leaves, structure = jax.tree.flatten(arguments)
        places = [place for place, leaf in enumerate(leaves) if hasattr(leaf, "shape")]  # options are leaves as well

        def call(*arrays: Any) -> Any:
            given = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
            with compilers.context_of(target), aligned_copies():
                return kernel(*jax.tree.unflatten(structure, given.values()))

        shaped = [jax.ShapeDtypeStruct(leaves[at].shape, leaves[at].dtype, sharding=sharding) for at in places]
        lowered = jax.jit(call).trace(*shaped).lower(**compilers.platforms_of(target))
        if is_compiled:
            lowered.compile()
        raise Reached

    return lower_call
