"""What trained, checked or measured a model takes its programs with it: nothing is left of many in one process."""

import ast
import gc
import weakref
from pathlib import Path

import jax.numpy as jnp
import pytest

from kvlab.evaluation.key_lengths import _Programs as MeasuresKeys
from kvlab.evaluation.key_lengths import key_lengths
from kvlab.evaluation.layerwise import Blockwise, layers_of
from kvlab.evaluation.mask_check import MaskCheck
from kvlab.evaluation.score import Scorer
from kvlab.lab.laboratory import Laboratory
from kvlab.programs import LET_GO, num_mappings
from kvlab.random import named_key
from kvlab.training.step import init_state
from tests.training.test_step import TINY

needs_maps = pytest.mark.skipif(not num_mappings(), reason="the system does not count mappings")
TOKENS = jnp.arange(16, dtype=jnp.int32)[None, :]


def trained(config_of):
    """A training of its own, with a batch to be tested on: its step and its task."""
    lab = Laboratory.of(config_of(*TINY))
    step_fn, key = lab.train_step(), named_key(0, "train")
    seq_len, knobs = lab.task.train_call(0, 2)
    step_fn(init_state(lab.model.params, step_fn.optimizer, 1e-2), (), key, jnp.asarray(knobs, jnp.int32), seq_len)
    lab.task.eval_batch(key, "test", lab.task.slices("test")[0], 0, 4)
    return step_fn, lab.task


def checked(config_of):
    """The check of a memory in int8."""
    lab = Laboratory.of(config_of(*TINY, "memory.format=int8"))
    layout = lab.layout(lab.task.context_len, 4)
    check = MaskCheck(lab.model.structure, lab.model.params, layout)
    scorer = Scorer(lab.model.structure, lab.task, named_key(0, "eval"), 4)
    scorer.through_memory(lab.model.params, "test", layout, check)
    assert check.num_compared
    return check, scorer


def measured(config_of):
    """A model that ran layer by layer, and whose keys were measured."""
    model = Laboratory.of(config_of(*TINY)).model
    blockwise = Blockwise(model)
    layers_of(blockwise, TOKENS, lambda layer, state, view: view)
    key_lengths(model.structure, model.params, TOKENS)
    return blockwise, blockwise.programs, MeasuresKeys.shared()


def let_go():
    """As `kvlab.programs.make_room` does where room is short."""
    for each in LET_GO:
        each()
    gc.collect()


@needs_maps
@pytest.mark.parametrize("use", [trained, checked, measured])
def test_nothing_is_left_of_what_is_over(use, config_of):
    use(config_of)  # plain operations, which all have in common
    let_go()
    before = num_mappings()
    kept = use(config_of)
    grown = num_mappings() - before
    assert grown > 20
    gone = list(map(weakref.ref, kept))
    del kept
    for _ in range(2):
        gone += map(weakref.ref, use(config_of))
        let_go()
    assert not any(each() for each in gone)
    assert num_mappings() - before < grown / 4


def test_models_that_are_alike_share_what_they_were_compiled_to(config_of):
    let_go()
    for _ in range(2):
        _, programs, _ = measured(config_of)
    assert programs is Blockwise(Laboratory.of(config_of(*TINY)).model).programs
    assert programs.block._cache_size() == 1


def test_no_method_is_compiled_for_all_instances_at_once():
    """`jax.jit` on a method has its instance among what is static, and keeps it: `kvlab.programs.program` does not."""
    for path in (Path(__file__).parents[2] / "kvlab").rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        methods = [node for each in classes for node in each.body if isinstance(node, ast.FunctionDef)]
        decorators = [ast.unparse(each) for method in methods for each in method.decorator_list]
        assert not [each for each in decorators if "jit" in each], path
