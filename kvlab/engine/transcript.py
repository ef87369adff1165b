"""The text of an answer while its tokens come, and its stop strings."""

from collections.abc import Sequence

from kvlab.tokenizers import Tokenizer


class Transcript:
    """The text of an answer while its tokens come. A token's text may depend on those before it and be incomplete until
    those after it, so a few tokens are decoded again each time and an unfinished character is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.text, self.stopped = "", False
        self._shown = 0  # characters of the text that were handed out
        self._ids: list[int] = []
        self._begin = self._read = 0  # ids [begin, read) have been turned into text and are context for the next

    def add(self, token: int) -> str:
        """The text that this token makes certain; `stopped` is set, and `text` cut, where a stop string is found.

        What may be the beginning of a stop string is held back.
        """
        self._ids.append(token)
        before, after = self._decoded()
        if after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._append(after[len(before) :])
        self._begin, self._read = self._read, len(self._ids)
        return self._show(len(self.text) - (0 if self.stopped else self._undecided()))

    def finish(self) -> str:
        """The rest, when no token follows."""
        if not self.stopped:
            before, after = self._decoded()
            self._append(after[len(before) :])
        return self._show(len(self.text))

    def _decoded(self) -> tuple[str, str]:
        """The text of the ids that give context, and of these with all that follow."""
        return self.tokenizer.decode(self._ids[self._begin : self._read]), self.tokenizer.decode(
            self._ids[self._begin :]
        )

    def _append(self, new: str) -> None:
        searched = max(0, len(self.text) - max((len(stop) for stop in self.stops), default=0))
        self.text += new
        found = [place for stop in self.stops if (place := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _undecided(self) -> int:
        """Characters at the end that a stop string may begin with."""
        ends = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(ends, default=0)

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(self._shown, end)
        return self.text[shown : self._shown]
