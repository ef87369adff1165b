"""The families of published checkpoints that are read and written: a file each."""

from typing import Any

from kvlab.weights.families.base import Architecture, Family
from kvlab.weights.families.deepseek_v3 import DeepseekV3
from kvlab.weights.families.llama import Llama
from kvlab.weights.families.mamba2 import Mamba2
from kvlab.weights.families.mistral import Mistral
from kvlab.weights.families.qwen3 import Qwen3

FAMILIES: dict[str, Family[Any]] = {
    family.model_type: family() for family in (Llama, Mistral, Qwen3, DeepseekV3, Mamba2)
}
"""By the `model_type` of config.json."""

__all__ = ["FAMILIES", "Architecture", "Family"]
