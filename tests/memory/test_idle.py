"""What is asked of a memory and changes nothing is said, and runs that differ in it alone are one; a method or a format
that serves no layer is refused."""

import pytest

from kvlab.capacity.estimate import estimate
from kvlab.compose import compose, compose_capacity, expand
from kvlab.engine.engine import Engine
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.sweeps import sweeps_of
from kvlab.memory.config import MemoryConfig
from kvlab.memory.idle import idle_fields, idle_words
from kvlab.schema import ConfigError

NO_TOKENS = r"memory\.format = '{}': serves no layer of this model: it is of stored tokens"


@pytest.mark.parametrize("format", ["int8", "int2"])
def test_a_format_is_refused_where_no_layer_stores_tokens(format):
    with pytest.raises(ConfigError, match=NO_TOKENS.format(format)):
        expand(["mixer=mha,mamba2", f"format=model,{format}"], multirun=True)
    expand(["mixer=mha,hybrid", f"format=model,{format}"], multirun=True)


@pytest.mark.parametrize("words", [["format=int8"], ["memory.kv_dtype=int8"]])
def test_a_deployment_without_tokens_refuses_it_by_the_field_that_was_given(words):
    field = words[0].split("=")[0].removeprefix("memory.")
    with pytest.raises(ConfigError, match=rf"memory\.{field} = 'int8': serves no layer of this model"):
        estimate(compose_capacity(["model=mamba2-2.7b", "hardware=h100", "simulate=false", *words]))


@pytest.mark.parametrize(
    ("words", "same", "said"),
    [
        (["mixer=mamba2", "memory.page_size=8"], ["mixer=mamba2"], "page_size = 8 changes nothing: no state of this"),
        (["memory=dense", "memory.page_size=8"], ["memory=dense"], "page_size = 8 changes nothing: memory.name = dens"),
        (["memory.residual=5"], [], "residual = 5 changes nothing: memory.format = model seals no pages"),
        (["format=int8", "memory.quantised_prefill=chunks"], ["format=int8"], "quantised_prefill = chunks changes not"),
        (["memory.allow_underfill=true"], [], "allow_underfill = True changes nothing: only a budget of bytes"),
        (["budget=0.5"], [], "budget = 0.5 has nothing to solve here"),
    ],
)
def test_what_changes_nothing_is_said_and_makes_no_other_run(words, same, said):
    (sweep,) = sweeps_of(words, multirun=False)
    assert len(sweep.said) == 1
    assert said in sweep.said[0]
    assert sweep.configs[0].run_id == compose(same).run_id
    assert not sweeps_of(same, multirun=False)[0].said


@pytest.mark.parametrize(
    "words",
    [
        ["memory.page_size=8"],
        ["mixer=hybrid", "memory.page_size=8"],
        ["mixer=mamba2", "memory.chunk_len=8"],
        ["format=kivi4", "memory.residual=5"],
        ["mixer=swa", "budget=600B", "memory.allow_underfill=true"],
    ],
)
def test_what_changes_something_is_another_run(words):
    (sweep,) = sweeps_of(words, multirun=False)
    assert not sweep.said
    assert sweep.configs[0].run_id != compose([word for word in words if word.startswith(("mixer", "format"))]).run_id


def test_a_sweep_says_it_of_runs_that_came_out_equal_too():
    """The first of two is as it would be without the field, which says nothing of the second."""
    (sweep,) = sweeps_of(["mixer=mha,mamba2", "memory.page_size=16,8"], multirun=True)
    assert [(config.mixer.name, config.memory.page_size) for config in sweep.configs] == [
        ("mha", 16), ("mha", 8), ("mamba2", 16)]  # fmt: skip
    assert sweep.said == ["mamba2: memory.page_size = 8 changes nothing: no state of this model lies in pages"]


def test_what_was_asked_stays_in_the_configuration():
    """So that the points of a sweep differ in what tells them apart, and in nothing else."""
    config = compose(["mixer=mamba2", "memory.page_size=8"])
    assert config.as_dict()["memory"]["page_size"] == 8
    assert "idle_fields" not in config.as_dict()


def test_generation_and_deployments_are_told_of_a_budget_that_says_nothing():
    memory = MemoryConfig(budget=0.5)
    assert idle_words(memory, idle_fields(memory)) == [
        "memory.budget = 0.5 changes nothing: it is of what a compression keeps"]  # fmt: skip
    held = compose_capacity(["model=llama3-8b", "hardware=h100", "budget=64"]).memory.held
    assert list(idle_fields(held)) == ["budget"]


def test_an_engine_refuses_a_format_where_no_layer_stores_tokens():
    recurrent = Laboratory.of(compose(["mixer=mamba2", "model.model_dim=16"]), abstract=True).model
    with pytest.raises(ConfigError, match=NO_TOKENS.format("int8")):
        Engine(recurrent, memory=MemoryConfig(format="int8"))
