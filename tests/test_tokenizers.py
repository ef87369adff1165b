"""Tokenizers of files: all of a text, whatever the file was saved with."""

import json
from pathlib import Path

import pytest

from kvlab.tokenizers import FileTokenizer

tokenizers = pytest.importorskip("tokenizers")


def saved(path: Path, *, dropout: float | None = None, added: tuple[str, ...] = (), **changes):
    """Byte-level BPE of 320 tokens over "w0 w1 ..." as the library saves it, with some parts of its file replaced."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 320, "min_frequency": 1, "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    made.train_from_iterator([text(400)], trainer)
    made.add_special_tokens(list(added))
    made.save(str(path))
    values = json.loads(path.read_text())
    values["model"]["dropout"] = dropout
    path.write_text(json.dumps(values | changes))
    return path


def text(num_words: int) -> str:
    return " ".join(f"w{number}" for number in range(num_words))


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 300},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 7,
    "pad_type_id": 0,
    "pad_token": "w",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": TRUNCATION},
        {"padding": PADDING},
        {"truncation": TRUNCATION, "padding": PADDING},
        {"dropout": 0.9},
    ],
)
def test_what_a_file_was_saved_with_changes_no_text(changes, tmp_path):
    """Neither cut nor padded, and cut into the same tokens each time."""
    plain = FileTokenizer(saved(tmp_path / "plain.json"))
    other = FileTokenizer(saved(tmp_path / "other.json", **changes))
    words = text(40)
    assert len(plain.encode(words)) > 30
    for special in (True, False):
        assert other.encode(words, special=special) == plain.encode(words, special=special)
    assert other.decode(other.encode(words)) == words


def test_a_vocabulary_ends_behind_its_highest_id(tmp_path):
    """Added tokens may leave gaps, and count."""
    assert FileTokenizer(saved(tmp_path / "a.json")).vocab_size == 320
    path = saved(tmp_path / "b.json", added=("<pad>",))
    assert FileTokenizer(path).vocab_size == 321
    values = json.loads(path.read_text())
    gone = values["model"]["merges"].pop()
    del values["model"]["vocab"]["".join(gone)]
    path.write_text(json.dumps(values))
    ids = FileTokenizer(path)._loaded.get_vocab()
    assert FileTokenizer(path).vocab_size == max(ids.values()) + 1
