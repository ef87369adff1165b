"""The text of an answer while its tokens come, and its stop strings."""

from collections.abc import Sequence
from functools import lru_cache

from kvlab.tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
MOST_UNFINISHED = 3
"""Replacement signs at an end that a token to come may still make a character of: one for each byte but the last."""
CONTEXT, MOST_CONTEXT = 8, 16
"""Tokens that are decoded again with a new one: a character has four at most, and what it looks like may depend on
those before. From the greater number on all but the lesser are let go of."""
MOST_SILENT = 64
"""Tokens that are kept although none of them shows anything, for the sake of the space that may stand behind them."""


class Transcript:
    """The text of an answer while its tokens come. A token's text may depend on those before it and be incomplete until
    those after it, so a few tokens are decoded again each time and an unfinished character is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.text, self.stopped = "", False
        self._matchers = [_Matcher(stop) for stop in stops]
        self._shown = 0  # characters of the text that were handed out
        self._recent: list[int] = []  # tokens that are decoded again
        self._taken = 0  # characters of their text that are in `text`

    def add(self, token: int) -> str:
        """The text that this token makes certain; `stopped` is set, and `text` cut, where a stop string is found.

        What may be the beginning of a stop string is held back.
        """
        if self.stopped:
            return ""
        self._recent.append(token)
        decoded = self.tokenizer.decode(self._recent)
        num_held = 0
        while num_held < MOST_UNFINISHED and decoded[-1 - num_held : len(decoded) - num_held] == UNFINISHED:
            num_held += 1
        self._take(decoded, len(decoded) - num_held)
        if len(self._recent) >= MOST_CONTEXT:
            self._forget(len(decoded) - self._taken)
        undecided = 0 if self.stopped else max((matcher.num_matched for matcher in self._matchers), default=0)
        return self._show(len(self.text) - undecided)

    def finish(self) -> str:
        """The rest, when no token follows. Once more it is nothing."""
        if not self.stopped:
            decoded = self.tokenizer.decode(self._recent)
            self._take(decoded, len(decoded))
        return self._show(len(self.text))

    def _take(self, decoded: str, end: int) -> None:
        """Characters [taken, end) of the recent tokens' text are certain."""
        if end <= self._taken:
            return
        new, begin = decoded[self._taken : end], len(self.text)
        self.text, self._taken = self.text + new, end  # both or none, whatever interrupts
        found = [place for matcher in self._matchers if (place := matcher.find(new, begin)) is not None]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _forget(self, num_held: int) -> None:
        """Lets go of the oldest recent tokens, unless the others show nothing of what was taken."""
        kept = self._recent[-CONTEXT:]
        num_taken = len(self.tokenizer.decode(kept)) - num_held
        if num_taken > 0 or len(self._recent) >= MOST_SILENT:
            self._recent, self._taken = kept, max(0, num_taken)

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(self._shown, end)
        return self.text[shown : self._shown]


class _Matcher:
    """Finds a string in characters that come in pieces, a step each (Knuth, Morris and Pratt 1977)."""

    def __init__(self, stop: str):
        self.stop, self.borders = stop, _borders(stop)
        self.num_matched = 0
        """Characters at the end of what came that the string begins with."""

    def find(self, new: str, begin: int) -> int | None:
        """Where it begins, if a piece of text completes it that itself begins at `begin`."""
        stop, borders, matched = self.stop, self.borders, self.num_matched
        if not matched and stop[0] not in new:
            return None
        for place, character in enumerate(new, begin + 1):
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                return place - matched
        self.num_matched = matched
        return None


@lru_cache(maxsize=64)
def _borders(stop: str) -> tuple[int, ...]:
    """For every beginning of a string the length of its longest proper beginning that is its end as well."""
    borders, matched = [0], 0
    for character in stop[1:]:
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        matched += stop[matched] == character
        borders.append(matched)
    return tuple(borders)
