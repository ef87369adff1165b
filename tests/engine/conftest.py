"""Fewer programs to compile: every batch has all its rows, and every row one token or a whole chunk."""

import pytest

from kvlab.engine import shapes


@pytest.fixture(autouse=True)
def few_shapes(request, monkeypatch):
    """Not for slow tests, nor for those marked `every_shape`: they run the engine as it is."""
    if not any(request.node.get_closest_marker(name) for name in ("slow", "every_shape")):
        monkeypatch.setattr(shapes, "rows_for", lambda _, limit: limit)
        monkeypatch.setattr(shapes, "width_for", lambda num_tokens, limit: 1 if num_tokens == 1 else limit)
