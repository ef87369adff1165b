"""What does not hold at this scale: the measures against numpy, findings that come out either way, and the command on
runs of a few steps and on published weights of a tiny size."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from kvlab.compose import compose
from kvlab.evaluation.layerwise import Blockwise
from kvlab.lab import smollm2
from kvlab.lab.execute import execute
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.smollm2 import Material
from kvlab.schema import ConfigError
from tests.engine.families import write_folder

HERE = EXPERIMENTS_DIR / "not_at_this_scale"
NO_PASSKEYS = pd.DataFrame(columns=["method", "slots", "query_aware", "turn", "context", "right"])


@pytest.fixture(scope="module")
def scale():
    return load_figure("not_at_this_scale")


@pytest.fixture(scope="module")
def model():
    """Two layers on text, as the experiment has them, with fresh weights."""
    return Laboratory.of(compose(["task=text", "mixer=mha", "mixer.A.short_conv=0", "seed=0"])).model


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(0), (2, 40), 0, 256, np.int32))


def keys_of_the_first_layer(model, tokens):
    """[B, T, 4, 16] in float64: normed embeddings, projected; of 8 rotary dims the pairs (i, i + 4) are turned."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)
    x = params["embedding"]["embedding"][tokens]
    block = params["blocks"][0]
    h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * block["mixer_norm"]["scale"]
    keys = (h @ block["mixer"]["key"]["kernel"]).reshape(*tokens.shape, 4, 16)
    angles = np.arange(tokens.shape[1])[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    low, high = keys[..., :4], keys[..., 4:8]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin, keys[..., 8:]], axis=-1)


@pytest.mark.parametrize("factor", [1, 16])
def test_ratios_of_channels_are_those_of_float64(scale, model, tokens, factor):
    keys = keys_of_the_first_layer(model, tokens)
    keys[..., [3, 7]] *= factor
    size = np.abs(keys).mean(axis=(0, 1))
    found = scale.toys.channel_ratios(Blockwise(scale.toys.scaled_pairs(model, factor)), tokens)
    assert found.shape == (2, 4)
    np.testing.assert_allclose(found[0], size.max(axis=1) / np.median(size, axis=1), rtol=1e-4)


def test_outliers_that_are_put_in_change_no_bit(scale, model, tokens):
    exact = np.asarray(model.merge().parallel(jnp.asarray(tokens)))
    scaled = scale.toys.scaled_pairs(model, 16)
    np.testing.assert_array_equal(np.asarray(scaled.merge().parallel(jnp.asarray(tokens))), exact)
    assert np.abs(np.asarray(model.params["blocks"][0]["mixer"]["key"]["kernel"])).max() < 1  # the model is left alone
    kernel = scaled.params["blocks"][1]["mixer"]["key"]["kernel"]
    scaled.params["blocks"][1]["mixer"]["key"]["kernel"] = kernel.at[:, 3].divide(16)  # half of a pair
    assert np.abs(np.asarray(scaled.merge().parallel(jnp.asarray(tokens))) - exact).max() > 1e-4


@pytest.mark.parametrize("words", ["mixer.A.qk_norm=true", "mixer.A.bias=true", "mixer.A.rope=false"])
def test_what_such_outliers_would_change_is_refused(scale, words):
    model = Laboratory.of(compose(["task=text", "mixer=mha", words]), abstract=True).model
    with pytest.raises(ConfigError, match="must be attention with rotary embeddings"):
        scale.toys.scaled_pairs(model, 4)


def fake(scale, sign):
    """Tables in which every claim holds (`sign` 1), or none does (-1)."""
    runs, spread = scale.runs, (-0.01, 0.0, 0.01)
    good, names = ("SnapKV, pyramid", "SnapKV, ada", "KVzip", "Knorm", "recency, 4 sinks"), ("full", *runs.RECALL)
    of = [("mqar", name, slots, 0.5 + 0.1 * sign * (name in good)) for name in names for slots in (32, 16)]
    of += [("text", "full", None, 2.0), ("text", "window, 4 sinks", 64, 2.1), ("text", "window", 64, 2.1 + (sign > 0))]
    frame = pd.DataFrame(
        [
            {"task": task, "method": name, "slots": slots, "seed": seed, "value": value + off, "logit_error": 0.0}
            for task, name, slots, value in of
            for seed, off in enumerate(spread)
        ]
    )
    heads = pd.DataFrame({"task": ["mqar", "text"] * 3, "share": [0.3 + 0.1 * sign] * 6})
    cells = [("none", 0, 5.0), ("channel", 4, 5.0), ("token", 4, 5.1), ("channel", 2, 6.0), ("token", 2, 7 + sign)]
    axes = pd.DataFrame(
        [
            {"seed": 0, "scale": by, "axis": axis, "bits": bits, "perplexity": perplexity, "channel_ratio": 2.0}
            for by in scale.toys.SCALES
            for axis, bits, perplexity in cells
        ]
    )
    asked = pd.DataFrame(
        [
            {"method": cell.method, "slots": cell.slots, "turn": 1, "context": context, "right": value + off}
            for cell in scale.smollm2.CELLS
            for value in [0.5 + 0.1 * sign * (cell.method in good)]
            for context, off in enumerate(spread)
        ]
    )
    return frame, heads, axes, asked


@pytest.mark.parametrize(("sign", "holds"), [(1, True), (-1, False)])
def test_findings_come_out_either_way(scale, sign, holds):
    found = scale.findings(*fake(scale, sign))
    assert len(found) == 16
    assert {row.holds for row in found} == {holds}


def test_the_committed_findings_follow_from_the_tables_beside_them(scale):
    tables = [pd.read_csv(HERE / f"{name}.csv") for name in ("runs", "heads", "axes", "smollm2")]
    committed = pd.read_csv(HERE / "findings.csv")
    found = scale.findings(*tables)
    assert [(row.where, row.holds) for row in found] == list(zip(committed["where"], committed.holds, strict=True))
    assert all(claim.passed for claim in scale.claims(tables[0], *tables[2:]))


def test_a_difference_within_its_interval_is_none(scale):
    frame, *rest = fake(scale, 1)
    is_noisy = (frame.method == "Knorm") & (frame.seed == 0)
    frame.loc[is_noisy, "value"] -= 0.2  # the mean is above random still
    at = {(row.arxiv, row.where): row.holds for row in scale.findings(frame, *rest)}
    assert not at["2406.11430", "recall, 32 slots"]
    assert at["2407.11550", "recall, 32 slots"]


def test_what_was_not_run_says_so(scale):
    frame, heads, axes, _ = fake(scale, -1)
    found = scale.findings(frame[frame.method != "SnapKV"], heads, axes, NO_PASSKEYS)
    assert {row.where for row in found if row.holds is None} >= {"pass keys, SmolLM2, 240 slots", "recall, 16 slots"}
    assert all(row.measured == "not run" for row in found if row.holds is None)


def test_the_preconditions_can_fail(scale):
    frame, _, axes, asked = fake(scale, 1)
    failed = {claim.what for claim in scale.claims(frame, axes, asked) if not claim.passed}
    assert failed == {"recall is learned", "SmolLM2 finds pass keys, full cache"}
    axes.loc[(axes.scale == 16) & (axes.axis != "token"), "perplexity"] *= 1.001
    failed |= {claim.what for claim in scale.claims(frame, axes, asked) if not claim.passed}
    assert {"outliers change nothing in full precision", "nor by channel"} < failed


FEW = ["task.num_test=4", "task.num_validation=4", "train.num_steps=4", "train.eval_every=4", "measure.batch_size=4"]


def test_the_command_on_a_few_steps(scale, tmp_path, monkeypatch, capsys):
    """Without SmolLM2 its rows are not run, and all else is written; the exit status says that nothing was learned."""
    monkeypatch.setenv(smollm2.VARIABLE, str(tmp_path / "nowhere"))
    monkeypatch.setattr(scale.toys, "NUM_SEQUENCES", 4)
    monkeypatch.setattr(scale.toys, "SCALES", (1, 4))
    knorm = scale.runs.swept([scale.runs.RECALL["Knorm"]], scale.runs.HALF)
    window = scale.runs.swept([scale.runs.WINDOWS["window"]], scale.runs.STREAMED)
    for words in (scale.runs.MQAR, (*scale.runs.MQAR, *knorm), scale.runs.TEXT, (*scale.runs.TEXT, *window)):
        fixed = [f"results_dir={tmp_path}", "train.checkpoint_every=4", "seed=0"]
        assert execute(compose(["experiment=not_at_this_scale", *words, *FEW, *fixed])) == "done"
    assert scale.main(tmp_path, tmp_path / "not_at_this_scale") == 1
    runs, heads, layers = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("runs", "heads", "layers"))
    assert sorted(runs.method) == ["Knorm", "full", "full", "window"]
    assert len(heads) == 2 * 2 * 4
    both = layers[layers.silent.isna()].set_index("task").value
    assert both["text"] == pytest.approx(runs[(runs.task == "text") & (runs.method == "full")].value.item(), rel=1e-4)
    found = pd.read_csv(tmp_path / "findings.csv")
    assert (found[found["where"].str.contains("SmolLM2")].measured == "not run").all()
    assert (tmp_path / "not_at_this_scale.png").is_file()
    assert "SmolLM2's rows are not run" in capsys.readouterr().err


def test_pass_keys(scale, tmp_path):
    """Bytes are the tokens here, since the folder has no tokenizer."""
    (tmp_path / "hay.txt").write_text("abcdefgh" * 2000)
    material = Material(write_folder("llama_gqa", tmp_path / "weights"), "")
    sizes = load_figure("passkey_smollm2").Sizes(330, 2, 2, 64, text=str(tmp_path / "hay.txt"))
    found = scale.smollm2.measure(material, tmp_path, scale.smollm2.CELLS[-4:], sizes)
    assert found.groupby("method").size().to_dict() == {"KVzip": 4, **dict.fromkeys(found.method[4:], 2)}
    assert found.right.between(0, 1).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "smollm2.csv"), found, check_dtype=False, rtol=1e-3)


def test_every_run_has_a_name(scale):
    """A configuration of the sweeps is found again in its record."""
    for name, of in scale.runs.RECALL.items():
        words, slots = scale.runs.swept([of], 32)
        config = compose(["experiment=not_at_this_scale", *scale.runs.MQAR, words, slots, "seed=0"])
        assert scale.runs.name_of(config.as_dict()) == name


def test_the_notebook_runs(capsys):
    runpy.run_path(str(HERE / "notebook.py"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 16
    assert all("the same to the last bit: True" in line for line in printed[-3:])


def test_the_page_has_every_paper(scale):
    page = (HERE / "README.md").read_text()
    assert all(row.arxiv in page for row in scale.findings(*fake(scale, 1)))
    assert "kvlab reproduce not_at_this_scale" in page
