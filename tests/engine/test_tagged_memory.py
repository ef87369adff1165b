"""Tagged memory: values are one-hot tags and all scores are equal, so attention's output shows exactly what it read.

A tag stands for the whole history of token ids up to its position. The same random operations as the ledger's own tests
run here through the device's arrays: paged writes, copies of shared pages, attention over the page table, recurrent
slots."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.ledger.answers import Ready
from kvlab.ledger.plan import load_plans, save_plans
from kvlab.ledger.states import ArraySpec, RecurrentState, TokenState
from kvlab.memory import pools as device
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.memory.views import view_of
from kvlab.memory.views.slots import StateSlots
from pallas_kernels.visible import Visible
from tests.contracts import VOCAB, build, parallel_logits, poisoned_session
from tests.ledger import shadows
from tests.ledger.exerciser import Exerciser
from tests.ledger.shadows import CHUNK_LEN
from tests.ledger.test_states import visible_by_mask

NUM_TAGS = 2048
FULL = TokenState(1, 1, NUM_TAGS)
WINDOWED = TokenState(1, 1, NUM_TAGS, visible=Visible(window=5, num_sinks=2))
STATE = RecurrentState((ArraySpec("tag", (1,), "float32"),))
MODELS = {"full": (FULL,), "window": (WINDOWED,), "hybrid": (FULL, WINDOWED, STATE)}


def _poisoned(state):
    pool = view_of(state.spec, "paged").allocate(state.spec, state.num_pages, state.page_size)
    return device.poisoned(pool, float("nan"), has_null_page=state.has_null_page)


@jax.jit
def _copy(pools, copies):
    return [device.copy_pages(pool, pairs[:, 0], pairs[:, 1]) for pool, pairs in zip(pools, copies, strict=True)]


def _step_of(classes):
    @jax.jit
    def step(pools, plan, values, tag):
        starts, counts = jnp.asarray(plan.starts), jnp.asarray(plan.counts)
        positions = starts[:, None] + jnp.arange(CHUNK_LEN, dtype=jnp.int32)[None, :]
        zeros = jnp.zeros((2, CHUNK_LEN, 1, 1), jnp.float32)
        after, reads = [], []
        for state, pool, class_step in zip(classes, pools, plan.classes, strict=True):
            view = view_of(state.spec, "paged").of(state.spec, pool, class_step, starts, counts)
            if isinstance(view, StateSlots):
                reads.append(view.read()["tag"])
                view = view.write({"tag": tag})
            else:
                view = view.append(keys=zeros, values=values)
                reads.append(view.attend(zeros, positions)[0])
            after.append(view.pool)
        return after, reads

    return step


class TaggedDevice(Exerciser):
    """The exerciser with arrays behind its plans."""

    def __init__(self, draw, steps):
        super().__init__(draw, thorough=False)
        key = tuple(self.ledger.classes)
        self.step_on_device = steps.setdefault(key, _step_of(key))
        self.arrays = [_poisoned(state) for state in self.ledger.classes]
        self.known: dict[tuple, int] = {}

    def tag(self, history: tuple) -> int:
        """A number for a history, the same every time."""
        return self.known.setdefault(history, len(self.known))

    def _run(self, name):
        shadow = self.live[name]
        plan = self.ledger.plan([name], 2, CHUNK_LEN)
        history, start = tuple(shadow.ids + shadow.drafts), len(shadow.ids)
        if plan.has_copies:
            padded = []
            for state, step in zip(self.ledger.classes, plan.classes, strict=True):
                rows = np.full((4, 2), [0, state.num_pages], np.int32)
                rows[: len(step.copies)] = step.copies
                padded.append(jnp.asarray(rows))
            self.arrays = _copy(self.arrays, padded)
        values = np.zeros((2, CHUNK_LEN, 1, NUM_TAGS), np.float32)
        for n in range(start, len(history)):
            values[0, n - start, 0, self.tag(history[: n + 1])] = 1
        final = np.full((2, 1), self.tag(history), np.float32)
        self.arrays, reads = self.step_on_device(self.arrays, plan.without_copies(), values, final)
        for state, read in zip(self.ledger.classes, reads, strict=True):
            if not state.spec.per_token:
                assert float(read[0, 0]) == (self.tag(history[:start]) if start else 0), "a state of another history"
                continue
            seen = np.asarray(read)[0, :, 0]
            for n in range(start, len(history)):
                expected = {self.tag(history[: p + 1]) for p in {*visible_by_mask(state.spec, n), n}}
                assert set(np.flatnonzero(seen[n - start]).tolist()) == expected, "attention read another history"

    def swap_out(self):
        """Not here: host copies are plain arrays, which `Exerciser` tags."""

    swap_in = compact = swap_out

    def _choose(self, shadow):
        return {}  # compaction is the ledger's so far: no step packs anything


@pytest.mark.parametrize("model", MODELS)
def test_attention_reads_exactly_the_history(model, monkeypatch):
    steps: dict = {}
    monkeypatch.setattr(shadows, "MODELS", {model: MODELS[model]})
    copied = hits = 0
    for seed in range(12):
        # One geometry, so that each model compiles once: these draws choose the page size, policy, pool, ...
        rng = random.Random(seed)
        fixed = iter([0, 1, 0, rng.randrange(4), 1, 20, 3, 1])
        device_exerciser = TaggedDevice(
            lambda n, fixed=fixed, rng=rng: min(next(fixed, rng.randrange(n)), n - 1), steps
        )
        for _ in range(50):
            device_exerciser.step()
        copied += sum(store.copied for store in device_exerciser.ledger.stores)
        hits += device_exerciser.ledger.counters.hit_tokens
    assert hits > 0
    assert copied > 0


def _drive(session: Session, names, chunks, hits=None):
    """One step for sequences that may begin with hits; returns its plan, its tokens and each one's logits."""
    for name in names:
        assert session.ledger.reserve(name, len(chunks[name]), hit=(hits or {}).get(name)) == Ready()
    width = session.ledger.chunk_len
    tokens = np.zeros((session.layout.max_sequences, width), np.int32)
    for row, name in enumerate(names):
        tokens[row, : len(chunks[name])] = chunks[name]
    plan = session.ledger.plan(names, session.layout.max_sequences, width)
    logits, session.pools = session.step.run(session.params, session.pools, plan, tokens)
    for name in names:
        session.ledger.commit(name, len(chunks[name]))
    return plan, tokens, {name: np.asarray(logits)[row, : len(chunks[name])] for row, name in enumerate(names)}


@pytest.mark.parametrize("variant", ["gqa", "window_sinks", "mamba2", "mamba3", "hybrid", "latent"])
def test_a_hit_and_a_fork_compute_what_the_whole_prompt_would(variant):
    """Logits behind a prefix hit, and of forks that part, equal the parallel form's: in poisoned pools."""
    session = poisoned_session(variant, MemoryConfig(page_size=4, chunk_len=8), rows=3, max_len=20)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, 12).astype(np.int32)
    ends = {name: rng.integers(0, VOCAB, 3).astype(np.int32) for name in "bcd"}
    _drive(session, ["a"], {"a": prompt[:8]}, {"a": session.ledger.lookup(prompt)})
    _drive(session, ["a"], {"a": prompt[8:]})
    session.ledger.release("a")
    whole = np.concatenate([prompt, ends["b"]])
    hit = session.ledger.lookup(whole)
    assert hit.length >= 8, "a resent prompt hits on every variant"
    rest = whole[hit.length :]
    _, _, found = _drive(session, ["b"], {"b": rest}, {"b": hit})
    (expected,) = parallel_logits(variant, [whole])
    np.testing.assert_allclose(found["b"], expected[-len(rest) :], atol=2e-4, rtol=2e-4)
    session.ledger.release("b")
    _drive(session, ["c"], {"c": prompt[:7]})
    session.ledger.fork("c", "d")
    _, _, found = _drive(session, ["c", "d"], {name: ends[name] for name in "cd"})
    session.ledger.check()
    expected = parallel_logits(variant, [np.concatenate([prompt[:7], ends[name]]) for name in "cd"])
    for name, logits in zip("cd", expected, strict=True):
        np.testing.assert_allclose(found[name], logits[7:], atol=2e-4, rtol=2e-4)


def test_saved_plans_replay_a_run(tmp_path):
    """The device needs the plans and the tokens, and nothing else of the host."""
    session = poisoned_session("hybrid", MemoryConfig(page_size=4, chunk_len=4), rows=3, max_len=12)
    rng = np.random.default_rng(1)
    steps = [_drive(session, [name], {name: rng.integers(0, VOCAB, 3).astype(np.int32)}) for name in "ab"]
    session.ledger.release("b")
    session.ledger.fork("a", "c")
    tokens = [{name: rng.integers(0, VOCAB, 1).astype(np.int32) for name in "ac"} for _ in range(2)]
    steps += [_drive(session, ["a", "c"], chunks) for chunks in tokens]
    save_plans(tmp_path / "plans.npz", [plan for plan, _, _ in steps])
    _, structure, params, _ = build("hybrid")
    step, pools = MemoryStep.of(structure, session.layout), session.layout.allocate(float("nan"))
    for plan, (_, tokens, expected) in zip(load_plans(tmp_path / "plans.npz"), steps, strict=True):
        logits, pools = step.run(params, pools, plan, tokens)
        for row, name in enumerate(expected):
            np.testing.assert_array_equal(np.asarray(logits)[row, : len(expected[name])], expected[name])


def test_copied_pages_are_the_same_bits():
    layout = MemoryLayout.of([{"kv": TokenState(2, 4, 3)}], MemoryConfig(page_size=4), max_sequences=4, max_len=16)
    (state,) = layout.classes
    rng = np.random.default_rng(0)
    shapes = {name: array.shape for name, array in _poisoned(state).items()}
    pool = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    sources, destinations = jnp.array([1, 2, 0], jnp.int32), jnp.array([5, 1, state.num_pages], jnp.int32)
    copied = device.copy_pages(pool, sources, destinations)
    for name, array in pool.items():
        expected = np.asarray(array).copy()
        expected[[5, 1]] = expected[[1, 2]]  # sources are read before destinations are written
        assert np.asarray(copied[name]).tobytes() == expected.tobytes()
