"""Llama (arXiv 2407.21783), and what others save as Llama."""

from dataclasses import dataclass

from kvlab.weights.config_files import only
from kvlab.weights.families.decoder import Decoder, DecoderFile


@dataclass(frozen=True, kw_only=True)
class LlamaFile(DecoderFile):
    """Its own fields."""

    pretraining_tp: int = only(1)


class Llama(Decoder[LlamaFile]):
    """Attention in every layer."""

    model_type = "llama"
    transformers_class = "LlamaForCausalLM"
    File = LlamaFile
    default_end = 2
