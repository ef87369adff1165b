"""A checkpoint family of somebody's own."""

from kvlab.weights.families.decoder import Decoder, DecoderFile


class ExampleLlama(Decoder[DecoderFile]):
    """Llama under another name."""

    model_type = "example_llama"
    transformers_class = "ExampleLlamaForCausalLM"
    File = DecoderFile
