"""What every kernel of paged attention must do, simulated or on a chip: float64's answer from memory that is NaN
wherever nothing may be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Scaling, Scheme, Stored, arrays_of, kivi, quantised
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.api import chunk_positions, paged_attention
from pallas_kernels.pages import Lists, Pages
from pallas_kernels.visible import NOWHERE, Visible


def by_api(**how: Any) -> Callable[..., tuple[jax.Array, ...]]:
    """`api.paged_attention`, called as implementations are; `how` goes to it as well."""

    def run(
        queries: jax.Array, pages: Pages, lists: Lists, positions: jax.Array, lens: jax.Array, scoring: Scoring
    ) -> tuple[jax.Array, ...]:
        asked = {name: getattr(scoring, name) for name in ("visible", "scale", "soft_cap", "with_page_mass")}
        return paged_attention(queries, pages, lists, positions, lens, **asked, **how)

    return run


def brute_force(query, keys, values, position, scoring, readable=None):
    """One query head [D] over keys [n, D] and values [n, Dv] in float64, of which `readable` says which are there;
    returns output and log-sum-exp."""
    window, sinks, chunk = (getattr(scoring.visible, name) for name in ("window", "num_sinks", "chunk"))
    seen = [p for p in range(len(keys)) if p <= position and (window is None or position - p < window or p < sinks)]
    seen = [p for p in seen if chunk is None or p // chunk == position // chunk]
    seen = [p for p in seen if readable is None or readable[p]]
    if not seen:
        return np.zeros(values.shape[1]), -np.inf
    scores, cap = keys[seen] @ query * scoring.scale, scoring.soft_cap
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max())
    return weights @ values[seen] / weights.sum(), np.log(weights.sum()) + scores.max()


@dataclass(frozen=True)
class Drawn:
    """A case as arrays: what a kernel is given, and in float64 what its pages stand for."""

    queries: jax.Array
    pages: Pages
    lists: Lists
    positions: np.ndarray
    lens: np.ndarray
    scoring: Scoring
    stored: list[list[np.ndarray]]
    """Of every sequence, keys and values [tokens, K, D]."""
    readable: list[np.ndarray]
    """Which of them are there [tokens, K]."""
    starts: np.ndarray
    """[B, K, N], as the lists' or the same for every head."""
    largest: float
    """Of what products of keys may come to, as `check` allows for."""

    def answer(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Outputs, log-sum-exp and page mass, one query at a time."""
        shape, page_size = self.queries.shape[:3], self.pages.page_size
        group, entries = shape[2] // self.pages.num_kv_heads, self.starts.shape[2]
        outputs, sums = np.zeros((*shape, self.pages.head_dims[1])), np.zeros(shape)
        mass = np.zeros((*shape, entries))
        for row, place, head in np.ndindex(shape):
            keys, values, there = (x[:, head // group] for x in (*self.stored[row], self.readable[row]))
            query = np.asarray(self.queries[row, place, head], np.float64)
            asked = query, keys, values, self.positions[row, place], self.scoring
            outputs[row, place, head], sums[row, place, head] = brute_force(*asked, there)
            for entry in range(entries) if self.scoring.with_page_mass else ():
                begin = self.starts[row, head // group, entry]
                if begin < len(there):  # what the entry's own tokens weigh, of all
                    own = np.zeros_like(there)
                    own[begin : begin + page_size] = there[begin : begin + page_size]
                    part = brute_force(*asked, own)[1]
                    share = 0.0 if part == -np.inf else np.exp(part - sums[row, place, head])
                    mass[row, place, head, entry] = share
        return outputs, sums, mass


def drawn(
    *, lengths, num_queries, group, dims=(16, 16), kv_heads=2, window=None, sinks=0, chunk=None, cap=None,
    dtype="float32", page_size=8, magnitude=1.0, lists="sequences", kept=1.0, format=None, per: Scaling = "token",
    with_mass=True, prefill=False, of_keys=1.0, of_values=1.0, is_shared=False, is_latent=False, schemes=None,
    offset=0.0, seed=3,
) -> Drawn:  # fmt: skip
    """With lists of "heads" every KV head has its own, which leaves pages out; `kept` is the part of all slots that is
    valid. `magnitude` of queries and `of_keys` may be of each channel, from the first again where there are more. Where
    pages are shared, the first two of every sequence are the first one's first. Of a `prefill`, a sequence shorter than
    the chunk leaves the rest of it empty. `schemes` are what `formats.kivi` is called with, in place of a `format`; all
    keys and values lie `offset` off zero. Where values are columns of the keys (`is_latent`), they are the first
    `dims[1]`."""
    rng, batch = np.random.default_rng(seed), len(lengths)
    magnitude, of_keys = (np.resize(np.asarray(size, np.float64), dims[0]) for size in (magnitude, of_keys))
    table, starts, num_pages = _listed(rng, lengths, kv_heads, page_size, lists)
    valid = rng.random((*table.shape, page_size)) < kept
    if lists == "sequences":
        valid[:] = valid[:, :1]
    if is_shared:
        for row, begin in np.ndindex(batch, 2):
            if lengths[row] >= (begin + 1) * page_size:
                table[row][starts[row] == begin * page_size] = table[0, 0, starts[0, 0] == 0]
    pools = [np.full((num_pages, kv_heads, page_size, dim), np.nan, np.float32) for dim in dims]
    slots_of = {}
    for row, head, entry in np.argwhere(starts < NOWHERE).tolist():
        begin = starts[row, head, entry]
        slots_of[row, head, entry] = slots = np.flatnonzero(valid[row, head, entry, : lengths[row] - begin])
        for pool, size in zip(pools, (of_keys, of_values), strict=True):
            tokens = (offset + size * rng.standard_normal((len(slots), pool.shape[3]))).astype(jnp.dtype(dtype))
            pool[table[row, head, entry], head, slots] = tokens.astype(np.float32)
    of_pools = kivi(*schemes) if schemes else 2 * (Scheme(format, per) if format else None,)
    kept_as = [as_stored(pool, dtype, of) for pool, of in zip(pools[: 2 - is_latent], of_pools, strict=False)]
    holds = [kept_as[0][1], kept_as[-1][1][..., : dims[1]]]
    stored = [[np.zeros((length, kv_heads, dim)) for dim in dims] for length in lengths]
    readable = [np.zeros((length, kv_heads), bool) for length in lengths]
    for (row, head, entry), slots in slots_of.items():
        places = starts[row, head, entry] + slots
        readable[row][places, head] = True
        for mine, held in zip(stored[row], holds, strict=True):
            mine[places, head] = held[table[row, head, entry], head, slots]
    lens = np.array(lengths, np.int32)
    begins = np.maximum(lens - num_queries, 0)
    positions = (begins[:, None] + np.arange(num_queries)).astype(np.int32)
    if prefill:
        positions[np.arange(num_queries)[None] >= np.minimum(lens, num_queries)[:, None]] = -1
    queries = magnitude * rng.standard_normal((batch, num_queries, kv_heads * group, dims[0]))
    mine = slice(None) if lists == "heads" else 0
    arrays = (table[:, mine], starts[:, mine], *([] if kept == 1 else [valid[:, mine]]))
    return Drawn(
        queries=jnp.asarray(queries, dtype),
        pages=Pages(kept_as[0][0], value_dim=dims[1]) if is_latent else Pages(kept_as[0][0], kept_as[1][0]),
        lists=Lists(*map(jnp.asarray, arrays)),
        positions=positions,
        lens=lens,
        scoring=Scoring(dims[0] ** -0.5, cap, Visible(window, sinks, chunk), with_mass),
        stored=stored,
        readable=readable,
        starts=starts,
        largest=float(np.max(magnitude * (of_keys + abs(offset)))),
    )


def _listed(
    rng: np.random.Generator, lengths: Sequence[int], kv_heads: int, page_size: int, lists: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Table and starts [B, K, N] of pages in random order, and how many pages a pool has."""
    batch, table_len = len(lengths), max(-(-max(lengths) // page_size), 1) + 2
    num_pages = 2 + batch * kv_heads * table_len
    table, starts = np.zeros((2, batch, kv_heads, table_len), np.int32)
    starts[:] = NOWHERE
    free_pages = iter(rng.permutation(np.arange(1, num_pages - 1)).tolist())
    for row, length in enumerate(lengths):
        num_held = -(-length // page_size)
        for head in range(kv_heads):
            if head and lists == "sequences":
                table[row, head], starts[row, head] = table[row, 0], starts[row, 0]
                continue
            held = rng.permutation(num_held)[: num_held if lists == "sequences" else rng.integers(num_held + 1)]
            table[row, head, : len(held)] = [next(free_pages) for _ in held]
            starts[row, head, : len(held)] = held * page_size
    return table, starts, num_pages


def check(kernel: Callable, *, misread: int = 0, is_compiled: bool = True, **case: Any) -> None:
    """Against float64: relative error at most 1.25 times that of rounding the exact answer to the type, log-sum-exp to
    1e-4. Where the type is float32 itself, at most what rounding the scores does to the weights.

    `kernel` is called as implementations are, `by_api` for the public function; what a `case` says is told by `drawn`.
    `misread` adds to every page id that the kernel is given. In a `format`, what is compared is the kernel's answer
    over what the numbers stand for: the loss of quantising is not the kernel's. All of it is one program, unless it is
    not to be `is_compiled`: the simulator of GPUs wants a thread for every warpgroup, of which a program of many steps
    takes one."""
    given, dtype = drawn(**case), case.get("dtype", "float32")
    lists, scoring = given.lists, given.scoring
    lists = replace(lists, table=jnp.where(lists.starts < NOWHERE, lists.table + misread, lists.table))
    arrays = given.queries, given.pages, lists, *_asked_for(given, is_chunk=case.get("prefill", False))

    def run(*arrays: Any) -> tuple[jax.Array, ...]:
        return kernel(*arrays, scoring)

    outputs, log_sum_exp, *mass = (jax.jit(run) if is_compiled else run)(*arrays)
    wanted, wanted_sum, wanted_mass = given.answer()
    if scoring.with_page_mass:
        np.testing.assert_allclose(mass[0], wanted_mass, atol=2e-4, rtol=0, err_msg="page mass")
    rounding = np.linalg.norm(np.asarray(jnp.asarray(wanted, dtype), np.float64) - wanted)
    error = np.linalg.norm(np.asarray(outputs, np.float64) - wanted)
    allowed = max(1.25 * rounding, 1e-6 * max(1, given.largest / 10) * np.linalg.norm(wanted))
    assert error <= allowed, f"error {error}, allowed {allowed}"
    np.testing.assert_allclose(log_sum_exp, wanted_sum, atol=1e-4, rtol=1e-5)


def _asked_for(given: Drawn, *, is_chunk: bool) -> tuple[jax.Array, jax.Array]:
    """Positions and lengths, of a chunk as `chunk_positions` has them."""
    lens, num_queries = jnp.asarray(given.lens), given.positions.shape[1]
    if not is_chunk:
        return jnp.asarray(given.positions), lens
    num_new = jnp.minimum(lens, num_queries)
    return chunk_positions(lens - num_new, num_new, num_queries)


def as_stored(pool: np.ndarray, dtype: Any, scheme: Scheme | None) -> tuple[Stored, np.ndarray]:
    """A pool [P, K, page, D] whose unused slots are NaN, in its type or scheme, and what it stands for in float64.
    Unused slots stay as bad as the scheme can make them: NaN scales and zeros, or NaN payloads where there are any."""
    if scheme is None:
        return jnp.asarray(pool, dtype), pool.astype(np.float64)
    unused = np.isnan(pool).any(axis=3)
    pages = jax.jit(quantised, static_argnums=1)(pool, scheme, valid=~unused)
    payload, (scales, *zeros) = np.array(pages.payload), (np.array(array) for array in arrays_of(pages)[1:])
    holds = np.asarray(pages.values(), np.float64)
    payload[unused] = np.nan if scheme.format == "fp8" else 0x55
    for array in (scales, *zeros):
        if scheme.per == "channel":
            array[unused.all(axis=2)] = np.nan
        else:
            (array if scheme.group is None else array.swapaxes(2, 3))[unused] = np.nan
    arrays = {"scales": jnp.asarray(scales)} | ({"zeros": jnp.asarray(zeros[0])} if zeros else {})
    return replace(pages, payload=jnp.asarray(payload), **arrays), holds
