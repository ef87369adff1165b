"""The ceiling of a run: what the same weights score on the same examples through a memory that holds and reads
everything. It stands beside every score of a lossy memory; what is far below it, the memory has lost."""

import json
from collections.abc import Iterable

from kvlab.lab.record import AnyRecord, Done
from kvlab.memory.naming import FULL, choice_of
from kvlab.tasks.metrics import METRICS


def is_full(record: Done) -> bool:
    """Whether nothing was dropped, rounded or passed over between the model and its score."""
    if record.quality.is_lossy:
        return False
    memory = record.config.get("memory", {})
    chosen = {name: memory.get(name, record.config.get(name)) for name in FULL}
    return all(choice_of(value) in FULL[name] for name, value in chosen.items())


class Ceilings:
    """Ceilings among some records: a run's own where it is full, else the full run of the same parameters on the same
    examples; of several the one whose memory is most like the run's."""

    def __init__(self, records: Iterable[AnyRecord]):
        self._full: dict[str, list[Done]] = {}
        for record in records:
            if isinstance(record, Done) and is_full(record):
                self._full.setdefault(_weights(record), []).append(record)

    def of(self, record: Done) -> Done | None:
        """The run that is a run's ceiling; None where there is none at hand."""
        if is_full(record):
            return record
        found = [full for full in self._full.get(_weights(record), []) if _same_examples(full, record)]
        return min(found, key=lambda full: (-_likeness(full, record), full.run_id), default=None)


def _weights(record: Done) -> str:
    """What two runs share that evaluate the same parameters in the same model, drawn and tested from the same seed."""
    whose = [record.training.params_sha256, record.seed, record.config["mixer"], record.config["task"]["type"]]
    return json.dumps(whose, sort_keys=True)


def _same_examples(ours: Done, theirs: Done) -> bool:
    """By the digests of the examples themselves, or by their task and data where older records have none."""
    if ours.examples and theirs.examples:
        return ours.examples.data_sha256 == theirs.examples.data_sha256
    return (ours.config["task"], ours.training.data_sha256) == (theirs.config["task"], theirs.training.data_sha256)


def _likeness(ours: Done, theirs: Done) -> int:
    """How many fields of the memory agree."""
    memory, other = ours.config.get("memory", {}), theirs.config.get("memory", {})
    return sum(memory[name] == other.get(name) for name in memory)


def is_discriminative(metric: str, ceiling: float | None, chance: float | None, floor: float | None) -> bool | None:
    """`Metric.is_discriminative` for a metric by its name; None without a ceiling, or for one that is not known."""
    known = METRICS.get(metric)
    return None if ceiling is None or known is None else known.is_discriminative(ceiling, chance, floor)
