"""A config's model before anything is held: drawn as shapes, and refused where its memory could not hold its states."""

from collections.abc import Iterable
from functools import partial

from flax import nnx
from jax import Array

from kvlab.config import Config
from kvlab.memory.parts import parts_of
from kvlab.memory.views import LayerStates
from kvlab.models.model import Model
from kvlab.models.transformer import Transformer
from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.weights.checkpoint import abstract_model, peek_architecture


def draw(config: Config, vocab_size: int, key: Array) -> Transformer:
    """The model with fresh parameters over a vocabulary."""
    return Transformer(config.layers(), config.model, vocab_size, rngs=nnx.Rngs(key))


def abstract(config: Config, vocab_size: int) -> Model:
    """The model with shapes in place of parameters, in a second and without memory.

    Raises ConfigError for states that the config's memory cannot hold, or not in its format, or not under its
    compression and budget, and for a published checkpoint whose vocabulary does not hold the task's `vocab_size`
    tokens.
    """
    shapes = _shapes(config, vocab_size)
    parts_of(shapes.states, config.memory, max_len=config.context_len)
    return shapes


def check(configs: Iterable[Config]) -> None:
    """Raises what `abstract` would, of the first config for which it would; equal models are built once."""
    built: dict[str, tuple[LayerStates, ...]] = {}
    for config in configs:
        vocab_size = config.make_task().vocab_size
        key = repr((config.mixer, config.model, config.weights, vocab_size))
        if key not in built:
            built[key] = tuple(_shapes(config, vocab_size).states)
        parts_of(built[key], config.memory, max_len=config.context_len)


def _shapes(config: Config, vocab_size: int) -> Model:
    if config.weights.path is None:
        key = named_key(config.seed, "init")
        return Model.of(nnx.eval_shape(partial(draw, config, vocab_size), key))
    architecture = peek_architecture(config.weights.folder, config.weights.compute_dtype)
    if vocab_size > architecture.vocab_size:
        legal = f"its vocabulary of {architecture.vocab_size} must hold the task's {vocab_size} tokens"
        raise ConfigError("weights.path", config.weights.path, legal)
    return abstract_model(architecture)
