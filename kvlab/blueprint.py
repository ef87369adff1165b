"""A config's model before anything is held: drawn as shapes, refused where its memory could not hold its states, and
solved for a budget of bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

from flax import nnx
from jax import Array

from kvlab.compression import Budget
from kvlab.config import Config
from kvlab.memory.budgets import EqualBudget, held_bytes, solve, solve_slots, with_slots
from kvlab.memory.idle import idle_fields
from kvlab.memory.parts import parts_of
from kvlab.memory.views import LayerStates
from kvlab.models.model import Model
from kvlab.models.transformer import Transformer
from kvlab.random import named_key
from kvlab.schema import ConfigError


def draw(config: Config, vocab_size: int, key: Array) -> Transformer:
    """The model with fresh parameters over a vocabulary."""
    return Transformer(config.layers(), config.model, vocab_size, rngs=nnx.Rngs(key))


def abstract(config: Config, vocab_size: int) -> Model:
    """The model with shapes in place of parameters, in a second and without memory.

    Raises ConfigError for states that the config's memory cannot hold, or not in its format, or not under its
    compression and budget, and for a published checkpoint whose vocabulary does not hold the tokens of the task's
    sequences; a tokenizer may know more.
    """
    _check_vocabulary(config)
    shapes = _shapes(config, vocab_size)
    parts_of(shapes.states, config.memory, max_len=config.context_len)
    return shapes


def check(configs: Iterable[Config]) -> None:
    """Raises what `abstract` would, of the first config for which it would; equal models are built once."""
    for config in configs:
        _check_vocabulary(config)
        parts_of(_states(config), config.memory, max_len=config.context_len)


def resolved(config: Config) -> Config:
    """The config with a budget of bytes solved: for whole pages of slots, or for the knob of a mixer whose tokens all
    stay. What has neither stays as it is, without the budget: slots and fractions are of what a compression keeps.

    `equal_budget` says what was asked, solved and held, and `idle_fields` what of the memory says nothing here. A
    resolved config comes back as it is. Raises ConfigError for a budget that cannot be solved, or not for 90% of it.
    """
    config = _budget_solved(config)
    idle = idle_fields(config.memory, partial(_has_pages, config))
    return config if idle == config.idle_fields else replace(config, idle_fields=idle)


def _has_pages(config: Config) -> bool:
    return any(state.per_token for layer in _states(config) for state in layer.values())


def _budget_solved(config: Config) -> Config:
    memory = config.memory
    if memory.budget is None:
        return config
    is_bytes = Budget.of(memory.budget).num_bytes is not None
    if memory.compression is not None:
        if not is_bytes:
            return config
        found = solve_slots(_states(config), memory, config.context)
        assert found.solved is not None
        return replace(config, memory=with_slots(memory, found.solved), equal_budget=found)
    without = replace(config, memory=replace(memory, budget=None, allow_underfill=False))
    knob = _knob(config) if is_bytes else None
    if knob is None:
        return replace(without, equal_budget=EqualBudget(memory.budget))
    place, values = knob

    def turned(value: int) -> Config:
        return replace(without, mixer=config.mixer.with_knob(place, value))

    def size(value: int) -> int:
        return held_bytes(_states(turned(value)), without.memory, config.context)

    found = solve(memory, f"mixer.{place}", values, size, config.context)
    assert found.solved is not None
    return replace(turned(found.solved), equal_budget=found)


def _knob(config: Config) -> tuple[str, Sequence[int]] | None:
    """The knob of a model's mixers, as layer.field, with its values; None where there is none: published weights are
    what they are. Raises ConfigError where several layers have one and none is named, and for a name that is none."""
    if config.weights.path is not None:
        return None
    found = {
        f"{name}.{knob.field}": knob.values
        for name, layer in config.mixer.layers.items()
        if (knob := layer.config.knob(config.context_len)) is not None
    }
    if config.mixer.knob is not None:
        if config.mixer.knob not in found:
            raise ConfigError("mixer.knob", config.mixer.knob, f"must be one of {', '.join(found) or 'none: no layer'}")
        return config.mixer.knob, found[config.mixer.knob]
    if len(found) > 1:
        legal = f"must name what a budget of bytes is solved for: one of {', '.join(found)}"
        raise ConfigError("mixer.knob", None, legal)
    return next(iter(found.items()), None)


def _states(config: Config) -> tuple[LayerStates, ...]:
    """Every layer's states, of equal models drawn once."""
    vocab_size = config.vocab_size
    key = repr((config.mixer.layers, config.mixer.pattern, config.model, config.weights, vocab_size))
    return _drawn(_Shapes(key, config, vocab_size))


class _Shapes(NamedTuple):
    """A model to be drawn, told from others by its key alone."""

    key: str
    config: Config
    vocab_size: int

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shapes) and other.key == self.key


@lru_cache(maxsize=64)
def _drawn(shapes: _Shapes) -> tuple[LayerStates, ...]:
    return tuple(_shapes(shapes.config, shapes.vocab_size).states)


def _shapes(config: Config, vocab_size: int) -> Model:
    if config.weights.path is None:
        key = named_key(config.seed, "init")
        return Model.of(nnx.eval_shape(partial(draw, config, vocab_size), key))
    return config.weights.abstract()


def _check_vocabulary(config: Config) -> None:
    """Raises ConfigError for a published checkpoint whose vocabulary does not hold a token of the task's sequences,
    and for a task that is not of the vocabulary of the model's own."""
    config.check_vocabulary()
    task = config.make_task()
    if config.weights.path is None or task.vocab_size <= (held := config.weights.architecture().vocab_size):
        return
    if (highest := task.highest_token()) >= held:
        legal = f"its vocabulary of {held} does not hold token {highest} of the task"
        raise ConfigError("weights.path", config.weights.path, legal)
