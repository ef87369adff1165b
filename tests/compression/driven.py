"""A small random model driven through a compressed memory with spoiled pages, and what its queries really attend to."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views import whole
from kvlab.models.transformer import merge
from tests.contracts import VOCAB, build

PROMPT, TOTAL, ROWS = 22, 29, 3


def tokens_of(rows: int = ROWS, total: int = TOTAL) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (rows, total)).astype(np.int32)


def drive(
    variant: str, method: Any, budget: Any, *, page_size: int = 4, chunk_len: int = 5, format: str = "model"
) -> tuple[MaskCheck, Session]:
    """Prompts in chunks, then tokens one by one, through pages that begin as NaN and become NaN when they are freed;
    every logit is compared with the parallel form under the memory's mask."""
    model, structure, params, _ = build(variant)
    memory = MemoryConfig(page_size=page_size, chunk_len=chunk_len, compression=method, budget=budget, format=format)
    layout = MemoryLayout.of(model.states(), memory, max_sequences=ROWS, max_len=TOTAL)
    session = Session(MemoryStep.of(structure, layout), params, layout.allocate(np.nan), poisons=True, observes=True)
    tokens, seen = tokens_of(), dict[int, np.ndarray]()
    session.prompt_len, session.known = PROMPT, dict(enumerate(tokens))
    position = 0
    while position < TOTAL:
        count = min(chunk_len, PROMPT - position) if position < PROMPT else 1
        width = chunk_len if position < PROMPT else 1
        logits = session.advance({row: tokens[row, position : position + count] for row in range(ROWS)}, width)
        session.ledger.check()
        seen |= {position + place: np.asarray(logits[:ROWS, place]) for place in range(count)}
        position += count
    check = MaskCheck(structure, params, layout)
    check.compare(tokens, seen, session.events)
    return check, session


class Recorder:
    """A view of complete sequences that remembers its keys [B, T, K, D] and queries [B, T, H, D]."""

    def __init__(self, view: Any, log: list[dict[str, np.ndarray]]):
        self.view, self.log = view, log

    def append(self, **tokens: Any) -> "Recorder":
        self.log.append({"keys": np.asarray(tokens["keys"], np.float64)})
        return Recorder(self.view.append(**tokens), self.log)

    def attend(self, queries: Any, positions: Any, **options: Any) -> Any:
        self.log[-1]["queries"] = np.asarray(queries, np.float64)
        self.log[-1] |= {"soft_cap": self.view.state.soft_cap, "scale": self.view.state.readers.scale}
        return self.view.attend(queries, positions, **options)


def true_weights(variant: str, tokens: np.ndarray, log: list[dict[str, Any]] | None = None) -> list[np.ndarray]:
    """Of every attention layer the softmax weights [B, K, G, T, T] of a causal pass over tokens [B, T], in float64 from
    its float32 queries and keys, which are left in `log`."""
    _, structure, params, _ = build(variant)
    model, log = merge(structure, params), [] if log is None else log
    memory = [
        {name: Recorder(view, log) if view.state.per_token else view for name, view in layer.items()}
        for layer in whole(model.states(), *tokens.shape)
    ]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    model.hidden(jnp.asarray(tokens), positions, memory)
    found = []
    for each in log:
        queries, keys = each["queries"], each["keys"]
        batch, length, num_kv_heads, dim = keys.shape
        grouped = queries.reshape(batch, length, num_kv_heads, -1, dim)
        scores = np.einsum("btkgd,bskd->bkgts", grouped, keys) * (each["scale"] or dim**-0.5)
        if (cap := each["soft_cap"]) is not None:
            scores = cap * np.tanh(scores / cap)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        found.append(weights / weights.sum(axis=-1, keepdims=True))
    return found


def kept_by(session: Session, layer: int, name: str = "kv") -> dict[int, np.ndarray]:
    """The slots [K, keep] that each row kept at its compaction."""
    found = {}
    for each in session.compacted:
        for row, sequence in enumerate(each.sequences):
            slots = np.asarray(each.kept[layer][name])[row]
            found[sequence] = slots[:, slots[0] < 2**30]
    return found
