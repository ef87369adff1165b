"""Serving without a device: requests, the real ledger, and a clock. What the engine would hold, step by step.

Continuous batching: every step decodes one token of each running sequence and computes prompts within a token budget;
the oldest are served first. Pages run out by preempting the youngest, which starts again or goes to the host and back.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvlab.capacity.workload import Request
from kvlab.memory.accounting import PARTS
from kvlab.memory.answers import READY, Never, Ready, Wait
from kvlab.memory.classes import Lengths
from kvlab.memory.ledger import Ledger

type StepTime = Callable[[Sequence[int], Sequence[int]], float]
"""Seconds of a step, from the lengths of the sequences that decode and the number of new tokens of each prompt chunk."""


@dataclass(frozen=True)
class Schedule:
    """How steps are made: at most `token_budget` tokens, decoded ones first. With `mixed` prompts and decodes share steps (chunked prefill); without, a step that computes
    prompts decodes nothing. `preemption` is "recompute" or "swap". `sample_every` steps the ledger is audited."""

    max_batch: int = 1 << 30
    token_budget: int = 1 << 30
    mixed: bool = True
    preemption: str = "recompute"
    sample_every: int = 10

    def __post_init__(self) -> None:
        for name in ("max_batch", "token_budget", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(eq=False)
class _Running:
    request: Request
    name: int
    target: int
    """Tokens to store before the request is done: the last token's own state is never needed."""
    prompt_len: int
    """Tokens to compute before one can be decoded: after a preemption, all those generated before as well."""
    length: int = 0
    produced: int = 0
    """Tokens of the answer known so far; a preemption forgets their state, not them."""
    active: bool = False
    """Whether it holds pages of the device."""


@dataclass
class Outcome:
    """What happened. `samples` has one row for each audited step: its time, batch, and each part's bytes summed over classes."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    finished: int = 0
    rejected: list[str] = field(default_factory=list)
    preempted: int = 0
    recomputed_tokens: int = 0
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    latencies: list[float] = field(default_factory=list)

    def mean(self, column: str, start: float = 0.0, stop: float = float("inf")) -> float:
        """Time-weighted mean of a column over [start, stop) seconds. Raises ValueError when nothing was sampled there."""
        rows = [row for row in self.samples if start <= row["time"] < stop]
        if not rows:
            raise ValueError(f"no sample in [{start}, {stop}) s")
        weights = [row["seconds"] for row in rows]
        return float(np.average([row[column] for row in rows], weights=weights))


class Simulator:
    """Runs requests through a ledger. Deterministic; raises RuntimeError should a step make no progress."""

    def __init__(self, ledger: Ledger, step_time: StepTime, schedule: Schedule, *, caches: bool = False):
        """`caches`: prompts with token ids are looked up in, and published to, the prefix index."""
        self.ledger, self.step_time, self.schedule, self.caches = ledger, step_time, schedule, caches
        self.outcome = Outcome()
        self.running: list[_Running] = []
        self.waiting: deque[_Running] = deque()
        self.away: deque[_Running] = deque()
        self.clock = 0.0

    def run(self, requests: Sequence[Request], until: float = float("inf")) -> Outcome:
        """Serves every request, or what can be served `until` that many seconds."""
        arriving = deque(
            _Running(one, name, one.prompt_len + one.output_len - 1, one.prompt_len)
            for name, one in enumerate(requests)
        )
        while (arriving or self.waiting or self.running or self.away) and self.clock < until:
            if not (self.waiting or self.running or self.away):
                self.clock = max(self.clock, arriving[0].request.arrival_s)
            while arriving and arriving[0].request.arrival_s <= self.clock:
                self.waiting.append(arriving.popleft())
            self._step()
        self.outcome.seconds = self.clock
        return self.outcome

    def _step(self) -> None:
        preempted, num_running = self.outcome.preempted, len(self.running)
        decoding = self._decode() if self.schedule.mixed else []
        budget = self.schedule.token_budget - len(decoding)
        chunks = self._continue(budget)
        if self.outcome.preempted == preempted:  # whoever made room is not let in again at once
            chunks |= self._admit(budget - sum(chunks.values()))
        if not self.schedule.mixed and not chunks:
            decoding = self._decode()
        decoding = [one for one in decoding if one.active]
        if not chunks and not decoding:
            if len(self.running) > num_running or not (self.waiting or self.away or self.running):
                return  # sequences came back and will run next, or everything that came was rejected
            raise RuntimeError(
                f"no progress: {len(self.running)} running, {len(self.waiting)} waiting, {len(self.away)} away"
            )
        seconds = self.step_time([one.length for one in decoding], list(chunks.values()))
        if self.outcome.steps % self.schedule.sample_every == 0:
            self._sample(seconds)
        self.clock += seconds
        self.outcome.steps += 1
        for one in decoding:
            self._commit(one, 1)
        for one, count in chunks.items():
            self._commit(one, count)

    # Which sequences take part in a step.

    def _continue(self, budget: int) -> dict[_Running, int]:
        """Reserves the next chunks of prompts that are partly computed."""
        chunks: dict[_Running, int] = {}
        for one in [one for one in self.running if one.length < one.prompt_len]:
            if budget > 0 and one.active:
                count = min(one.prompt_len - one.length, budget, self.ledger.chunk_len)
                count = self.ledger.clip(one.name, count)
                if self._reserve(one, count):
                    chunks[one] = count
                    budget -= count
        return {one: count for one, count in chunks.items() if one.active}

    def _admit(self, budget: int) -> dict[_Running, int]:
        """Brings sequences back from the host, then begins those waiting, the oldest first."""
        chunks: dict[_Running, int] = {}
        while self.away and len(self.running) < self.schedule.max_batch:
            if isinstance(self.ledger.swap_in(self.away[0].name), Wait):
                return chunks
            self._activate(self.away.popleft())
        while self.waiting and budget > 0 and len(self.running) < self.schedule.max_batch:
            count = self._begin(self.waiting[0], budget)
            if count is None:
                break
            one = self.waiting.popleft()
            if count:
                chunks[one] = count
                self._activate(one)
                budget -= count
        return chunks

    def _activate(self, one: _Running) -> None:
        one.active = True
        self.running.append(one)

    def _begin(self, one: _Running, budget: int) -> int | None:
        """Reserves a request's first chunk and returns its size; 0 for a request that can never fit, None for one that waits."""
        request = one.request
        hit = None
        if self.caches and request.tokens is not None:
            tokens = request.tokens
            if one.prompt_len > request.prompt_len:
                if request.answer is None:
                    raise ValueError(f"request {one.name}: has tokens and no answer, whose ids a preemption needs")
                tokens = np.concatenate([tokens, request.answer[: one.prompt_len - request.prompt_len]])
            hit = self.ledger.lookup(tokens)
        start = hit.length if hit else 0
        count = min(one.prompt_len - start, budget, self.ledger.chunk_len)
        if hit:
            count = self.ledger.clip(hit, count)
        answer = self.ledger.reserve(one.name, count, hit=hit, lengths=Lengths(request.prompt_len, one.target))
        if isinstance(answer, Ready):
            one.length = start
            return count
        if hit:
            self.ledger.unpin(hit)
        if isinstance(answer, Wait):
            return None
        self.outcome.rejected.append(answer.reason)
        return 0

    def _decode(self) -> list[_Running]:
        """Reserves one token of every sequence whose prompt is computed, the oldest first, within the token budget."""
        reserve = self.ledger.reserve
        ready = [one for one in self.running if one.length >= one.prompt_len][: self.schedule.token_budget]
        for one in ready:
            if one.active and reserve(one.name, 1) is not READY:
                self._reserve(one, 1)
        return [one for one in ready if one.active]

    def _reserve(self, one: _Running, count: int) -> bool:
        """Reserves, preempting younger sequences, in the end the sequence itself; False: it was preempted."""
        while not isinstance(answer := self.ledger.reserve(one.name, count), Ready):
            if isinstance(answer, Never):
                raise RuntimeError(f"admitted and then refused: {answer.reason}")
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is one:
                return False
        return True

    def _preempt(self, one: _Running) -> None:
        self.running.remove(one)
        one.active = False
        self.outcome.preempted += 1
        if self.ledger.running[one.name].num_new:
            self.ledger.cancel(one.name)
        if one.name not in self.ledger.running:  # it had only begun
            self.waiting.appendleft(one)
            return
        if self.schedule.preemption == "swap" and not isinstance(self.ledger.swap_out(one.name), Wait):
            self.away.appendleft(one)
            return
        self.ledger.release(one.name)
        self.outcome.recomputed_tokens += one.length
        one.prompt_len, one.length = max(one.length, one.request.prompt_len), 0
        self.waiting.appendleft(one)

    # What a step did.

    def _commit(self, one: _Running, count: int) -> None:
        request, start = one.request, one.length
        one.length = length = start + count
        if start < one.prompt_len:
            self.ledger.commit(one.name, count)
            self.outcome.prefilled_tokens += count
        elif self.caches and request.answer is not None:
            self.ledger.commit(one.name, count, [int(request.answer[start - request.prompt_len])])
        else:
            self.ledger.commit(one.name, count)
        if length - request.prompt_len >= one.produced:
            one.produced += 1
            self.outcome.decoded_tokens += 1
        if length >= one.target:
            self.ledger.release(one.name)
            self.running.remove(one)
            one.active = False
            self.outcome.finished += 1
            self.outcome.latencies.append(self.clock - request.arrival_s)

    def _sample(self, seconds: float) -> None:
        accounts = self.ledger.audit()
        total = accounts[0]
        for one in accounts[1:]:
            total = total + one
        row = {part: getattr(total, part) for part in (*PARTS, "pool", "allocated", "shared", "stranded")}
        self.outcome.samples.append({"time": self.clock, "seconds": seconds, "batch": len(self.running), **row})
