"""Compaction on the device: score, select, pack, as one program. Which slots stay is decided here; how many, and which
pages they fill, the host has said before (`kvlab.ledger.plan.Compaction`), so that it waits for nothing."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from kvlab.compression import Compression, Slots
from kvlab.ledger.memory_states import SealedState
from kvlab.ledger.plan import ClassCompaction, Compaction, Ints, Seals
from kvlab.memory.dealing import deal, pack_tiles
from kvlab.memory.layout import MemoryLayout
from kvlab.memory.page_index import noted_anew
from kvlab.memory.parts import Joined
from kvlab.memory.pools import Pool
from kvlab.memory.views.sealed import seal
from kvlab.memory.views.weights import gathered
from kvlab.units import power_of_two
from pallas_kernels.visible import NOWHERE

type Kept = tuple[dict[str, Any], ...]
"""For each layer, by the mixer's state: [B, K, M] the slots that each head kept, ascending; past its count `NOWHERE`.
Of layers that are not compacted there is nothing."""


def compact(layout: MemoryLayout, pools: Sequence[Any], compaction: Compaction) -> tuple[tuple[Any, ...], Kept]:
    """The pools after a compaction, and what stayed. Traced."""
    after, kept = [dict(layer) for layer in pools], []
    for layer, (mine, states) in enumerate(zip(after, layout.states, strict=True)):
        slots = dict[str, Array]()
        for name, joined in layout.joined[layer].items():
            places = {part: states[held] for part, held in joined.names}
            if "" not in places:
                continue
            tokens = compaction.classes[places[""]]
            if joined.method is None:
                continue
            if not tokens.pages.shape[1]:
                continue
            slots[name] = _compact_state(layout, mine, joined, tokens, compaction, places)
        kept.append(slots)
    return tuple(after), tuple(kept)


def padded(compaction: Compaction, layout: MemoryLayout) -> Compaction:
    """The same compaction with rows and pages rounded up to powers of two: padding reads the null page and writes
    nowhere."""

    def grown(array: Any, filler: int, *, rows: int) -> Any:
        widths = [(0, rows - array.shape[0])]
        if array.ndim == 2:
            width = array.shape[1]
            widths.append((0, (power_of_two(width) if width else 0) - width))
        return np.pad(array, widths, constant_values=filler)

    rows = power_of_two(len(compaction.seeds))
    classes = []
    for state, mine in zip(layout.classes, compaction.classes, strict=True):
        pages = grown(mine.pages, state.unused_page, rows=rows)
        destinations = grown(mine.destinations, state.num_pages, rows=rows)
        counts = (grown(array, 0, rows=rows) for array in (mine.stored, mine.keep))
        classes.append(ClassCompaction(pages, destinations, *counts))
    of_rows = (grown(array, 0, rows=rows) for array in (compaction.seeds, compaction.lengths))
    return Compaction(tuple(classes), *of_rows)


def _compact_state(
    layout: MemoryLayout,
    pools: dict[str, Pool],
    joined: Joined,
    tokens: ClassCompaction,
    compaction: Compaction,
    places: dict[str, int],
) -> Array:
    """Compacts one state of a layer, in place of its pools; returns the slots that stayed."""
    names, state = dict(joined.names), layout.classes[places[""]].spec
    pool, statistics = pools[names[""]], compaction.classes[places["noted"]] if "noted" in places else None
    noted = {} if statistics is None else read_slots(pools[names["noted"]], statistics.pages[:, 0])
    slots = slots_of(state, pool, tokens, compaction, noted, joined.layer)
    method = joined.method
    assert method is not None
    protected = protected_slots(slots.valid, slots.stored, method)
    page_size = layout.page_size
    scores, width = method.score(slots), tokens.destinations.shape[1] * page_size
    if "dealt" in places:
        kept, pools[names[""]], pools[names["dealt"]] = _dealt(
            method,
            (scores, slots.valid, protected),
            tokens,
            page_size,
            pool,
            pools[names["dealt"]],
            compaction.classes[places["dealt"]],
        )
    else:
        kept = select(scores, slots.valid, protected, jnp.asarray(tokens.keep), width)
        pools[names[""]] = _packed(layout, state, pool, tokens, kept)
    if statistics is not None:
        moved = {name: _moved(array, kept) if name in method.by_slot else array for name, array in noted.items()}
        pools[names["noted"]] = write_slots(pools[names["noted"]], statistics.destinations[:, 0], moved)
    return kept


def _packed(layout: MemoryLayout, state: Any, pool: Pool, tokens: ClassCompaction, kept: Int32[Array, "B K M"]) -> Pool:
    """A pool after a compaction: its tokens packed, and what is noted of the pages that they fill noted anew."""
    index = {array.name for array in state.index}
    by_token = {name: array for name, array in pool.items() if name not in index}
    destinations = jnp.asarray(tokens.destinations)
    pool = pool | pack(by_token, jnp.asarray(tokens.pages), destinations, kept)
    if layout.selection is None or state.reading is None:
        return pool
    begins = jnp.arange(destinations.shape[1], dtype=jnp.int32)[None, :] * layout.page_size
    num_slots = jnp.clip(jnp.asarray(tokens.keep)[:, None] - begins, 0, layout.page_size)
    return noted_anew(layout.selection, state, pool, destinations, num_slots)


def _dealt(
    method: Compression,
    choice: tuple[Array, Array, Array],
    tokens: ClassCompaction,
    page_size: int,
    pool: Pool,
    dealt: Pool,
    counted: ClassCompaction,
) -> tuple[Array, Pool, Pool]:
    """The slots that stay where each head keeps as many as its scores are worth; and the pools of tokens and of these
    counts. `choice` are scores, which slots are valid, and which are protected."""
    keep, num_kv_heads = jnp.asarray(tokens.keep), choice[0].shape[1]
    counts = deal(*choice, keep, page_size, method.sinks + method.recent, method.safeguard)
    counts = jnp.where(keep[:, None] > 0, counts, 0)
    most = min(num_kv_heads * tokens.destinations.shape[1], tokens.pages.shape[1])
    kept = select(*choice, counts, most * page_size)
    before = read_slots(dealt, jnp.asarray(counted.pages)[:, 0])["kept"]
    after = {"kept": jnp.where(keep[:, None] > 0, counts, before)}
    pool = pack_tiles(pool, tokens.pages, tokens.destinations, kept, counts)
    return kept, pool, write_slots(dealt, jnp.asarray(counted.destinations)[:, 0], after)


def slots_of(
    state: Any, pool: Pool, tokens: ClassCompaction, compaction: Compaction, noted: dict[str, Array], layer: int
) -> Slots:
    """What the sequences of a compaction store of one state, unused slots zero."""
    arrays = {
        name: gathered(state, pool, name, jnp.asarray(tokens.pages)) for name in ("keys", "values") if name in pool
    }
    stored = jnp.asarray(tokens.stored)
    used = jnp.arange(arrays["keys"].shape[2], dtype=jnp.int32)[None, None, :, None] < stored[:, None, None, None]
    arrays = {name: jnp.where(used, array, 0) for name, array in arrays.items()}
    values = arrays.get("values")
    if values is None:  # latent rows: their first numbers are values
        values = arrays["keys"][..., : state.rank]
    lengths, seeds = jnp.asarray(compaction.lengths), jnp.asarray(compaction.seeds)
    return Slots(arrays["keys"], values, stored, lengths, noted, state.readers, seeds, layer)


def protected_slots(valid: Bool[Array, "B N"], stored: Int32[Array, "B"], method: Compression) -> Bool[Array, "B N"]:
    """The slots that stay whatever their score: sinks and the newest."""
    places = jnp.arange(valid.shape[1], dtype=jnp.int32)[None, :]
    return valid & ((places < method.sinks) | (places >= stored[:, None] - method.recent))


def select(
    scores: Float[Array, "B K N"],
    valid: Bool[Array, "B N"],
    protected: Bool[Array, "B N"],
    keep: Int32[Array, "B *K"],
    width: int,
) -> Int32[Array, "B K M"]:
    """The slots that stay, ascending: those protected, then those of the highest score, the newer one where two are
    equal. Past the `keep` of a row, or of each of its heads, there is `NOWHERE`. A score that is NaN counts as the
    lowest."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    rank = jnp.where(valid, jnp.where(protected, 2, 1), 0)[:, None, :]
    rank = jnp.broadcast_to(rank, scores.shape)
    places = jnp.broadcast_to(jnp.arange(scores.shape[2], dtype=jnp.int32), scores.shape)
    scores = jnp.where(rank == 1, scores, 0)
    _, _, order = jax.lax.sort((-rank, -scores, -places), dimension=2, num_keys=3)
    chosen = -order[:, :, :width]
    chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, width - chosen.shape[2])), constant_values=NOWHERE)
    counts = jnp.minimum(keep.reshape(len(keep), -1), valid.sum(axis=1, keepdims=True))
    is_kept = jnp.arange(width, dtype=jnp.int32)[None, None, :] < counts[:, :, None]
    return jnp.sort(jnp.where(is_kept, chosen, NOWHERE), axis=2)


def pack(pool: Pool, pages: Array | Ints, destinations: Array | Ints, kept: Int32[Array, "B K M"]) -> Pool:
    """A pool [P, K, page, ...] in which the kept slots of the pages [B, N] lie at the front of the destinations [B, M],
    bit for bit, and zeros behind them. Everything is read first; a destination out of range drops the write."""
    pages, destinations = jnp.asarray(pages), jnp.asarray(destinations)

    def packed(array: Array) -> Array:
        heads, page_size = array.shape[1:3]
        slots = array[pages].swapaxes(1, 2)  # [B, K, N, page, ...]
        slots = slots.reshape(slots.shape[0], heads, -1, *slots.shape[4:])
        place = jnp.where(kept < slots.shape[2], kept, 0).reshape(*kept.shape, *(1,) * (slots.ndim - 3))
        taken = jnp.take_along_axis(slots, place, axis=2)
        is_real = (kept < slots.shape[2]).reshape(place.shape)
        taken = jnp.where(is_real, taken, jnp.zeros((), array.dtype))
        tiles = taken.reshape(*taken.shape[:2], -1, page_size, *taken.shape[3:]).swapaxes(1, 2)
        return array.at[destinations].set(tiles, mode="drop")

    return {name: packed(array) for name, array in pool.items()}


def read_slots(pool: Pool, slots: Array | Ints) -> dict[str, Array]:
    """Statistics [B, ...] of slots [B]; zeros where a slot is out of range."""
    return {name: array.at[jnp.asarray(slots)].get(mode="fill", fill_value=0) for name, array in pool.items()}


def write_slots(pool: Pool, slots: Array | Ints, values: dict[str, Array]) -> Pool:
    """A pool with statistics [B, ...] written; a slot out of range drops the write."""
    return {name: array.at[jnp.asarray(slots)].set(values[name], mode="drop") for name, array in pool.items()}


def _moved(array: Array, kept: Int32[Array, "B K M"]) -> Array:
    """Statistics [B, N, K, ...] of slots, where they lie after packing; zeros behind what was kept."""
    num_slots = array.shape[1]
    by_head = jnp.moveaxis(array, 2, 1)  # [B, K, N, ...]
    width = min(num_slots, kept.shape[2])
    kept = kept[:, :, :width]
    shape = (*kept.shape, *(1,) * (by_head.ndim - 3))
    is_real = (kept < num_slots).reshape(shape)
    place = jnp.where(kept < num_slots, kept, 0).reshape(shape)
    taken = jnp.where(is_real, jnp.take_along_axis(by_head, place, axis=2), 0)
    padding = [(0, 0), (0, 0), (0, num_slots - width), *[(0, 0)] * (by_head.ndim - 3)]
    return jnp.moveaxis(jnp.pad(taken, padding), 1, 2)


def seal_layers(layout: MemoryLayout, pools: Sequence[Any], seals: Seals) -> tuple[Any, ...]:
    """The pools after full pages were sealed. Traced."""
    after = [dict(layer) for layer in pools]
    for layer, (mine, states) in enumerate(zip(after, layout.states, strict=True)):
        for joined in layout.joined[layer].values():
            names = dict(joined.names)
            if "sealed" in names and len(moves := seals.classes[states[names[""]]]):
                state, open_state = (layout.classes[states[names[part]]].spec for part in ("sealed", ""))
                assert isinstance(state, SealedState)
                held = names["sealed"]
                mine[held] = seal(state, mine[held], open_state, mine[names[""]], jnp.asarray(moves))
    return tuple(after)
