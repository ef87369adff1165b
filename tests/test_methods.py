"""A method's fields on the command line: beside a sweep over methods, without a method, and with too small a budget."""

import re

import pytest

from kvlab.compose import compose, compose_capacity, expand, expand_capacity
from kvlab.schema import ConfigError


@pytest.mark.parametrize("words", [
    "debug=tiny compression=h2o budget=0.5", "compression=snapkv budget=0.25", "debug=tiny compression=rkv budget=0.5",
    "compression=lagkv budget=0.2 task.test=['64:1','64:16','128:32']",
    "compression=h2o budget=0.5 task.test=['64:2','64:8']",
])  # fmt: skip
def test_a_budget_that_is_too_small_for_the_defaults_says_what_fits(words):
    """README's words at the tasks' own lengths; whatever the sentence says may be typed."""
    with pytest.raises(ConfigError, match=r"fewer than the .* protect; give budget=") as caught:
        compose(words.split())
    budget, fields = re.fullmatch(r".*; give (budget=\S+), or (.*)", str(caught.value)).groups()
    given = [word for word in words.split() if not word.startswith("budget=")]
    assert compose([*given, budget]).memory.budget <= 1
    fitted = compose([*words.split(), *fields.split()])
    method = fitted.memory.compression
    assert method.sinks + method.recent > 0
    assert set(re.findall(r"\.(\w+)=", fields)) in ({"sinks", "recent"}, {"sinks", "recent", "window"})


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("compression=none,h2o memory.compression.recent=4", [None, ("h2o", 4, None)]),
        (
            "compression=none,random,snapkv memory.compression.window=4 memory.compression.recent=9",
            [None, ("random", 9, None), ("snapkv", 9, 4)],
        ),
        ("compression=glob(s*) +memory.compression.window=16", [("snapkv", 32, 16), ("streaming", 0, None)]),
        (
            "compression=none,h2o memory.compression.recent=4,9",
            [None, None, ("h2o", 4, None), ("h2o", 9, None)],
        ),
    ],
)
def test_a_methods_field_beside_a_sweep_is_for_the_methods_that_have_it(words, found, tmp_path, monkeypatch):
    """As it is composed here, and as each job of Hydra's composes it; runs that come out equal are one."""
    from kvlab.lab import launch

    configs, handed = expand([*words.split(), "budget=64", f"results_dir={tmp_path}"], multirun=True)

    def told(config):
        method = config.memory.compression
        return method and (method.name, method.recent, getattr(method, "window", None))

    assert [told(config) for config in configs] == found
    jobs = []
    monkeypatch.setattr(launch, "execute_one", lambda config: jobs.append(config) or "done")
    monkeypatch.setattr("sys.argv", ["kvlab"])
    launch.run_sweep(configs, handed)
    assert [told(config) for config in jobs] == list(dict.fromkeys(found))
    assert {config.run_id for config in jobs} == {config.run_id for config in configs}


def test_a_selections_field_beside_a_sweep_is_for_those_that_have_it():
    words = ["selection=all,quest,recency", "memory.selection.group=mean", "memory.selection.dense_layers=0"]
    assert [
        (each and (each.name, getattr(each, "group", None), each.dense_layers))
        for each in (config.memory.selection for config in expand(words, multirun=True)[0])
    ] == [None, ("quest", "mean", 0), ("recency", None, 0)]


def test_none_is_a_word_for_no_method():
    """As on the command line of a run, so in a YAML file and for `kvlab capacity`."""
    assert compose(["memory.compression=none", "memory.selection=none"]) == compose([])
    assert compose_capacity(["compression=none", "selection=all"]) == compose_capacity([])
    assert [c.memory.compression is None for c in expand_capacity(["compression=none,h2o", "budget=0.5"])] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compression=none,h2o memory.compression.recnt=4", "recnt = '4': no field of none, h2o; did you mean recent"),
        ("compression=none,h2o +memory.compression.windw=4", "windw = '4': no field of none, h2o; "),
        ("compression=none,h2o memory.compression.recent=-1", "recent = -1: must be an integer in"),
    ],
)
def test_a_field_that_no_method_of_a_sweep_has_stops_it(words, said):
    with pytest.raises(ConfigError, match=said):
        expand([*words.split(), "budget=64"], multirun=True)
