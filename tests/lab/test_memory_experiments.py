"""The experiments on memory: their tables against numpy and the records, their figures on runs of a few steps."""

import numpy as np
import pandas as pd
import pytest

from kvlab import cli
from kvlab.compose import compose
from kvlab.lab.execute import execute
from kvlab.lab.experiments import load_figure
from kvlab.lab.results import read_records


def rounded_by(keys, bits, axis, group):
    """Keys [T, D] rounded to `bits` in float64: `axis` 0 by channel over `group` tokens, 1 by token over `group`
    channels; each range has its lowest number and its highest."""
    along = keys if axis else keys.T
    parts = along.reshape(len(along), -1, group)
    low, high = parts.min(axis=-1, keepdims=True), parts.max(axis=-1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    found = (np.round((parts - low) / step) * step + low).reshape(along.shape)
    return found if axis else found.T


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    ("name", "axis", "group"), [("channel, page 32", 0, 32), ("token, groups of 32", 1, 32), ("token", 1, 64)]
)
def test_attention_errors_are_those_of_float64(name, axis, group, bits):
    kivi = load_figure("kivi_axes")
    queries, keys, _ = kivi.draw(10, 2)
    held = np.stack([rounded_by(each, bits, axis, group) for each in keys])
    expected = np.abs(kivi.exact_rows(queries, held) - kivi.exact_rows(queries, keys)).sum(axis=2).mean(axis=1) / 2
    found = kivi.errors(10, kivi.NAMED[name], bits, 2, scale_dtype="float32")
    np.testing.assert_allclose(found, expected, rtol=0.02)  # a number half way between two may go either way


def test_the_claims_on_axes_can_fail():
    kivi = load_figure("kivi_axes")
    frame = pd.read_csv(kivi.HERE / "axes.csv")
    assert all(claim.passed for claim in kivi.claims(frame))
    frame.loc[(frame.axis == "channel, page 16") & (frame.ratio == 30), "error"] *= 1.2
    assert [claim.what for claim in kivi.claims(frame) if not claim.passed] == [
        f"int{bits} by channel: error does not depend on outliers" for bits in (4, 2)
    ]


def test_every_sweep_of_an_experiment_is_run(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr("kvlab.commands.runs._run", lambda words, multirun: ran.append(words) or 0)
    monkeypatch.setattr("kvlab.lab.experiments.load_figure", lambda name: _Figure)
    monkeypatch.setattr("sys.argv", ["kvlab", "reproduce", "eviction_mqar", "--output", str(tmp_path)])
    assert cli.main() == 0
    assert [words[2:] for words in ran] == [["a=1"], ["b=2", "c=3"]]


class _Figure:
    RUNS = (("a=1",), ("b=2", "c=3"))

    @staticmethod
    def main(output, results):
        return 0


FEW = ["task.num_test=4", "task.num_validation=4", "train.num_steps=4", "train.eval_every=4", "measure.batch_size=4"]


def ran(tmp_path, experiment, *variants):
    for words in variants:
        config = compose(
            [f"experiment={experiment}", f"results_dir={tmp_path}", *FEW, "train.checkpoint_every=4", *words]
        )
        assert execute(config) == "done"
    return tmp_path / experiment


def test_eviction_on_a_few_steps(tmp_path):
    """Bytes of the ledger alone are those that the run held; what was not run fails its claim."""
    eviction = load_figure("eviction_mqar")
    section = f"memory.compression={eviction.methods.NAMED['recency'].words}"
    results = ran(tmp_path, "eviction_mqar", [], [section, "memory.budget=0.5"])
    assert eviction.main(tmp_path, results) == 1
    frame = pd.read_csv(tmp_path / "eviction.csv")
    for record in read_records(results):
        rows = frame[(frame.method == eviction.method_of(record)) & (frame.slice == "128:32")]
        assert rows.held_bytes.item() == record.memory.allocated_bytes / record.memory.batch_size
    assert (tmp_path / "eviction.png").exists()
    assert sorted(frame.labels.dropna()) == [4 * 16, 4 * 32]


def test_the_frontier_on_a_few_steps(tmp_path):
    words = ["mixer=mqa", "task=mqar", "task.test=['128:32']", "measure.decode_steps=64"]
    results = ran(tmp_path, "frontier_memory", words, [*words, "memory.format=int4"])
    frontier = load_figure("frontier_memory")
    assert frontier.main(tmp_path, results) == 1
    frame = pd.read_csv(tmp_path / "frontier.csv", keep_default_na=False)
    assert set(frame.method) == {"none", "int4"}
    assert frame[frame.method == "int4"].held_bytes.item() < frame[frame.method == "none"].held_bytes.item()


def test_the_indexer_on_a_few_steps(tmp_path):
    """Both axes come from the records; an arm that was not run fails the claims."""
    indexer = load_figure("indexer")
    results = ran(tmp_path, "indexer", indexer.DENSE.words, indexer.UNTRAINED.words)
    assert indexer.main(tmp_path, results) == 1
    frame = pd.read_csv(tmp_path / "indexer.csv").drop_duplicates("arm").set_index("arm")
    per_token = 4 * 2 * 2 * 16  # float32 keys and values of 2 heads
    dense, untrained = frame.loc["dense"], frame.loc["untrained indexer"]
    assert untrained.held_bytes - dense.held_bytes == 4 * 16 * 128
    assert dense.read_bytes - untrained.read_bytes == per_token * (128 - 16) - 4 * 16 * 128
    assert (tmp_path / "indexer.png").exists()


def test_at_random_is_what_a_random_choice_reads():
    """A token of the pairs, among 16 that each question draws of those that it sees."""
    rng, hits, draws = np.random.default_rng(0), 0, 0
    for place in np.repeat(np.arange(64, 128, 2), 200):
        hits, draws = hits + (rng.choice(place + 1, 16, replace=False) < 64).sum(), draws + 64
    assert load_figure("indexer").at_random("128:32") == pytest.approx(hits / draws, abs=0.01)


def test_a_loss_is_below_its_bound_only_with_its_interval():
    """Pairs lose 1% on every seed, or 1% on the mean of seeds that differ by 3%."""
    sharing = load_figure("kv_sharing")

    def passes(losses):
        rows = [("text", "mha", seed, 2.0) for seed in range(3)]
        rows += [("text", "cla", seed, 2.0 * (1 + loss)) for seed, loss in enumerate(losses)]
        frame = pd.DataFrame(rows, columns=["task", "variant", "seed", "value"]).assign(kv_bytes=1, read_bytes=1)
        return {claim.what: claim.passed for claim in sharing.claims(frame)}["text: loss of pairs"]

    assert passes([0.01, 0.01, 0.01])
    assert not passes([0.025, 0.01, -0.005])


def test_shared_keys_and_values_on_a_few_steps(tmp_path):
    """Half the bytes held, and as many read; what was not run fails its claim."""
    words = ["task=mqar", "model.num_layers=2", "task.test=['128:32']"]
    results = ran(tmp_path, "kv_sharing", ["mixer=mha", *words], ["mixer=cla", *words])
    sharing = load_figure("kv_sharing")
    assert sharing.main(tmp_path, results) == 1
    frame = pd.read_csv(tmp_path / "sharing.csv")
    assert frame.variant.tolist() == ["mha", "cla"]
    assert frame.kv_bytes.tolist() == [2 * 128 * 2 * 64 * 4, 128 * 2 * 64 * 4]
    assert frame.read_bytes.nunique() == 1
    assert frame.num_params.diff().iloc[1] == -2 * 64 * 64
    passed = {claim.what: claim.passed for claim in sharing.claims(frame)}
    assert [name for name, passes in passed.items() if name.startswith("text")] == [
        "text: bytes held",
        "text: bytes read for a token",
        "text: loss of pairs",
    ]
    assert not any(passes for name, passes in passed.items() if name.startswith("text"))
    assert passed["mqar: keys and values held, pairs : own"]
    frame["value"] = [0.9, 0.88]
    frame.loc[frame.variant == "cla", "kv_bytes"] = 1
    assert not any(claim.passed for claim in sharing.claims(frame) if "held" in claim.what or "accuracy" in claim.what)
    assert (tmp_path / "sharing.png").exists()
