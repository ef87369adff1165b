"""Contracts that every implementation plugs into, as plain functions over any (mixer, memory) pair."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.ledger.states import State
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views import VIEWS, whole
from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.indexed import IndexedConfig
from kvlab.mixers.latent import LatentConfig
from kvlab.mixers.linear import LinearConfig
from kvlab.mixers.mamba2 import Mamba2Config
from kvlab.mixers.mamba3 import Mamba3Config
from kvlab.mixers.rglru import RGLRUConfig
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, merge, split
from pallas_kernels.formats import quantised

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
        "partial_rope": {"num_kv_heads": 2, "rope_fraction": 0.5, "rope_base": 500.0, "local_start": 1.0},
        "norms_cap_bias": {"num_kv_heads": 2, "qk_norm": True, "soft_cap": 5.0, "bias": True, "scale": 0.7},
        "output_gate": {"num_kv_heads": 2, "output_gate": True, "qk_norm": True, "qk_norm_over": "all"},
        "sink_logits": {"num_kv_heads": 2, "sink_logits": True, "soft_cap": 5.0},
        "window": {"num_kv_heads": 2, "window": WINDOW},
        "window_one": {"num_kv_heads": 1, "window": 1},
        "window_sinks": {"num_kv_heads": 2, "window": WINDOW, "num_sinks": 3, "short_conv": 2},
    }.items()
}
VARIANTS["mamba2"] = [LayerConfig("mamba2", Mamba2Config(state_dim=5, num_heads=2, head_dim=8, chunk_len=4))]
VARIANTS["mamba2_groups"] = [
    LayerConfig("mamba2", Mamba2Config(state_dim=3, num_heads=4, head_dim=4, num_groups=2, conv_len=2, short_conv=3))
]
VARIANTS["mamba3"] = [
    LayerConfig("mamba3", Mamba3Config(state_dim=6, num_heads=4, head_dim=3, num_groups=2, chunk_len=4))
]
VARIANTS["rglru"] = [LayerConfig("rglru", RGLRUConfig(width=6, num_heads=2, conv_len=3))]
_linear = {"num_heads": 2, "key_dim": 5, "value_dim": 6, "chunk_len": 4}
VARIANTS |= {
    name: [LayerConfig("linear", LinearConfig(**{**_linear, **fields}))]
    for name, fields in {
        "gated_deltanet": {"num_value_heads": 4, "conv_len": 3, "conv_bias": False},
        "deltanet": {"decay": "none", "negative_eigenvalues": True, "conv_len": 0, "short_conv": 2},
        "deltaproduct": {"householders": 2, "negative_eigenvalues": True, "conv_len": 2},
        "kda": {"decay": "channel", "gate": "low_rank", "conv_len": 2},
        "based": {"rule": "plain", "decay": "constant", "feature_map": "taylor", "gate": "none", "conv_len": 0},
        "retnet": {"rule": "plain", "decay": "constant", "gate": "none", "write_gate": False},
        "gla": {"rule": "plain", "decay": "channel", "write_gate": False, "conv_len": 2},
        "lightning": {"rule": "plain", "decay": "slopes", "gate": "sigmoid", "write_gate": False, "conv_len": 0},
        "linear_attention": {"rule": "plain", "decay": "none", "write_gate": False, "conv_len": 3},
    }.items()
}
_latent = {"num_heads": 3, "rank": 6, "rope_dim": 2, "head_dim": 5, "value_dim": 4}
VARIANTS["latent"] = [LayerConfig("latent", LatentConfig(**_latent, query_rank=7, local_start=1.0))]
VARIANTS["latent_nope"] = [LayerConfig("latent", LatentConfig(**_latent | {"rope_dim": 3}, rope=False, short_conv=2))]
_index = {"num_kv_heads": 2, "index_heads": 3, "index_dim": 6}
VARIANTS |= {
    name: [LayerConfig("indexed", IndexedConfig(**{**_small, **_index, **fields}))]
    for name, fields in {
        "retrieval": {"num_selected": 5, "short_conv": 2, "sink_logits": True},
        "retrieval_blocks": {"num_selected": 9, "index_block": 3, "soft_cap": 5.0, "qk_norm": True},
        "retrieval_pages": {"num_selected": 8, "index_block": 4, "rope": False},
    }.items()
}
VARIANTS["hybrid"] = [*VARIANTS["mamba2"], *VARIANTS["window_sinks"], *VARIANTS["gqa"]]


_shared = {**_small, "num_kv_heads": 2}
_own, _reader = (LayerConfig("attention", AttentionConfig(**_shared, shares_kv=shares)) for shares in (False, True))
_by_window = {**_shared, "window": WINDOW, "num_sinks": 1}
VARIANTS |= {
    "cla": [_own, LayerConfig("attention", AttentionConfig(**_shared, shares_kv=True, short_conv=2, qk_norm=True))] * 2,
    "yoco": [*VARIANTS["mamba2"], _own, _reader, _reader],
    "shared_windows": [
        LayerConfig("attention", AttentionConfig(**_by_window, qk_norm=True)),
        _own,
        LayerConfig("attention", AttentionConfig(**_by_window, shares_kv=True, sink_logits=True)),
        _reader,
    ],
}


@functools.cache
def build(variant: str, dtype: str = "float32"):
    """A small random model of a variant, with weights large enough that a wrong cache shows; and its parallel form,
    compiled once for padded batches (causality makes the padding harmless)."""
    config = ModelConfig(model_dim=16, tie_embeddings=False, dtype=dtype)
    model = Transformer(VARIANTS[variant], config, VOCAB, rngs=nnx.Rngs(0))
    structure, params = split(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), params)

    @partial(jax.jit, static_argnames="format")
    def forward(tokens, format="model"):
        complete = merge(structure, params)
        if format == "model":
            return complete.logits(complete.parallel(tokens))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        memory = [
            {name: Rounded(view, format) if view.state.per_token else view for name, view in layer.items()}
            for layer in whole(complete.states(), *tokens.shape)
        ]
        return complete.logits(complete.hidden(tokens, positions, memory)[0])

    return model, structure, params, forward


@dataclass(frozen=True)
class Rounded:
    """The parallel form of quantised pages: keys and values become what their format makes of them."""

    view: Any
    format: str

    def append(self, **tokens):
        rounded = {name: quantised(tokens[name], self.format).values() for name in tokens if name in ("keys", "values")}
        return self.view.append(**tokens | rounded)


def parallel_logits(
    variant: str, sequences: Sequence[np.ndarray], dtype: str = "float32", format: str = "model"
) -> list[np.ndarray]:
    """Logits [T, V] of every sequence in the parallel form."""
    longest = max(len(tokens) for tokens in sequences)
    padded = np.zeros((len(sequences), longest), np.int32)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = tokens
    logits = np.asarray(build(variant, dtype)[3](padded, format=format))
    return [logits[row, : len(tokens)] for row, tokens in enumerate(sequences)]


@functools.cache
def states_of(variant: str) -> list[State]:
    """Every state of every layer; nothing is computed."""
    config = ModelConfig(model_dim=16, dtype="float32")
    model = nnx.eval_shape(lambda: Transformer(VARIANTS[variant], config, VOCAB, rngs=nnx.Rngs(0)))
    return [state for layer in model.states() for state in layer.values()]


def pairs_with(memories: Iterable[MemoryConfig]) -> list[tuple[str, MemoryConfig]]:
    """Every (variant, memory) of which the registry of views says that the memory can hold the variant's states."""
    kinds = {name: {type(state) for state in states_of(name)} for name in VARIANTS}
    return [
        (name, memory)
        for memory in memories
        for name in VARIANTS
        if all((kind, memory.name) in VIEWS for kind in kinds[name])
    ]


def poisoned_session(variant: str, memory: MemoryConfig, *, rows: int, max_len: int, dtype: str = "float32") -> Session:
    """A session whose pools hold NaN wherever nothing was written."""
    model, structure, params, _ = build(variant, dtype)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=rows, max_len=max_len)
    return Session(MemoryStep.of(structure, layout), params, layout.allocate(float("nan")))


def run_ragged(session: Session, sequences: dict[str, np.ndarray], chunk_len: int) -> dict[str, np.ndarray]:
    """Feeds sequences of different lengths side by side in chunks; one that ends leaves its row to padding. Every
    second sequence begins with a shorter chunk, so that padding stands behind tokens that others follow. Returns every
    sequence's logits [T, V]; the ledger's invariants hold after each step."""
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in sequences}
    done = dict.fromkeys(sequences, 0)
    first = {name: chunk_len if index % 2 else (chunk_len + 1) // 2 for index, name in enumerate(sequences)}
    while remaining := [name for name in sequences if done[name] < len(sequences[name])]:
        ends = {name: done[name] + (chunk_len if done[name] else first[name]) for name in remaining}
        chunks = {name: sequences[name][done[name] : ends[name]] for name in remaining}
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
    """The contract: chunks through memory give the parallel form's logits, for ragged batches, in poisoned pools, and
    again for later sequences that reuse the slots of earlier ones.

    Element by element in float32; in bfloat16, where both forms round differently, by relative Frobenius error."""
    session = poisoned_session(variant, memory, rows=len(lengths), max_len=max(lengths), dtype=dtype)
    rng = np.random.default_rng(0)
    for generation in range(2):
        order = lengths if generation == 0 else lengths[::-1]  # the second time other rows get the used slots
        sequences = {f"{generation}.{i}": rng.integers(0, VOCAB, n).astype(np.int32) for i, n in enumerate(order)}
        through = run_ragged(session, sequences, memory.chunk_len)
        expected = parallel_logits(variant, list(sequences.values()), dtype, memory.format)
        for name, logits in zip(sequences, expected, strict=True):
            if dtype == "float32":
                np.testing.assert_allclose(through[name], logits, atol=2e-4, rtol=2e-4, err_msg=f"{name} of {lengths}")
            else:
                assert np.linalg.norm(through[name] - logits) <= 0.03 * np.linalg.norm(logits), f"{name} of {lengths}"
