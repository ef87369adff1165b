"""What a run leaves behind: one typed record, written as JSON and checked when it is read back."""

import statistics
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from kvlab.config import SCHEMA_VERSION, completed
from kvlab.evaluation.measure import AXES, MemoryReport, SpeedReport
from kvlab.evaluation.verify import EXACT
from kvlab.lab.foreign import check_config, read_json
from kvlab.memory.naming import FULL, choice_of


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a number comes from: code, versions, device, flags, the implementations taken and why others were not.
    `outside` has what of the configuration is no part of kvlab, such as "kvlab.mixers: average", and whose it is, with
    its version."""

    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str | None]
    device: dict[str, Any]
    xla_flags: str
    implementations: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """How a field of `Quality` is shown: in frames, and with `over_seeds`, which makes one value of those of several
    seeds, in the frontier's data too, and in tables where any memory is lossy."""

    over_seeds: Callable[[list[Any]], Any] | None = None


def shown(*, default: Any = MISSING, over_seeds: Callable[[list[Any]], Any] | None = None) -> Any:
    """A field that frames have: showing another is adding such a row."""
    return field(default=default, metadata={"shown": Shown(over_seeds)})


@dataclass(frozen=True, kw_only=True)
class Part:
    """The metric of some of a slice's labels (null: there are none), and their share of its weight."""

    value: float | None
    share: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The task's metric through the memory (`value`, its mean over `slices`), in the parallel form, and on validation.

    `verified_by` is what the memory had to agree with: for a lossy format the parallel form rounded to it. `turns` has
    the metric of each turn of the slices that have several (null: a turn without labels); `value` and `slices` are over
    all turns. `parts` has the parts of each slice's labels that the task scores apart, by name. `chance` is what a
    blind guess scores, where the task knows.
    """

    metric: str = shown()
    higher_is_better: bool
    value: float = shown()
    slices: dict[str, float]
    parallel_value: float = shown()
    validation: float
    verified_by: str = shown(default=EXACT, over_seeds=itemgetter(0))
    turns: dict[str, list[float | None]] = field(default_factory=dict)
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    chance: float | None = None

    @property
    def is_lossy(self) -> bool:
        """Whether the memory stored less than what the model computes."""
        return self.verified_by != EXACT

    @property
    def lost(self) -> float:
        """What the memory costs: by how much `value` is worse than `parallel_value`, whichever way is better."""
        return self.parallel_value - self.value if self.higher_is_better else self.value - self.parallel_value


@dataclass(frozen=True, kw_only=True)
class Lossy:
    """What a lossy memory did to the test slices: the largest difference of a logit from the parallel form under its
    own mask, relative to the largest logit of its position, over `num_logits` positions; how often a sequence was
    compacted; by slice, the fraction of all slots that was dropped (0: the compression never acted); and the states
    that a compression, or a format, left as they are, with the reason."""

    logit_error: float
    num_logits: int
    num_compactions: int
    evicted_fraction: dict[str, float]
    skipped: dict[str, str]


SHOWN: dict[str, Shown] = {item.name: item.metadata["shown"] for item in fields(Quality) if "shown" in item.metadata}
SHOWN["lost"] = Shown(statistics.fmean)
"""The fields of `Quality` that are shown, and what follows from them, by name."""


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """Where the parameters come from: `training_id` names the folder, `trained_by` the run that trained them; both are
    empty in records from before trainings were shared. `num_together` trials were one program (`train.vmap`): numbers
    are those of one alone up to rounding, milliseconds of a step its share of theirs. `diverged` are learning rates
    that were tried and met what is not finite, and where."""

    learning_rate: float
    trials: list[dict[str, float]]
    num_steps: int
    num_tokens: int
    params_sha256: str
    data_sha256: str | None
    training_id: str = ""
    trained_by: str = ""
    num_together: int = 1
    diverged: dict[str, str] = field(default_factory=dict)
    implementations: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FailedTraining:
    """The shared training that a run failed for, and which of its attempts that was."""

    training_id: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every run has. `directory` is where it was read from; it is not part of the file."""

    run_id: str
    experiment: str
    config: dict[str, Any]
    seed: int
    schema: int = 1
    wall_s: float | None = None
    directory: str = ""


@dataclass(frozen=True, kw_only=True)
class Unfinished(Record):
    """A run that failed, or that was begun and never finished."""

    status: Literal["failed", "cut"]
    reason: str
    provenance: Provenance | None = None
    training: FailedTraining | None = None


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The run's scores by example (kvlab/lab/examples.py): the file's digest, and one of each slice's data, equal where
    two runs scored the same examples."""

    sha256: str
    data_sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Done(Record):
    """A finished run. `memory_at_task_context` is there where memory was measured at another length than the task's;
    runs from before scores by example were kept have no `examples`."""

    num_params: int
    quality: Quality
    memory: MemoryReport
    speed: SpeedReport
    training: TrainingReport
    provenance: Provenance
    memory_at_task_context: MemoryReport | None = None
    lossy: Lossy | None = None
    examples: Examples | None = None
    status: Literal["done"] = "done"

    @property
    def dropped(self) -> float | None:
        """The share of tokens that a compression dropped, the mean over the scored slices; 0: it never acted. None
        where there is no compression, and where an older record does not say."""
        method = choice_of((self.config.get("memory") or {}).get("compression"))
        if self.lossy is None or not self.lossy.evicted_fraction or method in FULL["compression"]:
            return None
        return statistics.fmean(self.lossy.evicted_fraction.values())


MAX_REASON = 500
"""Characters of what is wrong with a file that a row tells."""

type AnyRecord = Done | Unfinished
_READER: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[Done | Unfinished, Field(discriminator="status")])


def read_record(path: Path) -> AnyRecord:
    """The record of a file, its configuration with what was added since (`completed`). Raises ValueError (pydantic's,
    with field and value) when it is none, or of another version, and OSError when there is no readable file."""
    data = read_json(path)
    if isinstance(data, dict) and (version := data.get("schema", SCHEMA_VERSION)) != SCHEMA_VERSION:
        raise ValueError(f"schema: {version!r:.40} is of another kvlab, this one reads {SCHEMA_VERSION}")
    record = _READER.validate_python(data)
    check_config(record.config)
    if isinstance(record, Done):
        _check_memory(record.memory)
    return replace(record, config=completed(record.config), directory=str(path.parent))


def _check_memory(memory: MemoryReport) -> None:
    """Raises ValueError for sizes that are none, and for layers that do not say theirs."""
    for name in (*AXES, "context_len", "batch_size"):
        value, least = getattr(memory, name), int(name in ("context_len", "batch_size"))
        if value is not None and value < least:
            raise ValueError(f"memory.{name}: must be at least {least}")
    for row in memory.layers:
        if not {"layer", "state", "allocated_bytes"} <= row.keys() or not isinstance(row["allocated_bytes"], int):
            raise ValueError("memory.layers: must each have layer, state and allocated_bytes")


UNKNOWN_CONFIG: dict[str, Any] = {
    "mixer": {"name": "unknown"},
    "task": {"type": "unknown"},
    "seed": 0,
    "experiment": "unknown",
}
"""The configuration of a run of which nothing can be read."""


def damaged(error: Exception, run_id: str, config: dict[str, Any]) -> Unfinished:
    """The record of a run whose file is none: it failed, and says how."""
    reason = f"record.json is damaged: {first_error(error)}"
    return unfinished("failed", reason, run_id, config)


def unfinished(status: Literal["failed", "cut"], reason: str, run_id: str, config: dict[str, Any]) -> Unfinished:
    """The record of a run that has none."""
    return Unfinished(**basics(run_id, config), status=status, reason=reason)


def basics(run_id: str, config: dict[str, Any]) -> dict[str, Any]:
    """What every record of a run says, by its configuration."""
    experiment = config.get("name") or config.get("experiment", "unknown")
    return {"run_id": run_id, "experiment": experiment, "seed": config["seed"], "config": config}


def as_json(record: AnyRecord) -> dict[str, Any]:
    """Plain data for the file; what a record does not have is left out."""
    return {name: value for name, value in asdict(record).items() if name != "directory" and value is not None}


def first_error(error: Exception) -> str:
    """The first thing that is wrong with a record, in one line."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return (str(error) or type(error).__name__).splitlines()[0][:MAX_REASON]
    first = errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "record"
    return f"{place}: {first['msg']}"[:MAX_REASON]
