"""The tokenizer in a GGUF's metadata says what byte-level BPE is by its definition, and other kinds are refused by
name."""

import functools
import json
import random
from pathlib import Path

import pytest

from kvlab.tokenizers import FileTokenizer
from kvlab.weights import WeightsError
from kvlab.weights.convert import Origin, convert
from kvlab.weights.gguf import GGUF
from kvlab.weights.gguf_tokenizer import read_tokenizer
from tests.engine.families import golden
from tests.weights import reference_bpe
from tests.weights.gguf_writer import write_pair
from tests.weights.random_checkpoint import draw

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISSING = {0xC0, 0xC1, 0x04, 0xF5}
TEXT = """It's the 1st of the 12 months, isn't it? They've said: "we'll see", I'd say. naïve café straße Größe — 3.14,
\t 2024-11-26  and 100,000  \n\n  of the others;   the theatre, the there, then and thence. 东京 и Москва हिन्दी ١٢٣ ½ Ⅷ
def f(x):\n    return x ** 2  # it's 42\n"""


@functools.cache
def metadata() -> dict:
    merges = reference_bpe.learn(TEXT * 2, 60)
    tokens = [*SPECIAL, *(letter for byte, letter in sorted(reference_bpe.letters().items()) if byte not in MISSING)]
    tokens += list(dict.fromkeys("".join(merge) for merge in merges))
    tokens.append("<tool>")
    kinds = [3] * 3 + [1] * (len(tokens) - 4) + [4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m }}<|im_end|>{% endfor %}",
    }


def loaded(folder: Path, **changes) -> FileTokenizer:
    values = {key: given for key, given in (metadata() | changes).items() if given is not None}
    files = read_tokenizer(GGUF(Path("x.gguf"), values, {}), 320)
    assert files is not None
    (folder / "tokenizer.json").write_text(json.dumps(files[0]))
    return FileTokenizer(folder / "tokenizer.json")


def texts() -> list[str]:
    """Written ones, and random mixtures of what the pattern tells apart."""
    rng = random.Random(0)
    alphabet = [
        *"aeésßИ中क 'stvlmd\n\t\r\u00a0\u3000.,!?—#0123456789١½Ⅷ²",
        "the",
        " of",
        "  ",
        "'ll",
        "'S",
        "😀",
        "e\u0301",
    ]
    mixed = ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(400)]
    edges = [
        "",
        " ",
        "  ",
        "\n\n5",
        "  5",
        "5 ",
        "a  5",
        "12 345",
        "'",
        "''s",
        " 's",
        "it's5'd",
        "\n \n a",
        "a\n",
        "x  \n",
    ]
    return [TEXT, *edges, *mixed]


def test_ids_are_those_of_the_definition(tmp_path):
    tokenizer = loaded(tmp_path)
    vocab, ranks = reference_bpe.tables(metadata()["tokenizer.ggml.tokens"], metadata()["tokenizer.ggml.merges"])
    merged = 0
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == reference_bpe.encode(text, vocab, ranks), repr(text)
        assert tokenizer.decode(ids) == text
        merged += sum(id_ >= 256 for id_ in ids)
    assert merged > 500, "merges were at work"
    assert tokenizer.vocab_size == len(vocab)


def test_every_digit_is_alone(tmp_path):
    """Even where a merge would join two, or a space and one: the vocabulary never learned such merges, this one did."""
    tokens, merges = metadata()["tokenizer.ggml.tokens"], metadata()["tokenizer.ggml.merges"]
    changes = {
        "tokenizer.ggml.tokens": [*tokens, "12", "Ġ1"],
        "tokenizer.ggml.token_type": [*metadata()["tokenizer.ggml.token_type"], 1, 1],
        "tokenizer.ggml.merges": ["1 2", "Ġ 1", *merges],
    }
    tokenizer = loaded(tmp_path, **changes)
    ids = tokenizer.encode("on 12")
    assert [tokenizer.decode([id_]) for id_ in ids[-3:]] == [" ", "1", "2"]


def test_special_tokens_in_text_are_one_id_and_are_not_decoded(tmp_path):
    tokenizer = loaded(tmp_path)
    tool = metadata()["tokenizer.ggml.tokens"].index("<tool>")
    ids = tokenizer.encode("<|im_start|>a<tool>b<|im_end|>")
    assert (ids[0], ids[2], ids[-1]) == (1, tool, 2)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "a<tool>b"


def test_bytes_that_have_no_token_are_left_out(tmp_path):
    tokenizer = loaded(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True), (True, True)])
def test_tokens_around_every_text(first, last, tmp_path):
    around = {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}
    tokenizer = loaded(tmp_path, **around)
    inside = tokenizer.encode("the", special=False)
    assert tokenizer.encode("the") == [1] * first + inside + [2] * last


def test_the_folder_has_it_with_the_chat_template(tmp_path):
    config = golden("llama_gqa")["config"]
    tensors = {name: draw(name, tuple(shape)) for name, shape in golden("llama_gqa")["shapes"].items()}
    path, _ = write_pair(config, tensors, tmp_path / "in", {"1": "F32", "2": "F16"}, metadata())
    assert convert(path, tmp_path / "out", Origin("0" * 64))
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["chat_template"] == metadata()["tokenizer.chat_template"]
    assert (said["bos_token"], said["eos_token"], said["unk_token"]) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert FileTokenizer(tmp_path / "out" / "tokenizer.json").encode("it") == loaded(tmp_path).encode("it")
    assert convert(path, tmp_path / "bare", Origin("0" * 64, tokenizer=False))
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model = 'llama': must be gpt2"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre = 'llama-bpe': must be smollm"),
        ({"pre": None}, "tokenizer.ggml.pre = None: must be smollm"),
        ({"pre": "llama-bpe"}, "--no-tokenizer"),
        ({"add_space_prefix": True}, "add_space_prefix: must be false"),
        ({"tokens": None}, "tokenizer.ggml.tokens: must be a list of texts"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens: must be a list of texts"),
        ({"tokens": ["a"] * 400}, "400 of them: must be 1 to 320"),
        ({"tokens": ["a", "b", "a"]}, "1 are there twice"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type: must be one of"),
        ({"token_type": "x"}, "tokenizer.ggml.token_type: must be one of"),
        ({"merges": None}, "tokenizer.ggml.merges: must be a list of texts"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges: 'a b c': must be two tokens"),
        ({"merges": ["q q"]}, "tokenizer.ggml.merges: 'q q': must be two tokens that make a third"),
        ({"padding_token_id": 319}, "tokenizer.ggml.padding_token_id = 319: must be a token id"),
        ({"unknown_token_id": True}, "tokenizer.ggml.unknown_token_id = True: must be a token id"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token = True: must be false where there is no bos"),
    ],
)
def test_other_tokenizers_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        loaded(tmp_path, **{f"tokenizer.ggml.{name}": given for name, given in changes.items()})


def test_a_file_without_a_tokenizer_has_none():
    for values in ({}, {"tokenizer.ggml.model": "no_vocab"}):
        assert read_tokenizer(GGUF(Path("x.gguf"), values, {}), 320) is None
