"""Beam search over forked sequences: each beam shares the pages of its past, and a page is copied when two beams write
it."""

from dataclasses import dataclass, field

from kvlab.engine.requests import Completion, FinishReason, Request, Sample


@dataclass
class BeamGroup:
    """The beams of one request. They advance together: each pauses with its candidates until the last one has some."""

    request: Request
    finished: list[Completion] = field(default_factory=list)
    is_advancing: bool = False
    """Whether its next beams are being made: some of them may be missing."""

    @property
    def ready(self) -> bool:
        """Whether every live beam has its candidates."""
        return all(beam.candidates is not None for beam in self.request.samples)

    def select(self) -> list[tuple[Sample, int, float]]:
        """The next beams as (parent, token, log-probability), best first; a candidate that stops becomes a finished
        answer if it ranks among the best `beam_width`. Empty when the search has ended."""
        sampling = self.request.sampling
        width = sampling.beam_width or 1
        ranked = sorted(
            (
                (-(beam.score + logprob), order, rank, beam, token, logprob)
                for order, beam in enumerate(self.request.samples)
                if beam.candidates is not None
                for rank, (token, logprob) in enumerate(zip(*beam.candidates, strict=True))
            ),
            key=lambda candidate: candidate[:3],
        )[: sampling.num_candidates]
        chosen: list[tuple[Sample, int, float]] = []
        for place, (_, _, _, beam, token, logprob) in enumerate(ranked):
            if token in sampling.stop_tokens:
                if place < width:
                    self.finished.append(self.completion(beam, [token], [logprob], "stop"))
            elif len(chosen) < width:
                chosen.append((beam, token, logprob))
        self.finished.sort(key=lambda completion: -(completion.score or 0.0))
        del self.finished[width:]
        if not chosen:
            return []
        if len(chosen[0][0].answer) + 1 >= sampling.max_tokens:
            self.finished += [self.completion(beam, [token], [lp], "length") for beam, token, lp in chosen]
            chosen = []
        elif len(self.finished) == width and self._cannot_improve(chosen):
            chosen = []
        self.finished.sort(key=lambda completion: -(completion.score or 0.0))
        del self.finished[width:]
        return chosen

    def _cannot_improve(self, chosen: list[tuple[Sample, int, float]]) -> bool:
        """Whether the best live beam, scored as it is now, is no better than the worst finished one."""
        best, _, logprob = chosen[0]
        length = len(best.answer) + 1
        attainable = (best.score + logprob) / length**self.request.sampling.length_penalty
        return attainable <= (self.finished[-1].score or 0.0)

    def ended(self, reason: FinishReason) -> list[Completion]:
        """What was found if the search ends here, by a cancellation or an error: live beams count as they are."""
        found = self.finished + [self.completion(beam, [], [], reason) for beam in self.request.samples]
        return sorted(found, key=lambda completion: -(completion.score or 0.0))[: self.request.sampling.beam_width]

    def completion(self, beam: Sample, tokens: list[int], logprobs: list[float], reason: FinishReason) -> Completion:
        """A beam's answer with these tokens added."""
        answer, all_logprobs = beam.answer + tokens, beam.logprobs + logprobs
        total = beam.score + sum(logprobs)
        score = total / max(1, len(answer)) ** self.request.sampling.length_penalty
        return Completion(answer, all_logprobs, reason, score=score)
