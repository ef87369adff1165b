"""Token for token what `transformers` generates, over every family and every way to run it."""

import itertools
import json
import os
import random
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from tests.engine.families import (
    FAMILIES,
    FIRST,
    GOLDEN,
    LATER,
    MAX_LEN,
    NUM_NEW,
    VOCAB,
    Oracle,
    engine_of,
    golden,
    pretrained,
)
from tests.weights.random_checkpoint import prompt

AXES = {
    "family": FIRST,
    "page_size": (1, 4, 16),
    "chunk_len": (1, 7, 32, MAX_LEN),
    "pool": ("ample", "tight", "swapped", "minimal"),
    "sharing": (True, False),
    "speculation": ("none", "ngram", "oracle"),
}


def pairwise() -> list[dict]:
    """Cases in which every two values of different axes meet, chosen greedily, always the same."""
    rng, names = random.Random(0), list(AXES)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x, y in itertools.product(AXES[a], AXES[b])
    }
    cases = []
    while missing:
        candidates = [{name: rng.choice(AXES[name]) for name in names} for _ in range(200)]
        a, x, b, y = min(missing, key=repr)
        candidates = [case | {a: x, b: y} for case in candidates]
        covers = [{(a, c[a], b, c[b]) for a, b in itertools.combinations(names, 2)} & missing for c in candidates]
        best = max(range(len(candidates)), key=lambda i: len(covers[i]))
        missing -= covers[best]
        cases.append(candidates[best])
    return cases


def build(case: dict) -> Engine:
    """The engine of a case: an ample pool never preempts, a tight one must, a minimal one holds one sequence."""
    pools = {
        "ample": {},
        "tight": {"pool_len": 128},
        "swapped": {"pool_len": 128, "preemption": "swap", "host_len": 4 * MAX_LEN},
        "minimal": {"pool_len": MAX_LEN},
    }
    speculation = "none" if case["speculation"] == "none" else "ngram"
    engine = engine_of(
        case["family"],
        page_size=case["page_size"],
        chunk_len=case["chunk_len"],
        prefix_cache=case["sharing"],
        speculation=speculation,
        num_drafts=3,
        max_batch=2,
        **pools[case["pool"]],
    )
    if case["speculation"] == "oracle":
        answers = golden(case["family"])["answers"]
        engine.speculation.drafter = Oracle(
            {tuple(prompt(int(n), VOCAB)): answer["tokens"] for n, answer in answers.items()}, 3
        )
    return engine


def lengths_of(number: int) -> list[str]:
    """Five prompt lengths of those that have answers, others for every case, two long ones side by side."""
    every = list(golden("llama_gqa")["answers"])
    return [*(every[(number + 3 * i) % len(every)] for i in range(3)), every[-1 - number % 5], every[-2 - number % 5]]


def assert_exact(engine: Engine, family: str, lengths: list[str]) -> None:
    expected = [golden(family)["answers"][n] for n in lengths]
    found = engine.generate([prompt(int(n), VOCAB) for n in lengths], Sampling(max_tokens=NUM_NEW))
    for n, want, got in zip(lengths, expected, found, strict=True):
        assert got.tokens == want["tokens"], f"prompt of {n}"
        np.testing.assert_allclose(got.completions[0].logprobs, want["logprobs"], atol=1e-4)
    assert not engine.ledger.sequences
    assert not engine.ledger.suspended


def marked(cases: list[dict]) -> list:
    """Slow: a case whose only new pairs are those of its family with something."""
    met: set[tuple] = set()
    params = []
    for number, case in enumerate(cases):
        pairs = {*itertools.combinations([axis for axis in case.items() if axis[0] != "family"], 2)}
        name = "-".join(str(value) for value in case.values())
        params.append(pytest.param(number, case, id=name, marks=pytest.mark.slow if pairs <= met else ()))
        met |= pairs
    return params


WAYS = (
    (4, 1, "tight", True, "none"),
    (16, 32, "swapped", False, "oracle"),
    (1, MAX_LEN, "ample", True, "ngram"),
    (4, 7, "minimal", False, "none"),
)
"""How a later family is run: every value of every axis. The first two have rows in `tests/tiers.py`."""


def later() -> list:
    """The cases of the later families."""
    params = []
    for family, (number, way) in itertools.product(LATER, enumerate(WAYS)):
        case = dict(zip(AXES, (family, *way), strict=True))
        name, marks = "-".join(map(str, case.values())), pytest.mark.slow if number > 1 else ()
        params.append(pytest.param(number, case, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("number", "case"), [*marked(pairwise()), *later()])
def test_every_way_gives_the_reference_tokens(number, case):
    engine = build(case)
    assert_exact(engine, case["family"], lengths_of(number))
    if case["pool"] in ("tight", "swapped") and case["family"] not in ("mistral", "mamba2"):  # these hold less
        assert engine.scheduler.counters.preempted
    if case["speculation"] == "oracle" and case["chunk_len"] > 1:
        assert engine.stats.accepted_tokens
        assert engine.stats.accepted_tokens < engine.stats.drafted_tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", AXES["page_size"])
@pytest.mark.parametrize("chunk_len", AXES["chunk_len"])
def test_every_combination(family, page_size, chunk_len):
    rest = [name for name in AXES if name not in ("family", "page_size", "chunk_len")]
    for number, values in enumerate(itertools.product(*(AXES[name] for name in rest))):
        case = {
            "family": family,
            "page_size": page_size,
            "chunk_len": chunk_len,
            **dict(zip(rest, values, strict=True)),
        }
        assert_exact(build(case), family, lengths_of(number))


YARN = ("qwen3_yarn", "deepseek_v3_yarn")
EXPERTS = ("qwen3_next_experts", "qwen3_next_some_experts", "deepseek_v3_experts")


@pytest.mark.parametrize(
    "family", [*LATER, "granitemoehybrid_rope", "olmo_hybrid_rope", "kimi_linear_compressed", *YARN, *EXPERTS]
)
def test_a_full_pass_gives_the_reference_probabilities(family):
    """The parallel form on the longest prompt and its answer, where the engine and the reference decode from a
    cache."""
    model = pretrained(family).model.merge()
    length, answer = list(golden(family)["answers"].items())[-1]
    tokens = [*prompt(int(length), VOCAB), *answer["tokens"]]
    logits = jax.jit(lambda ids: model.logits(model.parallel(ids)))(jnp.asarray([tokens], jnp.int32))
    logits = logits[0, int(length) - 1 : -1]
    assert np.argmax(logits, axis=-1).tolist() == answer["tokens"]
    found = jax.nn.log_softmax(logits)[np.arange(NUM_NEW), np.asarray(answer["tokens"])]
    np.testing.assert_allclose(found, answer["logprobs"], atol=1e-4)


@pytest.mark.parametrize("family", YARN)
def test_a_context_stretched_by_yarn(family):
    engine = engine_of(family, page_size=4, chunk_len=7, max_batch=2)
    assert_exact(engine, family, lengths_of(1))


@pytest.mark.parametrize("family", EXPERTS)
def test_layers_of_experts(family):
    """All, all but one in the middle, and all behind the first."""
    engine = engine_of(family, page_size=4, chunk_len=7, max_batch=2)
    assert_exact(engine, family, lengths_of(1))


def test_latent_attention_with_queries_as_they_are():
    """No layer compresses its queries; and frequencies are stretched."""
    engine = engine_of("deepseek_v3_plain", page_size=4, chunk_len=7, max_batch=2)
    assert_exact(engine, "deepseek_v3_plain", lengths_of(1))


def test_the_answers_are_not_trivial():
    for family in FAMILIES:
        for answer in golden(family)["answers"].values():
            assert len(set(answer["tokens"])) >= 20


@pytest.mark.parametrize("family", ["llama_gqa", "mistral", "mamba2"])
def test_a_cache_that_is_off_by_one_page_fails(family):
    """The same assertion, on a memory whose steps read the neighbour of every sequence's newest page (or of its
    state)."""
    engine = engine_of(family, page_size=4, chunk_len=16)
    plan = engine.ledger.plan

    def broken(names, rows, width):
        made = plan(names, rows, width)
        for planned in made.classes:
            for row, name in enumerate(names):
                if made.starts[row] > 4:
                    pages = engine.ledger.running[name].holdings[0].pages
                    at = np.flatnonzero(planned.pages[row] == pages[max(pages)])
                    planned.pages[row, at] = (planned.pages[row, at] + 1) % engine.ledger.classes[0].num_pages
        return made

    engine.ledger.plan = broken
    with pytest.raises(AssertionError):
        assert_exact(engine, family, ["17", "33"])


def test_beams_are_those_of_the_reference():
    """Scores, too: transformers divides by length ** length_penalty, as here."""
    for fields in ({}, {"pool_len": MAX_LEN, "page_size": 1, "prefix_cache": False}):
        engine = engine_of("llama_gqa", **fields)
        for place, expected in golden("llama_gqa")["beams"].items():
            length, beams = (int(number) for number in place.split("/"))
            sampling = Sampling(max_tokens=NUM_NEW, beam_width=beams)
            (answer,) = engine.generate([prompt(length, VOCAB)], sampling)
            assert answer.tokens == expected["tokens"], f"{place} with {fields}"
            assert answer.completions[0].score == pytest.approx(expected["score"], abs=1e-4)
            assert len(answer.completions) == beams
            scores = [completion.score for completion in answer.completions]
            assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_the_golden_files_are_what_the_reference_says_today(tmp_path):
    """Needs `make peers`."""
    root = Path(__file__).parents[2]
    python = root / ".peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("transformers' environment is missing: make peers")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, GOLDEN / "make.py", tmp_path], check=True, env=environment, timeout=600)
    for path in sorted(tmp_path.glob("*.json")):
        fresh, kept = json.loads(path.read_text()), json.loads((GOLDEN / path.name).read_text())
        assert {n: answer["tokens"] for n, answer in fresh["answers"].items()} == {
            n: answer["tokens"] for n, answer in kept["answers"].items()
        }
        for n, answer in fresh["answers"].items():
            # The peer itself differs by 1.1e-5 between two processors; ours must be within 1e-4.
            np.testing.assert_allclose(answer["logprobs"], kept["answers"][n]["logprobs"], atol=5e-5)
