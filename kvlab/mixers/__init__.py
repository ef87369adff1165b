"""Sequence mixers by name. A new one is a file, a line here, a YAML in `configs/mixer` and a row in the contract
matrix."""

from kvlab.mixers.attention import Attention
from kvlab.mixers.base import LayerMemory, Mixer, MixerConfig
from kvlab.mixers.indexed import Indexed
from kvlab.mixers.linear import LinearAttention
from kvlab.mixers.mamba2 import Mamba2

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "indexed": Indexed,
    "linear": LinearAttention,
    "mamba2": Mamba2,
}

__all__ = ["MIXERS", "Attention", "Indexed", "LayerMemory", "LinearAttention", "Mamba2", "Mixer", "MixerConfig"]
