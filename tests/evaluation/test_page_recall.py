"""The share of attention in the pages that a selection would read, against loops in float64."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.evaluation.page_recall import page_recall
from kvlab.schema import ConfigError
from kvlab.selection import SELECTIONS
from kvlab.selection.quest import Quest
from tests.memory.test_selected import build
from tests.selection.brute_force import SCORES, read_by

PAGE, POSITIONS = 4, (8, 13, 29)
METHODS = {
    "quest": Quest(fraction=0.5, first_pages=0),
    "quest, the first": Quest(fraction=0.5),
    "mean_key": SELECTIONS["mean_key"](pages=3),
    "recency": SELECTIONS["recency"](fraction=0.5, last_pages=2),
    "oracle": SELECTIONS["oracle"](fraction=0.5, first_pages=0),
    "everything": SELECTIONS["random"](fraction=1.0),
}


@dataclass(frozen=True)
class Recording:
    """A view that keeps what its queries and keys were."""

    whole: Any
    seen: Any

    def append(self, **tokens):
        return replace(self, whole=self.whole.append(**tokens))

    def attend(self, queries, positions, **options):
        self.seen.append(
            (
                np.asarray(queries, np.float64),
                np.asarray(self.whole.pool["keys"], np.float64),
                self.whole.state.soft_cap,
            )
        )
        outputs, whole = self.whole.attend(queries, positions, **options)
        return outputs, replace(self, whole=whole)


def brute_force(seen, method):
    """`Recall` of one layer, query by query."""
    queries, keys, cap = seen
    shares = []
    group = queries.shape[2] // keys.shape[2]
    for b, t, k in np.ndindex(len(queries), len(POSITIONS), keys.shape[2]):
        place, full = POSITIONS[t], POSITIONS[t] // PAGE
        asked = queries[b, place, k * group : (k + 1) * group] * queries.shape[-1] ** -0.5
        scores = asked @ keys[b, : place + 1, k].T
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mass = weights[:, : full * PAGE].reshape(group, full, PAGE).sum(axis=2) / weights.sum(axis=1, keepdims=True)
        pages = [keys[b, n * PAGE : (n + 1) * PAGE, k] for n in range(full)]
        if method.name in SCORES:
            worth = [SCORES[method.name](asked, page) for page in pages]
        else:
            worth = mass.sum(axis=0) if method.name == "oracle" else range(full)
        wanted = method.pages or int(method.fraction * full + 1e-9)
        count = min(full, max(wanted, method.first_pages + method.last_pages))
        chosen = read_by(worth, full - 1, count, method.first_pages, method.last_pages - 1)
        rest = [n for n in chosen if n]
        shares += [
            (mass[g, chosen].sum() / mass[g].sum(), mass[g, rest].sum() / mass[g, 1:].sum()) for g in range(group)
        ]
    return np.mean(shares, axis=0)


def test_shares_are_those_of_the_attention_that_there_is():
    from kvlab.memory.views import whole

    model, structure, params = build("attention")
    tokens = np.random.default_rng(0).integers(0, 31, (2, 30)).astype(np.int32)
    found = page_recall(structure, params, tokens, METHODS, page_size=PAGE, positions=POSITIONS)
    views, seen = whole(model.states(), *tokens.shape), []
    memory = [
        {name: Recording(view, seen) if view.state.span is None else view for name, view in layer.items()}
        for layer in views
    ]
    positions = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32)[None], tokens.shape)
    model.hidden(jnp.asarray(tokens), positions, memory)
    assert len(seen) == 2  # the window has no pages to choose from
    for name, method in METHODS.items():
        expected = np.array([brute_force(layer, method) for layer in seen])
        np.testing.assert_allclose(np.stack(found[name], axis=1), expected, atol=1e-5, err_msg=name)
    assert (found["oracle"].share >= found["quest"].share - 1e-6).all()
    np.testing.assert_allclose(found["everything"].share, 1, atol=1e-6)


def test_wrong_positions_and_models():
    _, structure, params = build("attention")
    tokens = np.zeros((1, 30), np.int32)
    for position in (7, 30):
        with pytest.raises(ConfigError, match=rf"positions = {position}: must be in \[8, 29\]"):
            page_recall(structure, params, tokens, METHODS, page_size=PAGE, positions=(position,))
