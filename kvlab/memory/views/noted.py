"""Tokens in pages under a compression that remembers who was attended to: a view of two parts, the tokens and what the
method noted."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvlab.compression import Attended
from kvlab.memory.views.dealt import DealtTokens
from kvlab.memory.views.sealed import SealedTokens
from kvlab.memory.views.weights import paged_weights
from kvlab.typing import HeadOutputs, Positions, Queries, SinkLogits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NotedTokens:
    """`tokens` as they are without a method, and `noted`, its statistics: read before a step, written after it. A step
    of a second pass `listens`: see `Compression.listen`. Of several layers that read the tokens in turn each goes on
    from `rows`: what was noted up to the layer before it, or, where the last layer alone counts, up to the step."""

    method: Any = field(metadata={"static": True})
    tokens: Any
    noted: Any
    listens: bool = field(default=False, metadata={"static": True})
    rows: Any = None

    @classmethod
    def of_parts(cls, method: Any, parts: Mapping[str, Any], *, listens: bool = False) -> Self:
        """From the views of the parts."""
        return cls(method, parts[""], parts["noted"], listens)

    def parts(self) -> dict[str, Any]:
        """The views of the parts, by the names that a compression gives them."""
        is_joined = isinstance(self.tokens, DealtTokens | SealedTokens)
        tokens = self.tokens.parts() if is_joined else {"": self.tokens}
        return {**tokens, "noted": self.noted}

    def append(self, **tokens: Array) -> Self:
        return replace(self, tokens=self.tokens.append(**tokens))

    def attend(
        self, queries: Queries, positions: Positions, *, sink_logits: SinkLogits | None = None
    ) -> tuple[HeadOutputs, Self]:
        outputs, tokens = self.tokens.attend(queries, positions, sink_logits=sink_logits)
        num_tokens, dim = queries.shape[1], queries.shape[3]
        scaled = queries.astype(jnp.float32) * tokens.state.scale(dim)
        slots = tokens.query_slots(num_tokens)

        def weigh() -> Float[Array, "B T H S"]:
            return paged_weights(tokens, scaled, slots, sink_logits)

        seen = Attended(scaled, positions, slots, self.noted.valid(num_tokens), weigh, tokens.state.readers)
        note = self.method.listen if self.listens else self.method.observe
        rows = self.noted.read() if self.rows is None else self.rows
        if self.noted.state.until_compacted:  # of use to nobody in a step behind all prompts: then it costs nothing
            noted = jax.lax.cond(self.noted.held.any(), lambda rows: note(rows, seen), lambda rows: rows, rows)
        else:
            noted = note(rows, seen)
        following = rows if self.method.of_last_layer else noted
        return outputs, replace(self, tokens=tokens, noted=self.noted.write(noted), rows=following)
