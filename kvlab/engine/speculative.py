"""Drafting: guesses of the next tokens, which one step of the model then checks together (arXiv 2211.17192).

A draft is accepted where it equals the token that the model's own sampler draws at that position, so speculation
changes no token, greedy or random: see `sampling`. Drafts that are certain (prompt lookup) are accepted as often as by
the rejection rule of the paper. A draft model draws with the same noise. Its drafts are accepted with probability at
least (1 - d) / (1 + d), d being the total variation distance; the paper's rule has 1 - d (arXiv 2408.07978)."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from kvlab.engine.config import EngineConfig
from kvlab.engine.entries import Entry
from kvlab.engine.requests import Sample
from kvlab.engine.sampling import Choices, Mode, draw
from kvlab.engine.shapes import Buckets
from kvlab.engine.step import MemoryStep, Pools
from kvlab.ledger.plan import ClassPlan, Plan
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.models.model import Model
from kvlab.models.transformer import logits_at
from kvlab.programs import LET_GO, program
from kvlab.schema import ConfigError
from kvlab.typing import Params, Tokens


class Drafter(abc.ABC):
    """Proposes tokens for sequences that decode."""

    num_drafts: int
    """The most tokens proposed for one sequence."""

    @abc.abstractmethod
    def propose(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Up to `num_drafts` tokens to follow each sequence's known ones; none where there is no guess."""

    def forget(self, sample: Sample) -> None:  # noqa: B027  most keep nothing
        """A sequence ended, or left the device for a while."""


class NgramDrafter(Drafter):
    """Prompt lookup: what followed the last occurrence of the sequence's last tokens, the longest match first."""

    def __init__(self, num_drafts: int, max_ngram: int = 3):
        self.num_drafts, self.max_ngram = num_drafts, max_ngram
        self._seen: dict[Sample, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, samples: Sequence[Sample]) -> list[list[int]]:
        return [self._propose(sample) for sample in samples]

    def forget(self, sample: Sample) -> None:
        self._seen.pop(sample, None)

    def _propose(self, sample: Sample) -> list[int]:
        ids = sample.ids
        done, ends = self._seen.get(sample, (0, {}))
        for end in range(done + 1, len(ids)):  # n-grams that something follows
            for length in range(1, min(self.max_ngram, end) + 1):
                ends[tuple(ids[end - length : end])] = end
        self._seen[sample] = max(done, len(ids) - 1), ends
        for length in range(min(self.max_ngram, len(ids) - 1), 0, -1):
            end = ends.get(tuple(ids[-length:]))
            if end is not None:
                return ids[end : end + self.num_drafts]
        return []


@dataclass(frozen=True)
class _DraftStep:
    """Several tokens of the draft model in one program."""

    step: MemoryStep
    num_drafts: int

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, step: MemoryStep, num_drafts: int) -> "_DraftStep":
        """The same one for all who ask for the same: drafters made anew compile nothing anew."""
        return cls(step, num_drafts)

    @program(static_argnames="mode", donate_argnums=1)
    def __call__(
        self, params: Params, pools: Pools, plan: Plan, tokens: Tokens, choices: Choices, *, mode: Mode
    ) -> tuple[Array, Pools]:
        """Drafts [B, num_drafts] behind tokens [B, T]; the plan counts all of them but the last draft, whose state
        nobody needs."""
        known = jnp.maximum(jnp.asarray(plan.counts) - (self.num_drafts - 1), 0)
        starts, rest = jnp.asarray(plan.starts), self.num_drafts - 1

        def guess(pools: Pools, starts: Array, counts: Array, fed: Array, offset: Array | None) -> tuple[Pools, Array]:
            classes = tuple(
                _columns(planned, state.spec.per_token, offset, fed.shape[1])
                for planned, state in zip(plan.classes, self.step.layout.classes, strict=True)
            )
            now = plan._replace(starts=starts, counts=counts, classes=classes)
            model, hidden, pools = self.step.forward(params, pools, now, fed)
            logits = logits_at(model, hidden, jnp.maximum(counts - 1, 0)[:, None])
            return pools, draw(logits, (starts + counts)[:, None], choices, None, mode).tokens

        def follow(carry: tuple[Pools, Array], index: Array) -> tuple[tuple[Pools, Array], Array]:
            pools, fed = carry
            pools, drawn = guess(pools, starts + known + index, jnp.minimum(known, 1), fed, known + index)
            return (pools, drawn), drawn

        pools, first = guess(pools, starts, known, tokens[:, : tokens.shape[1] - rest], None)
        (pools, _), others = jax.lax.scan(follow, (pools, first), jnp.arange(rest, dtype=jnp.int32))
        return jnp.concatenate([first, others[:, :, 0].T], axis=1), pools


LET_GO.append(_DraftStep.of.cache_clear)


def _columns(plan: ClassPlan, per_token: bool, offset: Array | None, width: int) -> ClassPlan:
    """A class's plan for `width` tokens of the whole, from each row's offset on (None: the first). Slots of later
    tokens may be among them: what is written there too early is written again. A recurrent state is read where it was
    written last."""
    slots = jnp.asarray(plan.write_slots)
    if offset is None:
        return plan._replace(write_slots=slots[:, :width]) if per_token else plan
    starts = jnp.asarray(plan.starts) + offset
    if not per_token:
        return plan._replace(pages=slots, starts=starts)
    column = jnp.clip(offset, 0, slots.shape[1] - 1)[:, None]
    return plan._replace(write_slots=jnp.take_along_axis(slots, column, axis=1), starts=starts)


class ModelDrafter(Drafter):
    """A smaller model with a memory of its own, which guesses with the same noise as the sampler of the large one."""

    def __init__(
        self,
        model: Model,
        memory: MemoryConfig,
        *,
        num_drafts: int,
        max_sequences: int,
        max_len: int,
        buckets: Buckets,
    ):
        self.num_drafts, self.params, self.buckets = num_drafts, model.params, buckets
        layout = MemoryLayout.of(
            model.states,
            # A guess costs nothing but time where it is wrong: a drafter reads all that it stores.
            replace(memory, chunk_len=max(memory.chunk_len, 2 * num_drafts), selection=None),
            max_sequences=max_sequences,
            max_len=max_len + num_drafts,
            spare_states=max_sequences,  # a step that may be rejected writes beside what it reads
        )
        self.step, self.ledger, self.pools = MemoryStep.of(model.structure, layout), layout.ledger(), layout.allocate()
        self._draft_step = _DraftStep.of(self.step, num_drafts)
        self._in_flight: dict[Sample, tuple[int, list[int]]] = {}
        """Of the last round: known tokens when it began, and the drafts."""

    def propose(self, samples: Sequence[Sample]) -> list[list[int]]:
        again = {sample: guess for sample in samples if (guess := self._unanswered(sample)) is not None}
        asked, samples = samples, [sample for sample in samples if sample not in again]
        for sample in samples:
            self._settle(sample)
        longest = self.ledger.chunk_len - (self.num_drafts - 1)
        while behind := [sample for sample in samples if self._pending(sample) > longest]:
            self._prefill(behind)
        ready = [
            sample
            for sample in samples
            if self.ledger.reserve(sample, self._pending(sample), self.num_drafts - 1).ready
        ]
        proposed = self._draft(ready) if ready else {}
        self._in_flight |= {sample: (len(sample.ids), guess) for sample, guess in proposed.items()}
        return [(again | proposed).get(sample, []) for sample in asked]

    def _unanswered(self, sample: Sample) -> list[int] | None:
        """The last guess, where the large model has said nothing since."""
        known, guess = self._in_flight.get(sample, (0, []))
        return guess if known == len(sample.ids) else None

    def forget(self, sample: Sample) -> None:
        self._in_flight.pop(sample, None)
        if sample in self.ledger.running:
            self.ledger.release(sample)

    def _pending(self, sample: Sample) -> int:
        return len(sample.ids) - (self.ledger.length(sample) if sample in self.ledger.running else 0)

    def _settle(self, sample: Sample) -> None:
        """Keeps of the last round what the large model accepted."""
        if (last := self._in_flight.pop(sample, None)) is None:
            return
        known, guess = last
        fed, said = guess[: self.num_drafts - 1], sample.ids[known : known + self.num_drafts - 1]
        matched = next((i for i, pair in enumerate(zip(fed, said, strict=False)) if pair[0] != pair[1]), len(said))
        matched = min(
            matched, len(sample.ids) - known - 1
        )  # the last known token is always fed again: a guess follows it
        count = known - self.ledger.length(sample)
        rolls_back = all(state.spec.per_token for state in self.step.layout.classes)
        self.ledger.commit(sample, count + matched if rolls_back or matched == len(fed) else 0)

    def _prefill(self, rows: Sequence[Sample]) -> None:
        """The next chunk of sequences of which the drafter knows too little to guess."""
        chunk_len = self.ledger.chunk_len
        counts = [min(chunk_len, self._pending(sample) - 1) for sample in rows]
        tokens, plan = self._planned(rows, counts, chunk_len, reserve=True)
        _, self.pools = self.step(self.params, self.pools, plan, jnp.asarray(tokens))
        for sample, count in zip(rows, counts, strict=True):
            self.ledger.commit(sample, count)

    def _draft(self, rows: Sequence[Sample]) -> dict[Sample, list[int]]:
        """Drafts behind all that is known of sequences with a reservation."""
        counts, lookahead = [self._pending(sample) for sample in rows], self.num_drafts - 1
        width = self.buckets.width_for(max(counts), self.ledger.chunk_len - lookahead)
        tokens, plan = self._planned(rows, counts, width + lookahead, reserve=False)
        asked = [(sample.request.sampling, sample.request.seed, sample.index) for sample in rows]
        mode = Mode.of([sampling for sampling, _, _ in asked])._replace(num_logprobs=0, penalty=False)
        choices = Choices.of(asked, len(tokens))
        drafts, self.pools = self._draft_step(self.params, self.pools, plan, jnp.asarray(tokens), choices, mode=mode)
        return dict(zip(rows, np.asarray(drafts).tolist(), strict=False))

    def _planned(
        self, rows: Sequence[Sample], counts: Sequence[int], width: int, *, reserve: bool
    ) -> tuple[npt.NDArray[np.int32], Plan]:
        """The tokens and the plan of a step of these rows."""
        num_rows = self.buckets.rows_for(len(rows), self.step.layout.max_sequences)
        tokens = np.zeros((num_rows, width), np.int32)
        for row, (sample, count) in enumerate(zip(rows, counts, strict=True)):
            if reserve and not (answer := self.ledger.reserve(sample, count)).ready:
                raise RuntimeError(f"a drafter's pool has room for every sequence: {answer}")
            start = self.ledger.length(sample)
            tokens[row, :count] = sample.ids[start : start + count]
        plan, self.pools = self.step.copied(self.pools, self.ledger.plan(rows, *tokens.shape))
        return tokens, plan


class Speculation:
    """Who is asked for guesses before each step, and of whom the drafter still knows. Without a drafter, nobody is."""

    def __init__(self, make_drafter: Callable[[], Drafter | None]):
        self._make_drafter = make_drafter
        self.drafter = make_drafter()
        self._known: set[Sample] = set()
        """Sequences that the drafter may hold memory of."""

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        memory: MemoryConfig,
        draft: Model | None,
        vocab_size: int,
    ) -> "Speculation":
        """What a configuration asks for. Raises ConfigError for a draft model where none is asked for, none where one
        is, and one of another vocabulary."""
        if (draft is not None) != (config.speculation == "draft"):
            raise ConfigError("speculation", config.speculation, 'must be "draft" with a draft model, and only then')
        if draft is None:
            return cls(lambda: NgramDrafter(config.num_drafts) if config.speculation == "ngram" else None)
        if draft.vocab_size != vocab_size:
            raise ConfigError(
                "draft", f"vocabulary of {draft.vocab_size}", f"must have the model's {vocab_size} tokens"
            )
        return cls(
            lambda: ModelDrafter(
                draft,
                memory,
                num_drafts=config.num_drafts,
                max_sequences=config.max_batch,
                max_len=config.max_len,
                buckets=config.buckets,
            )
        )

    def start_over(self) -> None:
        """A drafter made anew."""
        self.drafter, self._known = self._make_drafter(), set()

    def forget(self, sample: Sample) -> None:
        """A sequence ended."""
        if self.drafter is not None:
            self.drafter.forget(sample)

    def ask(self, running: Sequence[Entry]) -> None:
        """Guesses for the sequences that decode next."""
        if self.drafter is None:
            return
        samples = [entry for entry in running if isinstance(entry, Sample)]
        for sample in self._known.difference(samples):
            self.drafter.forget(sample)
        asked = []
        for sample in samples:
            sample.draft_ids, sample.drafts = [], 0
            room = sample.final_len - sample.num_known
            plain = sample.seen is None and not sample.request.sampling.beam_width and sample.hold is None
            # What a recurrent state rejected is fed again before it guesses anew.
            if plain and room > 0 and sample.decodes:
                asked.append((sample, room))
        self._known = {sample for sample, _ in asked} | self._known.intersection(samples)
        for (sample, room), guess in zip(asked, self.drafter.propose([sample for sample, _ in asked]), strict=True):
            sample.draft_ids = guess[:room]
            sample.drafts = len(sample.draft_ids)
