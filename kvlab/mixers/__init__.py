"""Sequence mixers by name. A new one is a file, a line here, a YAML in `configs/mixer` and a row in the contract
matrix; or an entry point of another package."""

from kvlab.mixers.attention import Attention
from kvlab.mixers.base import LayerMemory, Mixer, MixerConfig
from kvlab.mixers.indexed import Indexed
from kvlab.mixers.latent import LatentAttention
from kvlab.mixers.linear import LinearAttention
from kvlab.mixers.mamba2 import Mamba2
from kvlab.mixers.mamba3 import Mamba3
from kvlab.mixers.rglru import RGLRU
from kvlab.registry import Registry

OURS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "indexed": Indexed,
    "latent": LatentAttention,
    "linear": LinearAttention,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "rglru": RGLRU,
}
MIXERS = Registry[type[Mixer]]("kvlab.mixers", Mixer, OURS)

__all__ = [
    "MIXERS",
    "RGLRU",
    "Attention",
    "Indexed",
    "LatentAttention",
    "LayerMemory",
    "LinearAttention",
    "Mamba2",
    "Mamba3",
    "Mixer",
    "MixerConfig",
]
