"""What words on the command line become: sweeps, experiments, chips."""

import pytest

from kvlab.compose import compose, compose_generate, expand
from kvlab.config import Config
from kvlab.lab.choose import Condition, said_by_hydra
from kvlab.lab.sweeps import sweeps_of
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
    assert len(configs) == len({config.run_id for config in configs}) == 10
    configs, _ = expand(["experiment=demo", "mixer=mha", "seed=0,1"], multirun=True)
    assert [(c.mixer.name, c.task_name, c.seed) for c in configs] == [
        ("mha", "mqar", 0), ("mha", "mqar", 1), ("mha", "text", 0), ("mha", "text", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "rate"),
    [("task=text mixer=mha", 0.02), ("task=text mixer=mla", 0.01), ("task=mqar mixer=mla", 0.01),
     ("experiment=demo task=text mixer=mla", 0.01), ("task=text mixer=mla optimizer.learning_rate=0.5", 0.5)],
)  # fmt: skip
def test_a_mixer_may_have_a_rate_of_its_own_on_a_task(words, rate):
    (config,), _ = expand(words.split(), multirun=False)
    assert config.optimizer.learning_rate == rate


def test_hydra_habits_hold():
    """+experiment=, glob choices; and what Hydra cannot sweep is answered in a sentence."""
    assert len(expand(["+experiment=demo", "task=mqar"], multirun=False)[0]) == 5
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


def test_each_experiment_of_a_sweep_brings_its_own_axes():
    """Swept together neither lost its axes to the other; runs that both have are made once."""
    sweeps = sweeps_of(["experiment=eviction_mqar,mqar_frontier", "seed=1"], multirun=True)
    assert [{config.experiment for config in sweep.configs} for sweep in sweeps] == [
        {"eviction_mqar"},
        {"mqar_frontier"},
    ]
    mixers = [[config.mixer.name for config in sweep.configs] for sweep in sweeps]
    assert mixers[0] == ["mha"]
    assert len(set(mixers[1])) == len(mixers[1]) == 9, "the axis of the second alone"
    # What Hydra is handed is the same sweep.
    assert {config.run_dir for config in expand(sweeps[0].handed, multirun=True)[0]} == {
        config.run_dir for config in sweeps[0].configs
    }
    assert len(sweeps_of(["+experiment=glob(e*_mqar)", "seed=1"], multirun=True)) == 1
    twice = sweeps_of(["experiment=eviction_mqar,eviction_mqar", "seed=1"], multirun=True)
    assert [len(sweep.configs) for sweep in twice] == [1]


@pytest.mark.parametrize(
    ("word", "said"), [("1e-5", 1e-5), ("010", "010"), ("0x10", "0x10"), ("1:30", "1:30"), ("on", "on"), ("yes", "yes")]
)
def test_values_are_read_as_hydra_reads_them(word, said):
    """YAML 1.1 makes a string of 1e-5, 8 of 010, 90 of 1:30 and true of on."""
    assert said_by_hydra(word) == said
    assert type(said_by_hydra(word)) is type(said)


def test_numbers_of_overrides_and_conditions_mean_the_same():
    assert compose_generate(["sampling.temperature=1e-5"]).sampling.temperature == 1e-5
    with pytest.raises(ConfigError, match="seed = '010': must be an integer"):
        compose(["seed=010"])
    fields = {"optimizer.learning_rate": 1e-5, "seed": 8}
    assert Condition("optimizer.learning_rate", ("1e-5",)).holds(fields)
    assert not Condition("seed", ("010",)).holds(fields)
    assert Condition("seed", ("8",)).holds(fields)


def test_a_name_of_ones_own_is_the_folder_and_leaves_the_identity_alone(tmp_path):
    words = ["mixer=mha", f"results_dir={tmp_path}"]
    plain, named = compose(words), compose([*words, "name=ablation1"])
    assert named.run_id == plain.run_id
    assert named.training_id == plain.training_id
    assert named.run_dir == tmp_path / "ablation1" / plain.run_id
    assert plain.run_dir == tmp_path / "default" / plain.run_id
    assert named.training_dir.parent == tmp_path / "ablation1" / "trained"
    assert Config.build(named.as_dict()) == named
    assert "name" not in plain.as_dict(), "older runs have none"
    (config,), handed = expand([*words, "name=ablation1", "seed=3"], multirun=True)
    assert "name=ablation1" in handed
    assert config.folder == "ablation1"
    for wrong in ("../up", "a/b", ".hidden"):
        with pytest.raises(ConfigError, match=r"name = .*: must be a word of letters"):
            compose([*words, f"name={wrong}"])
