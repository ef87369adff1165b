"""Every field of a family's config.json with values that no file should have: an answer in words, or a model that its
tensors fit."""

import dataclasses
import json
import random

import pytest

from kvlab.schema import ConfigError
from kvlab.weights import WeightsError, load_checkpoint
from kvlab.weights.checkpoint import peek_architecture
from kvlab.weights.families import FAMILIES as LOADED
from tests.engine.families import FAMILIES, golden, pretrained, write_folder

ABSENT = object()
VALUES = (
    ABSENT, None, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 10**40, 0.5, 1e-300, 1e300, float("nan"), float("inf"),
    True, False, "", "x" * 10_000, "auto", [], [0], [None] * 3_000, [[]], ["full_attention"] * 2, {}, {"a": {"b": 1}},
    {"rope_type": "linear"}, {"rope_type": "default", "rope_theta": -1}, {"rope_type": ["x"]},
    {"__float__": "Infinity"}, {"full_attention": None}, {"full_attention": 3, "sliding_attention": []},
    {"rope_type": "llama3", "factor": 1e300, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
     "original_max_position_embeddings": 8},
    {"num_heads": "x", "kda_layers": [0, -1], "full_attn_layers": ["x"]}, {"kda_layers": 3, "full_attn_layers": {}},
)  # fmt: skip
MORE = ("model_type", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "eos_token_id")
FEW = 24
"""Cases of each family that are tried every time; all of them are slow."""


def cases(family: str) -> list[tuple[str, object]]:
    """Every field that the family reads, with every value; and with its own, doubled and one more."""
    model_type = golden(family)["config"]["model_type"]
    names = {field.name for field in dataclasses.fields(LOADED[model_type].File)}
    own = golden(family)["config"]
    found = [(name, value) for name in sorted({*names, *MORE, "max_position_embeddings"}) for value in VALUES]
    for name, value in sorted(own.items()):
        if name in names and type(value) in (int, float):
            found += [(name, 2 * value), (name, value + 1)]
        if name in names and isinstance(value, list):
            found += [(name, value * 2), (name, value[:-1])]
    return found


def answer(folder) -> str:
    """What is said of a folder; empty: it is loaded."""
    try:
        load_checkpoint(folder)
    except (WeightsError, ConfigError) as error:
        return str(error)
    return ""


def try_all(family: str, folder, chosen) -> int:
    """Loads the folder under each change; returns how many were refused."""
    own, refused = golden(family)["config"], 0
    for name, value in chosen:
        config = {key: kept for key, kept in own.items() if key != name} | ({} if value is ABSENT else {name: value})
        (folder / "config.json").write_text(json.dumps(config))
        try:
            said = answer(folder)
        except BaseException as error:
            raise AssertionError(f"{family}: {name} = {str(value)[:80]}") from error
        assert len(said) < 2_000, (name, str(value)[:80], said[:300])
        assert not said or "cannot be loaded" in said
        refused += bool(said)
    return refused


@pytest.mark.parametrize("family", FAMILIES)
def test_some_wrong_fields_are_answered_in_words(family, tmp_path):
    folder = write_folder(family, tmp_path)
    chosen = random.Random(family).sample(cases(family), FEW)
    assert try_all(family, folder, chosen) > FEW // 4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_wrong_field_is_answered_in_words(family, tmp_path):
    every = cases(family)
    assert try_all(family, write_folder(family, tmp_path), every) > len(every) // 4


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("llama_gqa", {"pretraining_tp": 2}, {}),
        ("llama_gqa", {"rope_parameters": None, "rope_theta": 2_804_339_835.0}, {"rope_base": 2_804_339_835.0}),
        ("llama_gqa", {"rope_parameters": {"rope_theta": 3e11, "rope_type": "default"}}, {"rope_base": 3e11}),
        ("llama_mha", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("llama_mha", {"num_key_value_heads": ABSENT}, {"num_kv_heads": 4}),
        ("mistral", {"num_key_value_heads": ABSENT, "num_attention_heads": 8}, {"num_kv_heads": 8}),
        ("mistral", {"num_key_value_heads": ABSENT, "num_attention_heads": 16}, {"num_kv_heads": 8}),
        ("mistral", {"num_key_value_heads": None, "num_attention_heads": 16}, {"num_kv_heads": 16}),
        ("qwen3", {"num_key_value_heads": ABSENT, "num_attention_heads": 64}, {"num_kv_heads": 32}),
        ("qwen3", {"num_key_value_heads": None, "num_attention_heads": 64}, {"num_kv_heads": 64}),
    ],
)
def test_fields_mean_what_they_mean_in_transformers_5(family, changes, found, tmp_path):
    """Null and absent are its configuration classes' (5.23), `pretraining_tp` it does not read."""
    folder = write_folder(family, tmp_path)
    config = {**golden(family)["config"], **changes}
    kept = {name: value for name, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))
    config = peek_architecture(folder).layers[0].config
    assert {name: getattr(config, name) for name in found} == found
    if "pretraining_tp" in changes:
        assert load_checkpoint(folder).architecture == pretrained(family).architecture


def test_more_layers_than_tensors_are_refused_before_they_are_built(tmp_path):
    folder = write_folder("llama_gqa", tmp_path)
    config = golden("llama_gqa")["config"] | {"num_hidden_layers": 10_000}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"num_hidden_layers = 10000: the folder has 21 tensors"):
        load_checkpoint(folder)
