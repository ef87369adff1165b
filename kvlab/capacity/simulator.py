"""Serving without a device: requests, the real ledger and the engine's scheduler, and a clock. What the engine would
hold, step by step: every step decodes one token of each running sequence and computes prompts within a token budget."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvlab.capacity.traces import Request
from kvlab.engine.entries import Entry, Work
from kvlab.engine.scheduler import Schedule, Scheduler
from kvlab.ledger.accounting import PARTS
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.plan import Compaction, Seals
from kvlab.memory.budgets import Context

type StepTime = Callable[[Sequence[Context], Sequence[int]], float]
"""Seconds of a step, from the tokens, and the prompts among them, of the sequences that decode, and the number of new
tokens of each prompt chunk."""


@dataclass(eq=False, slots=True)
class _Served(Entry):
    """One request being served."""

    request: Request = field(kw_only=True)


@dataclass
class Outcome:
    """What happened. `samples` has one row for each audited step: its time, batch, and each part's bytes summed over
    classes."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    finished: int = 0
    rejected: list[str] = field(default_factory=list)
    preempted: int = 0
    recomputed_tokens: int = 0
    looked_up_tokens: int = 0
    """Of prompts, each once; below, what others had left of them in the prefix index, and what preempted sequences
    found again of their own."""
    hit_tokens: int = 0
    found_again_tokens: int = 0
    compacted: int = 0
    """Compactions of a sequence, and below the pages that were sealed."""
    sealed_pages: int = 0
    dropped_slots: int = 0
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    latencies: list[float] = field(default_factory=list)

    def mean(self, column: str, start: float = 0.0, stop: float = float("inf")) -> float:
        """Time-weighted mean of a column over [start, stop) seconds. Raises ValueError when nothing was sampled
        there."""
        rows = [row for row in self.samples if start <= row["time"] < stop]
        if not rows:
            raise ValueError(f"no sample in [{start}, {stop}) s")
        weights = [row["seconds"] for row in rows]
        return float(np.average([row[column] for row in rows], weights=weights))


class Simulator:
    """Runs requests through a ledger. Deterministic; raises RuntimeError should a step make no progress."""

    def __init__(
        self,
        ledger: Ledger,
        step_time: StepTime,
        schedule: Schedule,
        *,
        caches: bool = False,
        sample_every: int = 10,
    ):
        """`caches`: prompts with token ids are looked up in, and published to, the prefix index. Every `sample_every`
        steps the ledger is audited."""
        if sample_every < 1:
            raise ValueError(f"sample_every = {sample_every}: must be at least 1")
        self.ledger, self.step_time, self.caches, self.sample_every = ledger, step_time, caches, sample_every
        self.scheduler = Scheduler(ledger, schedule)
        self.outcome = Outcome()
        self.clock = 0.0

    def run(self, requests: Sequence[Request], until: float = float("inf")) -> Outcome:
        """Serves every request, or what can be served `until` that many seconds."""
        arriving = deque(self._served(name, request) for name, request in enumerate(requests))
        scheduler = self.scheduler
        while (arriving or scheduler.num_unfinished) and self.clock < until:
            if not scheduler.num_unfinished:
                self.clock = max(self.clock, arriving[0].request.arrival_s)
            while arriving and arriving[0].request.arrival_s <= self.clock:
                scheduler.submit(arriving.popleft())
            self.step()
        counters = scheduler.counters
        self.outcome.preempted, self.outcome.recomputed_tokens = counters.preempted, counters.recomputed_tokens
        self.outcome.looked_up_tokens, self.outcome.hit_tokens = counters.looked_up_tokens, counters.hit_tokens
        self.outcome.found_again_tokens = counters.found_again_tokens
        self.outcome.dropped_slots = self.ledger.counters.dropped_slots
        self.outcome.seconds = self.clock
        return self.outcome

    def _served(self, name: int, request: Request) -> _Served:
        served = _Served(name, request.prompt_len, request.prompt_len + request.output_len - 1, request=request)
        if self.caches and request.tokens is not None:
            served.ids, served.indexed = [int(token) for token in request.tokens], True
        return served

    def step(self) -> None:
        step = self.scheduler.schedule()
        work = step.work
        self.outcome.rejected += [reason for _, reason in step.rejected]
        for each in step.before:
            if isinstance(each, Compaction):
                self.outcome.compacted += len(each.lengths)
            elif isinstance(each, Seals):
                self.outcome.sealed_pages += sum(len(moves) for moves in each.classes)
        if not work:
            return
        decoding = [item.entry for item in work if item.entry.num_computed >= item.entry.prefill_len]
        chunks = [item.num_new for item in work if item.entry.num_computed < item.entry.prefill_len]
        seconds = self.step_time([Context(entry.num_computed, entry.prompt_len) for entry in decoding], chunks)
        if self.outcome.steps % self.sample_every == 0:
            self._sample(seconds)
        self.clock += seconds
        self.outcome.steps += 1
        for item in work:
            self._settle(item)

    def _settle(self, work: Work) -> None:
        """The step of one sequence is done; where it reached the last known token, it knows one more."""
        sequence, count, _ = work
        assert isinstance(sequence, _Served)
        begin, end = max(sequence.prefill_len, sequence.num_computed), sequence.num_computed + count
        if sequence.num_computed < sequence.prefill_len:
            self.outcome.prefilled_tokens += count
        self.ledger.commit(sequence.name, count, sequence.ids[begin:end] if sequence.indexed else ())
        sequence.num_computed = end
        if end < sequence.num_known:
            return
        self.outcome.decoded_tokens += 1
        if end >= sequence.final_len:
            self.scheduler.remove(sequence)
            self.outcome.finished += 1
            self.outcome.latencies.append(self.clock - sequence.request.arrival_s)
            return
        if sequence.indexed:
            if sequence.request.answer is None:
                sequence.indexed = False  # what follows has no ids, so nothing more can be published or found
            else:
                sequence.ids.append(int(sequence.request.answer[sequence.num_known - sequence.request.prompt_len]))
        sequence.num_known += 1

    def _sample(self, seconds: float) -> None:
        accounts = self.ledger.audit()
        total = accounts[0]
        for account in accounts[1:]:
            total = total + account
        row = {part: getattr(total, part) for part in (*PARTS, "pool", "allocated", "shared", "stranded")}
        batch = len(self.scheduler.running)
        self.outcome.samples.append({"time": self.clock, "seconds": seconds, "batch": batch, **row})
