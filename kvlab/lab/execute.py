"""One run from configuration to record: train (tuning on validation), score through the memory, measure, write."""

import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from kvlab.config import SCHEMA_VERSION, Config
from kvlab.engine.step import MemoryStep
from kvlab.evaluation.measure import MemoryReport, measure
from kvlab.evaluation.score import Scorer, SliceScore, mean_metric
from kvlab.host import keep_freed_memory
from kvlab.interrupt import Interrupted, StopRequest, stop_on_signals
from kvlab.lab.kernels import summary
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.plan import explain_out_of_memory
from kvlab.lab.provenance import provenance
from kvlab.lab.runs import Run
from kvlab.random import named_key
from kvlab.tasks import Task
from kvlab.training.checkpoint import Checkpoints
from kvlab.training.loop import TrialResult, params_digest, train
from kvlab.typing import Params
from pallas_kernels.selection import recording


def execute(config: Config) -> str:
    """Does whatever this run still needs; returns done, skipped, failed or interrupted. Only `RunLocked` is raised."""
    run = Run(config)
    with run.locked():
        if run.state == "done":
            return "skipped"
        if StopRequest().reason:  # a sweep that is ending starts nothing new
            return "interrupted"
        keep_freed_memory()
        jax.clear_caches()  # programs of earlier runs in this process would only accumulate
        with stop_on_signals() as stop, recording() as taken:
            began = time.monotonic()
            origin = provenance()
            run.begin(origin)
            run.say("running")
            base = {
                "schema": SCHEMA_VERSION,
                "run_id": config.run_id,
                "experiment": config.experiment,
                "config": config.as_dict(),
                "seed": config.seed,
                "provenance": origin,
            }

            def finish(**outcome: Any) -> None:
                """The record says which kernels ran, and why others did not: all caches were empty, so each was traced."""
                kernels = summary(taken)
                origin["implementations"] = {op: one.taken for op, one in kernels.items()}
                origin["passed_over"] = {op: one.reason for op, one in kernels.items() if one.reason}
                run.finish({**base, **outcome, "wall_s": time.monotonic() - began})

            try:
                result = _run(config, run, stop)
            except (Interrupted, KeyboardInterrupt) as error:
                run.say("interrupted", reason=str(error) or "KeyboardInterrupt")
                return "interrupted"
            except Exception as error:  # a failed run is a row with a reason, never a hole in the plot
                reason = f"{type(error).__name__}: {error}"
                if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
                    reason = f"out of memory: {explain_out_of_memory(config)} ({reason.splitlines()[0]})"
                (run.directory / "traceback.txt").write_text(traceback.format_exc())
                finish(status="failed", reason=reason)
                return "failed"
            finish(status="done", **result)
            return "done"


def _run(config: Config, run: Run, stop: StopRequest) -> dict[str, Any]:
    lab = Laboratory.of(config)
    scorer = Scorer(lab.structure, lab.task, named_key(config.seed, "eval"), config.measure.batch_size)
    best, learning_rate, trials = _tuned(lab, scorer, run, stop)
    _save_params(run.directory / "params", best.params)
    stop.check()

    layout = lab.layout(lab.task.context_len, config.measure.batch_size)
    through = scorer.through_memory(best.params, "test", layout)
    parallel = scorer.parallel(best.params, "test")
    _must_agree(through, parallel, lab.task, config.model.dtype)
    stop.check()

    report, tokens_per_s = measure_memory(lab, best.params, config.context_len)
    elsewhere = {}
    if config.context_len != lab.task.context_len:
        elsewhere["memory_at_task_context"] = measure_memory(lab, best.params, lab.task.context_len)[0].as_dict()
    return {
        **elsewhere,
        "num_params": lab.num_params,
        "quality": {
            "metric": lab.task.metric,
            "higher_is_better": lab.task.higher_is_better,
            "value": mean_metric(through, lab.task),
            "slices": {one.name: one.metric(lab.task) for one in through},
            "parallel_value": mean_metric(parallel, lab.task),
            "validation": best.validation,
        },
        "memory": report.as_dict(),
        "speed": {"train_step_ms": best.train_step_ms, "decode_tokens_per_s": tokens_per_s},
        "training": {
            "learning_rate": learning_rate,
            "trials": trials,
            "num_steps": best.num_steps,
            "num_tokens": best.num_tokens,
            "params_sha256": params_digest(best.params),
            "data_sha256": lab.task.fingerprint(),
        },
    }


def measure_memory(lab: Laboratory, params: Params, context_len: int) -> tuple[MemoryReport, float]:
    """Bytes and decode speed at a context of `context_len` tokens and the configured batch."""
    config = lab.config
    layout = lab.layout(context_len, config.measure.batch_size)
    step = MemoryStep.of(lab.structure, layout)
    return measure(step, params, lab.task.vocab_size, min(config.measure.decode_steps, context_len - 1))


def _tuned(
    lab: Laboratory, scorer: Scorer, run: Run, stop: StopRequest
) -> tuple[TrialResult, float, list[dict[str, float]]]:
    """The best trial by validation over the learning rates of `tune`, or the only one; ties go to the first."""
    config, best = lab.config, None
    trials: list[dict[str, float]] = []
    if config.train.num_steps == 0:
        validation = mean_metric(scorer.parallel(lab.params, "validation"), lab.task)
        return TrialResult(lab.params, validation, 0, 0, 0.0), config.optimizer.learning_rate, trials
    step_fn = lab.train_step()
    for index, learning_rate in enumerate(config.tune.learning_rate or (config.optimizer.learning_rate,)):
        trial = train(
            step_fn,
            jax.tree.map(lambda x: x.copy(), lab.params),  # the step donates its state
            config.train,
            learning_rate=learning_rate,
            seed=config.seed,
            validate=lambda params: mean_metric(scorer.parallel(params, "validation"), lab.task),
            directory=run.directory / "trials" / str(index),
            metrics_path=run.directory / "metrics.jsonl",
            label=f"{config.label} lr {learning_rate:g}",
            stop=stop,
        )
        trials.append({"learning_rate": learning_rate, "validation": trial.validation, "num_steps": trial.num_steps})
        sign = 1 if lab.task.higher_is_better else -1
        if best is None or sign * trial.validation > sign * best[0].validation:
            best = trial, learning_rate
    assert best is not None
    return *best, trials


def _save_params(directory: Path, params: Params) -> None:
    """The final parameters as a checkpoint of their own, in place of what an earlier attempt may have left."""
    shutil.rmtree(directory, ignore_errors=True)
    checkpoints = Checkpoints(directory, keep=1)
    try:
        checkpoints.save(0, params, {})
    finally:
        checkpoints.close()


def load_params(config: Config, run_dir: Path | None = None) -> tuple[Laboratory, Params]:
    """The model of a finished run and its parameters, from where the config says or from `run_dir`. Raises FileNotFoundError
    when the run has none."""
    lab = Laboratory.of(config)
    directory = (run_dir or config.run_dir) / "params"
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: this run has no final parameters; is it done?")
    checkpoints = Checkpoints(directory, keep=1)
    try:
        restored = checkpoints.restore(lab.params)
    finally:
        checkpoints.close()
    if restored is None:
        raise FileNotFoundError(f"{directory}: empty")
    return lab, restored[1]


def _must_agree(through: tuple[SliceScore, ...], parallel: tuple[SliceScore, ...], task: Task, dtype: str) -> None:
    """The parallel form and the memory must tell the same; otherwise the run fails rather than being plotted.

    Float32 sums differ in the last bits, so a near tie may flip an argmax: one label in a thousand, or 1e-3 bits.
    """
    tolerance = 1e-3 if dtype == "float32" else 2e-2
    for paged, plain in zip(through, parallel, strict=True):
        difference = abs(paged.metric(task) - plain.metric(task))
        if task.metric == "perplexity":
            difference = abs(paged.nll / paged.weight - plain.nll / plain.weight)
        allowed = max(tolerance, (2 / paged.weight if task.metric == "accuracy" else 0))
        if not difference <= allowed:
            raise RuntimeError(
                f"slice {paged.name}: {task.metric} through the memory is {paged.metric(task):.5f}, in the parallel form "
                f"{plain.metric(task):.5f}; they must agree within {allowed:g}"
            )
