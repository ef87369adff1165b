"""Pages on their way through a GPU's shared memory: where they lie, how they are waited for, and what may be seen of
them.

A block is 64 tokens: one page, several, or a part of one. Its pages come by TMA into a stage of a ring; every page has
a barrier of its own. Pages of 16 bits are multiplied in the ring. Quantised ones are turned into numbers of 16 bits,
exactly, in staged blocks: their scales are left to whoever multiplies. One warpgroup asks for pages and converts them
(`gpu_producer`), others attend."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import Scheme
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention.plan import BLOCK_LEN
from pallas_kernels.paged_attention.sharing import WORD
from pallas_kernels.visible import NOWHERE

LOG2_E = math.log2(math.e)


def filled(shape: tuple[int, ...], value: Any, layout: Any) -> Array:
    """Float32 in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def halves(exact: Array, dtype: Any) -> tuple[Array, Array]:
    """Weights in two numbers of 16 bits, which lose nothing: one alone would take the error of what is returned to 1.3
    or 1.5 times that of its own rounding. The first is cut, not rounded: that takes no conversion back."""
    bits = lax.bitcast_convert_type(exact, jnp.int32) & (-1 << (23 - jnp.finfo(dtype).nmant))
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(dtype), (exact - high).astype(dtype)


def by_name(refs: Sequence[Any], arrays: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel's refs by name, in the order of the arrays that it is given, then of its outputs and its scratch; those
    behind them have none."""
    flat, structure = jax.tree.flatten(list(arrays.values()))
    named = dict(zip(arrays, jax.tree.unflatten(structure, refs[: len(flat)]), strict=True))
    names = itertools.chain.from_iterable(others)
    return named | dict(zip(names, refs[len(flat) :], strict=False))


def given(kind: Any, named: dict[str, Any], **more: Any) -> Any:
    """A dataclass of refs, those of its names that there are, and more."""
    return kind(**{field.name: named[field.name] for field in fields(kind) if field.name in named}, **more)


@dataclass(frozen=True)
class Listed:
    """An item's pages, in global memory: see `plan.Plan`."""

    pieces: Any
    pages: Any
    starts: Any
    whole: Any
    first: Any
    last: Any
    words: Any = None


@dataclass(frozen=True)
class Side:
    """Keys or values: the pool in global memory, and where its pages lie in shared memory."""

    pages: list[Any]
    """The payload [P, K, page, D], and its scales and zeros if it has some."""
    ring: Any
    """[stages, 64, D] what pages are copied into."""
    blocks: Any
    """[places, 64, D] what is multiplied: the ring, or staged blocks."""
    arrived: Any
    """A barrier for each page of each stage; None: nothing arrives, these are columns of the keys' ring."""
    scales: Any
    """Of each place: see `gpu_scales`."""
    zeros: Any
    """As the scales; None: there are none."""
    staged: Any
    """A barrier for each staged block."""
    step: int
    """Columns that are laid out together, and turned into 16 bits at once."""
    scheme: Any
    """A `Scheme`; None: it is not quantised."""

    @property
    def per(self) -> str | None:
        """What has a scale of its own."""
        return None if self.scheme is None else self.scheme.per

    @property
    def may_be_nan(self) -> bool:
        """Whether what is multiplied may be NaN: whole numbers never are."""
        return self.scheme is None or self.scheme.format == "fp8"

    @staticmethod
    def of(named: dict[str, Any], name: str, step: int, scheme: Scheme | None) -> "Side":
        """That of "keys" or "values" in a kernel's refs by name."""
        if name not in named:  # values that are the first columns of the keys
            mine = named["keys"].at[:, :, pl.ds(0, named["outputs"].shape[2])]
            return Side([], mine, mine, None, None, None, None, step, scheme)
        blocks = named[name]
        parts = ("ring", "scales", "zeros", "staged")
        ring, scales, zeros, staged = (named.get(f"{name}_{part}") for part in parts)
        pages = named["key_pages" if name == "keys" else "value_pages"]
        ring, arrived = blocks if ring is None else ring, named[f"{name}_arrived"]
        return Side(pages, ring, blocks, arrived, scales, zeros, staged, step, scheme)


@dataclass
class Part:
    """Entries [begin, begin + count) of an item's list of pages, for one KV head: what both kinds of warpgroups
    know."""

    listed_pages: Listed
    keys: Side
    values: Side
    free: Any
    """A barrier for each place whose products are done."""
    piece: Any
    head: Any
    num_stages: int
    num_staged: int
    num_scale_places: int
    """How many blocks keep their scales: they may be needed longer than the stage is."""
    page_size: int
    scoring: Scoring

    @classmethod
    def of(
        cls, named: dict[str, Any], steps: tuple[int, int], schemes: tuple[Scheme, Scheme] | None, **more: Any
    ) -> "Part":
        """That of a kernel's refs by name, and more."""
        keys = Side.of(named, "keys", steps[0], schemes and schemes[0])
        values = Side.of(named, "values", steps[1], schemes and schemes[1])
        return cls(given(Listed, named), keys, values, named["free"], **more)

    def __post_init__(self) -> None:
        self.item, self.begin, self.count = (self.listed_pages.pieces[self.piece, place] for place in range(3))
        self.block_pages = BLOCK_LEN // self.page_size
        self.num_blocks = pl.cdiv(self.count, self.block_pages)
        self.is_quantised = self.keys.scheme is not None
        self.down, self.across = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def place_of_scales(self, number: Any) -> Any:
        return lax.rem(number, self.num_scale_places)

    def each_page(self, number: Any, do: Any) -> None:
        """`do(entry)` for the pages of a block that there are."""
        for entry in range(self.block_pages):
            pl.when(number * self.block_pages + entry < self.count)(partial(do, entry))

    def wait_for(self, arrived: Any, number: Any) -> None:
        """Until a block's pages are there."""
        stage = lax.rem(number, self.num_stages)
        self.each_page(number, lambda entry: plgpu.barrier_wait(arrived.at[stage * self.block_pages + entry]))

    def wait_to_multiply(self, side: Side, number: Any, place: Any) -> None:
        """Until a block of keys or values is in its place of the ring, or of the staged blocks."""
        if self.is_quantised:
            plgpu.barrier_wait(side.staged.at[place])
        elif side.arrived is not None:
            self.wait_for(side.arrived, number)

    # What is seen of a block: tokens lie along `axis` of an array, or alone.

    def listed(self, number: Any) -> tuple[list[Any], list[tuple[int, Any]]]:
        """First positions of a block's pages; and of its slots' validity, where those of each word begin, and the
        word."""
        entries = [number * self.block_pages + entry for entry in range(self.block_pages)]
        last = self.begin + self.count - 1

        def of_entry(entry, read, unused):
            return jnp.where(entry < self.count, read(jnp.minimum(self.begin + entry, last)), unused)

        starts = [of_entry(entry, lambda at: self.listed_pages.starts[self.item, at], NOWHERE) for entry in entries]
        bits, words = [], self.listed_pages.words
        if words is not None:
            span = min(self.page_size, WORD)
            for place in range(0, BLOCK_LEN, span):
                entry, word = entries[place // self.page_size], place % self.page_size // span
                bits.append((place, of_entry(entry, lambda at, word=word: words[self.item, at, word], 0)))
        return starts, bits

    def positions_of(self, slots: Array, starts: list[Any]) -> Array:
        """Of a block's slots."""
        positions = slots + starts[0]
        for entry, start in enumerate(starts[1:], 1):
            begin = entry * self.page_size
            positions = jnp.where(slots >= begin, slots + (start - begin), positions)
        return positions

    def only_valid(self, seen: Array, slots: Array, bits: list[tuple[int, Any]]) -> Array:
        """Those that `bits` allow."""
        if not bits:
            return seen
        of_slot = jnp.zeros_like(slots)
        for place, word in bits:
            of_slot = jnp.where(slots >= place, word, of_slot)
        span = min(self.page_size, WORD)
        return seen & (lax.shift_right_logical(of_slot, lax.rem(slots, span)) & 1 > 0)

    def is_whole(self, starts: list[Any], bits: list[tuple[int, Any]]) -> Any:
        """Whether every query sees all of a block."""
        low, high = self.listed_pages.whole[self.item, 0], self.listed_pages.whole[self.item, 1]
        is_whole = True
        for start in starts:
            is_whole = is_whole & (start >= low) & (start + self.page_size - 1 <= high)
        span = min(self.page_size, WORD)
        for _, word in bits:
            is_whole = is_whole & (word == ((1 << span) - 1 if span < WORD else -1))
        return is_whole

    def silence(self, blocks: list[Any], step: int, starts: list[Any], bits: list[tuple[int, Any]]) -> None:
        """A weight of zero does not silence a NaN: what no query sees of a block's values [64, Dv] is replaced, `step`
        columns at a time; several `blocks` hold them where their numbers have several parts."""
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_LEN,), 0, layout=self.down)
        places, seen_by = self.positions_of(slots, starts), self.listed_pages
        if self.scoring.num_sinks is None:
            readable = jnp.where(places <= seen_by.whole[self.item, 2], 1, 0)
        else:
            num_sinks = self.scoring.num_sinks

            def of_query(query, readable):
                seen = places <= seen_by.last[self.item, query]
                seen = seen & ((places >= seen_by.first[self.item, query]) | (places < num_sinks))
                return jnp.where(seen, 1, readable)

            nothing = plgpu.layout_cast(jnp.zeros((BLOCK_LEN,), jnp.int32), self.down)
            readable = lax.fori_loop(0, seen_by.last.shape[1], of_query, nothing)
        readable = jnp.where(self.only_valid(readable > 0, slots, bits), 1, 0)
        for at in range(0, blocks[0].shape[1], step):
            for block in blocks:
                columns = block.at[:, pl.ds(at, step)]
                kept = plgpu.load(columns, layout=plgpu.Layout.WGMMA)
                keeps = lax.broadcast_in_dim(readable, kept.shape, [0]) > 0
                columns[...] = jnp.where(keeps, kept, jnp.zeros((), kept.dtype))
