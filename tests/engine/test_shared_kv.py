"""The engine over layers that read another's keys and values: the same answers however it runs, in half the bytes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.memory.layout import MemoryConfig
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.model import Model
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer
from tests.engine.families import VOCAB, checked, config_of
from tests.engine.ways import WAYS
from tests.weights.random_checkpoint import prompt

NUM_NEW, MAX_LEN = 16, 64
PROMPTS = [prompt(n, VOCAB) for n in (5, 17, 33)]
PROMPTS.append(PROMPTS[2][:21] + PROMPTS[1])
"""The last shares pages with the one before it."""


@cache
def model():
    """Four layers in pairs, of which the second one reads."""
    own = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    layers = [LayerConfig("attention", replace(own, shares_kv=shares)) for shares in (False, True)] * 2
    config = ModelConfig(model_dim=16, tie_embeddings=False)
    built = Model.of(Transformer(layers, config, VOCAB, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), built.params)
    return Model(built.structure, moved)


def engine_of(*, chunk_len=8, page_size=4, **fields):
    memory, config = MemoryConfig("paged", page_size, chunk_len), config_of(chunk_len, max_len=MAX_LEN, **fields)
    return checked(Engine(model(), memory=memory, config=config))


@cache
def answers():
    """Greedy, of the parallel form: no memory, no engine."""
    complete, found = model().merge(), []
    forward = jax.jit(lambda tokens: complete.logits(complete.parallel(tokens)))
    for ids in PROMPTS:
        known = np.zeros((1, MAX_LEN), np.int32)
        known[0, : len(ids)] = ids
        for place in range(len(ids), len(ids) + NUM_NEW):
            known[0, place] = int(np.asarray(forward(jnp.asarray(known)))[0, place - 1].argmax())
        found.append(known[0, len(ids) : len(ids) + NUM_NEW].tolist())
    return found


@pytest.mark.parametrize("way", ["plain", "preempted", "swapped", "looked up", "chunks of 5"])
def test_the_way_it_runs_changes_no_token(way):
    engine = engine_of(**WAYS.get(way, {}) | ({"pool_len": MAX_LEN} if way in ("preempted", "swapped") else {}))
    found = engine.generate(PROMPTS, Sampling(max_tokens=NUM_NEW))
    assert [answer.tokens for answer in found] == answers()
    if way in ("preempted", "swapped"):
        assert engine.scheduler.counters.preempted
    if way == "plain":
        again = engine.generate(PROMPTS[2:3], Sampling(max_tokens=NUM_NEW))
        assert again[0].tokens == answers()[2]
        assert engine.ledger.counters.hit_tokens >= 32 - 4, "the prompt's pages were found again"


def test_samples_are_forks_of_one_prompt():
    engine = engine_of()
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=11, num_samples=3)
    (together,) = engine.generate([PROMPTS[2]], sampling)
    assert len({tuple(completion.tokens) for completion in together.completions}) > 1
    assert engine.stats.prefilled_tokens == len(PROMPTS[2]) - 1 + 3, "the prompt was computed once"
    (alone,) = engine_of().generate([PROMPTS[2]], Sampling(max_tokens=8, temperature=1.0, seed=11))
    assert alone.tokens == together.tokens
