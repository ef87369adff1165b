"""Between text and token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, where `special` with the tokens that the model expects around it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; an incomplete character at the end is U+FFFD."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8: the vocabulary of models trained on `task=text`."""

    vocab_size = 256

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the Hugging Face hub. Needs the extra `hf`. What a file was saved with that cuts a text, pads
    it or merges it at random (truncation, padding, dropout) is switched off."""

    def __init__(self, path: Path):
        """Raises ImportError without the extra, and ValueError for a file that is no tokenizer."""
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise ImportError(f"{path}: reading a tokenizer needs the extra: pip install 'kvlab[hf]'") from None
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is no regular file")  # a pipe might never end
        try:
            self._loaded = Loaded.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        self._loaded.no_truncation()
        self._loaded.no_padding()
        if getattr(self._loaded.model, "dropout", None) is not None:
            self._loaded.model.dropout = None
        self.vocab_size: int = max(self._loaded.get_vocab().values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return self._loaded.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._loaded.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer.json of a checkpoint's folder; None where there is none."""
    path = Path(directory) / "tokenizer.json"
    return FileTokenizer(path) if path.exists() else None
