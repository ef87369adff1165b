"""States that a memory makes beside those that mixers declare, or in their place: no mixer knows of them."""

from dataclasses import dataclass

from kvlab.ledger.states import ArraySpec, RecurrentState, TokenState


@dataclass(frozen=True)
class SealedState(TokenState):
    """Keys and values in whole pages that were sealed: numbers of `key_bits` and `value_bits` bits with zero points and
    scales of bfloat16, of keys for each channel of a page, of values for each `group` channels of a token (KIVI, arXiv
    2402.02750)."""

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        keys, values = (self.num_kv_heads, self.key_dim), (self.num_kv_heads, self.value_dim)
        groups = (self.num_kv_heads, self.value_dim // self.group)
        arrays = [ArraySpec("keys", keys, f"int{self.key_bits}")]
        arrays += [ArraySpec(f"keys_{n}", keys, "bfloat16", is_scale=True, per_page=True) for n in ("scale", "zero")]
        arrays += [ArraySpec("values", values, f"int{self.value_bits}")]
        arrays += [ArraySpec(f"values_{n}", groups, "bfloat16", is_scale=True) for n in ("scale", "zero")]
        return tuple(arrays)


@dataclass(frozen=True)
class Statistics(RecurrentState):
    """What a memory itself remembers of each sequence beside a state, to choose what of that stays: counted like any
    other state. No mixer declares one. With `until_compacted` it is of no use behind the compaction at a prompt's end,
    and goes there."""

    until_compacted: bool = False
