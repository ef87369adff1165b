"""What does not hold at this scale: the measures against numpy, findings that come out either way, and the command on
runs of a few steps and on published weights of a tiny size."""

import re
import runpy
from collections import Counter

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
from kvlab.tokenizers import ByteTokenizer
from tests.engine.families import write_byte_folder

HERE = EXPERIMENTS_DIR / "not_at_this_scale"
TABLES = ("runs", "heads", "axes", "smollm2", "mixers", "lengths", "ruler")
NO_PASSKEYS = pd.DataFrame(columns=["method", "slots", "query_aware", "turn", "context", "right"])
NO_RULER = pd.DataFrame(columns=["task", "context", "example", "tokens", "right", "chance"])


@pytest.fixture(scope="module")
def scale():
    return load_figure("not_at_this_scale")


@pytest.fixture(scope="module")
def model():
    """Two layers on text, as the experiment has them, with fresh weights."""
    words = ["mixer.A.short_conv=0", "mixer.A.rope_fraction=0.5", "mixer.A.rope_base=10000", "mixer.A.qk_norm=false"]
    return Laboratory.of(compose(["task=text", "mixer=mha", *words, "mixer.A.local_start=0", "seed=0"])).model


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
    plain = ["mixer.A.qk_norm=false", "mixer.A.local_start=0"]
    model = Laboratory.of(compose(["task=text", "mixer=mha", *plain, words]), abstract=True).model
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
    return scale.Tables(frame, heads, axes, asked, *fake_mixers(scale, sign, spread), fake_ruler(scale, sign))


def fake_mixers(scale, sign, spread):
    """Bits of text, of which KDA has fewer (`sign` 1) or more, and recall: decays help, and rules count, or do not."""
    mixers = scale.mixers
    gains = [
        {"method": name, "seed": seed, "value": value + off, "held_bytes": 100}
        for name, value in ((mixers.KDA, 2.0 - 0.1 * sign), (mixers.GATED, 2.0))
        for seed, off in enumerate(spread)
    ]
    of = {mixers.GATED: 0.7, mixers.SLOW: 0.75, mixers.FAST: 0.65, mixers.PLAIN: 0.4, mixers.UNGATED: 0.5}
    if sign < 0:
        of |= {mixers.SLOW: 0.6, mixers.PLAIN: 0.68, mixers.UNGATED: 0.9}
    lengths = [
        {"method": name, "length": length, "seed": seed, "value": value + off}
        for name, value in of.items()
        for length in mixers.LENGTHS
        for seed, off in enumerate(spread)
    ]
    return pd.DataFrame(gains), pd.DataFrame(lengths)


def fake_ruler(scale, sign):
    """Full caches that find nearly all, or little more than chance."""
    names, right = (scale.ruler.PASSKEY, *scale.ruler.TASKS), 0.6 + 0.3 * sign
    rows = [
        {"task": task, "context": context, "right": right + off, "chance": 0.2}
        for task in names
        for context in (512, 1024)
        for off in (-0.05, 0.05)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("sign", "holds"), [(1, True), (-1, False)])
def test_findings_come_out_either_way(scale, sign, holds):
    *found, dms, cartridges = scale.findings(fake(scale, sign))
    assert len(found) == 16 + 1 + 4 + 6
    assert {row.holds for row in found} == {holds}
    assert [(row.arxiv, row.holds) for row in (dms, cartridges)] == [("2506.05345", None), ("2506.06266", None)]
    assert not any(character.isdigit() for character in dms.measured + cartridges.measured)


def test_the_committed_findings_follow_from_the_tables_beside_them(scale):
    tables = scale.Tables(*(pd.read_csv(HERE / f"{name}.csv") for name in TABLES))
    committed = pd.read_csv(HERE / "findings.csv", keep_default_na=False)
    written = {True: "True", False: "False", None: ""}
    found = [(row.claim, row.where, written[row.holds]) for row in scale.findings(tables)]
    assert found == list(committed[["claim", "where", "holds"]].astype(str).itertuples(index=False, name=None))
    assert all(claim.passed for claim in scale.claims(tables))


def test_a_difference_within_its_interval_is_none(scale):
    tables = fake(scale, 1)
    is_noisy = (tables.runs.method == "Knorm") & (tables.runs.seed == 0)
    tables.runs.loc[is_noisy, "value"] -= 0.2  # the mean is above random still
    at = {(row.arxiv, row.where): row.holds for row in scale.findings(tables)}
    assert not at["2406.11430", "recall, 32 slots"]
    assert at["2407.11550", "recall, 32 slots"]


def test_what_was_not_run_says_so(scale):
    tables, gated = fake(scale, -1), scale.mixers.GATED
    fewer = {"runs": "SnapKV", "mixers": gated, "lengths": gated}
    kept = {name: table[table.method != fewer[name]] for name, table in tables._asdict().items() if name in fewer}
    *found, _, _ = scale.findings(tables._replace(**kept, smollm2=NO_PASSKEYS, ruler=NO_RULER))
    places = {row.where for row in found if row.holds is None}
    assert places >= {"pass keys, SmolLM2, 240 slots", "recall, 16 slots", "text by the byte", "SmolLM2"}
    assert sum(row.arxiv == "2412.06464" for row in found if row.holds is None) == 2
    assert all(row.measured == "not run" for row in found if row.holds is None)


def test_the_preconditions_can_fail(scale):
    tables = fake(scale, 1)
    failed = {claim.what for claim in scale.claims(tables) if not claim.passed}
    recalls = "both delta rules recall at the training length"
    assert failed == {"recall is learned", "SmolLM2 finds pass keys, full cache", recalls}
    axes = tables.axes
    axes.loc[(axes.scale == 16) & (axes.axis != "token"), "perplexity"] *= 1.001
    tables.mixers.loc[tables.mixers.method == scale.mixers.KDA, ["value", "held_bytes"]] *= 2
    failed |= {claim.what for claim in scale.claims(tables) if not claim.passed}
    assert {"outliers change nothing in full precision", "nor by channel"} < failed
    assert {"KDA and Gated DeltaNet learn text: bits a byte", "and hold as many bytes"} < failed


def one_choice(words):
    """The words of a sweep over mixers and rates, of which the first of each stays."""
    return [word.split(",")[0] + "]" * ("[" in word) if "," in word else word for word in words]


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
    text, recall = one_choice(scale.mixers.TEXT), (*scale.mixers.RECALL, *scale.mixers.VARIANTS[scale.mixers.SLOW])
    for words in (text, recall):
        assert execute(compose(["experiment=not_at_this_scale", *words, *FEW, *fixed])) == "done"
    assert scale.main(tmp_path, tmp_path / "not_at_this_scale") == 1
    runs, heads, layers = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("runs", "heads", "layers"))
    assert sorted(runs.method) == ["Knorm", "full", "full", "window"]
    assert len(heads) == 2 * 2 * 4
    both = layers[layers.silent.isna()].set_index("task").value
    assert both["text"] == pytest.approx(runs[(runs.task == "text") & (runs.method == "full")].value.item(), rel=1e-4)
    found = pd.read_csv(tmp_path / "findings.csv", keep_default_na=False)
    assert (found[found["where"].str.contains("SmolLM2")].measured == "not run").all()
    gains, longer = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("mixers", "lengths"))
    assert list(gains.method) == ["Gated DeltaNet"]
    assert gains.learning_rate.item() == 0.01
    assert list(longer.length) == [64, 128, 256]
    assert set(longer.method) == {"Gated DeltaNet, slow decay"}
    assert (tmp_path / "not_at_this_scale.png").is_file()
    assert "SmolLM2's rows are not run" in capsys.readouterr().err


def test_pass_keys(scale, tmp_path):
    """Bytes are the tokens here, since the folder has no tokenizer."""
    (tmp_path / "hay.txt").write_text("abcdefgh" * 2000)
    material = Material(write_byte_folder(tmp_path / "weights"), "")
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


def test_every_mixer_has_a_name(scale):
    """As above; and no run of another mixer is taken for an attention's."""
    for name, words in scale.mixers.VARIANTS.items():
        config = compose(["experiment=not_at_this_scale", *scale.mixers.RECALL, *words, "seed=0"]).as_dict()
        assert (scale.mixers.variant_of(config), scale.runs.name_of(config)) == (name, None)
    config = compose(["experiment=not_at_this_scale", *scale.runs.MQAR, "seed=0"]).as_dict()
    assert (scale.mixers.variant_of(config), scale.runs.name_of(config)) == (None, "full")


@pytest.mark.parametrize("size", [12, 40])
def test_common_words_are_the_most_common(scale, size):
    made = scale.ruler.common_words(np.random.default_rng(0), size)
    assert made == scale.ruler.common_words(np.random.default_rng(0), size)
    listed = made.prompt.split("\n\n")[1].split("\n")[1].split()[1::2]
    counts = Counter(listed)
    assert len(listed) == 2 * size
    assert set(made.candidates) == set(listed)
    assert {word for word, _ in counts.most_common(5)} == set(made.answer)
    assert min(counts[word] for word in made.answer) > max(counts[word] for word in set(listed) - set(made.answer))
    assert made.chance == 5 / len(counts)


def test_frequent_words_are_the_most_frequent(scale):
    made = scale.ruler.frequent_words(np.random.default_rng(1), 200)
    counts = Counter(made.prompt.split("\n")[1].split())
    assert [word for word, _ in counts.most_common(4)] == ["....", *made.answer]
    assert set(counts) == {"....", *made.candidates}
    assert counts["...."] == int(200 / sum(1 / k**2 for k in range(1, 201)))


def test_variables_are_tracked_by_reading_the_prompt(scale):
    """Each value is looked up statement by statement, as the text has them."""
    made = scale.ruler.variable_tracking(np.random.default_rng(2), 6)
    context, question = made.prompt.split("\n\n")[1].split("Question:")
    values = {}
    for name, _, value in re.findall(r"VAR (\w+) = (VAR )?(\w+)", context):
        values[name] = values.get(value, value)
    (asked,) = set(re.findall(r"\d{5}", question))
    assert sorted(name for name, value in values.items() if value == asked) == sorted(made.answer)
    assert set(values) == set(made.candidates)
    assert made.chance == 3 / 12
    assert context.count(scale.ruler.FILLER) == 6
    assert asked not in made.prompt.split("\n\n")[0]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("ab, cd, ef", 1),
        ("cd and ab", 2 / 3),
        ("gh ab cd ef", 2 / 3),  # the first three count
        ("abcd ab ab ab", 1 / 3),
        ("VAR xx, none of these", 0),
    ],
)
def test_what_is_said_is_scored_by_the_first_candidates(scale, said, right):
    example = scale.ruler.Example("", ("ab", "cd", "ef", "gh"), ("ab", "cd", "ef"))
    assert example.right(said) == pytest.approx(right)


def test_a_prompt_fills_its_context(scale):
    ruler, count = scale.ruler, lambda text: list(text.encode())
    for number, make in enumerate(ruler.TASKS.values()):
        made = ruler.fitted(make, count, (number, 0), 2600)
        assert len(made.prompt) <= 2600
        assert ruler.fitted(make, count, (number, 0), 5200).prompt > ""
        assert 2600 - len(made.prompt) < 150
    with pytest.raises(ValueError, match="must have room for one part"):
        ruler.fitted(ruler.variable_tracking, count, (0, 0), 100)


def test_ruler_answers_with_the_likeliest_token(scale, tmp_path, monkeypatch):
    """Bytes are the tokens. Token by token the parallel form says the same,
    whatever the prompts' lengths."""
    (tmp_path / "hay.txt").write_text("abcdefgh" * 20_000)
    material = Material(write_byte_folder(tmp_path / "weights"), "")
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: bytes(each % 256 for each in ids).decode("latin-1"))
    sizes = scale.ruler.Sizes((1500,), 2, 2, 2, 64, 5, str(tmp_path / "hay.txt"))
    found = scale.ruler.measure(material, tmp_path, sizes)
    assert found.groupby("task").size().to_dict() == dict.fromkeys([scale.ruler.PASSKEY, *scale.ruler.TASKS], 2)
    assert found.right.between(0, 1).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "ruler.csv"), found, check_dtype=False, rtol=1e-3)
    passkey = load_figure("passkey_smollm2")
    small = passkey.Sizes(330, 1, 2, 64, text=str(tmp_path / "hay.txt"))
    bench = passkey.bench_of(material, small, query_aware=False, num_contexts=1)
    prompts = [[7, 8, 9] * 30, [5, 6] * 20]
    model = bench.model.merge()
    for prompt, said in zip(prompts, scale.ruler.answers(bench, prompts, sizes, 100), strict=True):
        for chosen in said:
            logits = model.logits(model.parallel(jnp.asarray([prompt])))[0, -1]
            assert chosen == int(logits.argmax())
            prompt = [*prompt, chosen]


def test_the_notebook_runs(capsys):
    runpy.run_path(str(HERE / "notebook.py"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 16
    assert all("the same to the last bit: True" in line for line in printed[-3:])


def test_the_page_has_every_paper(scale):
    page = (HERE / "README.md").read_text()
    assert all(row.arxiv in page for row in scale.findings(fake(scale, 1)))
    assert "kvlab reproduce not_at_this_scale" in page
