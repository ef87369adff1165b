"""A random model over bytes, for tests of text."""

import jax
import numpy as np

from kvlab.models.model import Model


def build_bytes():
    """A random model over the 256 bytes."""
    from flax import nnx

    from kvlab.mixers.attention import AttentionConfig
    from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer

    layers = [LayerConfig("attention", AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8))]
    model = Model.of(Transformer(layers, ModelConfig(model_dim=16), 256, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(5)
    moved = jax.tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape).astype(np.float32), model.params)
    return Model(model.structure, moved)
