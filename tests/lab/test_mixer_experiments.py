"""The experiments on mixers: their sweeps, their tables on runs of a few steps, claims that come out either way; and
the notebooks that take a mixer apart and add one."""

import runpy
from itertools import product

import pandas as pd
import pytest

from kvlab.compose import compose, expand
from kvlab.lab.execute import execute
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure
from kvlab.mixers import MIXERS

FEW = [
    "model.model_dim=16", "task.num_test=4", "task.num_validation=4", "train.num_steps=4", "train.batch_size=4",
    "train.eval_every=4", "train.checkpoint_every=4", "measure.batch_size=4", "measure.decode_steps=4",
]  # fmt: skip
SMALL_RECALL = ["task.vocab_size=32", "task.train=['16:2']", "task.train_weights=[1]", "task.test=['16:2']"]


def ran(tmp_path, experiment, *words):
    assert execute(compose([f"experiment={experiment}", f"results_dir={tmp_path}", *words, *FEW])) == "done"
    return tmp_path / experiment


def values_of(claims):
    return {claim.what: claim.passed for claim in claims}


@pytest.mark.parametrize("name", ["state_tracking", "mixers_mqar"])
def test_every_sweep_is_of_one_arm(name):
    figure = load_figure(name)
    found = set()
    for words in figure.RUNS:
        config = compose([f"experiment={name}", *words])
        (arm,) = (arm.name for arm in figure.ARMS if arm.is_of(config.as_dict()))
        found.add((config.task, config.optimizer, arm))
    assert len(found) == len(figure.RUNS)
    assert {arm for _, _, arm in found} == {arm.name for arm in figure.ARMS}


def test_tracking_on_a_few_steps(tmp_path):
    """The slice behind the training length is told from the one within; what was not run fails its claim."""
    figure = load_figure("state_tracking")
    words = [*figure.RECIPE, "task=state_tracking", "task.seq_len=12", "task.test_len=20", *figure.DELTA.words]
    results = ran(tmp_path, "state_tracking", *words, "model.mlp_dim=8", "mixer.L.key_dim=4", "mixer.L.value_dim=4")
    assert figure.main(tmp_path, results) == 1
    (row,) = pd.read_csv(tmp_path / "tracking.csv").to_dict("records")
    assert (row["study"], row["mixer"], row["held_bytes"]) == ("parity", figure.DELTA.name, 2 * 2 * 4 * 4 * 4)
    assert row["within"] * 4 * 12 == pytest.approx(round(row["within"] * 4 * 12), abs=1e-3)  # a share of 4 x 12 labels
    assert row["behind"] * 4 * 8 == pytest.approx(round(row["behind"] * 4 * 8), abs=1e-3)
    assert (tmp_path / "tracking.png").exists()


def test_the_claims_on_parity_can_fail():
    figure = load_figure("state_tracking")
    solves = {arm.name: arm in figure.SOLVE for arm in figure.ARMS}
    rows = [
        {"study": "parity", "mixer": name, "seed": seed, "within": 1.0, "behind": 1.0 if solved else 0.5}
        for (name, solved), seed in product(solves.items(), range(3))
    ]
    frame = pd.DataFrame(rows)
    assert all(values_of(figure.claims(frame)).values())
    frame.loc[(frame.seed == 0) & (frame.mixer == figure.GATED.name), "behind"] = 0.96
    frame.loc[(frame.seed == 0) & (frame.mixer == figure.MAMBA2.name), "behind"] = 0.7
    failed = [what for what, passed in values_of(figure.claims(frame)).items() if not passed]
    assert failed == [f"parity, behind 40 tokens: {arm.name}" for arm in (figure.GATED, figure.MAMBA2)]
    assert not any(values_of(figure.claims(frame[frame.mixer == "none"])).values())


def test_a_hybrid_on_a_few_steps(tmp_path):
    """Bytes of one layer of attention and three of Gated DeltaNet, by hand."""
    figure = load_figure("hybrid_ratio")
    sizes = ["mixer.L.key_dim=4", "mixer.L.value_dim=4", "mixer.A.head_dim=4"]
    results = ran(tmp_path, "hybrid_ratio", "mixer.pattern='L L L A'", *SMALL_RECALL, *sizes)
    assert figure.main(tmp_path, results) == 1
    (row,) = pd.read_csv(tmp_path / "hybrid.csv").to_dict("records")
    keys_and_values, history = 16 * 2 * 4 * 4 * 4, 2 * 16 * 4  # 16 tokens, 4 heads of 4; two columns of 16
    delta = 2 * 4 * 4 * 4 + 2 * 2 * (4 + 4 + 4) * 4  # a matrix a head; two columns of queries, keys and values
    assert (row["attention"], row["kv_bytes"]) == (1, keys_and_values)
    assert row["held_bytes"] == keys_and_values + history + 3 * delta
    assert (tmp_path / "hybrid.png").exists()


def test_the_claims_on_hybrids_can_fail():
    figure = load_figure("hybrid_ratio")
    frame = pd.DataFrame({"pattern": figure.PATTERNS, "accuracy": [0.9, 0.992, 1.0, 1.0], "kv_bytes": [0, 10, 20, 40]})
    assert [claim.passed for claim in figure.claims(frame)] == [True] * 5
    frame["accuracy"], frame["kv_bytes"] = [0.995, 0.98, 1.0, 1.0], [0, 11, 20, 40]
    assert [claim.passed for claim in figure.claims(frame)] == [True, True, False, False, False]
    frame["accuracy"] = [0.004, 0.9, 0.9, 0.9]
    assert [claim.passed for claim in figure.claims(frame)] == [False, False, True, True, False]
    assert [claim.passed for claim in figure.claims(frame[:3])] == [False]


def test_recipes_are_the_demos():
    """Tasks, models, schedules and rates, but for the one arm that has another rate."""
    figure, found = load_figure("recipes"), list[tuple[str, str]]()
    for words in figure.RUNS:
        for config in expand(["experiment=recipes", *words, "seed=0"], multirun=True)[0]:
            names = [f"task={config.task_name}", f"mixer={config.mixer.name}", *words[2:]]
            theirs = compose(["experiment=demo", *names])
            for part in ("task", "mixer", "model", "optimizer", "train", "memory"):
                assert getattr(config, part) == getattr(theirs, part), (names, part)
            found.append((config.task_name, figure.variant_of(config.as_dict())))
    assert sorted(found) == sorted((task, name) for task, names in figure.VARIANTS.items() for name in names)


def test_recipes_on_a_few_steps(tmp_path):
    """Bytes of a window, by hand; what was not run is said, and fails, be it everything."""
    figure = load_figure("recipes")
    sizes = ["task.seq_len=16", "task.decode_len=4", "model.num_layers=1", "model.mlp_dim=8", "mixer.W.head_dim=4"]
    results = ran(tmp_path, "recipes", "task=text", "mixer=swa16", "mixer.W.window=4", *sizes)
    assert figure.main(tmp_path, results) == 1
    (row,) = pd.read_csv(tmp_path / "recipes.csv").to_dict("records")
    assert (row["task"], row["variant"], row["steps"]) == ("text", "swa16", 4)
    assert row["held_bytes"] == 16 * 2 * 4 * 4 * 4 + 2 * 16 * 4  # a page of 4 heads of 4; two columns
    assert (tmp_path / "recipes.png").exists()
    figure.draw(figure.table([]), tmp_path / "none.png")
    assert [claim.passed for claim in figure.claims(figure.table([]))] == [False]


def test_the_claims_on_recipes_can_fail():
    figure = load_figure("recipes")
    text = {"mha": 2.01, "gqa": 2.02, "mqa": 2.03, "mla": 2.1, "swa64": 2.0, "swa32": 2.1, "swa16": 2.2}
    text[figure.SLOWER] = 2.005
    recall = dict.fromkeys(figure.RECALL, 0.995)

    def frame():
        values = [("text", *pair) for pair in text.items()] + [("mqar", *pair) for pair in recall.items()]
        rows = [(*row, row[-1], seed) for row in values for seed in range(3)]
        return pd.DataFrame(rows, columns=["task", "variant", "value", "validation", "seed"])

    def passed(rows):
        return [claim.passed for claim in figure.claims(rows)]

    def with_values(name, *values):
        rows = frame()
        rows.loc[(rows.task == "text") & (rows.variant == name), "value"] = values
        return rows

    assert passed(frame()) == [True] * 7
    text["swa64"], text["gqa"], recall["hybrid"], recall["mla"] = 1.98, 2.005, 0.97, 0.98
    assert passed(frame()) == [False, False, False, True, True, False, True]
    text["swa64"], text["gqa"], recall["hybrid"] = 2.0, 2.02, 0.995
    assert not passed(with_values("mha", 1.99, 2.01, 2.03))[0], "as good on the mean, but seeds lie too far apart"
    assert not passed(with_values("gqa", 1.99, 2.02, 2.05))[5]
    one_seed = frame()
    one_seed.loc[one_seed.variant == "hybrid", "value"] = [0.999, 0.999, 0.97]
    assert not passed(one_seed)[1]
    chosen = frame()
    chosen.loc[chosen.variant == figure.SLOWER, "validation"] = 3.0
    assert not passed(chosen)[4], "the rate is the one that validation chose"
    assert passed(frame()[:-1]) == passed(frame()[:0]) == [False]
    other_seed = frame()
    other_seed.loc[other_seed.index[-1], "seed"] = 7
    assert passed(other_seed) == [False]


def test_recall_of_one_mixer_on_a_few_steps(tmp_path):
    """Both rates were tried, and the table says which was kept; what was not run fails its claim."""
    figure = load_figure("mixers_mqar")
    words = ["task=mqar", "task.writes=2", *figure.MAMBA2.sweep, *SMALL_RECALL]
    results = ran(tmp_path, "mixers_mqar", *words, "mixer.M.head_dim=4")
    assert figure.main(tmp_path, results) == 1
    (row,) = pd.read_csv(tmp_path / "mixers.csv").to_dict("records")
    assert (row["task"], row["mixer"]) == ("overwritten", figure.MAMBA2.name)
    assert row["learning_rate"] in (0.02, 0.01)
    matrix, inner, outer = 2 * 4 * 16, 3 * (2 * 4 + 2 * 16), 2 * 16  # numbers; columns of both convolutions
    assert row["held_bytes"] == 4 * (matrix + inner + outer)
    assert (tmp_path / "mixers.png").exists()


def test_the_claims_on_recall_can_fail():
    figure = load_figure("mixers_mqar")
    by_size = figure.GATED_BY_SIZE, figure.MAMBA2_BY_SIZE
    plain = {arm: 0.5 + 0.1 * place for arms in by_size for place, arm in enumerate(arms)} | {figure.LINEAR: 0.9}
    overwritten = {figure.GATED: 0.95, figure.MAMBA2: 0.9, figure.LINEAR: 0.5}
    overwritten |= dict(zip(figure.TWICE, (0.98, 0.93, 0.6), strict=True))

    def frame():
        groups = (("plain", plain), ("overwritten", overwritten))
        rows = [(task, arm.name, value) for task, values in groups for arm, value in values.items()]
        return pd.DataFrame(rows, columns=["task", "mixer", "accuracy"])

    assert [claim.passed for claim in figure.claims(frame())] == [True] * 7
    overwritten[figure.MAMBA2] = 0.78
    assert [claim.passed for claim in figure.claims(frame())] == [True, False, *[True] * 5]
    overwritten[figure.TWICE[1]] = 0.95
    assert [claim.passed for claim in figure.claims(frame())] == [True, False, False, *[True] * 4]
    plain[figure.GATED_BY_SIZE[2]] = plain[figure.GATED]
    plain[figure.LINEAR] = plain[figure.MAMBA2] - 0.01
    overwritten[figure.GATED] = 0.8
    assert [claim.passed for claim in figure.claims(frame())] == [False] * 3 + [True, False, False, True]
    assert not any(claim.passed for claim in figure.claims(frame()[:0]))


@pytest.fixture
def registry():
    """What is registered is forgotten again."""
    before = dict(MIXERS)
    yield
    MIXERS.clear()
    MIXERS.update(before)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", ["ablate_delta_rule", "add_a_mixer"])
def test_notebooks_on_mixers_run(name, tmp_path, monkeypatch, capsys):
    """From composing to the picture; the mixer that one adds meets its contract on the way."""
    monkeypatch.setenv("KVLAB_WORDS", " ".join([*FEW, *SMALL_RECALL, f"results_dir={tmp_path}"]))
    monkeypatch.setenv("KVLAB_SEEDS", "0")
    monkeypatch.setenv("KVLAB_PARTS", "the norm")  # the part that is no switch of the layer
    runpy.run_path(str(EXPERIMENTS_DIR / name / "notebook.py"))
    assert (tmp_path / f"{name}.png").exists()
    assert len(capsys.readouterr().out.splitlines()) > 6
