"""The ways in which an engine may run the same requests: none of them changes a token."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from tests.engine.families import MAX_LEN, VOCAB, pretrained
from tests.weights.random_checkpoint import prompt

PROMPTS = [prompt(n, VOCAB) for n in (5, 17, 33, 40)]
WAYS: dict[str, dict[str, Any]] = {
    "preempted": {"pool_len": MAX_LEN},
    "swapped": {"pool_len": MAX_LEN, "preemption": "swap", "host_len": 300},
    "budget of 3": {"token_budget": 3},
    "no cache": {"prefix_cache": False},
    "prompts first": {"mixed": False},
    "looked up": {"speculation": "ngram", "num_drafts": 2},
    "chunks of 5": {"chunk_len": 5},
    "page 7": {"page_size": 7},
    "one by one": {"max_batch": 1},
}
"""Fields of an engine, and of its memory. Where the pool is short, somebody must make room."""
EVERYWHERE = ("preempted", "swapped", "budget of 3", "no cache", "looked up")
"""Ways of every memory, whatever it does at the end of a page or a chunk."""


def answers(engine: Engine, samplings: Sampling | Sequence[Sampling], way: str) -> list[list[int]]:
    """The tokens that each of PROMPTS is answered, asked in an order that belongs to the way."""
    order = random.Random(way).sample(range(len(PROMPTS)), len(PROMPTS))
    asked = samplings if isinstance(samplings, Sampling) else [samplings[i] for i in order]
    found = engine.generate([PROMPTS[i] for i in order], asked)
    by_prompt = dict(zip(order, (answer.tokens for answer in found), strict=True))
    return [by_prompt[i] for i in range(len(PROMPTS))]


class ByHand(NamedTuple):
    """Greedy decoding without an engine: the prompt with its answer, the logits that were seen behind each token, and
    the session."""

    tokens: list[int]
    seen: dict[int, np.ndarray]
    session: Session

    def check(self, **events: Any) -> MaskCheck:
        """Every logit compared with the parallel form, under what happened to the memory, or these `events`."""
        model, session = pretrained("llama_gqa").model, self.session
        check = MaskCheck(model.structure, model.params, session.layout)
        check.compare(np.array([self.tokens], np.int32), self.seen, session.events._replace(**events))
        return check


def forced(memory: MemoryConfig, ids: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """The logits [1, vocab] behind a prompt and the tokens of an answer, read one by one."""
    session = session_of(memory, len(ids))
    for start in range(0, len(ids), memory.chunk_len):
        chunk = ids[start : start + memory.chunk_len]
        logits = session.advance({0: chunk}, memory.chunk_len)[:, len(chunk) - 1]
    for token in tokens:
        logits = session.advance({0: [token]}, 1)[:, 0]
    return np.asarray(logits)


def session_of(memory: MemoryConfig, prompt_len: int) -> Session:
    """One sequence, whose freed pages hold NaN."""
    model = pretrained("llama_gqa").model
    layout = MemoryLayout.of(model.states, memory, max_sequences=1, max_len=MAX_LEN)
    session = Session(MemoryStep.of(model.structure, layout), model.params, poisons=True, observes=True)
    session.prompt_len = prompt_len
    return session


def by_hand(memory: MemoryConfig, ids: Sequence[int], num_new: int = 20) -> ByHand:
    """`num_new` tokens behind a prompt, which is read in chunks of the memory's length."""
    session, chunk_len = session_of(memory, len(ids)), memory.chunk_len
    tokens, seen = list(ids), {}
    for start in range(0, len(ids), chunk_len):
        chunk = ids[start : start + chunk_len]
        logits = session.advance({0: chunk}, chunk_len)[:, len(chunk) - 1]
    for _ in range(num_new):
        tokens.append(int(np.asarray(logits)[0].argmax()))
        seen[len(tokens) - 2] = np.asarray(logits)
        logits = session.advance({0: tokens[-1:]}, 1)[:, 0]
    return ByHand(tokens, seen, session)
