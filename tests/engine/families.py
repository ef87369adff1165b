"""Small models of every family with weights drawn from names, loaded from real safetensors folders, and what
`transformers` says they answer (tests/golden/generation)."""

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.requests import Sample
from kvlab.engine.sampling import Sampling
from kvlab.engine.speculative import Drafter
from kvlab.memory.layout import MemoryConfig
from kvlab.tokenizers import Tokenizer
from kvlab.weights import Pretrained, load_checkpoint
from tests.weights.random_checkpoint import draw, prompt

GOLDEN = Path(__file__).parents[1] / "golden" / "generation"
FIRST = ("llama_gqa", "llama_mqa", "llama_mha", "llama3_rope", "qwen3", "mistral", "deepseek_v3", "mamba2")
LATER = (
    *("gemma3_text", "granitemoehybrid", "recurrent_gemma", "qwen3_next", "olmo_hybrid", "kimi_linear"),
    *("qwen2", "gemma", "gemma3n_text", "gpt_oss"),
)
"""Families that are run in the same few ways each: one more changes nothing for the others."""
FAMILIES = (*FIRST, *LATER)
VOCAB, WINDOW, NUM_NEW = 320, 24, 40
MAX_LEN = 112
PROMPTS = [prompt(n, VOCAB) for n in (1, 5, 16, 17, 33, 40)]
SAMPLED = Sampling(max_tokens=20, temperature=0.9, top_k=50, top_p=0.95, seed=3)
TIGHT = {"max_batch": 2, "chunk_len": 8, "page_size": 4, "pool_len": MAX_LEN, "host_len": 300}
"""Somebody must make room; and the ways of running that are not about shapes share their programs."""


@functools.cache
def golden(family: str) -> dict[str, Any]:
    """Config, tensor shapes and answers of a family."""
    return json.loads((GOLDEN / f"{family}.json").read_text())


def write_folder(family: str, directory: Path) -> Path:
    """The family's checkpoint as the hub would have it."""
    directory.mkdir(parents=True, exist_ok=True)
    near = golden(family).get("norms_near", 1.0)
    tensors = {name: draw(name, tuple(shape), norms_near=near) for name, shape in golden(family)["shapes"].items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(golden(family)["config"]))
    return directory


def write_byte_folder(directory: Path) -> Path:
    """A Llama whose tokens are bytes: no tokenizer belongs to it."""
    write_folder("llama_gqa", directory)
    tensors = load_file(directory / "model.safetensors")
    by_token = ("model.embed_tokens.weight", "lm_head.weight")
    save_file(tensors | {name: tensors[name][:256].copy() for name in by_token}, directory / "model.safetensors")
    config = golden("llama_gqa")["config"] | {"vocab_size": 256}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@functools.cache
def pretrained(family: str) -> Pretrained:
    """The family's model, loaded."""
    with tempfile.TemporaryDirectory() as folder:
        return load_checkpoint(write_folder(family, Path(folder)))


def config_of(chunk_len: int, **fields: Any) -> EngineConfig:
    """Few programs to compile: every batch has all its rows, and every row one token or a whole chunk."""
    fields = {"max_batch": 4, "max_len": MAX_LEN, **fields}
    return EngineConfig(**{"row_sizes": (fields["max_batch"],), "width_sizes": (chunk_len,), **fields})


def engine_of(
    family: str,
    *,
    page_size: int = 16,
    chunk_len: int = 32,
    memory: str = "paged",
    draft: str | None = None,
    tokenizer: Tokenizer | None = None,
    **fields: Any,
) -> Engine:
    """An engine whose ledger is checked after every step; `draft` is the family of its draft model."""
    model, drafting = pretrained(family), pretrained(draft) if draft else None
    engine = Engine(
        model.model,
        memory=MemoryConfig(memory, page_size, chunk_len),
        config=config_of(chunk_len, **fields),
        tokenizer=tokenizer,
        draft=drafting.model if drafting else None,
    )
    return checked(engine)


@functools.cache
def shared(family: str) -> Engine:
    """An engine of the family that is only asked for answers: what other ways to run are compared with."""
    return engine_of(family)


def checked(engine: Engine) -> Engine:
    """The same engine, checking every invariant of its ledger after each step."""
    step = engine.step

    def step_and_check():
        events = step()
        engine.ledger.check()
        return events

    engine.step = step_and_check
    return engine


class Oracle(Drafter):
    """Knows the answers and spoils some: drafts that are accepted in part, wholly and not at all."""

    def __init__(self, answers: dict[tuple[int, ...], Sequence[int]], num_drafts: int):
        self.answers, self.num_drafts = answers, num_drafts

    def propose(self, samples: Sequence[Sample]) -> list[list[int]]:
        guesses = []
        for sample in samples:
            done = len(sample.answer)
            guess = list(self.answers[tuple(sample.request.prompt)][done : done + self.num_drafts])
            spoiled = done % (self.num_drafts + 2)
            if spoiled < len(guess):
                guess[spoiled] = (guess[spoiled] + 1) % VOCAB
            guesses.append(guess)
        return guesses
