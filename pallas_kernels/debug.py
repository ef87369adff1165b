"""Checks of what arrays hold, which cost a trip to the host: done while debugging is on.

    with debugging():
        paged_attention(...)          # a page id that cannot be right raises
    PALLAS_KERNELS_DEBUG=1 python ... # the whole process

The switch is read when a program is traced: what was compiled before keeps what it was compiled with.
"""

import contextvars
import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.core
import numpy as np
from jax import Array

from pallas_kernels.typing import Int32
from pallas_kernels.visible import NOWHERE

_on = contextvars.ContextVar("debugging", default=os.environ.get("PALLAS_KERNELS_DEBUG", "0") not in ("", "0"))


@contextmanager
def debugging(*, on: bool = True) -> Iterator[None]:
    """Switches the checks on, or off, for what is called or traced inside."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def check_tables(
    op: str,
    page_table: Int32[Array, "B *heads num_pages"],
    page_starts: Int32[Array, "B *heads num_pages"],
    num_pages: int,
) -> None:
    """Where debugging is on: raises ValueError for a used entry whose page is not in the pool or whose start is
    negative; under `jit`, the program fails with that message."""

    def check(*arrays: Array) -> None:
        table, starts = map(np.asarray, arrays)
        used = starts < NOWHERE
        for name, values, wrong, legal in (
            ("lists.table", table, used & ((table < 0) | (table >= num_pages)), f"[0, {num_pages})"),
            ("lists.starts", starts, starts < 0, f"[0, {NOWHERE}), or {NOWHERE} where unused"),
        ):
            if wrong.any():
                place = tuple(int(indices[0]) for indices in np.nonzero(wrong))
                raise ValueError(f"{op}: {name}{list(place)} = {values[place]}: must be in {legal}")

    if not _on.get():
        return
    if isinstance(page_table, jax.core.Tracer) or isinstance(page_starts, jax.core.Tracer):
        jax.debug.callback(check, page_table, page_starts)
    else:
        check(page_table, page_starts)


def check_slots(op: str, write_slots: Int32[Array, "B T"], num_pages: int, page_size: int) -> None:
    """Where debugging is on: raises ValueError for a page that two rows write into, or one twice, and for the tokens of
    a row that do not go to consecutive positions."""

    def check(given: Array) -> None:
        slots = np.asarray(given)
        inside = (slots >= 0) & (slots < num_pages * page_size)
        owners: dict[int, tuple[int, int]] = {}
        offsets: dict[int, int] = {}
        for row, place in np.argwhere(inside).tolist():
            page, offset = divmod(int(slots[row, place]), page_size)
            where = f"{op}: write_slots[{row}, {place}] = {slots[row, place]}"
            began = owners.setdefault(page, (row, place - offset))
            if began != (row, place - offset):
                raise ValueError(f"{where}: page {page} is written by row {began[0]} already, not up to this slot")
            if offsets.setdefault(row, (offset - place) % page_size) != (offset - place) % page_size:
                raise ValueError(f"{where}: the tokens of a row must go to consecutive positions")

    if not _on.get():
        return
    if isinstance(write_slots, jax.core.Tracer):
        jax.debug.callback(check, write_slots)
    else:
        check(write_slots)


def check_chunks(query_starts: Int32[Array, "B"], query_lens: Int32[Array, "B"], num_queries: int) -> None:
    """Where debugging is on: raises ValueError for a chunk that begins before its sequence, or is longer than the
    queries."""

    def check(*arrays: Array) -> None:
        starts, lens = map(np.asarray, arrays)
        for name, values, wrong, legal in (
            ("query_starts", starts, starts < 0, "at least 0"),
            ("query_lens", lens, (lens < 0) | (lens > num_queries), f"in [0, {num_queries}]"),
        ):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise ValueError(f"{name}[{row}] = {values[row]}: must be {legal}")

    if not _on.get():
        return
    if isinstance(query_starts, jax.core.Tracer) or isinstance(query_lens, jax.core.Tracer):
        jax.debug.callback(check, query_starts, query_lens)
    else:
        check(query_starts, query_lens)
