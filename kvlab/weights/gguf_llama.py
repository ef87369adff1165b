"""A Llama GGUF in the words of the Hugging Face hub: its config.json, and which of its tensors is which."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlab.schema import shown
from kvlab.weights.architectures import read_architecture, table_of
from kvlab.weights.checkpoint import abstract_model, mismatches
from kvlab.weights.files import Stored, WeightsError
from kvlab.weights.gguf import GGUF

PREFIX = "llama."
FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
"""Metadata keys and the fields of config.json that say the same."""

REQUIRED = tuple(FIELDS)[:5]
OTHER_KEYS = (
    "attention.value_length",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
)
"""Keys that are checked or change nothing. Any other key of the architecture is refused: it may change what the model
computes."""

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hub_name(name: str) -> str | None:
    """The hub's name of a tensor; None for what is no tensor of a Llama."""
    if found := re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = found.groups()
        return f"model.layers.{layer}.{INSIDE[part]}.{kind}" if part in INSIDE else None
    part, _, kind = name.rpartition(".")
    return f"{OUTSIDE[part]}.weight" if kind == "weight" and part in OUTSIDE else None


def unpermuted(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Rows of W_q or W_k [heads * head_dim, in], or of their biases, in the hub's order.

    A GGUF keeps the rows of a rotary pair side by side (0, 1), (2, 3), ...; the hub, as kvlab, half a head apart.
    """
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Llama:
    """What is to be written of a GGUF: config.json, and the shape of each tensor by the hub's name."""

    gguf: GGUF
    config: dict[str, Any]
    names: dict[str, str]
    """The hub's names and the file's."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.gguf.tensors[self.names[name]].shape

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor by the hub's name, in the hub's order of rows."""
        whole = self.gguf.read(self.names[name])
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            return unpermuted(whole, self.config["num_attention_heads"])
        if name.endswith(("k_proj.weight", "k_proj.bias")):
            return unpermuted(whole, self.config["num_key_value_heads"])
        return whole


def read_llama(gguf: GGUF) -> Llama:
    """Raises WeightsError for another architecture, and with everything that is missing or not understood."""
    if (family := gguf.metadata.get("general.architecture")) != "llama":
        raise WeightsError(gguf.path, [f"general.architecture = {shown(family)}: must be llama"])
    config, found = _config(gguf)
    if found:
        raise WeightsError(gguf.path, found)
    architecture, found = read_architecture(config, "float32")
    if architecture is None:
        raise WeightsError(gguf.path, [_in_its_words(problem, _key_of) for problem in found])
    names = {theirs: name for name in gguf.tensors if (theirs := hub_name(name)) is not None}
    found = _wrong_ends(gguf, architecture.vocab_size)
    found += [f"{name}: {_reason(name)}" for name in gguf.tensors if hub_name(name) is None]
    headers = {name: Stored(gguf.path, gguf.tensors[names[name]].shape, "F32") for name in names}
    table = table_of(architecture)
    params = abstract_model(architecture).params
    found += [_in_its_words(problem, _file_name) for problem in mismatches(table, params, headers, architecture)]
    if found:
        raise WeightsError(gguf.path, found)
    return Llama(gguf, config, names)


def _reason(name: str) -> str:
    if name == "rope_freqs.weight":
        return "rotary frequencies as a tensor (Llama 3.1 and later) are not supported"
    return "is no tensor of a Llama that is read here"


def _config(gguf: GGUF) -> tuple[dict[str, Any], list[str]]:
    """The values of config.json, their types yet unchecked, and what is wrong with the keys."""
    given = {key.removeprefix(PREFIX): value for key, value in gguf.metadata.items() if key.startswith(PREFIX)}
    found = [f"{PREFIX}{key}: is missing" for key in REQUIRED if key not in given]
    unknown = sorted(given.keys() - FIELDS.keys() - set(OTHER_KEYS))
    found += [f"{PREFIX}{key} = {shown(given[key])}: is not supported" for key in unknown]
    if "token_embd.weight" not in gguf.tensors:
        found.append("token_embd.weight: is missing")
    if found:
        return {}, found
    values = {field: given[key] for key, field in FIELDS.items() if key in given and field != "rope_theta"}
    values = {"vocab_size": gguf.tensors["token_embd.weight"].shape[0], **values}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if "head_dim" not in values and type(heads) is int and type(width) is int and heads > 0:
        values["head_dim"] = width // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if key in given and "head_dim" in values and given[key] != values["head_dim"]:
            found.append(f"{PREFIX}{key} = {shown(given[key])}: must be the keys' length, {shown(values['head_dim'])}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **values,
        "hidden_act": "silu",
        "attention_bias": any(name.endswith("attn_q.bias") for name in gguf.tensors),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "rope_parameters": _rope(given, found),
        **_ends(gguf),
    }, found


def _rope(given: dict[str, Any], found: list[str]) -> dict[str, Any]:
    """`rope_parameters`; what is not supported is added to `found`."""
    rope: dict[str, Any] = {"rope_theta": given.get("rope.freq_base", 10_000.0), "rope_type": "default"}
    kind = given.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
    if kind not in ("none", "linear"):
        found.append(f"{PREFIX}rope.scaling.type = {shown(kind)}: must be none or linear")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": given.get("rope.scaling.factor", given.get("rope.scale_linear"))}
    return rope


ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot"))


def _wrong_ends(gguf: GGUF, vocab_size: int) -> list[str]:
    given = {key: gguf.metadata[key] for key in ENDS if key in gguf.metadata}
    wrong = {key: token for key, token in given.items() if type(token) is not int or not 0 <= token < vocab_size}
    return [f"{key} = {shown(token)}: must be a token id in [0, {vocab_size})" for key, token in wrong.items()]


def _ends(gguf: GGUF) -> dict[str, Any]:
    """`bos_token_id`, and `eos_token_id` with the token that ends a turn where that is another."""
    first, last, turn = (gguf.metadata.get(key) for key in ENDS)
    ends = list(dict.fromkeys(token for token in (last, turn) if token is not None))
    found = {} if first is None else {"bos_token_id": first}
    return found | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


def _in_its_words(problem: str, word: Callable[[str], str]) -> str:
    """A problem said of config.json or of the hub's tensors, said of the GGUF's keys and tensors."""
    return re.sub(r"^(?:config\.json: )?([\w.]+)", lambda match: word(match[1]), problem)


def _key_of(field: str) -> str:
    """The metadata key of a field of config.json."""
    keys = {theirs: f"{PREFIX}{key}" for key, theirs in FIELDS.items()} | {"factor": f"{PREFIX}rope.scaling.factor"}
    return keys.get(field, field)


def _file_name(name: str) -> str:
    """The GGUF's name of one of the hub's tensors."""
    part, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part):
        return f"blk.{found[1]}.{next(ours for ours, theirs in INSIDE.items() if theirs == found[2])}.{kind}"
    return next((f"{ours}.{kind}" for ours, theirs in OUTSIDE.items() if theirs == part), name)
