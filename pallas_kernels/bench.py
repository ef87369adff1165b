"""What the kernels of paged memory achieve on this machine: one command, with jax alone.

    python -m pallas_kernels.bench [--json results.json] [--plot bandwidth.png] [--size tiny]

First whether it is right here (`proof`), then ceilings (copying, reading, a product), then every problem: ours beside every peer that
is installed, in turns, medians; a table, and JSON. On a CPU the problems are tiny: that shows that the bench works, and nothing
about speed. The status is 1 where a kernel is wrong, and nothing is then timed.
"""

import argparse
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.formats import FORMATS, Pages, Quantised, quantised
from pallas_kernels.kv_write import api as write_api
from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.masking import NOWHERE
from pallas_kernels.paged_attention import api, proof
from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.selection import Asked
from pallas_kernels.tuning import bucket

CACHE_BYTES = 120_000_000
"""Twice an H200's second-level cache: inputs are drawn from at least so much memory, so that none is found there."""
SPACE: dict[str, Any] = {"dtypes": ("bfloat16", "float16"), "page_sizes": (16, 64), "dims": (64, 128)}


@dataclass(frozen=True)
class Problem:
    """One launch: sequences of `lengths` tokens stored, the last `num_queries` of each being asked. `must` is the least fraction of
    the floor that the goal asks for, `must_us` the most microseconds; `keep` the part of its pages that each KV head selects; a
    `format` with scales by token in place of bfloat16 must beat the problem named `than` by `must_gain`."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    dim: int = 128
    page_size: int = 64
    num_queries: int = 1
    keep: float = 1.0
    must: float | None = None
    must_us: float | None = None
    format: str = "bfloat16"
    than: str = ""
    must_gain: float | None = None

    @property
    def table_len(self) -> int:
        """Pages that a sequence, or a KV head, lists at most."""
        return max(1, round(self.keep * -(-max(self.lengths) // self.page_size)))

    @property
    def live_bytes(self) -> int:
        """Keys and values that must be read, once."""
        tokens = sum(min(length, self.table_len * self.page_size) for length in self.lengths)
        a_token = 2 * self.dim * {"bfloat16": 16, "int4": 4}.get(self.format, 8) // 8 + (self.format in FORMATS) * 2 * 4
        return tokens * self.num_kv_heads * a_token

    @property
    def flops(self) -> int:
        """Of both products, for the tokens that each query sees."""
        seen = sum(
            self.num_queries * length - self.num_queries * (self.num_queries - 1) // 2 for length in self.lengths
        )
        return int(4 * self.keep * seen * self.num_heads * self.dim)


def _ragged(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths spread evenly over the logarithm."""
    return tuple(int(one) for one in np.geomspace(low, high, count).round())


PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "full": (
        Problem("decode B32 S4096", (4096,) * 32, must=0.85),
        Problem("decode B32 S4096, pages of 16", (4096,) * 32, page_size=16, must=0.80),
        Problem("decode B1 S1024, 4 KV heads", (1024,), num_kv_heads=4, must_us=12.0),
        Problem("decode B64, 128 to 32K", _ragged(64, 128, 32768), must=0.80),
        *(
            Problem(
                f"decode B32 S4096, {format}",
                (4096,) * 32,
                format=format,
                must=must,
                than="decode B32 S4096",
                must_gain=gain,
            )
            for format, must, gain in (("int8", 0.65, 1.5), ("fp8", 0.65, 1.5), ("int4", 0.45, 2.0))
        ),
        Problem("64 decodes at 4K", (4096,) * 64),
        Problem("a chunk of 2048 at 8K", (8192,), num_queries=2048),
        Problem("decode B32 S32K, 1/8 of the pages by head", (32768,) * 32, keep=0.125),
    ),
    "tiny": (
        Problem("decode B3", (40, 64, 9), num_heads=4, num_kv_heads=2, dim=16, page_size=16),
        Problem(
            "decode B3, int8",
            (40, 64, 9),
            num_heads=4,
            num_kv_heads=2,
            dim=16,
            page_size=16,
            format="int8",
            than="decode B3",
        ),
        Problem("a chunk of 8 at 64", (64,), num_heads=4, num_kv_heads=2, dim=16, page_size=16, num_queries=8),
        Problem(
            "decode B2, 1/2 of the pages by head", (64, 64), num_heads=4, num_kv_heads=2, dim=16, page_size=16, keep=0.5
        ),
    ),
}
SWEEPS = {"full": ((1, 8, 32, 128), (512, 2048, 8192, 32768)), "tiny": ((1, 2), (16, 64))}
MOST_BYTES = 12_000_000_000
"""Of the pools of one problem."""


class Inputs(NamedTuple):
    """The arguments of one problem, with as many tables as keep their pages out of the cache."""

    queries: Array
    keys: Pages
    values: Pages
    tables: Array
    starts: Array
    positions: Array
    lens: Array


def make_inputs(problem: Problem, seed: int = 0) -> Inputs:
    """Pages in random order; keys and values drawn on the device."""
    rng = np.random.default_rng(seed)
    num_tables = max(1, min(64, math.ceil(CACHE_BYTES / problem.live_bytes))) if _is_accelerated() else 2
    batch, heads = len(problem.lengths), problem.num_kv_heads
    by_head = problem.keep < 1
    lists = (num_tables, batch, heads) if by_head else (num_tables, batch)
    per_sequence = -(-max(problem.lengths) // problem.page_size)
    num_pages = 1 + num_tables * batch * (problem.table_len if by_head else per_sequence)
    starts = np.full((*lists, problem.table_len), NOWHERE, np.int32)
    tables = np.zeros_like(starts)
    order = iter(rng.permutation(np.arange(1, num_pages)).reshape(num_tables * batch, -1))
    for number in range(num_tables):
        for row, length in enumerate(problem.lengths):
            held, pages = -(-length // problem.page_size), next(order)
            for head in range(heads) if by_head else (slice(None),):
                kept = np.arange(held)
                if by_head:  # the same page serves every head, with another part of the sequence in each
                    kept = np.sort(rng.permutation(held)[: problem.table_len])
                place = (number, row, head) if by_head else (number, row)
                starts[place][: len(kept)] = kept * problem.page_size
                tables[place][: len(kept)] = pages[: len(kept)]
    shape = (num_pages, heads, problem.page_size, problem.dim)
    keys = jax.random.split(jax.random.key(seed), 3)
    queries = jax.random.normal(keys[0], (batch, problem.num_queries, problem.num_heads, problem.dim), jnp.bfloat16)
    lens = np.array(problem.lengths, np.int32)
    positions = lens[:, None] - problem.num_queries + np.arange(problem.num_queries, dtype=np.int32)[None]

    def pool(key: Array) -> Pages:
        made = jax.random.normal(key, shape, jnp.bfloat16)
        return made if problem.format == "bfloat16" else jax.jit(quantised, static_argnums=1)(made, problem.format)

    lists = map(jnp.asarray, (tables, starts, positions, lens))
    return Inputs(queries, pool(keys[1]), pool(keys[2]), *lists)


type Attend = Callable[[Array, Array, Array], Array]
"""Queries, page table and starts to outputs."""


def ours(problem: Problem, inputs: Inputs, implementation: str | None, tiles: dict[str, int] | None = None) -> Attend:
    """`paged_attention` by that implementation, or of a chunk `paged_prefill`."""
    how: dict[str, Any] = {"implementation": implementation, "tiles": tiles}

    def run(queries: Array, table: Array, starts: Array) -> Array:
        memory = queries, inputs.keys, inputs.values, table, starts
        if problem.num_queries == 1:
            return api.paged_attention(*memory, inputs.positions, inputs.lens, **how)[0]
        return paged_prefill(*memory, inputs.positions[:, 0], jnp.full_like(inputs.lens, problem.num_queries), **how)[0]

    return run


def bucket_of(problem: Problem) -> str:
    """The problem's shapes, as tile sizes are remembered."""
    op, per = (
        ("paged_attention" if problem.num_queries == 1 else "paged_prefill"),
        "token" * (problem.format in FORMATS),
    )
    group = problem.num_heads // problem.num_kv_heads
    sizes = len(problem.lengths), problem.num_queries, problem.table_len * problem.page_size
    return bucket(op, problem.format, per, (problem.dim, problem.dim), group, problem.page_size, sizes)


def _plain(inputs: Inputs) -> tuple[Array, Array]:
    """The pages, for peers that take them as they are."""
    if isinstance(inputs.keys, Quantised) or isinstance(inputs.values, Quantised):
        raise NotImplementedError("takes pages of 16 bits")
    return inputs.keys, inputs.values


def jax_paged(problem: Problem, inputs: Inputs) -> Attend:
    """jax's own kernel (Triton, deprecated): pages of all heads side by side, no lists by head, one query."""
    from jax.experimental.pallas.ops.gpu import paged_attention as peer

    if problem.num_queries > 1 or problem.keep < 1:
        raise NotImplementedError("takes one query, and one list for each sequence")
    keys, values = (pool.swapaxes(0, 1) for pool in _plain(inputs))
    scale, splits = problem.dim**-0.5, math.gcd(16, problem.table_len)
    block = math.gcd(8, problem.table_len // splits)

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del starts
        rows = (queries[:, 0] * scale).astype(queries.dtype)
        return peer.paged_attention(
            rows, keys, values, table, inputs.lens, k_splits=splits, pages_per_compute_block=block
        )[:, None]

    return run


def _dense(problem: Problem, inputs: Inputs) -> tuple[Array, Array]:
    """Keys and values [B, S, K, D] of the first table, as if nothing were paged: once, outside the clock."""
    if problem.keep < 1:
        raise NotImplementedError("takes whole sequences")
    batch = len(problem.lengths)

    def rows(pool: Array) -> Array:
        tiles = pool[inputs.tables[0]]  # [B, N, K, page, D]
        return tiles.swapaxes(2, 3).reshape(batch, -1, problem.num_kv_heads, problem.dim)

    keys, values = _plain(inputs)
    return rows(keys), rows(values)


def jax_decode(problem: Problem, inputs: Inputs) -> Attend:
    """jax's dense decode kernel (Triton)."""
    from jax.experimental.pallas.ops.gpu import decode_attention as peer

    if problem.num_queries > 1:
        raise NotImplementedError("takes one query")
    keys, values = _dense(problem, inputs)

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del table, starts
        return peer.gqa(queries[:, 0], keys, values, kv_seq_len=inputs.lens)[:, None]

    return run


def cudnn_dense(problem: Problem, inputs: Inputs) -> Attend:
    """cuDNN's fused attention over dense rows, through `jax.nn`."""
    keys, values = _dense(problem, inputs)
    if problem.num_queries > 1 and len(set(problem.lengths)) > 1:
        raise NotImplementedError("takes chunks at one place of all rows")

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del table, starts
        if problem.num_queries == 1:
            return jax.nn.dot_product_attention(
                queries, keys, values, key_value_seq_lengths=inputs.lens, implementation="cudnn"
            )
        seen = jnp.arange(keys.shape[1])[None, :] <= inputs.positions[0][:, None]
        return jax.nn.dot_product_attention(queries, keys, values, mask=seen[None, None], implementation="cudnn")

    return run


def torch_sdpa(problem: Problem, inputs: Inputs) -> Attend:
    """PyTorch's scaled_dot_product_attention over dense rows of equal length, in its own runtime."""
    import torch  # pyright: ignore[reportMissingImports]

    if len(set(problem.lengths)) > 1 or problem.num_queries > 1:
        raise NotImplementedError("takes one query and rows of equal length")
    tensors = [torch.from_dlpack(one.swapaxes(1, 2)) for one in (inputs.queries, *_dense(problem, inputs))]

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del queries, table, starts
        found = torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)
        if found.is_cuda:
            torch.cuda.synchronize()
        return found.transpose(1, 2)

    run.own_runtime = True  # type: ignore[attr-defined]
    return run


def torch_flex(problem: Problem, inputs: Inputs) -> Attend:
    """PyTorch's FlexAttention over dense rows of equal length, compiled, in its own runtime."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import flex_attention  # pyright: ignore[reportMissingImports]

    if len(set(problem.lengths)) > 1 or problem.num_queries > 1:
        raise NotImplementedError("takes one query and rows of equal length")
    if not _is_accelerated():
        raise NotImplementedError("is compiled for GPUs")
    tensors = [torch.from_dlpack(one.swapaxes(1, 2)) for one in (inputs.queries, *_dense(problem, inputs))]
    compiled = torch.compile(flex_attention)

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del queries, table, starts
        found = compiled(*tensors, enable_gqa=True)
        torch.cuda.synchronize()
        return found.transpose(1, 2)

    run.own_runtime = True  # type: ignore[attr-defined]
    return run


def cudnn_paged(problem: Problem, inputs: Inputs) -> Attend:
    """cuDNN's paged attention, which jax keeps private: its pool must hold just these sequences' blocks [P, page, K, D]."""
    from jax._src.cudnn import fused_attention_stablehlo as peer

    if problem.num_queries > 1 or problem.keep < 1 or len(set(problem.lengths)) > 1:
        raise NotImplementedError("takes one query, and rows of equal length that fill its pool")
    blocks = inputs.tables[0].reshape(-1)
    keys, values = (pool[blocks].swapaxes(1, 2) for pool in _plain(inputs))
    batch, length = inputs.tables.shape[1:]
    numbers = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, 1, length, 1)

    def run(queries: Array, table: Array, starts: Array) -> Array:
        del table, starts
        ones = jnp.ones(batch, jnp.int32)
        return peer.paged_attention(
            queries, keys, values, ones, inputs.lens, numbers, numbers, scale=problem.dim**-0.5,
            mask_type=peer.MaskType.PADDING,
        )  # fmt: skip

    return run


PEERS: dict[str, Callable[[Problem, Inputs], Attend]] = {
    "jax paged_attention": jax_paged,
    "jax decode_attention, dense": jax_decode,
    "cuDNN, paged": cudnn_paged,
    "cuDNN, dense": cudnn_dense,
    "torch SDPA, dense": torch_sdpa,
    "torch FlexAttention, dense": torch_flex,
}


@dataclass
class Timing:
    """One implementation on one problem. `device_us` is a call inside a program of many, `wall_us` a call of its own."""

    name: str
    device_us: float | None = None
    wall_us: float | None = None
    fraction: float | None = None
    """The floor's time over `device_us`."""
    error: float | None = None
    """Relative difference from the reference."""
    absent: str = ""
    """Why it was not run."""


@dataclass
class Result:
    """One problem: its floor, and everybody's times."""

    problem: Problem
    floor_us: float
    timings: list[Timing] = field(default_factory=list)


def _is_accelerated() -> bool:
    return jax.devices()[0].platform != "cpu"


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def ceilings(size: str) -> dict[str, float]:
    """Bytes a second of copying and of reading, and FLOP/s of a product in bfloat16, as this device does them."""
    length, side = (1 << 29, 8192) if size == "full" else (1 << 20, 256)
    big = jnp.ones(length, jnp.bfloat16)
    square = jnp.ones((side, side), jnp.bfloat16)
    copy, read = jax.jit(lambda x: x + 1), jax.jit(lambda x: x.astype(jnp.float32).sum())
    product = jax.jit(lambda x: x @ x)
    works = {
        "copy_bytes_per_s": (partial(copy, big), 2 * big.nbytes),
        "read_bytes_per_s": (partial(read, big), big.nbytes),
        "product_flops_per_s": (partial(product, square), 2 * side**3),
    }
    return {
        name: work / statistics.median([_seconds(run) for _ in range(12)][2:]) for name, (run, work) in works.items()
    }


LOOP_SECONDS = 0.01
"""Least time of the loop that `device_us` is taken from, so that starting it does not count."""


class Clock:
    """Times one implementation on one problem: compiled first, then asked for a sample at a time, in turns with others."""

    def __init__(self, attend: Attend, inputs: Inputs):
        self.inputs, self.own_runtime = inputs, getattr(attend, "own_runtime", False)
        self.once = attend if self.own_runtime else jax.jit(attend)
        num_tables = len(inputs.tables)

        def many(count: Array, queries: Array, tables: Array, starts: Array) -> Array:
            def turn(number: Array, queries: Array) -> Array:
                pick = partial(lax.dynamic_index_in_dim, index=number % num_tables, keepdims=False)
                outputs = attend(queries, pick(tables), pick(starts))
                return queries + (outputs * 1e-30).astype(queries.dtype)  # so that each call waits for the one before

            return lax.fori_loop(0, count, turn, queries)

        self.many = jax.jit(many)
        self.outputs: Any = self.once(inputs.queries, inputs.tables[0], inputs.starts[0])
        self.device_us, self.wall_us, self.count = list[float](), list[float](), 1
        while not self.own_runtime and self._loop() < LOOP_SECONDS and self.count < 1024:
            self.count *= 2
        self.sample()  # the first of each kind compiles, or finds what was compiled
        self.device_us.clear()
        self.wall_us.clear()

    @property
    def median_us(self) -> float:
        """Microseconds of a call inside a program of many."""
        return statistics.median(self.device_us)

    def _loop(self) -> float:
        inputs = self.inputs
        return _seconds(lambda: self.many(jnp.int32(self.count), inputs.queries, inputs.tables, inputs.starts))

    def sample(self) -> None:
        """One measurement of each kind."""
        inputs = self.inputs
        table, starts = inputs.tables[-1], inputs.starts[-1]
        self.wall_us.append(_seconds(lambda: self.once(inputs.queries, table, starts)) * 1e6)
        self.device_us.append(self.wall_us[-1] if self.own_runtime else self._loop() / self.count * 1e6)


def measure(problem: Problem, limits: dict[str, float], rounds: int, *, alone: bool = False) -> Result:
    """Everybody on one problem, in turns, compared with one another's answers; or `alone` what `None` chooses, not compared."""
    floor = max(
        problem.live_bytes / limits["read_bytes_per_s"],
        problem.flops / limits["product_flops_per_s"] if problem.num_queries > 1 else 0.0,
    )
    inputs, result = make_inputs(problem), Result(problem, floor * 1e6)
    group = problem.num_heads // problem.num_kv_heads
    refused = api.refusals(Asked(problem.format, problem.page_size, (problem.dim, problem.dim), group))
    candidates: dict[str, Callable[[], Attend]] = {
        name: partial(ours, problem, inputs, name) for name in api.IMPLEMENTATIONS if name not in refused
    }
    if alone:
        candidates = dict(list(candidates.items())[:1])
    else:
        candidates |= {name: partial(make, problem, inputs) for name, make in PEERS.items()}
    wanted = (
        None
        if alone
        else np.asarray(
            jax.jit(ours(problem, inputs, "blocked"))(inputs.queries, inputs.tables[0], inputs.starts[0]), np.float32
        )
    )
    clocks: dict[str, Clock] = {}
    for name, make in candidates.items():
        timing = Timing(name)
        result.timings.append(timing)
        try:
            clocks[name] = Clock(make(), inputs)
        except Exception as error:  # a peer that is missing or refuses is a line of the table
            said = str(error).strip().splitlines() or [type(error).__name__]
            timing.absent = f"{type(error).__name__}: {said[0]}"[:120]
            continue
        if wanted is None:
            continue
        outputs = clocks[name].outputs
        found = np.asarray(outputs.float().cpu() if hasattr(outputs, "cpu") else outputs, np.float32)
        timing.error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    for _ in range(rounds):
        for clock in clocks.values():
            clock.sample()
    for timing in result.timings:
        if timing.name in clocks:
            clock = clocks[timing.name]
            timing.device_us = clock.median_us
            timing.wall_us = statistics.median(clock.wall_us)
            timing.fraction = result.floor_us / timing.device_us
    return result


def verify(num_generated: int) -> Iterator[str]:
    """Runs the cases of every op's contract on this device with what `None` chooses; yields what went wrong."""
    cases = proof.CASES | {f"generated {n}": proof.generated(n, **SPACE) for n in range(num_generated)}
    attend, write = partial(proof.check, api.paged_attention), partial(write_proof.check, jax.jit(kv_write))
    prefill = partial(proof.check, paged_prefill, prefill=True)
    checks = [(name, partial(attend, **{"page_size": 16, **case})) for name, case in cases.items()]
    chunks = [(name, case) for name, case in cases.items() if case["num_queries"] > 1]
    checks += [(f"chunk, {name}", partial(prefill, **{"page_size": 16, **case})) for name, case in chunks]
    checks += [(f"write, {name}", partial(write, **case)) for name, case in write_proof.CASES.items()]
    for name, check in checks:
        try:
            check(**({} if "dtype" in check.keywords else {"dtype": "bfloat16"}))
        except Exception as error:  # wrong, or not to be run: both are failures
            yield f"{name}: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"


@dataclass
class Whole:
    """Something of which only one time is asked: who did it, in how long, beside a floor or a sum of parts."""

    name: str
    implementation: str
    device_us: float
    beside_us: float
    must: float
    """The least `beside_us / device_us`."""

    def verdict(self) -> str:
        ratio = self.beside_us / self.device_us
        met = "met" if ratio >= self.must else "missed"
        return f"{self.name} ({self.implementation}): {self.device_us:.1f} us, {ratio:.2f} of {self.beside_us:.1f} us, goal {self.must:.2f}: {met}"


def measure_mixed(size: str, rounds: int) -> list[Whole]:
    """A chunk and decodes in one program, beside the two of them alone: two launches over one page table."""
    full, tiny = ("a chunk of 2048 at 8K", "64 decodes at 4K"), ("a chunk of 8 at 64", "decode B3")
    by_name = {one.name: one for one in PROBLEMS[size]}
    problems = [by_name[name] for name in (full if size == "full" else tiny) if name in by_name]
    if len(problems) < 2:
        return []
    inputs = [make_inputs(one) for one in problems]
    alone = [Clock(ours(problem, of, None), of) for problem, of in zip(problems, inputs, strict=True)]

    def both(queries: Array, table: Array, starts: Array) -> Array:
        chunk = ours(problems[0], inputs[0], None)(queries, table, starts)
        others = inputs[1]
        decoded = ours(problems[1], others, None)(others.queries, others.tables[0], others.starts[0])
        return chunk + (decoded.sum() * 1e-30).astype(chunk.dtype)

    together = Clock(both, inputs[0])
    for _ in range(rounds):
        for clock in (*alone, together):
            clock.sample()
    parts = sum(clock.median_us for clock in alone)
    return [Whole("mixed: " + " + ".join(one.name for one in problems), "None", together.median_us, parts, 1 / 1.2)]


def measure_writes(size: str, limits: dict[str, float], rounds: int) -> list[Whole]:
    """Tokens into pages, by each implementation and format: beside the floor, which is to read them and to write what they become."""
    num_tokens, heads, dim, page = (8192, 8, 128, 64) if size == "full" else (128, 2, 16, 16)
    rng, found = np.random.default_rng(0), []
    num_pages = 8 * num_tokens // page + 1
    order = rng.permutation(np.arange(1, num_pages))[: num_tokens // page]
    slots = jnp.asarray((order[:, None] * page + np.arange(page)[None]).reshape(1, -1), jnp.int32)
    tokens = jax.random.normal(jax.random.key(0), (1, num_tokens, heads, dim), jnp.bfloat16)
    for format in ("bfloat16", *FORMATS):
        made = jnp.zeros((num_pages, heads, page, dim), jnp.bfloat16)
        pool = made if format == "bfloat16" else quantised(made, format)
        a_token = 2 * dim * {"bfloat16": 16, "int4": 4}.get(format, 8) // 8 + (format in FORMATS) * 2 * 4
        floor = num_tokens * heads * (2 * dim * 2 + a_token) / limits["copy_bytes_per_s"]
        refused = write_api.refusals(Asked(format, page, (dim, dim)))
        for name in (one for one in write_api.IMPLEMENTATIONS if one not in refused):

            def many(count: Array, keys: Pages, values: Pages, tokens: Array, name: str = name) -> tuple[Pages, Pages]:
                def turn(number: Array, pools: tuple[Pages, Pages]) -> tuple[Pages, Pages]:
                    moved = (slots - page + number * num_tokens) % ((num_pages - 1) * page) + page
                    return kv_write(*pools, tokens, tokens, moved, implementation=name)

                return lax.fori_loop(0, count, turn, (keys, values))

            run, samples, count = jax.jit(many), [], 64 if size == "full" else 1024
            for _ in range(rounds + 1):
                empty = _seconds(partial(run, jnp.int32(0), pool, pool, tokens))
                samples.append((_seconds(partial(run, jnp.int32(count), pool, pool, tokens)) - empty) / count)
            seconds = max(statistics.median(samples[1:]), 1e-9)
            must = 0.75 if format == "bfloat16" else 0.65
            found.append(Whole(f"write {num_tokens} tokens, {format}", name, seconds * 1e6, floor * 1e6, must))
    return found


HEADER = (
    "problem",
    "implementation",
    "device us",
    "wall us",
    "floor us",
    "of the floor",
    "times the first",
    "error, or why not",
)


def rows(result: Result) -> Iterator[tuple[str, ...]]:
    """The table's lines of one problem, in the order of HEADER."""
    first = result.timings[0].device_us
    problem = result.problem
    for timing in result.timings:
        if timing.device_us is None:
            yield (problem.name, timing.name, *["-"] * 5, timing.absent)
            continue
        assert timing.wall_us is not None
        yield (
            problem.name,
            timing.name,
            f"{timing.device_us:.1f}",
            f"{timing.wall_us:.1f}",
            f"{result.floor_us:.1f}",
            f"{timing.fraction:.2f}",
            f"{timing.device_us / first:.2f}" if first else "",
            f"{timing.error:.1e}",
        )


def gain(result: Result, results: Sequence[Result]) -> str | None:
    """Whether a format gains on bfloat16 what its goal asks for; None where it has none."""
    times = {one.problem.name: next((t.device_us for t in one.timings if t.device_us), None) for one in results}
    mine, other = times[result.problem.name], times.get(result.problem.than)
    if result.problem.must_gain is None or mine is None or other is None:
        return None
    met = "met" if other / mine >= result.problem.must_gain else "missed"
    return (
        f"{result.problem.name}: {other / mine:.2f}x {result.problem.than}, goal {result.problem.must_gain:.1f}x: {met}"
    )


def verdict(result: Result) -> str | None:
    """Whether the goal of a problem is met by the first implementation that ran; None where it has none."""
    problem, best = result.problem, next((one for one in result.timings if one.device_us is not None), None)
    if best is None or best.device_us is None or best.fraction is None:
        return None
    if problem.must is not None:
        met = "met" if best.fraction >= problem.must else "missed"
        return f"{problem.name}: {best.fraction:.2f} of the floor, goal {problem.must:.2f}: {met}"
    if problem.must_us is not None:
        met = "met" if best.device_us <= problem.must_us else "missed"
        return f"{problem.name}: {best.device_us:.1f} us, goal {problem.must_us:.0f} us: {met}"
    return None


def sweep(size: str, limits: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    """Achieved bandwidth of what `None` chooses, over batch and context."""
    batches, contexts = SWEEPS[size]
    found = []
    for batch in batches:
        for context in contexts:
            sizes: dict[str, Any] = (
                {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "page_size": 16} if size == "tiny" else {}
            )
            problem = Problem(f"B{batch} S{context}", (context,) * batch, **sizes)
            if problem.live_bytes > MOST_BYTES:
                continue
            timing = next(
                one for one in measure(problem, limits, rounds, alone=True).timings if one.device_us is not None
            )
            assert timing.device_us is not None
            rate = problem.live_bytes / timing.device_us * 1e6
            found.append({"batch": batch, "context": context, "bytes_per_s": rate, "device_us": timing.device_us})
    return found


def plot(points: Sequence[dict[str, Any]], limits: dict[str, float], path: Path) -> None:
    """Bandwidth over context, a line for each batch. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for batch in sorted({one["batch"] for one in points}):
        mine = [one for one in points if one["batch"] == batch]
        axes.plot(
            [one["context"] for one in mine], [one["bytes_per_s"] / 1e9 for one in mine], "o-", label=f"B{batch:.0f}"
        )
    axes.axhline(limits["read_bytes_per_s"] / 1e9, color="0.5", linestyle="--", label="reading alone")
    axes.set_xscale("log", base=2)
    contexts = sorted({one["context"] for one in points})
    axes.set_xticks(contexts, [f"{one:,.0f}" for one in contexts])
    axes.set(xlabel="context, tokens", ylabel="live bytes read, GB/s", title="Paged decode: achieved bandwidth")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Correctness, ceilings, problems, sweep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(PROBLEMS), help="default: full on an accelerator, tiny on a CPU")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each figure (default 9)")
    parser.add_argument("--cases", type=int, default=40, help="generated cases of the correctness check (default 40)")
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--plot", type=Path, help="draw bandwidth over context and batch here (needs matplotlib)")
    options = parser.parse_args()
    size = options.size or ("full" if _is_accelerated() else "tiny")
    device = jax.devices()[0]
    chosen = next(iter(api.implementations()))
    print(f"{device.device_kind}, jax {jax.__version__}; None chooses {chosen}", flush=True)
    if wrong := list(verify(options.cases)):
        print(*(f"WRONG {one}" for one in wrong), sep="\n")
        return 1
    print("every case right", flush=True)
    limits = ceilings(size)
    print(", ".join(f"{name} {value:.3g}" for name, value in limits.items()), flush=True)
    print("", "| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER), sep="\n", flush=True)
    results = []
    for problem in PROBLEMS[size]:
        results.append(measure(problem, limits, options.rounds))
        print(*("| " + " | ".join(line) + " |" for line in rows(results[-1])), sep="\n", flush=True)
    verdicts = [said for one in results for said in (verdict(one), gain(one, results)) if said]
    wholes = measure_mixed(size, options.rounds) + measure_writes(size, limits, options.rounds)
    verdicts += [one.verdict() for one in wholes]
    print("", *verdicts, sep="\n")
    points = sweep(size, limits, options.rounds) if options.plot or options.json else []
    if options.json:
        record = {
            "benchmark": "pallas_kernels",
            "date": datetime.now(UTC).date().isoformat(),
            "device": device.device_kind,
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
            "size": size,
            "chosen": chosen,
            "ceilings": limits,
            "results": [asdict(one) for one in results],
            "wholes": [asdict(one) for one in wholes],
            "verdicts": verdicts,
            "bandwidth": points,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        plot(points, limits, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
