"""What every example of a run scored: a small compressed file beside its record, which holds the file's digest.

examples.npz
  names             the slices, in the task's order
  nll.0  ...        of slice 0: nats, right answers, weights and labels of each example and turn [examples, turns];
  correct.0         of `right` the bits of its labels, example by example, in each by position
  weight.0
  num_labels.0
  right.0

Comparisons of two runs pair examples by it. A run whose file is missing or damaged is still read; what needs the file
says so in a sentence.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlab.evaluation.score import SliceScore
from kvlab.files import write_atomic
from kvlab.lab.record import Done, Examples
from kvlab.schema import ConfigError
from kvlab.tasks.metrics import ExampleScores
from kvlab.units import counted

FILE = "examples.npz"
COLUMNS = ("nll", "correct", "weight", "num_labels")


class ExamplesError(ConfigError):
    """A run's scores by example cannot be had; says which run, and why."""


def write_examples(directory: Path, scores: Sequence[SliceScore]) -> Examples:
    """Writes the file, wholly or not at all; returns what the record says of it."""
    arrays: dict[str, Any] = {"names": np.array([part.name for part in scores])}
    for index, part in enumerate(scores):
        arrays |= {f"{name}.{index}": getattr(part.examples, name) for name in COLUMNS}
        arrays[f"right.{index}"] = np.packbits(part.examples.right)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(directory / FILE, buffer.getvalue())
    return Examples(
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        data_sha256={part.name: part.data_sha256 for part in scores},
    )


def read_examples(record: Done) -> dict[str, ExampleScores]:
    """The scores of a run by slice. Raises `ExamplesError` where it has none, or others than its record says."""
    path = Path(record.directory) / FILE

    def refusal(reason: str) -> ExamplesError:
        return ExamplesError(f"examples of run {record.run_id}", str(path), reason)

    if record.examples is None:
        raise refusal("the run is from before scores by example were kept; run it again in a new folder of results")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise refusal(f"cannot be read ({error.strerror}); remove the run's folder and run it again") from None
    if hashlib.sha256(content).hexdigest() != record.examples.sha256:
        raise refusal("is damaged: not what the record says; remove the run's folder and run it again")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {str(name): _slice(arrays, index) for index, name in enumerate(arrays["names"])}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise refusal(f"is no file of scores: {error}") from None


def _slice(arrays: Mapping[str, np.ndarray], index: int) -> ExampleScores:
    columns = {name: arrays[f"{name}.{index}"] for name in COLUMNS}
    shape, num_labels = columns["weight"].shape, int(columns["num_labels"].sum())
    if len(shape) != 2 or any(column.shape != shape for column in columns.values()):
        raise ValueError(f"slice {index}: its columns must be alike, [examples, turns]")
    bits = arrays[f"right.{index}"]
    if len(bits) != -(-num_labels // 8):
        raise ValueError(f"slice {index}: {counted(len(bits), 'byte')} of bits for {counted(num_labels, 'label')}")
    return ExampleScores(**columns, right=np.unpackbits(bits, count=num_labels).astype(bool))
