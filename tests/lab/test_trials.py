"""Trainings of a sweep that are one program (`train.vmap`): who joins, what is left of each, what failures cost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.cli import main
from kvlab.files import locked
from kvlab.lab import trials
from kvlab.lab.execute import execute, load_params
from kvlab.lab.labels import run_labels, without_seed
from kvlab.lab.runs import Run
from kvlab.lab.trained import Training
from kvlab.lab.trials import shared_half
from kvlab.schema import ConfigError
from tests.lab.small import SMALL, TUNED, command, rows, small

BOTH = "train.vmap=[seed,learning_rate]"


@pytest.fixture
def programs(monkeypatch):
    """The number of trials of each program of several."""
    sizes, right = [], trials.train_together

    def counted(programs, config, members, **options):
        sizes.append(len(members))
        return right(programs, config, members, **options)

    monkeypatch.setattr(trials, "train_together", counted)
    return sizes


def alike(record, other):
    """Two records of one run, trained in a program of several and alone: equal up to rounding."""
    assert record.run_id == other.run_id
    for one, two in zip(record.training.trials, other.training.trials, strict=True):
        assert one == {name: pytest.approx(value, abs=1e-4) for name, value in two.items()}
    fresh = {"params_sha256": "", "num_together": 0, "trials": [], "trained_by": ""}
    assert replace(record.training, **fresh) == replace(other.training, **fresh)
    assert record.quality.slices == {name: pytest.approx(value) for name, value in other.quality.slices.items()}
    assert record.memory == other.memory


def test_a_sweep_of_seeds_and_rates_trains_once_and_leaves_what_each_leaves_alone(tmp_path, programs):
    """Two seeds, each tuned: four trials in one program. The second run finds its parameters."""
    configs = [small(tmp_path / "swept", *TUNED, f"seed={seed}", BOTH) for seed in (0, 1)]
    assert execute(configs[0], configs) == "done"
    assert programs == [4]
    assert Training(configs[1]).done is not None
    assert not Run(configs[1]).directory.exists()
    assert execute(configs[1]) == "done"
    assert programs == [4]
    for config in configs:
        alone = small(tmp_path / "alone", *TUNED, f"seed={config.seed}")
        assert (alone.run_id, alone.training_id) == (config.run_id, config.training_id)
        assert execute(alone) == "done"
        record, expected = Run(config).record, Run(alone).record
        alike(record, expected)
        assert (record.training.num_together, expected.training.num_together) == (4, 1)
        assert record.training.trained_by == config.run_id
        ones, others = (load_params(each)[1] for each in (config, alone))
        for one, other in zip(jax.tree.leaves(ones), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-6, rtol=0)
        for row, known in zip(rows(config), rows(alone), strict=True):
            assert row == {name: pytest.approx(value, rel=1e-4) for name, value in known.items()}
        names = [sorted(str(path.relative_to(each.training_dir)) for path in each.training_dir.rglob("*"))
                 for each in (config, alone)]  # fmt: skip
        assert [name for name in names[0] if "/" not in name] == [name for name in names[1] if "/" not in name]
    assert programs == [4]


def test_who_may_join(tmp_path):
    made = {}

    def half(varied, *words):
        if words not in made:
            made[words] = small(tmp_path, *words)
        return shared_half(made[words], varied)

    for varied in (["seed"], ["seed", "learning_rate"]):
        assert half(varied, "seed=1") == half(varied)
    for varied in (["learning_rate"], ["seed", "learning_rate"]):
        assert half(varied, "optimizer.learning_rate=0.1") == half(varied) == half(varied, *TUNED)
    assert half(["learning_rate"], "seed=1") != half(["learning_rate"])
    assert half(["seed"], "optimizer.learning_rate=0.1") != half(["seed"])
    for other in ("optimizer.eps=1e-7", "mixer=mqa", "measure.batch_size=2"):
        assert half(["seed", "learning_rate"], other) != half(["seed", "learning_rate"])


def test_those_that_are_done_held_or_of_another_model_do_not_join(trained, monkeypatch):
    """The training of the first is done; another process holds that of the third."""
    config = small(trained, "seed=1", *TUNED, BOTH)
    others = [small(trained, *TUNED, BOTH), small(trained, "seed=2", *TUNED, BOTH), small(trained, "mixer=mqa", BOTH)]
    free = small(trained, "seed=3", "optimizer.learning_rate=0.1", BOTH)
    own = trials.Trials(*_lab(config), Training(config), 1)
    code = "import sys, time; from kvlab.files import locked; from pathlib import Path\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    words = [sys.executable, "-c", code, str(others[1].training_dir / "lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with trials._joined(own, [*others, free, free], ["seed", "learning_rate"]) as found:
            assert [each.lab.config for each in found] == [free]
            assert Training(free).status.status == "running"
        assert Training(free).status.status == "interrupted"
        with locked(free.training_dir / "lock"):
            holder.kill()


def _lab(config):
    from kvlab.evaluation.score import Scorer
    from kvlab.lab.laboratory import Laboratory
    from kvlab.random import named_key

    lab = Laboratory.of(config)
    return lab, Scorer(lab.model.structure, lab.task, named_key(config.seed, "eval"), config.measure.batch_size)


def test_a_nan_fails_its_own_run_and_no_other(tmp_path, programs, monkeypatch):
    configs = [small(tmp_path, f"seed={seed}", "train.vmap=[seed]") for seed in (0, 1)]
    right = trials.Trials.member

    def poisoned(self, index):
        member = right(self, index)
        if self.lab.config.seed == 1:
            scale = member.params["norm"]
            scale["scale"] = scale["scale"].at[0].set(jnp.nan)
        return member

    monkeypatch.setattr(trials.Trials, "member", poisoned)
    assert [execute(configs[0], configs), execute(configs[1])] == ["done", "failed"]
    record = Run(configs[1]).record
    assert record.reason.startswith("NotFinite: step 0: parameter norm.scale is not finite (in the shared training ")
    assert record.training.attempt == 1
    monkeypatch.setattr(trials.Trials, "member", right)
    shutil.rmtree(configs[1].training_dir / "trials")  # its first checkpoint has the NaN
    assert [execute(configs[0], configs), execute(configs[1])] == ["skipped", "done"]  # the command, given again
    assert programs == [2]


def test_what_cannot_be_one_program_is_trained_one_by_one(tmp_path, monkeypatch):
    configs = [small(tmp_path, f"seed={seed}", "train.vmap=[seed]") for seed in (0, 1)]

    def unable(*_, **__):
        raise NotImplementedError("no batching rule")

    monkeypatch.setattr(trials, "train_together", unable)
    with pytest.warns(RuntimeWarning, match=r"cannot be one program: NotImplementedError\('no batching rule'\)"):
        assert execute(configs[0], configs) == "done"
    assert Training(configs[1]).status.status == "interrupted"
    assert Run(configs[0]).record.training.num_together == 1
    assert execute(configs[1]) == "done"


def test_where_there_is_no_room_each_is_alone(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(trials, "room_bytes", lambda: 1)
    config = small(tmp_path, *TUNED, BOTH)
    assert execute(config) == "done"
    assert programs == []
    assert Run(config).record.training.num_together == 1


def test_parts_are_as_long_as_each_other():
    for count, most, sizes in ((6, 6, [6]), (7, 6, [3, 4]), (5, 2, [2, 2]), (3, 1, []), (6, 4, [3, 3])):
        parts = trials._parts(list(range(count)), most)
        assert [len(part) for part in parts] == sizes
        assert all(len(part) <= most for part in parts)


def test_it_is_no_part_of_a_run_and_tells_no_points_apart(tmp_path):
    configs = [small(tmp_path, f"train.vmap={word}", "seed=1") for word in ("null", "auto", "[seed]")]
    configs.append(small(tmp_path, BOTH, "seed=1"))
    assert len({(config.run_id, config.training_id) for config in configs}) == 1
    plain = [config.as_dict() for config in configs]
    assert all(without_seed(each) == without_seed(plain[0]) for each in plain)
    assert len(set(run_labels(plain))) == 1
    assert [config.train.varied("cpu") for config in configs] == [(), (), ("seed",), ("seed", "learning_rate")]
    assert [config.train.varied("gpu") for config in configs[:2]] == [(), ("seed", "learning_rate")]


@pytest.mark.parametrize("word", ["seed", "[]", "[seed,seed]", "[rate]", "3", "true", "[1]"])
def test_anything_else_is_answered_with_what_is_legal(tmp_path, word):
    legal = "must be null, auto, or a list of some of seed, learning_rate, each once"
    with pytest.raises(ConfigError, match=rf"^train\.vmap = .*: {legal}$"):
        small(tmp_path, f"train.vmap={word}")


def test_a_sweep_on_the_command_line_joins_its_runs(tmp_path, programs, monkeypatch, capsys):
    words = [*SMALL, f"results_dir={tmp_path}", "seed=0,1", "train.vmap=[seed]"]
    monkeypatch.setattr("sys.argv", ["kvlab", "run", "-m", *words])
    assert main() == 0
    assert programs == [2]
    assert [Run(small(tmp_path, f"seed={seed}")).record.training.num_together for seed in (0, 1)] == [2, 2]


LONG = ["train.num_steps=200", "train.eval_every=100", "train.checkpoint_every=20", "train.vmap=[seed]"]


def _saved(config):
    """The steps of its checkpoints."""
    return [int(path.name) for path in (config.training_dir / "trials" / "0").iterdir() if path.name.isdigit()]


def test_a_sweep_that_is_killed_goes_on(tmp_path, capsys):
    """Both trainings have checkpoints then, each in its own folder, from which each is resumed by its run alone."""
    words = command(tmp_path, *LONG, "seed=0,1")
    words.insert(4, "-m")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    configs = [small(tmp_path, *LONG, f"seed={seed}") for seed in (0, 1)]
    metrics = configs[1].training_dir / "metrics.jsonl"
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 30:
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [Training(config).status.status for config in configs] == ["running"] * 2
    assert all(max(_saved(config)) >= 40 for config in configs)
    for config in configs[::-1]:
        assert execute(config) == "done"
        assert "resumed at step" in capsys.readouterr().err
        assert Run(config).record.training.num_steps == 200
        assert [row["step"] for row in rows(config)] == list(range(2, 202, 2))
        assert json.loads((config.training_dir / "status.json").read_text())["status"] == "done"
