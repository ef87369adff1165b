"""Tasks after RULER (arXiv 2404.06654), made small, asked of SmolLM2 through its full cache: variable tracking, common
words and frequent words. What the full cache scores is the ceiling of every cache method; beside it are chance, and the
pass keys that are found in contexts of the same lengths.

python experiments/not_at_this_scale/ruler.py      # this part alone
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvlab.evaluation.layerwise import LayerwiseStep
from kvlab.evaluation.session import Session
from kvlab.lab.experiments import load_figure
from kvlab.lab.smollm2 import WORK, Bench, Material, with_material
from kvlab.tasks.haystack import Haystack

HERE = Path(__file__).resolve().parent
PASSKEY = "pass keys"
NUM_CHAINS, NUM_HOPS = 4, 2
"""Of variable tracking: each chain is a number, and NUM_HOPS variables behind the first that are set to the one
before."""
NUM_COMMON, NUM_RARE = 5, 40
"""Of common words: how many there are of each kind, which are read equally often together."""
NUM_FREQUENT = 3
FILLER = "The rain fell on the hills all night. The river rose. A boat went by, and nobody saw it."
NOUNS = """
apple arrow basket beach bell bird board boat bone book bottle bread bridge brush bucket butter button camera candle
carpet castle chair cheese circle clock cloud coast coffee corner cotton country cousin desert dinner doctor dragon
engine farmer father finger flower forest friend garden glass guitar hammer harbor horse island jacket kitchen ladder
letter lemon market mirror mountain needle office orange paper pencil picture planet pocket potato prince rabbit
ribbon river saddle school shadow silver sister spider station stone street summer table teacher temple ticket tiger
tower tunnel turtle valley village violin wagon window winter wizard
"""


@dataclass(frozen=True)
class Example:
    """A prompt, the words of its context that an answer could name, and those that are right."""

    prompt: str
    candidates: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def chance(self) -> float:
        """What naming as many candidates blindly scores."""
        return len(self.answer) / len(self.candidates)

    def right(self, said: str) -> float:
        """The share of the answer among the first candidates that are named, as many as are asked for."""
        named = [match.group() for match in re.finditer(r"\w+", said)]
        first = [word for word in dict.fromkeys(named) if word in self.candidates][: len(self.answer)]
        return len(set(first) & set(self.answer)) / len(self.answer)


type Make = Callable[[np.random.Generator, int], Example]
"""An example of so many repeated parts."""


def variable_tracking(rng: np.random.Generator, size: int) -> Example:
    """Chains of assignments in order, mixed with each other and with `size` fillers; which variables have a number?
    An answered question of two chains comes first."""

    def question(num_chains: int, num_fillers: int) -> tuple[str, Example]:
        names = _letters(rng, num_chains * (NUM_HOPS + 1), 5, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        chains = [names[i::num_chains] for i in range(num_chains)]
        numbers = rng.choice(np.arange(10_000, 100_000), num_chains, replace=False).tolist()
        lines = [
            [f"VAR {chain[0]} = {number}", *(f"VAR {name} = VAR {before}" for before, name in pairwise(chain))]
            for chain, number in zip(chains, numbers, strict=True)
        ]
        turns = rng.permutation(np.repeat(np.arange(num_chains), NUM_HOPS + 1))
        statements = [lines[chain].pop(0) for chain in turns]
        places = np.sort(rng.integers(0, num_fillers + 1, len(statements)))
        context = [FILLER] * num_fillers
        for place, statement in zip(places[::-1], statements[::-1], strict=True):
            context.insert(place, statement)
        asked = f"Question: Which variables have the value {numbers[0]}, directly or through another variable?"
        given = f"Answer: The {NUM_HOPS + 1} variables that have the value {numbers[0]} are:"
        said = "\n".join((*context, asked, given))
        return said, Example(said, tuple(names), tuple(chains[0]))

    shown, solved = question(2, 1)
    told = "Read the text and remember which variable is set to what.\n"
    said, asked = question(NUM_CHAINS, size)
    prompt = f"{told}{shown} {', '.join(solved.answer)}\n\n{told}{said}"
    return Example(prompt, asked.candidates, asked.answer)


def common_words(rng: np.random.Generator, size: int) -> Example:
    """A numbered list, every second word of which is one of NUM_COMMON and the others are of NUM_RARE; which are the
    common ones? An answered list of other words comes first."""
    words = rng.permutation(NOUNS.split()).tolist()

    def question(num_rare: int, num_pairs: int) -> tuple[str, list[str], list[str]]:
        common, rare = ([words.pop() for _ in range(num)] for num in (NUM_COMMON, num_rare))
        listed = [word for i in range(num_pairs) for word in (common[i % NUM_COMMON], rare[i % num_rare])]
        lines = " ".join(f"{place}. {word}" for place, word in enumerate(rng.permutation(listed), 1))
        asked = f"Question: Which {NUM_COMMON} words are the most common in the list?"
        given = f"Answer: The {NUM_COMMON} most common words in the list are:"
        return "\n".join((lines, asked, given)), common, list(dict.fromkeys(listed))

    told = "Read the numbered list, in which some words are more common than others. Remember the common ones.\n"
    shown, solved, _ = question(2 * NUM_COMMON, 2 * NUM_COMMON)
    said, answer, candidates = question(NUM_RARE, size)
    prompt = f"{told}{shown} {', '.join(solved)}\n\n{told}{said}"
    return Example(prompt, tuple(candidates), tuple(answer))


def frequent_words(rng: np.random.Generator, size: int) -> Example:
    """`size` coded words, of which the k-th most frequent has a share like 1 / k^2 and the first is dots, to be
    passed over; which are the NUM_FREQUENT most frequent?"""
    ranks = np.arange(1, size + 1)
    counts = np.floor(size * ranks**-2.0 / (ranks**-2.0).sum()).astype(int)
    counts = counts[counts > 0]
    names = _letters(rng, len(counts) - 1, 6, "abcdefghijklmnopqrstuvwxyz")
    text = rng.permutation(np.repeat(["....", *names], counts))
    told = "Read the coded text and count each coded word. Pass over the dots '....'.\n"
    asked = f"\nQuestion: Which {NUM_FREQUENT} coded words are the most frequent?"
    given = f"\nAnswer: The {NUM_FREQUENT} most frequent coded words are:"
    return Example(told + " ".join(text) + asked + given, tuple(names), tuple(names[:NUM_FREQUENT]))


TASKS: dict[str, Make] = {
    "variable tracking": variable_tracking,
    "common words": common_words,
    "frequent words": frequent_words,
}


def _letters(rng: np.random.Generator, num: int, length: int, alphabet: str) -> list[str]:
    """So many different words of letters at random."""
    found = dict[str, None]()
    while len(found) < num:
        found["".join(rng.choice(list(alphabet), length))] = None
    return list(found)


@dataclass(frozen=True)
class Sizes:
    """What is run; tests run less. A context is at most as many tokens of a prompt."""

    contexts: Sequence[int] = (512, 1024)
    num_examples: int = 8
    num_passkeys: int = 4
    batch_size: int = 4
    chunk_len: int = 128
    answer_len: int = 40
    text: str = WORK


def fitted(make: Make, encode: Callable[[str], list[int]], seed: Sequence[int], context: int) -> Example:
    """The example with as many parts as `context` tokens have room for. Raises ValueError where one part has none."""
    found = None
    for size in range(1, context):
        example = make(np.random.default_rng(seed), size)
        if len(encode(example.prompt)) > context:
            break
        found = example
    if found is None:
        raise ValueError(f"context = {context}: must have room for one part of {make.__name__}")
    return found


def answers(bench: Bench, prompts: Sequence[Sequence[int]], sizes: Sizes, context: int) -> list[list[int]]:
    """The `answer_len` tokens that follow each of at most `batch_size` prompts, the likeliest one by one, through pages
    that keep all."""
    layout = bench.laboratory.layout(context + sizes.answer_len, sizes.batch_size)
    session = Session(LayerwiseStep(bench.model.structure, layout, bench.blockwise), bench.model.params)
    said: list[list[int]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), sizes.chunk_len):
        chunks = [(row, ids[start : start + sizes.chunk_len]) for row, ids in enumerate(prompts) if len(ids) > start]
        logits = session.advance(dict(chunks), sizes.chunk_len)
        for place, (row, chunk) in enumerate(chunks):
            if start + len(chunk) == len(prompts[row]):
                said[row].append(int(np.argmax(logits[place, len(chunk) - 1])))
    while len(said[0]) < sizes.answer_len:
        logits = session.advance({row: ids[-1:] for row, ids in enumerate(said)}, 1)
        for row, chosen in enumerate(np.argmax(logits[:, 0], axis=-1)[: len(said)].tolist()):
            said[row].append(chosen)
    return said


def measure(material: Material, output: Path, sizes: Sizes | None = None) -> pd.DataFrame:
    """A row for each task, context and example: the share of its answer that is right, and chance; pass keys, of which
    a row is the digits of a context in both turns, beside them. The table is written after each task."""
    sizes, rows, passkey = sizes or Sizes(), list[dict[str, Any]](), load_figure("passkey_smollm2")
    for context in sizes.contexts:
        few = passkey.Sizes(context, sizes.num_passkeys, sizes.batch_size, sizes.chunk_len, text=sizes.text)
        bench = passkey.bench_of(material, few, query_aware=False, num_contexts=sizes.num_passkeys)
        parts = [part.examples for part in bench.through({}, checked=False).slices]
        shares = np.mean([part.correct.sum(axis=1) / part.weight.sum(axis=1) for part in parts], axis=0)
        rows += _rows(PASSKEY, context, [context] * len(shares), shares.tolist(), [0.1] * len(shares))
        for name in TASKS:
            began = time.process_time()
            rows += asked(bench, name, sizes, context)
            pd.DataFrame(rows).to_csv(output / "ruler.csv", index=False, float_format="%.4g")
            right = np.mean([row["right"] for row in rows[-sizes.num_examples :]])
            print(f"{name}, {context} tokens: {right:.2f} right, {time.process_time() - began:.0f} CPU-s", flush=True)
    return pd.DataFrame(rows)


def asked(bench: Bench, name: str, sizes: Sizes, context: int) -> list[dict[str, Any]]:
    """A row for each example of a task."""
    assert isinstance(bench.laboratory.task, Haystack)
    tokenizer = bench.laboratory.task.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, special=False)

    seeds = [(list(TASKS).index(name), index) for index in range(sizes.num_examples)]
    examples = [fitted(TASKS[name], encode, seed, context) for seed in seeds]
    prompts, said = [encode(example.prompt) for example in examples], list[list[int]]()
    for start in range(0, len(prompts), sizes.batch_size):
        said += answers(bench, prompts[start : start + sizes.batch_size], sizes, context)
    right = [example.right(tokenizer.decode(ids)) for example, ids in zip(examples, said, strict=True)]
    return _rows(name, context, list(map(len, prompts)), right, [example.chance for example in examples])


def _rows(
    task: str, context: int, num_tokens: Sequence[int], right: Sequence[float], chance: Sequence[float]
) -> list[dict[str, Any]]:
    """Of the examples of a task at a context."""
    cells = enumerate(zip(num_tokens, right, chance, strict=True))
    place = {"task": task, "context": context}
    return [place | {"example": i, "tokens": n, "right": share, "chance": blind} for i, (n, share, blind) in cells]


def main(output: Path = HERE, results: Path | None = None) -> int:
    """Writes ruler.csv; 3, and a sentence, where the model or the text cannot be had."""
    return with_material(lambda material: int(measure(material, output).empty))


if __name__ == "__main__":
    sys.exit(main())
