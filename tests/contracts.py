"""Contracts that every implementation plugs into, as plain functions over any (mixer, memory) pair."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.mamba2 import Mamba2Config
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, merge, split

VOCAB = 31
WINDOW = 6

# One row a variant: everything a mixer can be asked for, in small.
_small = {"num_heads": 4, "head_dim": 8}
VARIANTS: dict[str, list[LayerConfig]] = {
    name: [LayerConfig("attention", AttentionConfig(**{**_small, **fields}))]
    for name, fields in {
        "mha": {"num_kv_heads": 4},
        "gqa": {"num_kv_heads": 2},
        "mqa": {"num_kv_heads": 1, "short_conv": 3},
        "no_positions": {"num_kv_heads": 2, "rope": False},
        "partial_rope": {"num_kv_heads": 2, "rope_fraction": 0.5, "rope_base": 500.0},
        "norms_cap_bias": {"num_kv_heads": 2, "qk_norm": True, "soft_cap": 5.0, "bias": True},
        "window": {"num_kv_heads": 2, "window": WINDOW},
        "window_one": {"num_kv_heads": 1, "window": 1},
        "window_sinks": {"num_kv_heads": 2, "window": WINDOW, "num_sinks": 3, "short_conv": 2},
    }.items()
}
VARIANTS["mamba2"] = [LayerConfig("mamba2", Mamba2Config(state_dim=5, num_heads=2, head_dim=8, chunk_len=4))]
VARIANTS["mamba2_groups"] = [
    LayerConfig("mamba2", Mamba2Config(state_dim=3, num_heads=4, head_dim=4, num_groups=2, conv_len=2, short_conv=3))
]
VARIANTS["hybrid"] = [*VARIANTS["mamba2"], *VARIANTS["window_sinks"], *VARIANTS["gqa"]]


@functools.cache
def build(variant: str, dtype: str = "float32"):
    """A small random model of a variant, with weights large enough that a wrong cache shows; and its parallel form, compiled
    once for padded batches (causality makes the padding harmless)."""
    config = ModelConfig(model_dim=16, tie_embeddings=False, dtype=dtype)
    model = Transformer(VARIANTS[variant], config, VOCAB, rngs=nnx.Rngs(0))
    structure, params = split(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), params)

    @jax.jit
    def forward(tokens):
        whole = merge(structure, params)
        return whole.logits(whole.parallel(tokens))

    return model, structure, params, forward


def parallel_logits(variant: str, sequences: Sequence[np.ndarray], dtype: str = "float32") -> list[np.ndarray]:
    """Logits [T, V] of every sequence in the parallel form."""
    longest = max(len(tokens) for tokens in sequences)
    padded = np.zeros((len(sequences), longest), np.int32)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = tokens
    logits = np.asarray(build(variant, dtype)[3](padded))
    return [logits[row, : len(tokens)] for row, tokens in enumerate(sequences)]


def poisoned_session(variant: str, memory: MemoryConfig, *, rows: int, max_len: int, dtype: str = "float32") -> Session:
    """A session whose pools hold NaN wherever nothing was written."""
    model, structure, params, _ = build(variant, dtype)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=rows, max_len=max_len)
    return Session(MemoryStep.of(structure, layout), params, layout.allocate(float("nan")))


def run_ragged(session: Session, sequences: dict[str, np.ndarray], chunk_len: int) -> dict[str, np.ndarray]:
    """Feeds sequences of different lengths side by side in chunks; one that ends leaves its row to padding. Returns every
    sequence's logits [T, V]; the ledger's invariants hold after each step."""
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in sequences}
    done = dict.fromkeys(sequences, 0)
    while remaining := [name for name in sequences if done[name] < len(sequences[name])]:
        chunks = {name: sequences[name][done[name] : done[name] + chunk_len] for name in remaining}
        logits = np.asarray(session.advance(chunks, chunk_len))
        session.ledger.check()
        for row, name in enumerate(remaining):
            outputs[name].append(logits[row, : len(chunks[name])])
            done[name] += len(chunks[name])
            if done[name] == len(sequences[name]):
                session.ledger.release(name)
    return {name: np.concatenate(parts) for name, parts in outputs.items()}


def assert_memory_equals_parallel(
    variant: str, memory: MemoryConfig, lengths: Sequence[int], *, dtype: str = "float32"
) -> None:
    """The contract: chunks through memory give the parallel form's logits, for ragged batches, in poisoned pools, and again
    for later sequences that reuse the slots of earlier ones.

    Element by element in float32; in bfloat16, where both forms round differently, by relative Frobenius error."""
    session = poisoned_session(variant, memory, rows=len(lengths), max_len=max(lengths), dtype=dtype)
    rng = np.random.default_rng(0)
    for generation in range(2):
        order = lengths if generation == 0 else lengths[::-1]  # the second time other rows get the used slots
        sequences = {f"{generation}.{i}": rng.integers(0, VOCAB, n).astype(np.int32) for i, n in enumerate(order)}
        through = run_ragged(session, sequences, memory.chunk_len)
        expected = parallel_logits(variant, list(sequences.values()), dtype)
        for name, logits in zip(sequences, expected, strict=True):
            if dtype == "float32":
                np.testing.assert_allclose(through[name], logits, atol=2e-4, rtol=2e-4, err_msg=f"{name} of {lengths}")
            else:
                assert np.linalg.norm(through[name] - logits) <= 0.03 * np.linalg.norm(logits), f"{name} of {lengths}"
