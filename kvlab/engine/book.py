"""The book of requests: which are under way, by which sequences, what became of those that ended, and who is told."""

import weakref
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from kvlab.engine.beam import BeamGroup
from kvlab.engine.config import Stats
from kvlab.engine.entries import Entry
from kvlab.engine.requests import Answer, Completion, Event, FinishReason, Request, Sample
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.speculative import Speculation
from kvlab.engine.stream import Stream
from kvlab.engine.transcript import Transcript
from kvlab.tokenizers import Tokenizer


class Book:
    """Opens requests, and ends them and their sequences in every place that knows of them."""

    def __init__(
        self,
        scheduler: Scheduler,
        speculation: Speculation,
        stats: Stats,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        *,
        indexed: bool,
        shares: bool,
    ):
        """`indexed`: prompts are looked up and published; `shares`: sequences can be forked."""
        self.scheduler, self.speculation, self.stats = scheduler, speculation, stats
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.indexed, self.shares = indexed, shares
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, Answer] = {}
        """Of requests that ended and were not taken yet."""
        self.beams: dict[str, BeamGroup] = {}
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    # Beginnings.

    def open(self, request: Request) -> None:
        """Queues a request; touches nothing that others have."""
        self.requests[request.name] = request
        if request.sampling.beam_width:
            self.beams[request.name] = BeamGroup(request)
        first = self.sample(request, 0, request.prompt)
        if request.sampling.num_samples > 1 and self.shares:
            first.hold = len(request.prompt) - 1  # its last token is fed by every sample, from memory that they share
        self.scheduler.submit(first)
        if first.hold == 0 or not self.shares:
            self.start_others(first)

    def take_back(self, request: Request) -> None:
        """Nothing of a request was ever queued, however far `open` came."""
        self.scheduler.forget(request.samples)
        self.beams.pop(request.name, None)
        self.requests.pop(request.name, None)

    def sample(self, request: Request, index: int, ids: Sequence[int]) -> Sample:
        """A sequence of a request, not scheduled yet."""
        sample = Sample(
            f"{request.name}/{request.num_started}",
            len(ids),
            request.final_len,
            request.priority,
            list(ids),
            self.indexed,
            request.namespace,
            request=request,
            prompt_len=len(request.prompt),
            seed=request.seed,
            index=index,
            stop_tokens=request.sampling.stop_tokens,
        )
        request.num_started += 1
        request.samples.append(sample)
        if self.tokenizer is not None:
            sample.transcript = Transcript(self.tokenizer, request.sampling.stop)
        if request.sampling.repetition_penalty != 1:
            sample.seen = np.zeros(self.vocab_size, bool)
            sample.seen[sample.ids] = True
        return sample

    def start_others(self, first: Sample) -> None:
        """The other samples of a request, behind what the first one has computed of the prompt."""
        first.hold = None
        for index in range(1, first.request.sampling.num_samples):
            self.scheduler.branch(first, self.sample(first.request, index, first.request.prompt))

    # Ends of sequences.

    def drop(self, sample: Sample, *, keep: bool = True) -> None:
        """A sequence leaves scheduler, ledger, drafter and request; what it published stays in the index, unless not
        `keep`."""
        if sample.state != "gone":
            self.scheduler.remove(sample, keep=keep)
        self.speculation.forget(sample)
        sample.request.samples.remove(sample)

    def finish(self, sample: Sample, reason: FinishReason) -> None:
        """A sequence has its completion; the last one of a request makes the answer."""
        request = sample.request
        request.completions[sample.index] = _completion(sample, reason)
        self.drop(sample)
        if not request.samples:
            if reason == "cancelled":  # samples that were never started
                for index in range(request.sampling.num_samples):
                    request.completions.setdefault(index, Completion([], [], reason))
            self.answer(request)

    def fail(self, sample: Sample, reason: str) -> Event:
        """A request ends in error; what its sequences published and nobody else uses is withdrawn."""
        event = self._end_in_error(sample.request, sample.index, reason)
        for other in sample.request.samples[:]:
            self.drop(other, keep=False)
        return event

    # Ends of requests.

    def cancel(self, name: str) -> list[Event]:
        """Ends a request now; its answer has what was generated so far, and events tell the text that was held
        back."""
        request = self.requests[name]
        held = {sample.index: text for sample in request.samples if (text := _held_back(sample))}
        if name in self.beams:
            self.beams[name].finished = self.beams[name].ended("cancelled")
            self.end_beams(self.beams[name])
        else:
            for sample in request.samples[:]:
                self.finish(sample, "cancelled")
        last = Event(name, 0, None, float("nan"), held.pop(0, ""), "cancelled")
        return [*(last._replace(sample=index, text=text, finish_reason=None) for index, text in held.items()), last]

    def end_beams(self, group: BeamGroup) -> list[Event]:
        """A beam search has ended: its beams go, and the best one is told."""
        request = group.request
        for sample in request.samples[:]:
            self.drop(sample)
        for index, found in enumerate(group.finished):
            text = self.tokenizer.decode(found.tokens) if self.tokenizer else ""
            request.completions[index] = Completion(
                found.tokens, found.logprobs, found.finish_reason, text, score=found.score
            )
        best = request.completions.get(0, Completion([], [], "stop"))
        self.answer(request)
        if not best.tokens:
            return [Event(request.name, 0, None, 0.0, best.text, best.finish_reason)]
        events = [Event(request.name, 0, *pair, "", None) for pair in zip(best.tokens, best.logprobs, strict=True)]
        return [*events[:-1], events[-1]._replace(text=best.text, finish_reason=best.finish_reason)]

    def untorn(self, waiting: Iterable[Entry]) -> list[Entry]:
        """Of those waiting, the sequences of requests that no interrupt can have torn: all that there is of them waits,
        and nothing of them was in the midst of a change."""
        idle = {entry for entry in waiting if entry.state == "waiting" and not entry.num_computed}
        whole = {
            sample
            for request in self.requests.values()
            if idle.issuperset(request.samples) and self._is_complete(request)
            for sample in request.samples
        }
        return [entry for entry in waiting if entry in whole]

    def _is_complete(self, request: Request) -> bool:
        """Whether a request has every sequence that it should have now, or its completion."""
        if not request.samples or request.name in self.answers:
            return False
        if request.name in self.beams:
            return not self.beams[request.name].is_advancing
        should = 1 if request.samples[0].hold is not None else request.sampling.num_samples
        return len(request.samples) + len(request.completions) == request.num_started == should

    def tear(self, untorn: Collection[Entry], reason: str) -> list[Event]:
        """Requests end in error, all but those of these sequences; scheduler and ledger have forgotten them already.
        Cut short, it is called again."""
        events, kept = list[Event](), set(untorn)
        for request in list(self.requests.values()):
            if request.samples and kept.issuperset(request.samples):
                continue
            for sample in request.samples:
                sample.state = "gone"
                del sample.ids[len(request.prompt) + len(sample.logprobs) :]
                del sample.alternatives[len(sample.logprobs) :]
            if request.name in self.answers:
                self._close(request)
            else:
                events.append(self._end_in_error(request, 0, reason))
        return events

    def _end_in_error(self, request: Request, index: int, reason: str) -> Event:
        """The answer of a request that failed: what its sequences have said until now. They are the caller's to
        drop."""
        self.stats.failed += 1
        text = "".join(_held_back(sample) for sample in request.samples if sample.index == index)
        if request.name in self.beams:
            request.completions = dict(enumerate(self.beams[request.name].ended("error")))
        for sample in request.samples:
            request.completions.setdefault(sample.index, _completion(sample, "error"))
        self.answer(request, reason)
        return Event(request.name, index, None, float("nan"), text, "error", reason)

    def answer(self, request: Request, error: str | None = None) -> None:
        """A request is over."""
        completions = [request.completions[index] for index in sorted(request.completions)]
        self.answers[request.name] = Answer(request.name, request.prompt, completions, error)
        self._close(request)

    def _close(self, request: Request) -> None:
        self.beams.pop(request.name, None)
        del self.requests[request.name]

    def tell(self, events: list[Event]) -> list[Event]:
        """Everybody who listens hears of what happened, whoever stepped."""
        self.stats.told_tokens += sum([event.token is not None for event in events])
        for stream in list(self.streams):
            stream.take(events)
        return events


def _held_back(sample: Sample) -> str:
    """Text of a sequence that nobody was told, since more could have changed it."""
    return "" if sample.transcript is None or sample.request.sampling.beam_width else sample.transcript.finish()


def _completion(sample: Sample, reason: FinishReason) -> Completion:
    """What a sequence has said until now."""
    text = ""
    if sample.transcript is not None:
        sample.transcript.finish()
        text = sample.transcript.text
    return Completion(sample.answer, sample.logprobs, reason, text, sample.alternatives)
