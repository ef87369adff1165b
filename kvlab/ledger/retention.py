"""How many slots of a sequence a class keeps, and when it is compacted to them: closed forms of token counts alone, so
that admission, capacity and a replay know them beforehand."""

import math
from dataclasses import dataclass

from kvlab.ledger.pyramid import Pyramid

AT = ("end", "chunks")


@dataclass(frozen=True)
class Sealing:
    """When a class's full pages are sealed: once `residual` newer slots are stored. During a prompt only behind each
    `chunk_len` tokens of it, or with `after_prompt` not at all: then the whole prompt is held open once."""

    residual: int
    page_size: int
    chunk_len: int
    after_prompt: bool = True

    def due(self, prompt_len: int, length: int, num_open: int) -> int:
        """Pages to seal of a sequence of `length` tokens, of which `num_open` slots are open."""
        if length < prompt_len and (self.after_prompt or length % self.chunk_len):
            return 0
        return max(0, num_open - self.residual) // self.page_size

    def next_due(self, prompt_len: int, length: int, num_open: int) -> int | None:
        """The next length, beyond `length`, at which some page is to be sealed."""
        place = length + max(1, self.residual + self.page_size - num_open)
        if place >= prompt_len:
            return place
        return prompt_len if self.after_prompt else min(prompt_len, -(-place // self.chunk_len) * self.chunk_len)

    def most(self, prompt_len: int, final_len: int) -> int:
        """The most open slots of a sequence on its way to `final_len` tokens."""
        at_rest = self.residual + self.page_size
        peak = prompt_len if self.after_prompt else min(prompt_len, at_rest - 1 + self.chunk_len)
        return min(final_len, max(peak, at_rest))

    def most_of_any(self, max_len: int) -> int:
        """The most open slots of any sequence of up to `max_len` tokens."""
        return self.most(max_len, max_len)


@dataclass(frozen=True)
class Retention:
    """What compression leaves of a sequence, in slots a (layer, head): `slots`, or `fraction` of the prompt.

    A prompt is compacted at its end ("end": all of it is held once), or after every `chunk_len` of its tokens
    ("chunks"). While decoding, a sequence is compacted whenever it stores `every` slots more than it keeps; 0: never.
    `protected` slots are never dropped, so that at least as many are kept. Counts are multiples of `unit`,
    rounded down. With a `pyramid` that is the mean of several layers, of which this class is one.
    """

    slots: int | None = None
    fraction: float | None = None
    protected: int = 0
    at: str = "end"
    chunk_len: int = 0
    every: int = 0
    unit: int = 1
    pyramid: Pyramid | None = None

    def __post_init__(self) -> None:
        if (self.slots is None) == (self.fraction is None):
            raise ValueError(f"slots = {self.slots}, fraction = {self.fraction}: exactly one must be given")
        if self.slots is not None and self.slots < max(1, self.protected):
            raise ValueError(f"slots = {self.slots}: must be at least {max(1, self.protected)}, the protected slots")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction = {self.fraction}: must be in (0, 1]")
        if self.at not in AT:
            raise ValueError(f"at = {self.at!r}: must be one of {', '.join(AT)}")
        if self.at == "chunks" and self.chunk_len < 1:
            raise ValueError(f"chunk_len = {self.chunk_len}: must be at least 1 with at = chunks")
        if self.every < 0:
            raise ValueError(f"every = {self.every}: must be at least 0")

    def keep(self, prompt_len: int) -> int:
        """Slots that a compaction leaves of a sequence with such a prompt; it may have fewer."""
        mean, least = self._mean(prompt_len), self._least
        if self.pyramid is None:
            return mean * self.unit
        return (least + self.pyramid.slots(mean - least, -(-prompt_len // self.unit) - least)) * self.unit

    @property
    def _least(self) -> int:
        """Units that hold the protected slots, and at least one of them."""
        return -(-max(1, self.protected) // self.unit)

    def _mean(self, prompt_len: int) -> int:
        """Units that a compaction leaves of a sequence, on average over the layers that share a budget."""
        slots = self.slots
        if slots is None:
            assert self.fraction is not None
            slots = math.floor(self.fraction * prompt_len + 1e-9)
        return max(slots // self.unit, self._least)

    def _most_kept(self, max_len: int) -> int:
        """The most slots that a compaction leaves of any prompt of up to `max_len` tokens."""
        mean, least = self._mean(max_len), self._least
        return (mean if self.pyramid is None else least + self.pyramid.most_slots(mean - least)) * self.unit

    def due(self, prompt_len: int, length: int, stored: int) -> int | None:
        """Slots to keep if a sequence of `length` tokens, of which `stored` slots are stored, is to be compacted before
        its next token; None: it is not."""
        keep = self.keep(prompt_len)
        if stored <= keep:
            return None
        if length == prompt_len or (self.at == "chunks" and length < prompt_len and length % self.chunk_len == 0):
            return keep
        return keep if length > prompt_len and self.every and stored >= keep + self.every else None

    def next_due(self, prompt_len: int, length: int, stored: int) -> int | None:
        """The next length, beyond `length`, at which a sequence that stores `stored` slots now is to be compacted;
        None: nowhere."""
        room = self.keep(prompt_len) - stored  # slots that may be added without more being stored than are kept
        if length < prompt_len:
            place = prompt_len
            if self.at == "chunks":
                first = length + max(1, room + 1)
                place = min(place, -(-first // self.chunk_len) * self.chunk_len)
            if place - length > room:
                return place
        return length + max(1, room + self.every) if self.every else None

    def stored(self, prompt_len: int, length: int) -> int:
        """Slots that a sequence stores at `length` tokens, whatever was due there done."""
        keep = self.keep(prompt_len)
        if length < prompt_len:
            if self.at == "end":
                return length
            behind = length % self.chunk_len
            return min(length, min(keep, length - behind) + behind)
        stored = min(keep, prompt_len) + length - prompt_len
        if not self.every or stored < keep + self.every:
            return stored
        return keep + (stored - keep) % self.every

    def most(self, prompt_len: int, final_len: int, step_len: int) -> int:
        """The most slots that a sequence ever stores on its way to `final_len` tokens, in steps of up to `step_len`:
        prompts peak before they are compacted, and between compactions a step is added to what is kept."""
        prompt_len = min(prompt_len, final_len)
        keep = min(self.keep(prompt_len), prompt_len)
        peak = prompt_len if self.at == "end" else min(prompt_len, keep + self.chunk_len)
        grown = keep + final_len - prompt_len
        if self.every:
            grown = min(grown, self.keep(prompt_len) + self.every)
        return max(peak, grown)

    def most_of_any(self, max_len: int, step_len: int) -> int:
        """The most slots of any sequence of up to `max_len` tokens, whatever its prompt."""
        if self.at == "end" or not self.every:
            return max_len
        return min(max_len, self._most_kept(max_len) + max(self.chunk_len, self.every))
