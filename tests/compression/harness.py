"""Tiny models through memories that compress: what every test of a method needs."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvlab.compression import COMPRESSIONS, SecondPass
from kvlab.compression.streaming import Windowed
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.lossy import Compacted
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.session import Session
from kvlab.evaluation.trail import trail
from kvlab.ledger.plan import Compaction
from kvlab.ledger.readers import Readers, Rotary
from kvlab.ledger.states import TokenState
from kvlab.memory.compacting import compact, padded
from kvlab.memory.config import SEALED
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, split
from tests.contracts import VARIANTS, VOCAB

_attention = functools.partial(AttentionConfig, num_heads=4, head_dim=8)
MODELS: dict[str, list[LayerConfig]] = VARIANTS | {
    "stacked": [LayerConfig("attention", _attention(num_kv_heads=heads)) for heads in (2, 4, 1)],
    "alike": [LayerConfig("attention", _attention(num_kv_heads=2)) for _ in range(4)],
}
SMALLER: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 3, "recent": 3, "pool": 3},
    "rkv": {"window": 3, "recent": 3, "pool": 3},
    "lagkv": {"lag": 4},
    "expected": {"future": 16},
}
"""Fields of methods whose defaults are made for longer prompts than a test's."""
PROMPT, TOTAL = 23, 31
TOLERANCE = 1e-4
"""Of a logit, relative to the largest of its position."""


@functools.cache
def model_of(name: str):
    """States, structure and parameters of a small random model whose attention is far from uniform."""
    config = ModelConfig(model_dim=16, tie_embeddings=False, dtype="float32")
    model = Transformer(MODELS[name], config, VOCAB, rngs=nnx.Rngs(0))
    structure, params = split(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), params)
    return model.states(), structure, params


@functools.cache
def _check_of(model: str, format: str) -> MaskCheck:
    """The parallel form, compiled once for all methods: what differs between them is the mask, an argument."""
    _, structure, params = model_of(model)
    return MaskCheck(structure, params, layout_of(model, MemoryConfig(format=format)))


SCORED = [name for name, kind in COMPRESSIONS.items() if not issubclass(kind, Windowed)]
"""Methods that score what is stored; the others forget by position, and nothing of them is ever compacted."""


def passes(method: str) -> bool:
    """Whether a method reads on behind a prompt: it compacts at the prompt's end alone."""
    return issubclass(COMPRESSIONS[method], SecondPass)


def memory_of(method: str, budget: Any = 9, *, page_size: int = 4, chunk_len: int = 5, **fields: Any) -> MemoryConfig:
    """A memory that compresses by a method; `format` and fields of the method may be given by name. A method that
    compacts at a prompt's end alone is not told of another time."""
    format = fields.pop("format", "model")
    residual = {"residual": 1} if format in SEALED else {}
    if passes(method):
        fields = {name: value for name, value in fields.items() if name not in ("at", "every")}
    chosen = {"type": method, "sinks": 2, "recent": 2} | SMALLER.get(method, {}) | fields
    return MemoryConfig(
        page_size=page_size,
        chunk_len=chunk_len,
        format=format,
        compression=chosen,
        budget=budget,  # pyright: ignore
        **residual,
    )


def layout_of(model: str, memory: MemoryConfig, rows: int = 3, max_len: int = TOTAL, **options: Any) -> MemoryLayout:
    """The layout of a model's states in a memory."""
    return MemoryLayout.of(model_of(model)[0], memory, max_sequences=rows, max_len=max_len, **options)


@dataclass
class Ran:
    """What a run through memory left: its session, logits [B, T, V], and the worst difference to the parallel form."""

    session: Session
    logits: np.ndarray
    worst: float
    num_compactions: int
    layout: MemoryLayout

    @property
    def num_sealed(self) -> int:
        """Pages, of all sequences and layers."""
        return sum(page.num_pages for each in self.session.sealed for mine in each.sealed for page in mine)

    @property
    def compacted(self) -> list[Compacted]:
        return self.session.compacted

    def held(self, num_rows: int = 2, num_tokens: int = TOTAL) -> list[dict[str, np.ndarray]]:
        """For each layer, by state: [B, K, T] which tokens are still there at the end."""
        gone = trail(self.layout, self.compacted, num_rows, num_tokens)
        return [{name: array > num_tokens for name, array in layer.items()} for layer in gone]


def tokens_of(num_rows: int = 2, num_tokens: int = TOTAL, seed: int = 0) -> np.ndarray:
    """Random sequences [B, T]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (num_rows, num_tokens)).astype(np.int32)


def chunks_of(prompt_len: int, num_tokens: int, chunk_len: int) -> list[tuple[int, int]]:
    """The prompt in chunks, what follows token by token."""
    prompt = [(start, min(start + chunk_len, prompt_len)) for start in range(0, prompt_len, chunk_len)]
    return [*prompt, *((place, place + 1) for place in range(prompt_len, num_tokens))]


def run(
    model: str, memory: MemoryConfig, *, tokens: np.ndarray | None = None, prompt_len: int = PROMPT, **options: Any
) -> Ran:
    """Sequences through a memory whose freed pages are spoiled, compared at every position with the parallel form under
    the mask that the compactions imply. The ledger's invariants hold after each step; the third row is padding."""
    _, structure, params = model_of(model)
    tokens = tokens_of() if tokens is None else tokens
    layout = layout_of(model, memory, max_len=tokens.shape[1], **options)
    session = Session(
        MemoryStep.of(structure, layout), params, layout.allocate(float("nan")), poisons=True, observes=True
    )
    session.prompt_len, session.known = prompt_len, dict(enumerate(tokens))
    seen = dict[int, np.ndarray]()
    for start, end in chunks_of(prompt_len, tokens.shape[1], layout.chunk_len):
        width = layout.chunk_len if start < prompt_len else 1
        chunks = {row: tokens[row, start:end] for row in range(len(tokens))}
        logits = np.asarray(session.advance(chunks, width))
        session.ledger.check()
        seen |= {place: logits[: len(tokens), place - start] for place in range(start, end)}
    check = _check_of(model, memory.format)
    check.layout, check.worst, check.num_compactions = layout, 0.0, 0
    check.compare(tokens, seen, session.events)
    stacked = np.stack([seen[place] for place in sorted(seen)], axis=1)
    return Ran(session, stacked, check.worst, check.num_compactions, layout)


def assert_equivalent(ran: Ran) -> None:
    """The run dropped something, and its logits are the parallel form's."""
    assert ran.num_compactions > 0
    assert ran.worst <= TOLERANCE, ran.worst


READERS = Readers(4, rotary=Rotary(8, 100.0))
STATE = TokenState(2, 8, 6, readers=READERS)
"""Of a layer without a model: 4 query heads in 2 groups."""


def plausible(name: str, array: Array, rng: np.random.Generator) -> Array:
    """Statistics as they could be: counts of many queries, sums of squares, positive numbers."""
    if name == "count":
        return jnp.full_like(array, 3)
    values = np.abs(rng.standard_normal(array.shape))
    if name == "scatter":
        values = np.einsum("...de,...fe->...df", values, values)
    return jnp.asarray(values, array.dtype)


@dataclass
class Packed:
    """One compaction of two sequences of one layer: what there was, the plan, and what is left."""

    before: tuple[dict[str, Any], ...]
    plan: Compaction
    after: tuple[dict[str, Any], ...]
    kept: np.ndarray
    """[B, K, M] slots"""
    layout: MemoryLayout
    stored: tuple[int, ...]

    def slots(self, name: str, row: int, *, after: bool) -> np.ndarray:
        """[K, N, D] what a sequence's pages hold of keys or values."""
        mine, pools = self.plan.classes[0], self.after if after else self.before
        pages = (mine.destinations if after else mine.pages)[row]
        tiles = np.asarray(pools[0]["kv"][name])[pages[pages < len(pools[0]["kv"][name])]]
        return tiles.swapaxes(0, 1).reshape(tiles.shape[1], -1, tiles.shape[-1])


def packed(
    memory: MemoryConfig, *, keep: int = 9, stored: tuple[int, ...] = (22, 13), unused: float = 0.0, ties: bool = False
) -> Packed:
    """Compacts two sequences whose slots are random and whose unused slots hold `unused`; with `ties` there are but
    three different keys."""
    layout = MemoryLayout.of([{"kv": STATE}], memory, max_sequences=2, max_len=24)
    ledger, rng = layout.ledger(), np.random.default_rng(0)
    for row, count in enumerate(stored):
        for start in range(0, count, layout.chunk_len):
            width = min(layout.chunk_len, count - start)
            ledger.reserve(row, width)
            ledger.commit(row, width)
    tables = [list(ledger.running[row].holdings[0].pages.values()) for row in range(len(stored))]
    pools = layout.allocate()
    for name, dim in (("keys", 8), ("values", 6)):
        array = np.full(pools[0]["kv"][name].shape, unused, np.float32)
        array[0] = 0  # the null page
        for pages, count in zip(tables, stored, strict=True):
            for slot in range(count):
                drawn = np.random.default_rng(slot % 3).standard_normal((2, dim)) if ties else rng.normal(size=(2, dim))
                array[pages[slot // layout.page_size], :, slot % layout.page_size] = drawn
        pools[0]["kv"][name] = jnp.asarray(array)
    for name, array in pools[0].get("kv.noted", {}).items():
        pools[0]["kv.noted"][name] = plausible(name, array, rng)
    before = jax.tree.map(np.asarray, pools)
    plan = ledger.compact({row: {"kv": keep} for row in range(len(stored))}, dict.fromkeys(range(len(stored)), 5))
    assert isinstance(plan, Compaction)
    after, kept = jax.jit(lambda pools, plan: compact(layout, pools, plan))(pools, padded(plan, layout))
    found = np.asarray(kept[0]["kv"])[: len(stored), :, :keep]
    return Packed(before, plan, jax.tree.map(np.asarray, after), found, layout, stored)
