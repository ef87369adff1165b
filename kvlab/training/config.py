"""How long a training is, how often it is looked at, and which trainings are one program."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from kvlab.schema import ConfigError, Schema, added, integer, real

VARIED = ("seed", "learning_rate")
"""In what trainings may differ that are one program."""


def _each_once(chosen: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(chosen)) < len(chosen):
        raise ValueError("named twice")  # the sentence that is shown is the field's description
    return chosen


SOME: Any = Annotated[tuple[Literal["seed", "learning_rate"], ...], Field(min_length=1), AfterValidator(_each_once)]
LEGAL = f"null, auto, or a list of some of {', '.join(VARIED)}, each once"
VMAP: Any = Annotated[Literal["auto"] | SOME | None, Field(description=LEGAL)]
"""null, "auto", or some of `VARIED`."""


@dataclass(frozen=True)
class TrainConfig(Schema):
    """How long and how often; `num_steps` 0 evaluates the parameters as they are. `eval_every` and `checkpoint_every`
    are in steps and multiples of `steps_per_call`.

    Training stops early when the validation metric reaches `stop_at`, or has not improved for `patience` validations.

    `vmap` names in what trainings of a sweep, or of `tune`, may differ that are trained as one program; "auto" is both
    on an accelerator and neither on a CPU. It is no part of a run's identity.
    """

    num_steps: int = integer(1000, 0)
    batch_size: int = integer(64, 1, 1 << 20)
    accumulation: int = integer(1, 1, 1 << 20)
    steps_per_call: int = integer(4, 1, 10_000)
    eval_every: int = integer(200, 1)
    checkpoint_every: int = integer(500, 1)
    keep_checkpoints: int = integer(2, 1, 1000)
    stop_at: float | None = real(None, 0.0, 1e6, optional=True)
    patience: int | None = integer(None, 1, optional=True)
    vmap: tuple[str, ...] | str | None = added(field(default="auto", metadata={"type": VMAP}), aside=True)

    def cross_check(self) -> None:
        if self.batch_size % self.accumulation:
            raise ConfigError("accumulation", self.accumulation, f"must divide batch_size = {self.batch_size}")
        for name in ("num_steps", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value % self.steps_per_call:
                raise ConfigError(name, value, f"must be a multiple of steps_per_call = {self.steps_per_call}")

    def varied(self, platform: str) -> tuple[str, ...]:
        """In what trainings may differ that are one program on a JAX platform; nothing: each is its own."""
        if self.vmap == "auto":
            return () if platform == "cpu" else VARIED
        return tuple(self.vmap or ())
