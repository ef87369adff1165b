"""What is asked of the engine and what it answers: requests, the sequences that work on them, answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvlab.engine.entries import Entry
from kvlab.engine.sampling import Sampling
from kvlab.engine.transcript import Transcript
from kvlab.units import counted

type FinishReason = Literal["length", "stop", "cancelled", "error"]


class Alternatives(NamedTuple):
    """The most likely tokens at one position, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Completion:
    """One answer. `logprobs` are natural, of each token under the model itself; `text` is empty without a tokenizer."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str = ""
    alternatives: list[Alternatives] = field(default_factory=list)
    score: float | None = None
    """Of a beam search: the sum of log-probabilities over length ** length_penalty."""


@dataclass(frozen=True)
class Answer:
    """What became of a request: a completion for each sample, the beams best first; `error` says why it failed."""

    name: str
    prompt: list[int]
    completions: list[Completion]
    error: str | None = None

    @property
    def tokens(self) -> list[int]:
        """The first completion's tokens."""
        return self.completions[0].tokens

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


class Event(NamedTuple):
    """What a step did for one sample: a token with the text it completed, or its end."""

    name: str
    sample: int
    token: int | None
    logprob: float
    text: str
    finish_reason: FinishReason | None
    error: str | None = None


class GenerationError(RuntimeError):
    """Requests that failed beside others that did not; `answers` has them all."""

    def __init__(self, answers: Sequence[Answer]):
        failed = [answer for answer in answers if answer.error]
        listed = "; ".join(f"{answer.name}: {answer.error}" for answer in failed[:5])
        super().__init__(f"{len(failed)} of {counted(len(answers), 'request')} failed: {listed}")
        self.answers = list(answers)


@dataclass(eq=False)
class Request:
    """One request in the engine."""

    name: str
    prompt: list[int]
    sampling: Sampling
    seed: int
    priority: int
    namespace: str
    samples: list["Sample"] = field(default_factory=list)
    """Unfinished sequences."""
    completions: dict[int, Completion] = field(default_factory=dict)
    num_started: int = 0
    """Sequences made so far, for their names."""

    @property
    def final_len(self) -> int:
        """Tokens stored in the end: the last token's own state is never needed."""
        return len(self.prompt) + self.sampling.max_tokens - 1


@dataclass(eq=False, slots=True)
class Sample(Entry):
    """One sequence that works on a request: an entry of the scheduler whose `ids` are prompt and answer."""

    request: Request = field(kw_only=True)
    index: int = 0
    stop_tokens: tuple[int, ...] = ()
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    transcript: Transcript | None = None
    seen: npt.NDArray[np.bool_] | None = None
    """Tokens of prompt and answer, where a penalty asks for them."""
    draft_ids: list[int] = field(default_factory=list)
    score: float = 0.0
    """Of a beam: the sum of its log-probabilities."""
    candidates: Alternatives | None = None
    """Of a beam that waits for the others of its group."""

    @property
    def answer(self) -> list[int]:
        """Tokens after the prompt."""
        return self.ids[len(self.request.prompt) :]
