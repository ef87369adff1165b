"""Configs at random: every section and value of a config x what does not belong there. A sentence of at most 2 KB, or a
legal config; never a traceback, and never a wait."""

import contextlib
import random
import time

import pytest

from kvlab import blueprint
from kvlab.compose import compose, expand
from kvlab.config import Config
from kvlab.files import cache_folder, home_expanded
from kvlab.schema import ConfigError
from tests.lab.test_foreign import changed, leaves

WRONG = [
    None, 5, -1, 0, 1.5, 10**400, 1e308, float("inf"), float("nan"), "x", "", "a" * 100_000, [], {}, {"x": 1},
    [1, "x", None], {"type": [1]}, {"type": "x"}, {1: 2}, True, "../../x", "/etc/*", "\0", "é", "64KiB",
    "9" * 400 + "KiB", "**x", "~nobody/x",
]  # fmt: skip
COMPOSED = {
    "mha": [],
    "hybrid on text": ["mixer=hybrid", "task=text"],
    "needle, compressed": ["task=needle", "compression=snapkv", "budget=0.9", "selection=quest"],
}
"""Configs of several sections, and the overrides that make them."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_cases", [60, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
@pytest.mark.parametrize("overrides", COMPOSED.values(), ids=COMPOSED)
def test_any_value_anywhere(overrides, num_cases):
    base = compose(overrides).as_dict()
    cases = [(place, wrong) for place in leaves(base) if place for wrong in WRONG]
    longest = 0
    for place, wrong in random.Random(0).sample(cases, min(num_cases, len(cases))):
        began = time.process_time()
        try:
            config = blueprint.resolved(Config.build(changed(base, place, wrong)))
            assert config.run_dir
            blueprint.check([config])
        except ConfigError as error:
            longest = max(longest, len(str(error)))
        assert time.process_time() - began < 20, place
    assert longest <= 2000


WORDS = [
    "budget=" + "9" * 400 + "KiB", "seed=" + "9" * 400, "seed=" + "9" * 5000, "seed=1e999",
    "optimizer.learning_rate=1e999",
    "mixer.A.soft_cap=${nope}", "seed=${seed}", "experiment=${oc.env:KVLAB_NOT_SET}", "results_dir=${nope}",
    "mixer.pattern=" + "A" * 100_000, "hydra=null", "hydra.launcher=null", "model=null", "optimizer=null", "train=null",
    "mixer.A=null", "mixer={}", "+equal_budget=5", "weights=5", "hardware=5", "[", "=", "a", "'", "x=[", "++x=1",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS, ids=[word[:40] for word in WORDS])
def test_words_that_no_config_is_made_of(word):
    with contextlib.suppress(ConfigError):
        expand([word], multirun=False)
        return
    with pytest.raises(ConfigError) as caught:
        expand([word], multirun=True)
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize("pattern", ["/etc/*", "../../x", "a/../../*", "**x", "/", ".."])
def test_a_pattern_stays_below_its_folder(tmp_path, pattern):
    with pytest.raises(ConfigError, match=r"task\.pattern = .*must match names of files below the folder"):
        compose([f"task.pattern='{pattern}'", "task=text", f"task.path={tmp_path}"])


def test_a_user_without_a_home(monkeypatch, tmp_path):
    from pathlib import Path

    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().name.startswith("kvlab-")
    assert home_expanded("~/x") == Path("~/x")
    assert compose(["task=text"]).run_dir
    with pytest.raises(ConfigError, match=r"task\.path = '~/nowhere': must be an existing file"):
        compose(["task=text", "task.path='~/nowhere'"])


def test_results_may_lie_at_home_and_have_any_letters(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose(["results_dir='~/résultats 结果'"]).run_dir.is_relative_to(tmp_path / "résultats 结果")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ([], ("weights", "path")),
        (["task=text"], ("task", "path")),
        (["task=text"], ("task", "tokenizer")),
        (["task=needle"], ("task", "path")),
    ],
)
@pytest.mark.parametrize("name", ["9" * 400, "9" * 5000])
def test_a_name_longer_than_any_files(words, place, name):
    with pytest.raises(ConfigError) as caught:
        blueprint.check([blueprint.resolved(Config.build(changed(compose(words).as_dict(), place, name)))])
    assert place[1] in str(caught.value)
    assert len(str(caught.value)) <= 2000
