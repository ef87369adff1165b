"""The tokenizer in a GGUF's metadata, as a tokenizer.json and a tokenizer_config.json of the Hugging Face hub."""

from collections.abc import Sequence
from typing import Any

from kvlab.schema import shown
from kvlab.weights.files import WeightsError
from kvlab.weights.gguf import GGUF

KEY = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4
KINDS = (1, 2, CONTROL, USER_DEFINED, 5)
"""Normal, unknown, control, defined by the user, unused. 6, a byte, is of SentencePiece."""


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


PRE_TOKENIZERS: dict[str, Any] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    },
}
"""How text is cut before merges, by `tokenizer.ggml.pre`. smollm: every digit alone, then GPT-2's pattern."""


def read_tokenizer(gguf: GGUF, vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """tokenizer.json and tokenizer_config.json (with the chat template); None where the file has no tokenizer.

    Bytes that the vocabulary lacks are left out of what is encoded, as the hub's tokenizer and llama.cpp do. Raises
    WeightsError for a tokenizer that is not byte-level BPE, another pre-tokenizer, and tables that contradict each
    other.
    """
    model = gguf.metadata.get(f"{KEY}model", "none")
    if model in ("none", "no_vocab"):
        return None
    found: list[str] = []
    if model != "gpt2":
        found.append(f"{KEY}model = {shown(model)}: must be gpt2 (byte-level BPE)")
    elif (pre := gguf.metadata.get(f"{KEY}pre")) not in PRE_TOKENIZERS:
        found.append(f"{KEY}pre = {shown(pre)}: must be {' or '.join(PRE_TOKENIZERS)}")
    if gguf.metadata.get(f"{KEY}add_space_prefix", False) is not False:
        found.append(f"{KEY}add_space_prefix: must be false")
    if found:
        advice = "the weights alone are converted with --no-tokenizer; prompts are token ids then"
        raise WeightsError(gguf.path, [*found, advice])
    tokens, kinds, merges = _tables(gguf, vocab_size)
    special = _special(gguf, tokens)
    return _tokenizer_file(gguf, tokens, kinds, merges, special), _config_file(gguf, special)


def _tables(gguf: GGUF, vocab_size: int) -> tuple[list[str], list[int], list[list[str]]]:
    """Tokens by id, their kinds, and the pairs that merge, most urgent first."""
    tokens, merges = (_texts(gguf, name) for name in ("tokens", "merges"))
    if not 1 <= len(tokens) <= vocab_size:
        raise WeightsError(gguf.path, [f"{KEY}tokens: {len(tokens)} of them: must be 1 to {vocab_size}"])
    vocab = set(tokens)
    if len(vocab) < len(tokens):
        raise WeightsError(gguf.path, [f"{KEY}tokens: {len(tokens) - len(vocab)} are there twice"])
    kinds = gguf.metadata.get(f"{KEY}token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not set(kinds) <= set(KINDS):
        raise WeightsError(gguf.path, [f"{KEY}token_type: must be one of {KINDS} for each of {len(tokens)} tokens"])
    pairs = [merge.split(" ") for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab:
            legal = "must be two tokens that make a third"
            raise WeightsError(gguf.path, [f"{KEY}merges: {shown(' '.join(pair))}: {legal}"])
    return tokens, kinds, pairs


def _texts(gguf: GGUF, name: str) -> list[str]:
    values = gguf.metadata.get(f"{KEY}{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise WeightsError(gguf.path, [f"{KEY}{name}: must be a list of texts"])
    return values


def _special(gguf: GGUF, tokens: Sequence[str]) -> dict[str, int]:
    """The ids that the metadata names, by the hub's name of their role."""
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special: dict[str, int] = {}
    for role, name in roles.items():
        token = gguf.metadata.get(f"{KEY}{name}_token_id")
        if token is None:
            continue
        if type(token) is not int or not 0 <= token < len(tokens):
            legal = f"must be a token id in [0, {len(tokens)})"
            raise WeightsError(gguf.path, [f"{KEY}{name}_token_id = {shown(token)}: {legal}"])
        special[role] = token
    return special


def _tokenizer_file(
    gguf: GGUF, tokens: Sequence[str], kinds: Sequence[int], merges: list[list[str]], special: dict[str, int]
) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": token, "content": tokens[token], **plain, "special": kind != USER_DEFINED}
        for token, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[gguf.metadata[f"{KEY}pre"]],
        "post_processor": _around(gguf, tokens, special),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _around(gguf: GGUF, tokens: Sequence[str], special: dict[str, int]) -> dict[str, Any] | None:
    """The tokens that go before and after every text; None where there are none."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template, used = [text], {}
    for role, is_first in (("bos_token", True), ("eos_token", False)):
        key = f"{KEY}add_{role}"
        if not gguf.metadata.get(key, False):
            continue
        if role not in special:
            raise WeightsError(gguf.path, [f"{key} = True: must be false where there is no {role}_id"])
        token = tokens[special[role]]
        piece = {"SpecialToken": {"id": token, "type_id": 0}}
        template = [piece, *template] if is_first else [*template, piece]
        used[token] = {"id": token, "ids": [special[role]], "tokens": [token]}
    if not used:
        return None
    return {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": used}


def _config_file(gguf: GGUF, special: dict[str, int]) -> dict[str, Any]:
    tokens = gguf.metadata[f"{KEY}tokens"]
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    values |= {role: tokens[token] for role, token in special.items()}
    if (template := gguf.metadata.get("tokenizer.chat_template")) is not None:
        values["chat_template"] = template
    return values
