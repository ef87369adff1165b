"""One run from configuration to record: obtain the parameters, score through the memory, measure, write."""

import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from kvlab.config import SCHEMA_VERSION, Config
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.measure import MemoryReport, SpeedReport, measure
from kvlab.evaluation.score import Scorer, SliceScore
from kvlab.evaluation.verify import verify
from kvlab.host import keep_freed_memory
from kvlab.interrupt import Interrupted, StopRequest, stop_on_signals
from kvlab.lab.examples import write_examples
from kvlab.lab.following import Follower, NoFollower, followed
from kvlab.lab.kernels import summary
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.parameters import obtain
from kvlab.lab.plan import explain_failure
from kvlab.lab.provenance import provenance
from kvlab.lab.record import AnyRecord, Done, FailedTraining, Lossy, Part, Provenance, Quality, Unfinished
from kvlab.lab.runs import Run
from kvlab.lab.trained import TrainingFailed, trained_params
from kvlab.memory.formats import skipped
from kvlab.random import named_key
from kvlab.tasks import Task
from kvlab.tasks.metrics import Metric
from kvlab.typing import Params
from kvlab.units import Spread
from pallas_kernels.selection import recording


def execute(config: Config, beside: Sequence[Config] = (), *, trains: bool = True) -> str:
    """Does whatever this run still needs; returns done, skipped, failed or interrupted. Raises `RunLocked`, and OSError
    where nothing can be written.

    Runs `beside` it are executed after it: their parameters are trained with its own where they are one program. One
    that never `trains` fails where its parameters are not there.
    """
    run = Run(config)
    if run.state == "done":  # nothing is written, not even a lock
        return "skipped"
    with run.locked():
        if run.state == "done":
            return "skipped"
        if StopRequest().reason:  # a sweep that is ending starts nothing new
            return "interrupted"
        keep_freed_memory()
        jax.clear_caches()  # programs of earlier runs in this process would only accumulate
        with stop_on_signals() as stop:
            return _recorded(config, run, stop, beside=beside, trains=trains)


def _recorded(config: Config, run: Run, stop: StopRequest, **given: Any) -> str:
    """The run with its record: a failed run is a row with a reason, never a hole in the plot."""
    began = time.monotonic()
    known_attempt = run.known_attempt
    origin = provenance(config)
    run.begin(origin)
    with followed(config) as follower:
        record = _record_of(config, run, stop, follower, origin, began, known_attempt=known_attempt, **given)
        if record is None:
            return "interrupted"
        run.finish(record)
        follower.record = record
    return record.status


def _record_of(
    config: Config,
    run: Run,
    stop: StopRequest,
    follower: Follower | NoFollower,
    origin: Provenance,
    began: float,
    **given: Any,
) -> AnyRecord | None:
    """What became of the run, as its record; None where it was interrupted."""
    with recording() as taken:  # all caches are empty, so each kernel that runs is traced
        try:
            build = partial(Done, **_run(config, run, stop, follower, taken=taken, **given))
        except (Interrupted, KeyboardInterrupt) as error:
            run.say("interrupted", reason=str(error) or "KeyboardInterrupt")
            return None
        except TrainingFailed as error:
            _keep_traceback(run)
            failed = FailedTraining(training_id=config.training_id, attempt=error.attempt)
            build = partial(Unfinished, status="failed", reason=str(error), training=failed)
        except Exception as error:
            _keep_traceback(run)
            build = partial(Unfinished, status="failed", reason=explain_failure(config, error))
    kernels = summary(taken)
    return build(
        run_id=config.run_id,
        experiment=config.folder,
        config=config.as_dict(),
        seed=config.seed,
        schema=SCHEMA_VERSION,
        wall_s=time.monotonic() - began,
        provenance=replace(
            origin,
            implementations={op: chosen.taken for op, chosen in kernels.items()},
            passed_over={op: chosen.reason for op, chosen in kernels.items() if chosen.reason},
        ),
    )


def _keep_traceback(run: Run) -> None:
    """As far as there is room: the record tells the reason."""
    with suppress(OSError):
        (run.directory / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")


def _run(config: Config, run: Run, stop: StopRequest, follower: Follower | NoFollower, **given: Any) -> dict[str, Any]:
    """What a finished run adds to its record; the rest is for `obtain`."""
    lab = Laboratory.of(config)
    scorer = Scorer(lab.model.structure, lab.task, named_key(config.seed, "eval"), config.measure.batch_size)
    params, trained = obtain(lab, scorer, run, stop, follow=follower.row, **given)
    follower.catch_up()
    stop.check()

    layout = lab.layout(lab.task.context_len, config.measure.batch_size)
    check = None if layout.is_exact else MaskCheck(lab.model.structure, params, layout)
    through = scorer.through_memory(params, "test", layout, check, between=stop.check)
    parallel = scorer.parallel(params, "test", between=stop.check)
    given = {"memory": config.memory, "dtype": config.model.dtype, "check": check}
    verified_by = verify(through, parallel, lab.task.metric, **given)
    stop.check()

    memory, speed = measure_memory(lab, params, config.context_len, trained.step_ms)
    elsewhere = None
    if config.context_len != lab.task.context_len:
        elsewhere, _ = measure_memory(lab, params, lab.task.context_len, trained.step_ms)
    return {
        "num_params": lab.model.num_params,
        "quality": quality_of(lab.task, through, parallel, validation=trained.validation, verified_by=verified_by),
        "examples": write_examples(run.directory, through),
        "memory": memory,
        "memory_at_task_context": elsewhere,
        "speed": speed,
        "training": trained.report,
        "lossy": None if check is None else lossy_report(lab, check),
    }


def lossy_report(lab: Laboratory, check: MaskCheck) -> Lossy:
    """What a record says of a lossy memory."""
    evicted = {name: dropped / max(1, num_slots) for name, (dropped, num_slots) in check.evicted.items()}
    return Lossy(
        logit_error=check.worst,
        num_logits=check.num_compared,
        num_compactions=check.num_compactions,
        evicted_fraction=evicted,
        skipped=skipped(lab.model.states, lab.config.memory),
    )


def quality_of(
    task: Task, through: Sequence[SliceScore], parallel: Sequence[SliceScore], *, validation: float, verified_by: str
) -> Quality:
    """What a record says of a task's scores through the memory and in the parallel form."""
    metric = task.metric
    return Quality(
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        value=metric.mean(through),
        slices={part.name: metric.from_sums(part) for part in through},
        parallel_value=metric.mean(parallel),
        validation=validation,
        verified_by=verified_by,
        turns={part.name: metric.by_turn(part.examples) for part in through if part.examples.num_turns > 1},
        parts={part.name: parts_of(part, metric) for part in through if part.parts},
        chance=task.chance,
    )


def parts_of(score: SliceScore, metric: Metric) -> dict[str, Part]:
    """What a record says of the parts of a slice's labels."""
    return {
        name: Part(value=metric.from_sums(sums) if sums.weight else None, share=sums.weight / score.weight)
        for name, sums in score.parts.items()
    }


def measure_memory(
    lab: Laboratory, params: Params, context_len: int, train_step_ms: Spread
) -> tuple[MemoryReport, SpeedReport]:
    """Bytes and speed at a context of `context_len` tokens and the configured batch."""
    config, prompt_len = lab.config, lab.config.context_of(context_len).prompt_len
    layout = lab.layout(context_len, config.measure.batch_size, prompt_len=prompt_len)
    step = MemoryStep.of(lab.model.structure, layout)
    sizes = {"prompt_len": prompt_len, "decode_steps": config.measure.decode_steps}
    return measure(step, params, lab.task.vocab_size, **sizes, train_step_ms=train_step_ms)


def load_params(config: Config, run_dir: Path | None = None) -> tuple[Laboratory, Params]:
    """The model of a finished run and its parameters, from where the config says or from `run_dir`. Raises
    FileNotFoundError when the run has none, and `CheckpointError` when they are not the ones that were trained."""
    lab = Laboratory.of(config)
    return lab, trained_params(run_dir or config.run_dir, lab.model.params)
