"""The experiments with published weights at a tiny size: random weights, words for a text. What they claim of SmolLM2
is checked where that is; here, that everything is computed, written and drawn."""

import runpy

import numpy as np
import pandas as pd
import pytest

from kvlab.lab import smollm2
from kvlab.lab.experiments import EXPERIMENTS_DIR, load_figure, load_part
from kvlab.lab.smollm2 import MISSING, Bench, Material, Missing, Window
from kvlab.schema import ConfigError
from tests.engine.families import write_byte_folder, write_folder
from tests.lab.test_generation import word_tokenizer

WITH_WEIGHTS = ("sinks_smollm2", "quest_recall", "passkey_smollm2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_folder("llama_gqa", tmp_path_factory.mktemp("weights") / "tiny")
    word_tokenizer(folder / "tokenizer.json")
    words = np.random.default_rng(0).integers(0, 320, 600)
    return Material(folder, " ".join(f"w{word}" for word in words))


def test_tokens_are_those_of_the_text_from_a_character_on(tiny):
    words = tiny.text[tiny.text.index(" ") + 1 :].split()[:5]
    assert tiny.tokens(tiny.text.index(" "), 5).tolist() == [int(word[1:]) for word in words]
    with pytest.raises(ConfigError, match="num_tokens = 9999: must be at most 600"):
        tiny.tokens(0, 9999)


def test_a_window_is_scored_as_the_parallel_form_scores_it(tiny):
    bench = Bench.of_text(tiny, Window(0, 48, 20), ["memory.chunk_len=8", "memory.page_size=8"])
    found = bench.through({})
    (plain,) = bench.scorer.parallel(bench.model.params, "test")
    assert found.slices[0].nll == pytest.approx(plain.nll, rel=1e-5)
    assert found.verified == "the parallel form"
    assert found.slices[0].weight == 20


def test_sinks(tiny, tmp_path, capsys):
    figure = load_figure("sinks_smollm2")
    sizes = figure.Sizes(Window(0, 64, 32), budget=12, attention_len=32, chunk_len=8, flat_layers=1)
    figure.reproduce(tiny, tmp_path, sizes)
    found = pd.read_csv(tmp_path / "sinks.csv")
    assert found.sinks.tolist() == ["full", "0", "1", "4"]
    assert found.logit_difference.max() < 1e-4
    assert found.perplexity.nunique() == 4
    assert (tmp_path / "sinks.png").is_file()
    assert "claims pass" in capsys.readouterr().out


def test_page_recall(tiny, tmp_path):
    figure = load_figure("quest_recall")
    figure.reproduce(tiny, tmp_path, figure.Sizes(0, 128, 4, (100, 120), first_layer=1))
    found = pd.read_csv(tmp_path / "recall.csv").set_index(["fraction", "first_page_forced", "method"]).share
    assert len(found) == 24
    assert (found[0.25, False].drop("oracle") <= found[0.25, False, "oracle"] + 1e-6).all()


def test_axes_and_sealed_pages(tiny, tmp_path):
    smol = load_part("kivi_axes", "smollm2")
    smol.reproduce(tiny, tmp_path, smol.Sizes(Window(0, 64, 32), page_size=16, chunk_len=16, residual=8, group=8))
    cells, pages = (pd.read_csv(tmp_path / f"smollm2_{name}.csv") for name in ("axes", "pages"))
    assert len(cells) == 15
    assert cells.perplexity[1:].nunique() == 14
    assert pages.logit_difference.max() < 1e-4
    errors = cells.set_index(["axes", "bits", "residual"]).key_error
    assert (errors["K channel, V token", 2, 0] > errors["K channel, V token", 4, 0]).all()


def test_passkeys(tmp_path):
    """Bytes are the tokens here, since the folder has no tokenizer."""
    (tmp_path / "hay.txt").write_text("abcdefgh" * 2000)
    material = Material(write_byte_folder(tmp_path / "weights"), "")
    figure = load_figure("passkey_smollm2")
    sizes = figure.Sizes(330, 2, 2, 64, methods=("h2o",), text=str(tmp_path / "hay.txt"))
    figure.draw(figure.measure(material, sizes, tmp_path), tmp_path / "passkey.png")
    found = pd.read_csv(tmp_path / "passkey.csv")
    assert len(found) == 2 * 2 * (1 + 2)
    assert found.right.between(0, 1).all()
    assert (tmp_path / "passkey.png").is_file()
    assert figure.worst_difference(material, sizes) < 1e-4


def test_what_is_not_here_is_a_sentence_and_a_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(smollm2.VARIABLE, str(tmp_path))
    with pytest.raises(Missing, match=r"no converted model is there; `kvlab weights smollm2` makes it"):
        smollm2.material()
    for name in WITH_WEIGHTS:
        assert load_figure(name).main(tmp_path) == MISSING
    assert "cannot be had" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_notebooks_run(name, capsys):
    runpy.run_path(str(EXPERIMENTS_DIR / name / "notebook.py"))
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_every_experiment_says_what_it_is(name):
    assert "kvlab reproduce" in (EXPERIMENTS_DIR / name / "README.md").read_text()
