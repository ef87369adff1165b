"""The engine: many requests at once from one memory.

    engine = Engine(model, memory=MemoryConfig(page_size=16), config=EngineConfig(max_len=4096))
    answers = engine.generate(prompts, Sampling(max_tokens=100))     # all of them, in order
    for event in engine.stream(prompts, Sampling()): ...             # token by token
    name = engine.submit(prompt); engine.step(); engine.cancel(name) # by hand

Every step: the scheduler says who computes what, the ledger plans the pages, the device computes and draws tokens, and
what they mean is settled: tokens accepted, pages published, sequences ended. Where all rows decode on, the next step is
launched before this one is settled, so that the device never waits for the host."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from kvlab.engine.book import Book
from kvlab.engine.config import EngineConfig, Stats
from kvlab.engine.entries import Entry, Planned
from kvlab.engine.intake import Intake, each_sampling
from kvlab.engine.listener import Listener
from kvlab.engine.requests import Answer, Event, GenerationError, Request, Sample
from kvlab.engine.runner import Group, Launched, Runner
from kvlab.engine.sampling import Sampling
from kvlab.engine.scheduler import Schedule, Scheduler
from kvlab.engine.settle import Settler
from kvlab.engine.speculative import Speculation
from kvlab.engine.stream import Stream
from kvlab.ledger.answers import Wait
from kvlab.ledger.ledger import Ledger
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.models.model import Model
from kvlab.schema import ConfigError
from kvlab.tokenizers import Tokenizer


class Engine:
    """Generates from a model through its memory. Not thread-safe: one engine, one caller."""

    def __init__(
        self,
        model: Model,
        *,
        memory: MemoryConfig | None = None,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        draft: Model | None = None,
    ):
        """`draft` guesses ahead where `config.speculation` is "draft": a smaller model of the same vocabulary.

        Raises ConfigError for settings that do not fit together.
        """
        memory, config = memory or MemoryConfig(), config or EngineConfig()
        self.config, self.tokenizer, self.stats = config, tokenizer, Stats()
        self.vocab_size = model.vocab_size
        keeps_states = config.speculation != "none" or config.prefix_cache
        self.layout = layout = MemoryLayout.of(
            model.states,
            memory,
            max_sequences=config.max_batch,
            max_len=config.max_len,
            pool_len=config.pool_len,
            host_len=config.host_len,
            spare_states=config.max_batch if keeps_states else 0,
        )
        has_states = any(not state.spec.per_token for state in layout.classes)
        shares = memory.name == "paged"
        schedule = Schedule(config.max_batch, config.token_budget, config.mixed, config.preemption)
        self.scheduler = Scheduler(layout.ledger(config.policy, config.checkpoints), schedule)
        self.scheduler.listen = self._listener()
        self.runner = Runner(model, layout, config, self.stats)
        self.speculation = Speculation.of(config, memory, draft, self.vocab_size)
        self.intake = Intake(config, memory, self.vocab_size, tokenizer)
        indexed = config.prefix_cache and shares
        self.book = Book(
            self.scheduler, self.speculation, self.stats, tokenizer, self.vocab_size, indexed=indexed, shares=shares
        )
        self.settler = Settler(self.scheduler, self.book, self.stats, rolls_back=not has_states)
        self._flight: list[Launched] = []
        """The next step, where it is under way already."""
        self._stepping, self._unheard = False, list[str]()

    def _listener(self) -> Callable[[Entry], Planned | Wait] | None:
        """What plans second passes behind prompts; None: this memory needs none."""
        listener = Listener(self.layout)
        if not listener:
            return None
        if listener.knows_future:
            raise ConfigError("memory.compression", listener.name, "must know what follows, which no engine does")
        return lambda entry: listener.plan(self.ledger, entry.name, entry.ids[: entry.prompt_len])

    @property
    def ledger(self) -> Ledger:
        """Who holds which page now."""
        return self.scheduler.ledger

    @property
    def requests(self) -> dict[str, Request]:
        """Requests that have not ended, by name."""
        return self.book.requests

    @property
    def answers(self) -> dict[str, Answer]:
        """Of requests that ended and were not taken yet: they are the caller's to pop."""
        return self.book.answers

    # Requests come and go.

    def submit(
        self,
        prompt: Sequence[int] | str,
        sampling: Sampling | None = None,
        *,
        name: str | None = None,
        priority: int = 0,
        namespace: str = "",
    ) -> str:
        """Queues a request and returns its name. Higher priorities are admitted first and make room last, but do not
        interrupt what runs; prompts share pages within a namespace only.

        Raises ValueError for an empty prompt, ids outside the vocabulary, an answer that could not fit, a prompt of
        which a fraction is to stay that is less than what is protected, a name in use, text or stop strings without a
        tokenizer, and a priority or namespace of another type. Nothing has then changed.
        """
        request = self.intake.request(
            prompt,
            sampling,
            name=name,
            priority=priority,
            namespace=namespace,
            ledger=self.ledger,
            taken=self.requests.keys() | self.answers.keys(),
        )
        self.book.open(request)
        return request.name

    def cancel(self, name: str) -> None:
        """Ends a request now; its answer has what was generated so far. Raises KeyError for an unknown name."""
        self.book.tell(self.book.cancel(name))

    def generate(
        self, prompts: Sequence[Sequence[int] | str], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Answer]:
        """Answers in the order of the prompts, each with its own sampling or all with the same.

        Raises ValueError for the first bad prompt before anything is computed, and GenerationError, with every answer,
        when requests failed."""
        names = self._submit_all(prompts, sampling)
        try:
            while any(name in self.requests for name in names):
                self.step()
        except BaseException:
            self._abandon(names)
            raise
        answers = [self.answers.pop(name) for name in names]
        if any(answer.error for answer in answers):
            raise GenerationError(answers)
        return answers

    def stream(
        self, prompts: Sequence[Sequence[int] | str], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Stream:
        """Events of these requests as they happen; of a beam search, the best beam's when it has ended. Whoever stops
        listening cancels what is left. Bad prompts raise here."""
        names = self._submit_all(prompts, sampling)
        stream = Stream(names, self.step, self.requests.__contains__, self._abandon)
        self.book.streams.add(stream)
        return stream

    def _submit_all(self, prompts: Sequence[Any], sampling: Sampling | Sequence[Sampling] | None) -> dict[str, None]:
        names: dict[str, None] = {}
        try:
            for prompt, wanted in each_sampling(prompts, sampling):
                names[self.submit(prompt, wanted)] = None
        except BaseException:
            self._abandon(names)
            raise
        return names

    def _abandon(self, names: Collection[str]) -> None:
        """Ends these requests, whatever became of them, and forgets their answers; after the step, if one is under way:
        Python may let go of a stream anywhere."""
        if self._stepping:
            self._unheard += names
            return
        for name in names:
            if name in self.requests:
                self.cancel(name)
            self.answers.pop(name, None)

    # A step.

    def step(self) -> list[Event]:
        """Advances every sequence that the budget allows; returns what happened. Nothing to do is no event.

        Where a step does not end, by an interrupt or an error of the device, what took part in it fails, what waits
        goes on in memory made anew, and the exception is raised."""
        self._stepping = True
        try:
            events = self._advance()
        except BaseException as error:
            self.book.tell(self._start_over(f"a step was interrupted: {type(error).__name__}: {error}"))
            raise
        finally:
            self._stepping = False
        unheard, self._unheard = self._unheard, []
        self._abandon(unheard)
        return self.book.tell(events)

    def _advance(self) -> list[Event]:
        stats, began = self.stats, time.perf_counter()
        handed_over, waited = stats.dispatch_s, stats.wait_s
        (flight, self._flight), events = (self._flight, []), list[Event]()
        is_new = not any(sample.state != "gone" for launched in flight for sample in launched.batch.samples)
        if is_new:
            flight, events = self._launch()
        busy_since, handed_over_since = (time.perf_counter(), stats.dispatch_s) if is_new else (began, handed_over)
        following = self._launch_behind(flight)
        stats.hidden_s += time.perf_counter() - busy_since - (stats.dispatch_s - handed_over_since)
        fetched = self.runner.fetch(flight)
        known = time.perf_counter()
        for launched, said in zip(flight, fetched, strict=True):
            events += self.settler.settle(launched, said)
        self.ledger.publish()
        events += self.settler.advance_beams()
        self._flight = following
        ended = time.perf_counter()
        stats.steps += bool(flight)
        stats.hidden_s += (ended - known) * bool(following)
        stats.host_s += ended - began - (stats.wait_s - waited) - (stats.dispatch_s - handed_over)
        return events

    def _launch(self) -> tuple[list[Launched], list[Event]]:
        """The next step, under way, and what became of those who can never take part."""
        self.speculation.ask(self.scheduler.running)
        step = self.scheduler.schedule()
        self.runner.prepare(step.before)
        events = [self.book.fail(entry, reason) for entry, reason in step.rejected if isinstance(entry, Sample)]
        # A request that was rejected may have had other sequences.
        work = [part for part in step.work if part.entry.state != "gone"] if events else step.work
        groups = self.runner.groups(work, self.ledger.chunk_len)
        return [self.runner.launch(self.ledger, group) for group in groups], events

    def _launch_behind(self, flight: list[Launched]) -> list[Launched]:
        """The step behind this one, under way, where it needs nothing of this one on the host: all that run decode
        here, want tokens and text only, and nobody can come in. A sequence that this step turns out to end is then
        computed in vain."""
        if len(flight) != 1 or self.speculation.drafter is not None:
            return []
        (launched,) = flight
        _, going = launched.rows()
        # Behind a step that was launched behind another, all decode anyway.
        decode = launched.is_behind or all(sample.decodes for sample in going)
        if not (launched.batch.is_plain and decode and len(going) == len(self.scheduler.running)):
            return []
        if not self.settler.commit_early(launched):
            return []
        work = self.scheduler.schedule_ahead()
        if work is None:
            return []
        self.stats.planned_ahead += 1
        return [self.runner.launch(self.ledger, Group(work, 1, False), launched)]

    def _start_over(self, reason: str) -> list[Event]:
        """Nobody knows which part of a torn step was done: its requests fail, and ledger, pools and drafter are made
        anew. What was published is gone with them, since it may not be finite."""
        scheduler = self.scheduler
        waiting = [entry for entry in scheduler.waiting if not entry.num_computed and entry.state == "waiting"]
        torn = [
            request
            for request in self.requests.values()
            if not request.samples or any(sample not in waiting for sample in request.samples)
        ]
        ledger = self.layout.ledger(self.config.policy, self.config.checkpoints)
        ledger.counters = self.ledger.counters
        self._flight = []
        self.runner.start_over()
        self.speculation.start_over()
        lost = {sample for request in torn for sample in request.samples}
        scheduler.start_over(ledger, [entry for entry in waiting if entry not in lost])
        return self.book.tear(torn, reason)
