"""A state whose KV heads are held apart: some keep every token, others forget. Heads are attended to where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitTokens:
    """`views` by part, each of its own KV heads, which `heads` says in the same order."""

    heads: tuple[tuple[str, tuple[int, ...]], ...] = field(metadata={"static": True})
    views: Any

    @classmethod
    def of_parts(cls, heads: Sequence[tuple[str, tuple[int, ...]]], parts: Mapping[str, Any]) -> Self:
        """From the views of the parts."""
        return cls(tuple(heads), dict(parts))

    def parts(self) -> dict[str, Any]:
        """The views of the parts, by the names that a compression gives them."""
        return self.views

    def append(self, **tokens: Array) -> Self:
        after = {
            part: self.views[part].append(**{name: array[:, :, list(heads)] for name, array in tokens.items()})
            for part, heads in self.heads
        }
        return replace(self, views=after)

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        batch, num_tokens, num_heads, dim = queries.shape
        order = [head for _, heads in self.heads for head in heads]
        grouped = queries.reshape(batch, num_tokens, len(order), num_heads // len(order), dim)
        outputs, after = list[Array](), dict[str, Any]()
        for part, heads in self.heads:
            mine = grouped[:, :, list(heads)].reshape(batch, num_tokens, -1, dim)
            sinks = None if sink_logits is None else sink_logits.reshape(len(order), -1)[np.array(heads)].reshape(-1)
            found, after[part] = self.views[part].attend(mine, positions, sink_logits=sinks)
            outputs.append(found.reshape(batch, num_tokens, len(heads), -1, found.shape[-1]))
        merged = jnp.concatenate(outputs, axis=2)[:, :, np.argsort(order)]
        return merged.reshape(batch, num_tokens, num_heads, -1), replace(self, views=after)
