"""The notebooks that add something of one's own run from their first cell to their picture, at a tiny size."""

import runpy

import pytest

from kvlab.lab.experiments import EXPERIMENTS_DIR
from kvlab.tasks import TASKS
from kvlab.weights.families import FAMILIES

FEW = [
    "model.model_dim=16", "train.num_steps=4", "train.batch_size=4", "train.eval_every=4", "train.checkpoint_every=4",
    "task.num_test=4", "task.num_validation=4", "measure.batch_size=4", "measure.decode_steps=4",
    "optimizer.name=adamw",
]  # fmt: skip


@pytest.fixture
def ran(tmp_path, monkeypatch, capsys):
    """Runs a notebook; its names when it has ended, and what it printed. What it registers is forgotten again."""
    before = {id(registry): dict(registry) for registry in (TASKS, FAMILIES)}

    def run(name, *words):
        monkeypatch.setenv("KVLAB_WORDS", " ".join([*words, f"results_dir={tmp_path}"]))
        found = runpy.run_path(str(EXPERIMENTS_DIR / name / "notebook.py"))
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return found, capsys.readouterr().out

    yield run
    for registry in (TASKS, FAMILIES):
        for name in set(registry) - set(before[id(registry)]):
            del registry[name]


def test_a_task_of_ones_own(ran, monkeypatch):
    monkeypatch.setenv("KVLAB_TASK", "seq_len=16 num_test=4 num_validation=4")
    monkeypatch.setenv("KVLAB_LAGS", "6")
    found, printed = ran("add_a_task", *FEW)
    assert len(found["found"]) == len(found["MEMORIES"]) * len(found["LAGS"])
    for (_, lag), record in found["found"].items():
        assert record.config["task"] == {
            "type": "echo", "lag": lag, "seq_len": 16, "vocab_size": 16, "num_validation": 4, "num_test": 4,
        }  # fmt: skip
    alone = found["alone"]
    assert alone.labels[0].tolist() == alone.tokens[0, :-3].tolist()
    assert alone.label_positions[0].tolist() == list(range(3, 12))
    assert "lag = 12: must be in [1, 11], below seq_len" in printed


def test_a_data_set_of_ones_own(ran, monkeypatch, tmp_path):
    monkeypatch.setenv("KVLAB_DATA", str(tmp_path / "data"))
    found, printed = ran("add_a_data_set", *FEW, "task.seq_len=32", "task.decode_len=4", "model.num_layers=1")
    by_bytes, by_tokens = found["found"]["bytes"], found["found"]["tokens"]
    assert (by_bytes.quality.metric, by_tokens.quality.metric) == ("bits_per_byte", "perplexity")
    for bits, _ in found["rows"].values():
        assert 3 < bits < 9, "hardly trained"
    held = [held for _, held in found["rows"].values()]
    assert held[1] < held[0] / 1.5, "a token stands for several bytes"
    assert "1024 tokens; the test split is" in printed


def test_an_experiment_of_ones_own(ran, monkeypatch, tmp_path):
    """Its claims on bytes are true of runs of four steps; that on recall is not, and says so."""
    monkeypatch.setenv("KVLAB_SEEDS", "0")
    monkeypatch.setenv("KVLAB_WINDOWS", "8")
    found, printed = ran("add_an_experiment", *FEW)
    made = found["claims"](found["frame"])
    assert [bool(claim.passed) for claim in made][:3] == [True, True, False]
    assert found["status"] == 1
    assert "of 4 claims pass" in printed
    assert (tmp_path / "add_an_experiment.csv").read_text().startswith("sees,seed,accuracy,kv_bytes\n8,0,")


def test_a_family_of_ones_own(ran, monkeypatch, tmp_path):
    monkeypatch.setenv("KVLAB_NIMBUS", str(tmp_path / "nimbus"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "add_a_family.png").symlink_to(tmp_path / "nimbus" / "add_a_family.png")
    _, printed = ran("add_a_family")
    assert "written back bit for bit: True" in printed
    for said in ("cloud.last_norm: is missing", "cloud.0.wq: shape [63, 64]: must be [64, 64]", "cloud.3.wo: is unexp"):
        assert said in printed
