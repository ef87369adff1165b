"""What attention over pages is given: the pages of a pool, and the lists that say which of them a sequence holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.formats import Quantised, Scaling, Scheme, Stored, arrays_of, each_array, format_of


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["value_dim"])
@dataclass(frozen=True)
class Pages:
    """Keys and values of a pool, head by head: `keys` [P, K, page, D] and `values` [P, K, page, Dv], arrays or
    `Quantised`, each in a scheme of its own.

    Without `values`, the first `value_dim` columns of the keys are the values as well, as in a latent cache (arXiv
    2405.04434): `Pages(keys, value_dim=512)` holds D numbers a token and head."""

    keys: Any
    values: Any = None
    value_dim: int | None = None

    @property
    def pools(self) -> tuple[Stored, ...]:
        """What is held: keys, and values where they are no part of the keys."""
        return (self.keys,) if self.values is None else (self.keys, self.values)

    @property
    def is_latent(self) -> bool:
        """Whether values are columns of the keys."""
        return self.values is None

    @property
    def num_pages(self) -> int:
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def head_dims(self) -> tuple[int, int]:
        """D of keys and Dv of values."""
        return self.keys.shape[3], self.value_dim or self.values.shape[3]

    @property
    def per(self) -> Scaling | None:
        """What has a scale of its own, of keys; None: the pages are not quantised."""
        return self.keys.per if isinstance(self.keys, Quantised) else None

    @property
    def schemes(self) -> tuple[Scheme, Scheme] | None:
        """How keys and values are quantised; None: they are not."""
        pools = self.pools
        found = [pool.scheme for pool in (pools[0], pools[-1]) if isinstance(pool, Quantised)]
        return (found[0], found[1]) if len(found) == 2 else None

    @property
    def is_plain(self) -> bool:
        """Whether `format` and `per` say all there is to say of keys and values."""
        schemes = self.schemes
        return schemes is None or (schemes[0] == schemes[1] and schemes[0].is_plain)

    @property
    def format(self) -> str:
        """As `formats.format_of`, of keys."""
        return format_of(self.keys)

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.size * array.dtype.itemsize for pool in self.pools for array in arrays_of(pool))

    def each(self, do: Callable[[Array], Array]) -> "Pages":
        """`do` with every array: for what concerns the axes [P, K], which all of them begin with."""
        values = None if self.values is None else each_array(self.values, do)
        return replace(self, keys=each_array(self.keys, do), values=values)

    def by_head(self) -> "Pages":
        """The same tiles as pages of one head each: tile (page, head) is page * K + head. Nothing is copied."""
        return self.each(lambda array: array.reshape(-1, 1, *array.shape[2:]))

    def check(self) -> None:
        """Raises ValueError for pools that are not of one format, or whose arrays do not fit together."""
        names = ("keys", "values")[: len(self.pools)]
        for name, pool in zip(names, self.pools, strict=True):
            if pool.ndim != 4 or 0 in pool.shape:
                raise ValueError(f"pages.{name} = {pool.shape}: must be [P, K, page, D], with one at least of each")
            if isinstance(pool, Quantised):
                pool.check(f"pages.{name}")
        if self.values is None:
            self._check_latent()
        else:
            self._check_values()

    def _check_latent(self) -> None:
        dim = self.keys.shape[3]
        if self.value_dim is None or not 1 <= self.value_dim <= dim:
            said = f"must be in [1, {dim}], columns of the keys, where there are no values"
            raise ValueError(f"pages.value_dim = {self.value_dim}: {said}")

    def _check_values(self) -> None:
        keys, values = self.keys, self.values
        if self.value_dim is not None:
            raise ValueError(f"pages.value_dim = {self.value_dim}: must be None beside values")
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"pages.values = {values.shape}: must share [P, K, page] with keys {keys.shape}")
        is_quantised = isinstance(keys, Quantised)
        if is_quantised != isinstance(values, Quantised) or (not is_quantised and keys.dtype != values.dtype):
            said = "quantised" if is_quantised else format_of(keys)
            raise ValueError(f"pages.values of {format_of(values)}: must be stored as keys are, {said}")


@partial(jax.tree_util.register_dataclass, data_fields=["table", "starts", "valid"], meta_fields=[])
@dataclass(frozen=True)
class Lists:
    """Which pages a sequence holds, and what lies in them: slot o of entry n of sequence b holds token position
    starts[b, n] + o of page table[b, n].

    `table` and `starts` are int32 [B, N]; [B, K, N] where every KV head has a list of its own. Unused entries are page
    0 with start `NOWHERE`. `valid`, bool [B, (K,) N, page], says which slots count; None: all. Neither sorted nor
    contiguous."""

    table: Any
    starts: Any
    valid: Any = None

    @property
    def is_by_head(self) -> bool:
        """Whether every KV head has a list of its own."""
        return self.table.ndim == 3

    @property
    def num_entries(self) -> int:
        """N."""
        return self.table.shape[-1]

    def clipped(self, num_pages: int) -> "Lists":
        """With page ids inside a pool: of what lies outside, the nearest page."""
        return replace(self, table=jnp.clip(self.table, 0, num_pages - 1))

    def by_sequence(self, num_kv_heads: int) -> "Lists":
        """Lists of every KV head as lists of B * K sequences, over the tiles of `Pages.by_head`; others as they are."""
        if not self.is_by_head:
            return self
        heads = jnp.arange(num_kv_heads, dtype=self.table.dtype)[None, :, None]
        table = self.table * num_kv_heads + heads

        def joined(array: Array) -> Array:
            return array.reshape(-1, *array.shape[2:])

        return Lists(joined(table), joined(self.starts), None if self.valid is None else joined(self.valid))

    def in_blocks(self, page_size: int, block_len: int) -> "Lists":
        """With an entry for each block of `block_len` slots, over pages that are whole blocks: page * blocks of a page
        + block. Lists of sequences, not of heads."""
        num_parts = page_size // block_len
        parts = jnp.arange(num_parts, dtype=jnp.int32)[None, None]
        table = (self.table[..., None] * num_parts + parts).reshape(len(self.table), -1)
        starts = (self.starts[..., None] + parts * block_len).reshape(len(self.table), -1)
        valid = None if self.valid is None else self.valid.reshape(*table.shape, block_len)
        return Lists(table, starts, valid)

    def check(self, batch: int, pages: Pages) -> None:
        """Raises ValueError for arrays that do not fit together, or fit no `batch` sequences over such pages."""
        table, starts, valid = self.table, self.starts, self.valid
        if table.ndim not in (2, 3):
            raise ValueError(f"lists.table = {table.shape}: must be [B, N], or [B, K, N] for lists of each head")
        for name, array in (("table", table), ("starts", starts)):
            if array.dtype != jnp.int32:
                raise ValueError(f"lists.{name} of {array.dtype.name}: must be int32")
        if table.shape != starts.shape:
            raise ValueError(f"lists.starts = {starts.shape}: must have the shape of the table {table.shape}")
        if len(table) != batch:
            raise ValueError(f"lists.table = {table.shape}: must have a row for each of {batch} sequences")
        if self.is_by_head and table.shape[1] != pages.num_kv_heads:
            raise ValueError(f"lists.table = {table.shape}: must list pages for each of {pages.num_kv_heads} KV heads")
        slots = (*table.shape, pages.page_size)
        if valid is not None and valid.shape != slots:
            raise ValueError(f"lists.valid = {valid.shape}: must be {slots}, a flag for each slot of each entry")
        if valid is not None and valid.dtype != jnp.bool:
            raise ValueError(f"lists.valid of {valid.dtype.name}: must be bool")
