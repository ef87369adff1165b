"""A window over the attention of weights that were trained without one, or with a wider one."""

from dataclasses import replace

from kvlab.mixers.attention import AttentionConfig
from kvlab.models.sharing import sources_of
from kvlab.models.transformer import LayerConfig
from kvlab.schema import ConfigError
from kvlab.weights.families import Architecture

WITHOUT_TOKENS = ("mamba2", "linear", "rglru")
"""Mixers that hold one state a sequence: a window has nothing to narrow there."""


def windowed(architecture: Architecture, window: int | None, num_sinks: int) -> Architecture:
    """The same model in which every layer of attention sees at most `window` tokens, the current one included, and the
    first `num_sinks` (arXiv 2309.17453). A layer's own window stays where it is narrower; with None all do.

    Raises ConfigError where no layer would have the window or the sinks, for attention that cannot have one, and where
    layers would read the keys and values of others than they were trained with.
    """
    if window is None and not num_sinks:
        return architecture
    name, value = ("num_sinks", num_sinks) if window is None else ("window", window)
    for layer in architecture.layers:
        if not isinstance(layer.config, AttentionConfig) and layer.mixer not in WITHOUT_TOKENS:
            legal = (
                f"must be {'null' if name == 'window' else 0}: layers of {layer.mixer} attention have no window here"
            )
            raise ConfigError(name, value, legal)
    layers = tuple(_narrowed(layer, window, num_sinks) for layer in architecture.layers)
    if not any(isinstance(layer.config, AttentionConfig) for layer in layers):
        raise ConfigError(name, value, f"no layer of this {architecture.family} model attends to tokens")
    if layers == architecture.layers and num_sinks:
        raise ConfigError(name, value, "must be 0 without a window: no layer has one")
    before, after = (sources_of([layer.config for layer in each]) for each in (architecture.layers, layers))
    if before != after:
        layer = next(index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        legal = f"makes layers of two kinds alike: layer {layer} would read the keys and values of layer {after[layer]}"
        raise ConfigError(name, value, f"{legal} in place of layer {before[layer]}")
    return replace(architecture, layers=layers)


def _narrowed(layer: LayerConfig, window: int | None, num_sinks: int) -> LayerConfig:
    config = layer.config
    if not isinstance(config, AttentionConfig) or (config.window is None and window is None):
        return layer
    narrower = min(size for size in (config.window, window) if size is not None)
    return replace(layer, config=replace(config, window=narrower, num_sinks=num_sinks))
