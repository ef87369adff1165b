"""A selecting memory in float64, query by query and page by page: what pages, chunks and engines must agree with."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvlab.memory.pools import as_stored
from kvlab.memory.views import view_of


def read_by(scores, own, count, first, last):
    """Pages [0, own] that a query reads, by sorting tuples: those always read, then by score, then the newer."""
    always = [n for n in range(own + 1) if n < first or n > own - last]
    rest = sorted((n for n in range(own + 1) if n not in always), key=lambda n: (scores[n], n), reverse=True)
    return sorted([*reversed(always), *rest][:count])


def quest(queries, keys):
    """Of the queries [G, D] that share a head, the largest bound over the keys [S, D] of a page."""
    return np.maximum(queries * keys.min(axis=0), queries * keys.max(axis=0)).sum(axis=1).max()


def mean_key(queries, keys):
    """The same of their mean."""
    return (queries @ keys.mean(axis=0)).max()


SCORES = {"quest": quest, "mean_key": mean_key}


@dataclass(frozen=True)
class BruteForce:
    """The memory of a complete sequence, as `WholeTokens`; `count(num_pages)` pages are read, by `method`."""

    state: Any
    method: Any
    page_size: int
    prompt_len: int
    tokens: Any = None

    def append(self, **tokens):
        return replace(
            self,
            tokens={name: np.asarray(as_stored(self.state, name, each), np.float64) for name, each in tokens.items()},
        )

    def attend(self, queries, positions, *, sink_logits=None):
        cap = self.state.soft_cap
        sinks = np.full(queries.shape[2], -np.inf) if sink_logits is None else np.asarray(sink_logits, np.float64)
        keys = self.tokens["keys"]
        values = self.tokens["values"] if "values" in self.tokens else keys[..., : self.state.rank]
        asked = np.asarray(queries, np.float64) * self.state.scale(queries.shape[-1])
        batch, num_tokens, num_heads, _ = asked.shape
        group, outputs = num_heads // keys.shape[2], np.zeros((*asked.shape[:3], values.shape[-1]))
        for b, t, k in np.ndindex(batch, num_tokens, keys.shape[2]):
            mine = asked[b, t, k * group : (k + 1) * group]
            slots = self._slots(mine, keys[b, : t + 1, k])
            scores = mine @ keys[b, slots, k].T
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            scores = np.column_stack([scores, sinks[k * group : (k + 1) * group]])  # a key of no token, without value
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights = weights[:, :-1] / weights.sum(axis=1, keepdims=True)
            outputs[b, t, k * group : (k + 1) * group] = weights @ values[b, slots, k]
        return jnp.asarray(outputs, queries.dtype), self

    def _slots(self, queries, keys):
        """Which of the tokens up to its own a query reads."""
        own, size = (len(keys) - 1) // self.page_size, self.page_size
        if self.method.prefill == "dense" and len(keys) <= self.prompt_len:
            return np.arange(len(keys))
        wanted = self.method.pages or int(self.method.fraction * (own + 1) + 1e-9)
        count = min(own + 1, max(wanted, self.method.first_pages + self.method.last_pages))
        scores = [SCORES[self.method.name](queries, keys[n * size : (n + 1) * size]) for n in range(own + 1)]
        pages = read_by(scores, own, count, self.method.first_pages, self.method.last_pages)
        return np.concatenate([np.arange(n * size, min(len(keys), (n + 1) * size)) for n in pages])


def logits_of(model, states, method, page_size, tokens, prompt_len=0):
    """Logits [T, V] of one sequence; `states` are the model's as the memory stores them. Nothing is compiled."""
    tokens = jnp.asarray(tokens, jnp.int32)[None]
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    starts, counts = jnp.zeros(1, jnp.int32), jnp.full(1, tokens.shape[1], jnp.int32)
    memory = [
        {
            name: view_of(state, "whole").of(state, {}, None, starts, counts)
            if state.reading is None
            else BruteForce(state, method, page_size, prompt_len)
            for name, state in layer.items()
        }
        for layer in states
    ]
    return np.asarray(model.logits(model.hidden(tokens, positions, memory)[0]))[0]
