"""Sequence mixers by name. A new one is a file, a line here, a YAML in `configs/mixer` and a row in the contract
matrix."""

from kvlab.mixers.attention import Attention
from kvlab.mixers.base import LayerMemory, Mixer, MixerConfig
from kvlab.mixers.latent import LatentAttention
from kvlab.mixers.linear import LinearAttention
from kvlab.mixers.mamba2 import Mamba2

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "latent": LatentAttention,
    "linear": LinearAttention,
    "mamba2": Mamba2,
}

__all__ = ["MIXERS", "Attention", "LatentAttention", "LayerMemory", "LinearAttention", "Mamba2", "Mixer", "MixerConfig"]
