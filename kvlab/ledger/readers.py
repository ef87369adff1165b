"""How a mixer's queries read what it stores: what a memory must know to weigh tokens as attention would."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding that stored keys have gone through: of `dim` of their numbers, from `start` on, with
    frequencies base ** (-2 i / dim), stretched as `AttentionConfig.rope_scaling` says."""

    dim: int
    base: float
    scaling: tuple[float, ...] = ()
    start: int = 0


@dataclass(frozen=True)
class Readers:
    """Query heads that read a state, and how: `scale` None is D ** -0.5, `soft_cap` c maps a scaled score s to c *
    tanh(s / c), `rotary` None means keys as they were projected. `num_layers` counts the layers that read it: the one
    that writes it, and those that share it."""

    num_heads: int
    scale: float | None = None
    soft_cap: float | None = None
    rotary: Rotary | None = None
    num_layers: int = 1
