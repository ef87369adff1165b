"""Models: a layer pattern over named mixers."""

from kvlab.models.model import Model
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer

__all__ = ["LayerConfig", "Model", "ModelConfig", "Transformer"]
