"""What words on the command line become: sweeps, experiments, chips."""

import pytest

from kvlab.compose import compose, expand
from kvlab.config import Config
from kvlab.schema import ConfigError


@pytest.mark.parametrize(
    ("overrides", "label", "total"),
    [
        (["hardware=h100x3"], "h100x3", 3),
        (["+hardware=h200"], "h200", 1),
        (["hardware.name=h100x2", "hardware.num_chips=2"], "h100x4", 4),
        ([], "host", 1),
    ],
)
def test_chips_are_a_word(overrides, label, total):
    """In notebooks, on the command line and in a sweep alike."""
    (config,), _ = expand(overrides, multirun=False)
    assert config == compose([word.removeprefix("+") for word in overrides])
    assert (config.hardware.label, config.hardware.total_chips) == (label, total)
    assert Config.build(config.as_dict() | {"hardware": label}).hardware.total_chips == total
    swept, _ = expand(["hardware=h100x2,h200"], multirun=True)
    assert [config.hardware.label for config in swept] == ["h100x2", "h200"]


def test_a_sweep_without_m_is_refused():
    with pytest.raises(ConfigError, match="sweeps over values need -m"):
        expand(["mixer=mha,gqa"], multirun=False)


def test_an_experiment_brings_its_sweep_and_the_command_line_narrows_it():
    configs, _ = expand(["experiment=demo"], multirun=False)
    assert len(configs) == len({config.run_id for config in configs}) == 18
    configs, _ = expand(["experiment=demo", "mixer=mha", "seed=0,1"], multirun=True)
    assert [(c.mixer.name, c.task_name, c.seed) for c in configs] == [
        ("mha", "mqar", 0), ("mha", "mqar", 1), ("mha", "text", 0), ("mha", "text", 1),
    ]  # fmt: skip


def test_hydra_habits_hold():
    """+experiment=, glob choices; and what Hydra cannot sweep is answered in a sentence."""
    assert len(expand(["+experiment=demo", "task=mqar"], multirun=False)[0]) == 9
    configs, _ = expand(["mixer=glob(swa*)"], multirun=True)
    assert [config.mixer.name for config in configs] == ["swa", "swa16", "swa32", "swa64"]
    with pytest.raises(ConfigError, match="BasicSweeper does not support"):
        expand(["seed=interval(0,3)"], multirun=True)


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["mixer=mha,mqa", "memory.page_size=8,16", "memory=paged"], ["memory.page_size=8,16"]),
        (["experiment=demo", "task=mqar", "mixer=mha,mqa", "measure.decode_steps=2,3"], ["measure.decode_steps=2,3"]),
        (["seed=0,1", "measure={context_len:300}", "measure.decode_steps=2,3"], []),  # the later word would win
        (["seed=0,1", "mixer=mha,mqa"], []),
    ],
)  # fmt: skip
def test_a_sweep_starts_distinct_trainings_first(words, first):
    """So that the second worker does not wait for the first one's. What is run stays the same."""
    configs, handed = expand(words, multirun=True)
    again, _ = expand(handed, multirun=True)
    assert handed[: len(first)] == first
    assert {config.run_id for config in again} == {config.run_id for config in configs}
    trainings = {config.training_id for config in configs}
    if first or len(trainings) == len(configs):
        assert {config.training_id for config in again[: len(trainings)]} == trainings


def test_a_plan_has_the_type_of_the_hardware_that_it_names():
    words = ["hardware=h100,v5e,host"]
    assert [config.model.dtype for config in expand(words, True, planned=True)[0]] == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]
    assert {config.model.dtype for config in expand(words, True)[0]} == {"float32"}  # a run's: this machine's
    (named,), _ = expand(["hardware=h100", "model.dtype=float32"], False, planned=True)
    assert named.model.dtype == "float32"
