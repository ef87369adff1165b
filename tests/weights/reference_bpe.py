"""Byte-level BPE by its definition, in plain Python: GPT-2's pattern as a scanner over Unicode categories, with every
digit alone, and merges one at a time."""

import functools
import itertools
import unicodedata
from collections.abc import Mapping, Sequence

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def kind(character: str) -> str:
    """L, N, space or other."""
    if character in SPACES:
        return "space"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "other"


def pieces(text: str) -> list[str]:
    """GPT-2's pieces of a text without digits."""
    found, place = [], 0
    while place < len(text):
        end = next((place + len(word) for word in CONTRACTIONS if text.startswith(word, place)), 0)
        if not end:
            begin = place + (text[place] == " " and place + 1 < len(text) and kind(text[place + 1]) != "space")
            end = begin
            while end < len(text) and kind(text[end]) == kind(text[begin]):
                end += 1
            if kind(text[begin]) == "space" and end < len(text) and end - place > 1:
                end -= 1  # the last space belongs to what follows, or stands alone
        found.append(text[place:end])
        place = end
    return found


def split(text: str) -> list[str]:
    """Pieces, each digit (of whatever script) alone."""
    runs: list[str] = []
    is_open = False
    for character in text:
        is_number = kind(character) == "N"
        if is_number or not is_open:
            runs.append(character)
        else:
            runs[-1] += character
        is_open = not is_number
    return [piece for run in runs for piece in ([run] if kind(run[0]) == "N" else pieces(run))]


@functools.cache
def letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def encode(text: str, vocab: Mapping[str, int], ranks: Mapping[tuple[str, str], int]) -> list[int]:
    """Ids of a text without special tokens; bytes that the vocabulary lacks are left out."""
    ids: list[int] = []
    for piece in split(text):
        ids += [vocab[part] for part in _merged(piece, ranks) if part in vocab]
    return ids


def _merged(piece: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    parts = [letters()[byte] for byte in piece.encode()]
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def learn(text: str, num_merges: int) -> list[tuple[str, str]]:
    """The commonest pairs of a text, one after the other."""
    words = [[letters()[byte] for byte in piece.encode()] for piece in split(text)]
    merges: list[tuple[str, str]] = []
    for _ in range(num_merges):
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
    return merges


def tables(tokens: Sequence[str], merges: Sequence[str]) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Vocabulary and ranks from a GGUF's lists."""
    pairs = [merge.split(" ") for merge in merges]
    return {token: i for i, token in enumerate(tokens)}, {(left, right): i for i, (left, right) in enumerate(pairs)}
