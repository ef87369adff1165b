"""The engine: many requests at once from one memory.

    engine = Engine(model, memory=MemoryConfig(page_size=16), config=EngineConfig(max_len=4096))
    answers = engine.generate(prompts, Sampling(max_tokens=100))     # all of them, in order
    for event in engine.stream(prompts, Sampling()): ...             # token by token
    name = engine.submit(prompt); engine.step(); engine.cancel(name) # by hand

Every step: the scheduler says who computes what, the ledger plans the pages, the device computes and draws tokens, and
what they mean is settled: tokens accepted, pages published, sequences ended. Where all rows decode on, the next step is
launched before this one is settled, so that the device never waits for the host."""

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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


class Change(NamedTuple):
    """Something that must be done wholly: what to say of it where it is not, and the request that it opens, if it
    touches nothing else."""

    reason: str
    opened: Request | None


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
        self._change: Change | None = None
        """What is done now; behind an interrupt, what it tore and nobody has mended yet."""
        self._unheard: dict[str, None] = {}
        """Requests that nobody wants any more, and that have not been ended yet."""
        self._owners: list[tuple[weakref.ref[Stream], dict[str, None]]] = []
        """Streams with the requests that are theirs to end."""

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
        which a fraction is to stay that is less than what is protected, a name in use or not printable, text or stop
        strings without a tokenizer, text that UTF-8 cannot write, and anything of another type. Nothing has then
        changed.
        """
        name = self._submit(prompt, sampling, name=name, priority=priority, namespace=namespace, owned={})
        self._let_go()
        return name

    def cancel(self, name: str) -> None:
        """Ends a request now; its answer has what was generated so far. Raises KeyError for an unknown name."""
        self._mend()
        if name not in self.requests:
            raise KeyError(f"request {name!r}: is not running")
        self._do("a cancellation", lambda: self.book.tell(self.book.cancel(name)))
        self._let_go()

    def generate(
        self, prompts: Sequence[Sequence[int] | str], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Answer]:
        """Answers in the order of the prompts, each with its own sampling or all with the same.

        Raises ValueError for the first bad prompt before anything is computed, and GenerationError, with every answer,
        when requests failed."""
        stream = self._open(prompts, sampling)
        try:
            while any(name in self.requests for name in stream.names):
                self.step()
            answers = [self.answers[name] for name in stream.names]
        finally:
            stream.close()
        if any(answer.error for answer in answers):
            raise GenerationError(answers)
        return answers

    def stream(
        self, prompts: Sequence[Sequence[int] | str], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Stream:
        """Events of these requests as they happen; of a beam search, the best beam's when it has ended. Whoever stops
        listening cancels what is left. Bad prompts raise here."""
        stream = self._open(prompts, sampling)
        self.book.streams.add(stream)
        return stream

    def _open(self, prompts: Sequence[Any], sampling: Sampling | Sequence[Sampling] | None) -> Stream:
        """Queues requests that a stream, which nobody tells anything yet, is to end."""
        stream = Stream(self)
        self._owners.append((weakref.ref(stream), stream.names))
        try:
            for prompt, wanted in each_sampling(prompts, sampling):
                self._submit(prompt, wanted, owned=stream.names)
        except BaseException:
            stream.close()
            raise
        return stream

    def _submit(
        self,
        prompt: Sequence[int] | str,
        sampling: Sampling | None,
        *,
        name: str | None = None,
        priority: int = 0,
        namespace: str = "",
        owned: dict[str, None],
    ) -> str:
        """`submit`. The name is among those that are `owned` before the request is queued: whatever happens then, its
        owner can end it."""
        self._mend()
        request = self.intake.request(
            prompt,
            sampling,
            name=name,
            priority=priority,
            namespace=namespace,
            ledger=self.ledger,
            taken=self.requests.keys() | self.answers.keys(),
        )
        owned[request.name] = None
        self._do("a submission", lambda: self.book.open(request), opened=request)
        return request.name

    def abandon(self, names: Iterable[str], *, later: bool = False) -> None:
        """Ends these requests, whatever became of them, and forgets their answers; with `later`, after what is done
        now, if anything is: Python may let go of a stream anywhere."""
        self._unheard |= dict.fromkeys(names)
        if not (later and self._change is not None):
            self._let_go()

    def _let_go(self) -> None:
        """Ends who was abandoned. What an interrupt leaves is done by the next call: of a stream that Python has let
        go, too, whose own end an interrupt may have cut short without a word."""
        for owner in tuple(self._owners):
            stream, names = owner
            if stream() is None:
                self._unheard |= names
                self._owners.remove(owner)
        while self._unheard:
            name = next(reversed(self._unheard))
            self._mend()
            if name in self.requests:
                self._do("a cancellation", lambda name=name: self.book.tell(self.book.cancel(name)))
            self.answers.pop(name, None)
            self._unheard.pop(name, None)

    # Changes, and what an interrupt leaves of one.

    def _do[T](self, what: str, change: Callable[[], T], opened: Request | None = None) -> T:
        """Makes a change that is done wholly or mended: by the next call, where mending is interrupted too."""
        self._mend()
        self._change = Change(f"{what} was interrupted", opened)
        try:
            done = change()
        except BaseException as error:
            self._change = Change(f"{what} was interrupted: {type(error).__name__}: {error}", opened)
            self._mend()
            raise
        self._change = None
        return done

    def _mend(self) -> None:
        """Undoes a submission that was cut short. Otherwise nobody knows which part of a torn change was done: requests
        that had begun fail, and ledger, pools and drafter are made anew. What was published is gone with them, since it
        may not be finite. Cut short itself, it begins again."""
        if self._change is None:
            return
        reason, opened = self._change
        if opened is not None:
            self.book.take_back(opened)
        else:
            self._flight = []
            waiting = self.book.untorn(self.scheduler.waiting)
            ledger = self.layout.ledger(self.config.policy, self.config.checkpoints)
            ledger.counters = self.ledger.counters
            self.runner.start_over()
            self.speculation.start_over()
            self.scheduler.start_over(ledger, waiting)
            self.book.tell(self.book.tear(waiting, reason))
        self._change = None

    # A step.

    def step(self) -> list[Event]:
        """Advances every sequence that the budget allows; returns what happened. Nothing to do is no event.

        Where a step does not end, by an interrupt or an error of the device, what took part in it fails, what waits
        goes on in memory made anew, and the exception is raised."""
        events = self._do("a step", lambda: self.book.tell(self._advance()))
        self._let_go()
        return events

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
