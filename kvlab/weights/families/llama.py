"""Llama (arXiv 2407.21783), and what others save as Llama."""

from kvlab.weights.families.decoder import Decoder, DecoderFile


class Llama(Decoder[DecoderFile]):
    """Attention in every layer. `pretraining_tp` says how it was trained, and is not read."""

    model_type = "llama"
    transformers_class = "LlamaForCausalLM"
    File = DecoderFile
    default_end = 2
