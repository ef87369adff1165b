"""The engine: many requests at once from one memory.

    engine = Engine(structure, params, memory=MemoryConfig(page_size=16), config=EngineConfig(max_len=4096))
    answers = engine.generate(prompts, Sampling(max_tokens=100))     # all of them, in order
    for event in engine.stream(prompts, Sampling()): ...             # token by token
    name = engine.submit(prompt); engine.step(); engine.cancel(name) # by hand

Every step: the scheduler says who computes what, the ledger plans the pages, the device computes and draws tokens, and what
they mean is settled: tokens accepted, pages published, sequences ended.
"""

import math
import time
import weakref
from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from kvlab.engine import shapes
from kvlab.engine.beam import BeamGroup
from kvlab.engine.config import EngineConfig, Stats
from kvlab.engine.requests import (
    Alternatives,
    Answer,
    Completion,
    Event,
    FinishReason,
    GenerationError,
    Request,
    Sample,
)
from kvlab.engine.sampling import Choices, Drawn, Mode, Sampling, draw_tokens
from kvlab.engine.scheduler import Schedule, Scheduler, Work
from kvlab.engine.speculative import Drafter, ModelDrafter, NgramDrafter
from kvlab.engine.step import MemoryStep
from kvlab.engine.stream import Stream
from kvlab.engine.swap import HostTier
from kvlab.engine.transcript import Transcript
from kvlab.ledger.plan import Plan
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.models.transformer import Transformer, merge
from kvlab.schema import ConfigError
from kvlab.tokenizers import Tokenizer
from kvlab.typing import Params


class _Batch(NamedTuple):
    """Rows that compute together, with what they ask of the sampler; `wants_more` than tokens, log-probabilities and text."""

    samples: list[Sample]
    choices: Choices
    mode: Mode
    wants_more: bool
    names: list[Hashable]
    labels: list[tuple[str, int]]
    """Request and sample of each row, as events name them."""
    may_stop: bool
    """Whether any has stop tokens."""
    has_text: bool


class _Launched(NamedTuple):
    """A step under way: its rows, the first token of each, and what is drawn and which rows are finite, still on the device."""

    batch: _Batch
    tokens: npt.NDArray[np.int32]
    drawn: Drawn
    finite: Any


class _Early(NamedTuple):
    """Rows that were committed while the device worked."""

    batch: _Batch
    late: list[Sample]
    """Those for which the ledger must be asked once more, when they are known to be finite."""
    last: list[Sample]
    """Those for which this is the last step."""


class _Ahead(NamedTuple):
    """The next step, planned while the device works: good for as long as the scheduler gives this very work."""

    work: list[Work]
    plan: Plan


class Engine:
    """Generates from a model through its memory. Not thread-safe: one engine, one caller."""

    def __init__(
        self,
        model: nnx.GraphDef[Transformer],
        params: Params,
        *,
        memory: MemoryConfig | None = None,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        draft: tuple[nnx.GraphDef[Transformer], Params] | None = None,
    ):
        """`model` and `params` as of `split(transformer)` or `load_checkpoint`; `draft` is the pair of the draft model.

        Raises ConfigError for settings that do not fit together.
        """
        memory, self.config, self.tokenizer = memory or MemoryConfig(), config or EngineConfig(), tokenizer
        config, self.params = self.config, params
        whole = merge(model, params)
        self.vocab_size: int = whole.embedding.num_embeddings
        has_states = any(not spec.per_token for layer in whole.states() for spec in layer.values())
        keeps_states = config.speculation != "none" or config.prefix_cache
        self.layout = layout = MemoryLayout.of(
            whole.states(),
            memory,
            max_sequences=config.max_batch,
            max_len=config.max_len,
            pool_len=config.pool_len,
            host_len=config.host_len,
            spare_states=config.max_batch if keeps_states else 0,
        )
        self.caches = config.prefix_cache and memory.name == "paged"
        self.step_fn = MemoryStep.of(model, layout)
        self.ledger = layout.ledger(config.policy, config.checkpoints)
        self.scheduler = Scheduler(
            self.ledger, Schedule(config.max_batch, config.token_budget, config.mixed, config.preemption)
        )
        self.pools, self.host = layout.allocate(), HostTier(layout)
        self._make_drafter = lambda: self._drafter_of(memory, draft)
        self.drafter = self._make_drafter()
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, Answer] = {}
        """Of requests that ended and were not taken yet."""
        self.stats = Stats()
        self._beams: dict[str, BeamGroup] = {}
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._stepping, self._unheard = False, list[str]()
        self._num_submitted = 0
        self._rolls_back = not has_states
        self._shares = memory.name == "paged"
        self._batches: dict[tuple[int, bool], _Batch] = {}
        self._ahead: _Ahead | None = None
        self._drafted: set[Any] = set()
        """Sequences that the drafter may hold memory of."""
        self._read_bytes = [
            np.array([one.spec.read_bytes(n) * one.num_layers for n in range(config.max_len + 1)])
            for one in layout.classes
        ]
        self._weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

    def _drafter_of(self, memory: MemoryConfig, draft: tuple[Any, Params] | None) -> Drafter | None:
        config = self.config
        if (draft is not None) != (config.speculation == "draft"):
            raise ConfigError("speculation", config.speculation, 'must be "draft" with a draft model, and only then')
        if draft is None:
            return NgramDrafter(config.num_drafts) if config.speculation == "ngram" else None
        if (draft_vocab := merge(*draft).embedding.num_embeddings) != self.vocab_size:
            raise ConfigError(
                "draft", f"vocabulary of {draft_vocab}", f"must have the model's {self.vocab_size} tokens"
            )
        return ModelDrafter(
            *draft, memory, num_drafts=config.num_drafts, max_sequences=config.max_batch, max_len=config.max_len
        )

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
        """Queues a request and returns its name. Higher priorities are admitted first and make room last, but do not interrupt
        what runs; prompts share pages within a namespace only.

        Raises ValueError for an empty prompt, ids outside the vocabulary, an answer that could not fit, a name in use, text or
        stop strings without a tokenizer, and a priority or namespace of another type. Nothing has then changed.
        """
        sampling = sampling or Sampling()
        ids = self._encoded(prompt)
        self._check(ids, sampling)
        ids = [int(one) for one in ids]
        if name is None:
            name = self._free_name()
        elif not isinstance(name, str) or name in self.requests or name in self.answers:
            raise ValueError(f"name = {name!r}: {'is in use' if isinstance(name, str) else 'must be a string'}")
        if type(priority) is not int:
            raise ValueError(f"priority = {priority!r}: must be an integer")
        if not isinstance(namespace, str):
            raise ValueError(f"namespace = {namespace!r}: must be a string")
        seed = sampling.seed
        if seed is None:
            seed = int(np.random.default_rng([self.config.seed, self._num_submitted]).integers(2**31))
        self._num_submitted += 1
        request = Request(name, ids, sampling, seed, priority, namespace)
        self.requests[name] = request
        if sampling.beam_width:
            self._beams[name] = BeamGroup(request)
        first = self._sample(request, 0, ids)
        if sampling.num_samples > 1 and self._shares:
            first.hold = len(ids) - 1  # its last token is fed by every sample, from memory that they share
        self.scheduler.submit(first)
        if first.hold == 0 or not self._shares:
            self._start_others(first)
        return name

    def _free_name(self) -> str:
        number = self._num_submitted
        while (name := f"request-{number}") in self.requests or name in self.answers:
            number += 1
        return name

    def _encoded(self, prompt: Sequence[int] | str) -> list[int]:
        if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, str | bytes):
            return list(prompt)
        if not isinstance(prompt, str):
            raise ValueError(f"prompt = {prompt!r}: must be text or a list of token ids")
        if self.tokenizer is None:
            raise ValueError("prompt: is text, and the engine has no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    def _check(self, ids: list[int], sampling: Sampling) -> None:
        if not ids:
            raise ValueError("prompt = []: must have at least one token")
        wrong = next((one for one in ids if not isinstance(one, int | np.integer) or isinstance(one, bool)), None)
        if wrong is not None:
            raise ValueError(f"prompt: token {wrong!r}: must be an integer")
        if wrong_ids := [one for one in ids if not 0 <= one < self.vocab_size]:
            raise ValueError(f"prompt: token {wrong_ids[0]}: must be in [0, {self.vocab_size})")
        longest = self.config.max_len - len(ids) + 1
        if sampling.max_tokens > longest:
            if longest < 1:
                raise ValueError(f"prompt: {len(ids)} tokens: must be at most max_len = {self.config.max_len}")
            legal = f"must be in [1, {longest}], since prompt and answer share max_len = {self.config.max_len}"
            raise ValueError(f"max_tokens = {sampling.max_tokens}: {legal}")
        if never := self.ledger.never(len(ids) + sampling.max_tokens - 1):
            raise ValueError(f"prompt: {len(ids)} tokens and max_tokens = {sampling.max_tokens}: {never.reason}")
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop = {list(sampling.stop)}: stop strings need a tokenizer")
        if (sampling.beam_width or 0) > self.config.max_batch:
            raise ValueError(f"beam_width = {sampling.beam_width}: must be at most max_batch = {self.config.max_batch}")
        if sampling.beam_width and not self._shares:
            raise ValueError(f"beam_width = {sampling.beam_width}: beams need memory=paged, which can be shared")
        most = self.vocab_size // 2 if sampling.beam_width else self.vocab_size
        for field_name, value in (("num_logprobs", sampling.num_logprobs), ("beam_width", sampling.beam_width or 0)):
            if value > most:
                raise ValueError(f"{field_name} = {value}: must be at most {most} of a vocabulary of {self.vocab_size}")

    def _sample(self, request: Request, index: int, ids: list[int]) -> Sample:
        """A sequence of a request, not scheduled yet."""
        own = list(ids)
        one = Sample(
            f"{request.name}/{request.num_started}",
            len(own),
            request.final_len,
            request.priority,
            own if self.caches else None,
            request.namespace,
            request=request,
            index=index,
            ids=own,
            stop_tokens=request.sampling.stop_tokens,
        )
        request.num_started += 1
        request.samples.append(one)
        if self.tokenizer is not None:
            one.transcript = Transcript(self.tokenizer, request.sampling.stop)
        if request.sampling.repetition_penalty != 1:
            one.seen = np.zeros(self.vocab_size, bool)
            one.seen[ids] = True
        return one

    def _start_others(self, first: Sample) -> None:
        """The other samples of a request, behind what the first one has computed of the prompt."""
        first.hold = None
        for index in range(1, first.request.sampling.num_samples):
            self.scheduler.branch(first, self._sample(first.request, index, first.request.prompt))

    def cancel(self, name: str) -> None:
        """Ends a request now; its answer has what was generated so far. Raises KeyError for an unknown name."""
        if name not in self.requests:
            raise KeyError(f"request {name!r}: is not running")
        request = self.requests[name]
        if name in self._beams:
            self._beams[name].end("cancelled")
            self._end_beams(self._beams[name])
        else:
            for one in request.samples[:]:
                self._finish(one, "cancelled")
        self._tell([Event(name, 0, None, float("nan"), "", "cancelled")])

    def generate(
        self, prompts: Sequence[Sequence[int] | str], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Answer]:
        """Answers in the order of the prompts, each with its own sampling or all with one.

        Raises ValueError for the first bad prompt before anything is computed, and GenerationError, with every answer, when
        requests failed.
        """
        names = self._submit_all(prompts, sampling)
        try:
            while any(name in self.requests for name in names):
                self.step()
        except BaseException:
            self._abandon(names)
            raise
        answers = [self.answers.pop(name) for name in names]
        if any(one.error for one in answers):
            raise GenerationError(answers)
        return answers

    def stream(
        self, prompts: Sequence[Sequence[int] | str], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Stream:
        """Events of these requests as they happen; of a beam search, the best beam's when it has ended. Whoever stops listening
        cancels what is left. Bad prompts raise here."""
        names = self._submit_all(prompts, sampling)
        made = Stream(names, self.step, self.requests.__contains__, self._abandon)
        self._streams.add(made)
        return made

    def _tell(self, events: list[Event]) -> list[Event]:
        """Everybody who listens hears of what happened, whoever stepped."""
        for one in list(self._streams):
            one.take(events)
        return events

    def _abandon(self, names: Collection[str]) -> None:
        """Ends these requests, whatever became of them, and forgets their answers; after the step, if one is under way: Python may
        let go of a stream anywhere."""
        if self._stepping:
            self._unheard += names
            return
        for name in names:
            if name in self.requests:
                self.cancel(name)
            self.answers.pop(name, None)

    def _submit_all(self, prompts: Sequence[Any], sampling: Sampling | Sequence[Sampling] | None) -> dict[str, None]:
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            raise ValueError("prompts: must be a list of prompts; put a single one into a list")
        if len(each) != len(prompts):
            raise ValueError(f"sampling: {len(each)} of them for {len(prompts)} prompts: must be one, or one for each")
        names: dict[str, None] = {}
        try:
            for prompt, one in zip(prompts, each, strict=True):
                names[self.submit(prompt, one)] = None
        except BaseException:
            self._abandon(names)
            raise
        return names

    # A step.

    def step(self) -> list[Event]:
        """Advances every sequence that the budget allows; returns what happened. Nothing to do is no event.

        Where a step does not end, by an interrupt or an error of the device, what took part in it fails, what waits goes on in
        memory made anew, and the exception is raised.
        """
        self._stepping = True
        try:
            events = self._advance()
        except BaseException as error:
            self._tell(self._start_over(f"a step was interrupted: {type(error).__name__}: {error}"))
            raise
        finally:
            self._stepping = False
        unheard, self._unheard = self._unheard, []
        self._abandon(unheard)
        return self._tell(events)

    def _start_over(self, reason: str) -> list[Event]:
        """Nobody knows which part of a torn step was done: its requests fail, and ledger, pools and drafter are made anew. What was
        published is gone with them, since it may not be finite."""
        waiting = [one for one in self.scheduler.waiting if not one.num_computed and one.state == "waiting"]
        torn = [
            request
            for request in self.requests.values()
            if not request.samples or any(sample not in waiting for sample in request.samples)
        ]
        counters, self.pools = self.ledger.counters, ()
        self.ledger = self.layout.ledger(self.config.policy, self.config.checkpoints)
        self.ledger.counters = counters
        self.pools, self.host = self.layout.allocate(), HostTier(self.layout)
        self.drafter, self._drafted, self._ahead = self._make_drafter(), set(), None
        self.scheduler.start_over(self.ledger, [one for one in waiting if one.request not in torn])  # type: ignore[attr-defined]
        events = []
        for request in torn:
            for one in request.samples:
                one.state = "gone"
                del one.ids[len(request.prompt) + len(one.logprobs) :]
            events.append(self._end_in_error(request, 0, reason))
            request.samples.clear()
        return events

    def _advance(self) -> list[Event]:
        began, dispatched_before = time.perf_counter(), self.stats.dispatch_s
        if self.drafter is not None:
            self._draft(self.drafter)
        work = self.scheduler.schedule()
        for move in self.scheduler.moves:
            if move.direction == "out":
                self.host.take(self.pools, move.swap)
            else:
                self.pools = self.host.give_back(self.pools, move.swap)
        self.scheduler.moves.clear()
        events = [event for entry, reason in self.scheduler.rejected for event in self._fail(entry, reason)]  # type: ignore[arg-type]
        self.scheduler.rejected.clear()
        if events:  # a request that was rejected may have had other sequences
            work = [one for one in work if one.entry.state != "gone"]
        groups = self._groups(work)
        ahead, self._ahead = self._ahead, None
        plan = ahead.plan if ahead is not None and work is ahead.work else None
        launched = [self._launch(*group, plan) for group in groups]
        dispatched = time.perf_counter()
        self.ledger.publish()
        committed = [self._commit_early(*group, one) for group, one in zip(groups, launched, strict=True)]
        if len(groups) == 1 and self.drafter is None and committed[0] and not committed[0].late:
            self._look_ahead()
        waited = time.perf_counter()
        fetched = jax.device_get([(one.drawn, one.finite) for one in launched])
        done = time.perf_counter()
        self.stats.hidden_s += waited - dispatched
        self.stats.wait_s += done - waited
        for (rows, _, everywhere), early, (drawn, finite) in zip(groups, committed, fetched, strict=True):
            if early is not None:
                events += self._settle_plain(early, drawn, finite)
            else:
                events += self._settle(rows, drawn, finite.tolist(), everywhere)
        for group in [one for one in self._beams.values() if one.ready]:
            events += self._advance_beams(group)
        self.stats.steps += bool(work)
        dispatch_s = self.stats.dispatch_s - dispatched_before
        self.stats.host_s += waited - began - dispatch_s + time.perf_counter() - done
        return events

    def _draft(self, drafter: Drafter) -> None:
        """Guesses for the sequences that decode next."""
        for one in self._drafted - set(self.scheduler.running):
            drafter.forget(one)
        asked = []
        for one in self.scheduler.running:
            assert isinstance(one, Sample)
            one.draft_ids, one.drafts = [], 0
            pending, room = one.num_known - one.num_computed, one.final_len - one.num_known
            plain = one.seen is None and not one.request.sampling.beam_width and one.hold is None
            # What a recurrent state rejected is fed again before it guesses anew.
            if plain and room > 0 and pending == 1 and one.num_computed >= one.prefill_len:
                asked.append((one, room))
        self._drafted = {one for one, _ in asked} | self._drafted & set(self.scheduler.running)
        for (one, room), guess in zip(asked, drafter.propose([one for one, _ in asked]), strict=True):
            one.draft_ids = guess[:room]
            one.drafts = len(one.draft_ids)

    def _groups(self, work: list[Work]) -> list[tuple[list[Work], int, bool]]:
        """Work that shares a program: (rows, width, whether every place is drawn)."""
        groups: dict[tuple[int, bool], list[Work]] = {}
        if decoding := [one for one in work if one is one.entry.decoding]:
            groups[1, False] = decoding
        for one in work if len(decoding) < len(work) else ():
            if one is one.entry.decoding:
                continue
            tokens = one.num_new + one.lookahead
            width = shapes.width_for(tokens, self.ledger.chunk_len)
            width = min(shapes.least_of(self.config.width_sizes, tokens, width), self.ledger.chunk_len)
            groups.setdefault((width, one.lookahead > 0), []).append(one)
        return [(rows, *key) for key, rows in groups.items()]

    def _plan(self, rows: list[Work], width: int) -> Plan:
        num_rows = shapes.rows_for(len(rows), self.config.max_batch)
        num_rows = shapes.least_of(self.config.row_sizes, len(rows), num_rows)
        return self.ledger.plan([one.entry.name for one in rows], num_rows, width)

    def _look_ahead(self) -> None:
        """Reserves and plans the next step while the device works on this one, if all will go on as now."""
        if work := self.scheduler.look_ahead():
            self._ahead = _Ahead(work, self._plan(work, 1))

    def _launch(self, rows: list[Work], width: int, everywhere: bool, plan: Plan | None) -> _Launched:
        """Plans, where that is not done yet, and dispatches one step, not waited for."""
        samples: list[Any] = [one.entry for one in rows]
        self.stats.planned_ahead += plan is not None
        plan = plan or self._plan(rows, width)
        batch_size = len(plan.starts)
        tokens = np.zeros((batch_size, width), np.int32)
        if width == 1:
            tokens[: len(rows), 0] = [one.ids[one.num_computed] for one in samples]
        else:
            for row, (one, (_, count, lookahead)) in enumerate(zip(samples, rows, strict=True)):
                tokens[row, :count] = one.ids[one.num_computed : one.num_computed + count]
                tokens[row, count : count + lookahead] = one.draft_ids[:lookahead]
        batch = self._batch(samples, batch_size, width, everywhere)
        choices, mode = batch.choices, batch.mode
        seen = None
        if mode.penalty:
            seen = np.zeros((batch_size, self.vocab_size), bool)
            for row, one in enumerate(samples):
                if one.seen is not None:
                    seen[row] = one.seen
        ends = plan.starts[: len(rows)] + plan.counts[: len(rows)]
        self.stats.read_bytes += self._weight_bytes + sum(int(table[ends].sum()) for table in self._read_bytes)
        self.stats.launches += 1
        self.stats.shapes.add((batch_size, width, everywhere))
        began = time.perf_counter()
        plan, self.pools = self.step_fn.copied(self.pools, plan)
        logits, finite, self.pools = self.step_fn.next_logits(
            self.params, self.pools, plan, tokens, everywhere=everywhere
        )
        first = plan.starts + 1 if everywhere else plan.starts + plan.counts
        positions = first[:, None] + np.arange(logits.shape[1], dtype=np.int32)
        drawn = draw_tokens(logits, positions, choices, seen, mode=mode)
        self.stats.dispatch_s += time.perf_counter() - began
        return _Launched(batch, tokens[: len(rows), 0], drawn, finite)

    def _batch(self, samples: list[Sample], batch_size: int, width: int, everywhere: bool) -> "_Batch":
        """What is the same for these rows as long as they compute together."""
        kept = self._batches.get((width, everywhere))
        if kept is not None and kept.samples == samples and len(kept.choices.temperature) == batch_size:
            return kept
        asked = [(one.request.sampling, one.request.seed, one.index) for one in samples]
        choices = Choices(*(jnp.asarray(one) for one in Choices.of(asked, batch_size)))
        samplings = [sampling for sampling, _, _ in asked]
        wants_more = any(one.seen is not None or one.request.sampling.reports_more for one in samples)
        labels = [(one.request.name, one.index) for one in samples]
        may_stop = any(one.stop_tokens for one in samples)
        names = [one.name for one in samples]
        has_text = any(one.transcript is not None for one in samples)
        made = _Batch(samples, choices, Mode.of(samplings), wants_more, names, labels, may_stop, has_text)
        self._batches[width, everywhere] = made
        return made

    # What a step means.

    def _commit_early(self, rows: list[Work], width: int, everywhere: bool, launched: _Launched) -> _Early | None:
        """Commits while the device works, for rows that decode and ask for tokens, log-probabilities and text only: the common case.
        None where any row wants more.

        What is not finite, as it then turns out, nobody has seen: pages are published in the next step.
        """
        if width > 1 or everywhere or not all([one is one.entry.decoding for one in rows]):  # noqa: C419
            return None
        batch = launched.batch
        if batch.wants_more:
            return None
        early = _Early(batch, [], [])
        for one, done in zip(batch.samples, self.ledger.commit_each(batch.names, launched.tokens), strict=True):
            if not done:
                early.late.append(one)
            one.num_computed = known = one.num_known
            one.num_known = known + 1
            if known >= one.final_len:
                early.last.append(one)
        return early

    def _settle_plain(self, early: _Early, drawn: Drawn, finite: npt.NDArray[np.bool_]) -> list[Event]:
        """What `_settle` does, for rows that `_commit_early` took, quickly."""
        samples, labels = early.batch.samples, early.batch.labels
        drawn_logprobs = drawn.logprobs[: len(samples), 0]
        tokens, logprobs = drawn.tokens[: len(samples), 0].tolist(), drawn_logprobs.tolist()
        failed: list[Event] = []
        for row in np.flatnonzero(~(finite[: len(samples)] & np.isfinite(drawn_logprobs))):
            if samples[row].state != "gone":
                failed += self._fail_at(samples[row], samples[row].num_computed - 1, 1)
        if failed:  # and with them the other samples of their requests
            kept = [row for row, one in enumerate(samples) if one.state != "gone"]
            samples, labels = [samples[row] for row in kept], [labels[row] for row in kept]
            tokens, logprobs = [tokens[row] for row in kept], [logprobs[row] for row in kept]
        for one in early.late:
            if one.state != "gone":
                self.ledger.commit(one.name, 1, one.ids[-1:])
        for one, token, logprob in zip(samples, tokens, logprobs, strict=True):
            one.ids.append(token)
            one.logprobs.append(logprob)
        texts = [""] * len(samples)
        if early.batch.has_text:
            texts = [
                "" if one.transcript is None else one.transcript.add(token)
                for one, token in zip(samples, tokens, strict=True)
            ]
        new = tuple.__new__  # half the time of naming the fields
        events = [
            new(Event, (name, index, token, logprob, text, None, None))
            for (name, index), token, logprob, text in zip(labels, tokens, logprobs, texts, strict=True)
        ]
        self.stats.decoded_tokens += len(events)
        ends: dict[Sample, FinishReason] = dict.fromkeys(early.last, "length")
        if early.batch.may_stop:
            ends |= {one: "stop" for one, token in zip(samples, tokens, strict=True) if token in one.stop_tokens}
        if early.batch.has_text:
            ends |= {one: "stop" for one in samples if one.transcript is not None and one.transcript.stopped}
        for row, one in enumerate(samples) if ends else ():
            if (reason := ends.get(one)) is not None:
                rest = one.transcript.finish() if one.transcript is not None else ""
                events[row] = events[row]._replace(text=events[row].text + rest, finish_reason=reason)
                self._finish(one, reason)
        return failed + events

    def _settle(self, rows: list[Work], drawn: Drawn, finite: list[bool], everywhere: bool) -> list[Event]:
        events: list[Event] = []
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        for row, (one, count, lookahead) in enumerate(rows):
            assert isinstance(one, Sample)
            if one.state == "gone":  # another sample of its request failed in this step
                continue
            place, accepted = count - 1 if everywhere else 0, 0
            if not finite[row] or not all(map(math.isfinite, logprobs[row][place : place + lookahead + 1])):
                events += self._fail_at(one, one.num_computed, count)
                continue
            reached = one.num_computed + count == one.num_known
            row_tokens = tokens[row]
            while accepted < lookahead and row_tokens[place + accepted] == one.draft_ids[accepted]:
                accepted += 1
            finish: FinishReason | None = None
            if reached and one.request.sampling.beam_width:
                one.candidates = Alternatives(drawn.top_tokens[row, 0].tolist(), drawn.top_logprobs[row, 0].tolist())
                one.paused = True
            elif reached:
                for kept, index in enumerate(range(place, place + accepted + 1)):
                    if one.request.sampling.num_logprobs:
                        one.alternatives.append(self._alternatives(one, drawn, row, index))
                    event = self._accept(one, row_tokens[index], logprobs[row][index])
                    events.append(event)
                    if (finish := event.finish_reason) is not None:
                        accepted = kept  # the tokens behind the end are not known, so they cannot be stored
                        break
            if lookahead:
                self.stats.drafted_tokens += lookahead
                self.stats.accepted_tokens += accepted
            self._commit(one, count, lookahead, accepted)
            if one.hold is not None and one.num_computed >= one.hold:
                self._start_others(one)
            if finish is not None:
                self._finish(one, finish)
        return events

    def _commit(self, one: Sample, count: int, lookahead: int, accepted: int) -> None:
        """The computed tokens count. Beside recurrent states a step with a rejected draft is rejected whole, and its accepted
        tokens, known now, are fed again."""
        if one.num_computed >= one.prefill_len:
            self.stats.decoded_tokens += accepted + 1
        else:
            self.stats.prefilled_tokens += count
        stored = count + accepted if self._rolls_back or accepted == lookahead else 0
        begin, end = max(one.prefill_len, one.num_computed), one.num_computed + stored
        self.ledger.commit(one.name, stored, one.ids[begin:end] if self.caches and begin < end else ())
        one.num_computed = end

    @staticmethod
    def _alternatives(one: Sample, drawn: Drawn, row: int, index: int) -> Alternatives:
        most = one.request.sampling.num_logprobs
        return Alternatives(
            drawn.top_tokens[row, index, :most].tolist(), drawn.top_logprobs[row, index, :most].tolist()
        )

    def _accept(self, one: Sample, token: int, logprob: float) -> Event:
        """One more token of an answer, and whether it ends there."""
        sampling = one.request.sampling
        one.ids.append(token)
        one.logprobs.append(logprob)
        one.num_known += 1
        if one.seen is not None:
            one.seen[token] = True
        text = one.transcript.add(token) if one.transcript is not None else ""
        finish: FinishReason | None = None
        if token in sampling.stop_tokens or (one.transcript is not None and one.transcript.stopped):
            finish = "stop"
        elif one.num_known > one.final_len:
            finish = "length"
        if finish and one.transcript is not None:
            text += one.transcript.finish()
        return Event(one.request.name, one.index, token, logprob, text, finish)

    def _advance_beams(self, group: BeamGroup) -> list[Event]:
        """The group's next beams: the first child of each goes on in its place, the others are forked from it."""
        request = group.request
        chosen = group.select()
        if not chosen:
            return self._end_beams(group)
        parents = {one: [] for one in request.samples}
        for parent, token, logprob in chosen:
            parents[parent].append((token, logprob))
        for parent in [one for one, children in parents.items() if not children]:
            self._drop(parent)  # first, so that there is room for the others' children
            del parents[parent]
        for parent, children in parents.items():
            for token, logprob in children[1:]:
                child = self._sample(request, parent.index, parent.ids)
                child.logprobs, child.score = list(parent.logprobs), parent.score
                self._extend_beam(child, token, logprob)
                self.scheduler.branch(parent, child)
            self._extend_beam(parent, *children[0])
        return []

    @staticmethod
    def _extend_beam(one: Sample, token: int, logprob: float) -> None:
        one.ids.append(token)
        one.logprobs.append(logprob)
        one.num_known += 1
        one.score += logprob
        one.candidates, one.paused = None, False

    def _end_beams(self, group: BeamGroup) -> list[Event]:
        request = group.request
        for one in request.samples[:]:
            self._drop(one)
        tokenizer = self.tokenizer
        for index, found in enumerate(group.finished):
            text = tokenizer.decode(found.tokens) if tokenizer else ""
            request.completions[index] = Completion(
                found.tokens, found.logprobs, found.finish_reason, text, score=found.score
            )
        best = request.completions.get(0, Completion([], [], "stop"))
        self._answer(request)
        if not best.tokens:
            return [Event(request.name, 0, None, 0.0, best.text, best.finish_reason)]
        events = [Event(request.name, 0, *one, "", None) for one in zip(best.tokens, best.logprobs, strict=True)]
        return [*events[:-1], events[-1]._replace(text=best.text, finish_reason=best.finish_reason)]

    # Endings.

    def _drop(self, one: Sample, *, keep: bool = True) -> None:
        """A sequence leaves scheduler, ledger, drafter and request."""
        if one.state != "gone":
            self.scheduler.remove(one, keep=keep)
        if self.drafter is not None:
            self.drafter.forget(one)
        one.request.samples.remove(one)

    @staticmethod
    def _completion(one: Sample, reason: FinishReason) -> Completion:
        """What a sequence has said until now."""
        text = ""
        if one.transcript is not None:
            one.transcript.finish()
            text = one.transcript.text
        return Completion(one.answer, one.logprobs, reason, text, one.alternatives)

    def _finish(self, one: Sample, reason: FinishReason) -> None:
        """A sequence has its completion; the last one of a request makes the answer."""
        request = one.request
        self._drop(one)
        request.completions[one.index] = self._completion(one, reason)
        if not request.samples:
            if reason == "cancelled":  # samples that were never started
                for index in range(request.sampling.num_samples):
                    request.completions.setdefault(index, Completion([], [], reason))
            self._answer(request)

    def _fail(self, one: Sample, reason: str) -> list[Event]:
        """A request ends in error; what its sequences published and nobody else uses is withdrawn."""
        event = self._end_in_error(one.request, one.index, reason)
        for other in one.request.samples[:]:
            self._drop(other, keep=False)
        return [event]

    def _end_in_error(self, request: Request, index: int, reason: str) -> Event:
        """The answer of a request that failed: what its sequences have said until now. They are the caller's to drop."""
        self.stats.failed += 1
        if request.name in self._beams:
            group = self._beams[request.name]
            group.end("error")
            request.completions = dict(enumerate(group.finished))
        for one in request.samples:
            request.completions.setdefault(one.index, self._completion(one, "error"))
        self._answer(request, reason)
        return Event(request.name, index, None, float("nan"), "", "error", reason)

    def _fail_at(self, one: Sample, start: int, count: int) -> list[Event]:
        """Fails a sequence of which `count` tokens from `start` on came out wrong."""
        computed = f"[{start}, {start + count})"
        return self._fail(one, f"logits or states at tokens {computed} are not finite")

    def _answer(self, request: Request, error: str | None = None) -> None:
        completions = [request.completions[index] for index in sorted(request.completions)]
        self.answers[request.name] = Answer(request.name, request.prompt, completions, error)
        self._beams.pop(request.name, None)
        del self.requests[request.name]
