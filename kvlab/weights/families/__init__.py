"""The families of published checkpoints that are read and written: a file each, or a class of another package."""

from typing import Any

from kvlab.registry import Registry
from kvlab.weights.families.base import Architecture, Family
from kvlab.weights.families.deepseek_v3 import DeepseekV3
from kvlab.weights.families.gemma import Gemma
from kvlab.weights.families.gemma3 import Gemma3
from kvlab.weights.families.gemma3n import Gemma3n
from kvlab.weights.families.gpt_oss import GptOss
from kvlab.weights.families.granite_hybrid import GraniteHybrid
from kvlab.weights.families.kimi_linear import KimiLinear
from kvlab.weights.families.llama import Llama
from kvlab.weights.families.mamba2 import Mamba2
from kvlab.weights.families.mistral import Mistral
from kvlab.weights.families.olmo_hybrid import OlmoHybrid
from kvlab.weights.families.qwen2 import Qwen2
from kvlab.weights.families.qwen3 import Qwen3
from kvlab.weights.families.qwen3_next import Qwen3Next
from kvlab.weights.families.recurrent_gemma import RecurrentGemma

READ: tuple[type[Family[Any]], ...] = (
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    DeepseekV3,
    Mamba2,
    Gemma,
    Gemma3,
    Gemma3n,
    GraniteHybrid,
    RecurrentGemma,
    Qwen3Next,
    OlmoHybrid,
    KimiLinear,
    GptOss,
)
FAMILIES = Registry[Family[Any]](
    "kvlab.families",
    Family,
    {family.model_type: family() for family in READ},
    called="model_type",
    made=lambda family: family(),
    field="model_type",
)
"""By the `model_type` of config.json."""

NOT_BUILT = {
    "gemma3n": "images and sound beside its text model, which alone is gemma3n_text",
    "gemma3": "images beside its text model, which alone is gemma3_text",
}
"""What is refused, and why."""

__all__ = ["FAMILIES", "NOT_BUILT", "Architecture", "Family"]
