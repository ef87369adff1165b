"""The mixer contract: `mixer(x, positions, memory) -> (y, memory)`, and bytes that are stated before anything is
built."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from flax import nnx

from kvlab.ledger.states import State
from kvlab.schema import ConfigError, Schema, added, choice, integer, real
from kvlab.typing import Hidden, Positions

# Modules are plain pytrees: no graph mode, no mutation under jit. Set once, where modules are first defined.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)

type LayerMemory = Mapping[str, Any]
"""Views of one layer's named states (`kvlab.memory.views`), keyed as `Mixer.states`: `TokenView` or `StateView`."""


class Knob(NamedTuple):
    """The integer field by which a variant holds more or fewer bytes: its legal values ascend, and bytes with them."""

    field: str
    values: Sequence[int]


@dataclass(frozen=True)
class MixerConfig(Schema):
    """What every mixer can be asked for: `short_conv` puts a causal convolution of that width in front of it (0: none);
    `norm_eps` is that of the norms inside. `norms` says where its block has others: before mixer and MLP, after them,
    or both."""

    short_conv: int = integer(0, 0, 64)
    norm_eps: float = real(1e-6, 0.0, 1.0, open_low=True)
    norms: str = added(choice("before", ("before", "after", "both")))

    def cross_check(self) -> None:
        if self.short_conv == 1:
            raise ConfigError("short_conv", 1, "must be 0 (none) or a width in [2, 64]")

    def knob(self, context_len: int) -> Knob | None:
        """What a budget of bytes is solved for, in contexts of `context_len` tokens; None: it holds what it holds."""
        return None


class Mixer(nnx.Module):
    """Mixes information along the sequence. Abstract: without `states` a mixer has no bytes and cannot be
    constructed."""

    Config: ClassVar[type[MixerConfig]]
    parallel_op: ClassVar[str | None] = None
    """The op of `pallas_kernels` that the parallel form takes, as plans and records name it; None: plain JAX."""

    @abc.abstractmethod
    def states(self) -> dict[str, State]:
        """The named states one layer of this mixer must remember."""

    @abc.abstractmethod
    def __call__(self, x: Hidden, positions: Positions, memory: LayerMemory) -> tuple[Hidden, LayerMemory]:
        """Outputs [B, T, E] for inputs [B, T, E] at absolute positions [B, T], and the memory with the new tokens in
        it.

        x continues what is stored: a prompt's chunk or one decoded token. Rows may end in padding, which states must
        be told (`StateView.valid`). In the memory `whole` the sequence is complete and starts at 0, and nothing
        outlives the call: that is the parallel form, for training and scoring, and a mixer need not know.
        """
