"""Sinks and a window on a model of full attention (StreamingLLM, arXiv 2309.17453)."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from jax import Array
from jaxtyping import Float

from kvlab.compression.base import Compression, Part, Shape, Slots
from kvlab.compression.budget import Budget
from kvlab.ledger.states import PerToken, State
from kvlab.schema import ConfigError, choice, integer
from kvlab.units import counted
from pallas_kernels.visible import Visible


@dataclass(frozen=True)
class Windowed(Compression, abc.ABC):
    """The base of what drops tokens by their position alone. A state with a window forgets while it is filled, so that
    nothing is scored or packed, no prompt is ever held whole, and what is shared stays shared. The budget is what is
    held between steps: `sinks` tokens and the newest ones, beside which a query sees its own. It must be slots (or
    bytes): a window is fixed before a prompt is known, so that no fraction of one can be meant."""

    recent: int = integer(0, 0, 0)
    at: str = choice("end", ("end",))
    every: int = integer(0, 0, 0)
    heads: str = choice("uniform", ("uniform",))
    layers: str = choice("uniform", ("uniform",))

    def score(self, slots: Slots) -> Float[Array, "B K N"]:
        raise AssertionError("what forgets by position is never compacted")

    def retention(self, state: State, shape: Shape) -> None:
        """None: there is nothing to compact."""

    def visible(self, budget: Budget) -> Visible:
        """What a token sees under a budget. Raises ConfigError for one that is not slots, or below the sinks."""
        least = max(1, self.sinks)
        if budget.slots is None:
            legal = f"must be slots for {self.name}: a window is fixed before a prompt is known"
            raise ConfigError("memory.budget", str(budget), legal)
        if budget.slots < least:
            legal = f"must be at least {counted(least, 'slot')}, with sinks = {self.sinks}"
            raise ConfigError("memory.budget", str(budget), legal)
        return Visible(budget.slots - self.sinks + 1, self.sinks)


@dataclass(frozen=True)
class Streaming(Windowed):
    """Keeps the first `sinks` tokens and the newest: a window for every head of every layer of full attention."""

    name: ClassVar[str] = "streaming"

    def parts(self, state: State, shape: Shape) -> Mapping[str, Part]:
        assert isinstance(state, PerToken)
        return {"": Part(replace(state, visible=self.visible(shape.budget)))}
