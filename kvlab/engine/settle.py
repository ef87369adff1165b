"""What a step means: tokens are accepted, memory is committed, sequences end, beams advance."""

import math
from typing import NamedTuple

import numpy as np

from kvlab.engine.beam import BeamGroup
from kvlab.engine.book import Book
from kvlab.engine.config import Stats
from kvlab.engine.requests import Alternatives, Event, FinishReason, Sample
from kvlab.engine.runner import Fetched, Launched
from kvlab.engine.scheduler import Scheduler


class _Row(NamedTuple):
    """One sequence's part of a program: `num_new` known tokens and `lookahead` drafts, and what was drawn behind the
    last known one and behind each draft."""

    sample: Sample
    num_new: int
    lookahead: int
    tokens: list[int]
    logprobs: list[float]
    alternatives: list[Alternatives]
    is_finite: bool

    @classmethod
    def of(cls, launched: Launched, fetched: Fetched, number: int) -> "_Row":
        """A program's row."""
        sample, num_new, lookahead = launched.group.work[number]
        assert isinstance(sample, Sample)
        first = num_new - 1 if launched.group.everywhere else 0
        tokens, logprobs, *top = (array[number, first : first + lookahead + 1].tolist() for array in fetched.drawn)
        is_finite = bool(fetched.finite[number]) and all(map(math.isfinite, logprobs))
        return cls(sample, num_new, lookahead, tokens, logprobs, list(map(Alternatives, *top)), is_finite)


class Settler:
    """Settles what programs drew. `rolls_back`: a step can be accepted in part, which recurrent states cannot."""

    def __init__(self, scheduler: Scheduler, book: Book, stats: Stats, *, rolls_back: bool):
        self.scheduler, self.book, self.stats, self.rolls_back = scheduler, book, stats, rolls_back

    def commit_early(self, launched: Launched) -> bool:
        """Counts the tokens of a program that decodes while the device works on it, and says whether all of them could
        be: then the step behind can be scheduled. What is not finite, as it may turn out, nobody has seen: pages wait
        for `publish`."""
        rows, entries = launched.rows()
        fed = [entry.ids[entry.num_computed] for entry in entries]
        done = self.scheduler.ledger.commit_each([entry.name for entry in entries], fed)
        for row, entry, was_committed in zip(rows, entries, done, strict=True):
            if was_committed:
                launched.committed[row] = True
                entry.num_computed = known = entry.num_known
                entry.num_known = known + 1
        return all(done)

    def settle(self, launched: Launched, fetched: Fetched) -> list[Event]:
        """Every row's part in the answers. A row whose sequence has ended meanwhile was computed in vain."""
        events: list[Event] = []
        drawn, accept, num_decoded = fetched.drawn, self._accept, 0
        tokens, logprobs = drawn.tokens[:, 0].tolist(), drawn.logprobs[:, 0].tolist()
        sound = (fetched.finite & np.isfinite(drawn.logprobs[:, 0])).tolist()
        for row, sample in zip(*launched.rows(), strict=True):
            if not launched.committed[row]:
                events += self._settle_row(_Row.of(launched, fetched, row))
            elif sample.state == "gone":  # another sample of its request failed in this step
                continue
            elif not sound[row]:
                events.append(self._fail(sample, sample.num_computed - 1, 1))
            else:
                events.append(event := accept(sample, tokens[row], logprobs[row]))
                num_decoded += 1
                if event.finish_reason is not None:
                    self.book.finish(sample, event.finish_reason)
        self.stats.decoded_tokens += num_decoded
        return events

    def _fail(self, sample: Sample, start: int, num_new: int) -> Event:
        """What was computed of these tokens cannot be used, so the request ends."""
        return self.book.fail(sample, f"logits or states at tokens [{start}, {start + num_new}) are not finite")

    def _settle_row(self, row: _Row) -> list[Event]:
        """A row that was not committed early: a prompt's chunk, drafts, or what asks for more than tokens and text."""
        sample, num_new, lookahead, tokens, logprobs, alternatives, is_finite = row
        if sample.state == "gone":
            return []
        if not is_finite:
            return [self._fail(sample, sample.num_computed, num_new)]
        events: list[Event] = []
        sampling, accepted = sample.request.sampling, 0
        while accepted < lookahead and tokens[accepted] == sample.draft_ids[accepted]:
            accepted += 1
        finish: FinishReason | None = None
        if sample.num_computed + num_new < sample.num_known:
            pass  # more of the prompt follows
        elif sampling.beam_width:
            sample.candidates, sample.paused = alternatives[0], True
        else:
            for kept, token in enumerate(tokens[: accepted + 1]):
                if most := sampling.num_logprobs:
                    best = alternatives[kept]
                    sample.alternatives.append(Alternatives(best.tokens[:most], best.logprobs[:most]))
                sample.num_known += 1
                events.append(event := self._accept(sample, token, logprobs[kept]))
                if (finish := event.finish_reason) is not None:
                    accepted = kept  # the tokens behind the end are not known, so they cannot be stored
                    break
        if lookahead:
            self.stats.drafted_tokens += lookahead
            self.stats.accepted_tokens += accepted
        self._commit(sample, num_new, lookahead, accepted)
        if sample.hold is not None and sample.num_computed >= sample.hold:
            self.book.start_others(sample)
        if finish is not None:
            self.book.finish(sample, finish)
        return events

    def _commit(self, sample: Sample, num_new: int, lookahead: int, accepted: int) -> None:
        """The computed tokens count. Beside recurrent states a step with a rejected draft is rejected whole, and its
        accepted tokens, known now, are fed again."""
        if sample.num_computed >= sample.prefill_len:
            self.stats.decoded_tokens += accepted + 1
        else:
            self.stats.prefilled_tokens += num_new
        stored = num_new + accepted if self.rolls_back or accepted == lookahead else 0
        begin, end = max(sample.told_len, sample.num_computed), sample.num_computed + stored
        new_ids = sample.ids[begin:end] if sample.indexed and begin < end else ()
        self.scheduler.ledger.commit(sample.name, stored, new_ids)
        sample.num_computed = end

    @staticmethod
    def _accept(sample: Sample, token: int, logprob: float) -> Event:
        """One more token of an answer, and whether it ends there."""
        sample.ids.append(token)
        sample.logprobs.append(logprob)
        text, finish = "", None
        if token in sample.stop_tokens:
            finish = "stop"
        elif len(sample.ids) > sample.final_len:
            finish = "length"
        if sample.seen is not None:
            sample.seen[token] = True
        if (transcript := sample.transcript) is not None:
            text = transcript.add(token)
            if transcript.stopped:
                finish = "stop"
            if finish is not None:
                text += transcript.finish()
        # Half the time of naming the fields.
        return tuple.__new__(Event, (sample.request.name, sample.index, token, logprob, text, finish, None))

    def advance_beams(self) -> list[Event]:
        """Every group whose beams all have their candidates goes on."""
        ready = [group for group in self.book.beams.values() if group.ready]
        return [event for group in ready for event in self._advance(group)]

    def _advance(self, group: BeamGroup) -> list[Event]:
        """The group's next beams: the first child of each goes on in its place, the others are forked from it."""
        group.is_advancing = True
        chosen = group.select()
        if not chosen:
            return self.book.end_beams(group)
        children: dict[Sample, list[tuple[int, float]]] = {beam: [] for beam in group.request.samples}
        for parent, token, logprob in chosen:
            children[parent].append((token, logprob))
        for parent in [beam for beam, tokens in children.items() if not tokens]:
            self.book.drop(parent)  # first, so that there is room for the others' children
            del children[parent]
        for parent, tokens in children.items():
            for token, logprob in tokens[1:]:
                child = self.book.sample(group.request, parent.index, parent.ids)
                child.logprobs, child.score = list(parent.logprobs), parent.score
                _extend(child, token, logprob)
                self.scheduler.branch(parent, child)
            _extend(parent, *tokens[0])
        group.is_advancing = False
        return []


def _extend(beam: Sample, token: int, logprob: float) -> None:
    """A beam goes on with this token."""
    beam.ids.append(token)
    beam.logprobs.append(logprob)
    beam.num_known += 1
    beam.score += logprob
    beam.candidates, beam.paused = None, False
