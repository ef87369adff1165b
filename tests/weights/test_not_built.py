"""Families that are refused by name; and the attention alone of Gemma 3n, which is built, and of gpt-oss, beside
transformers' (tests/golden/attention)."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer, split
from kvlab.schema import ConfigError
from kvlab.weights import WeightsError, load_checkpoint
from kvlab.weights.families import FAMILIES, NOT_BUILT
from tests.weights.random_checkpoint import draw, prompt

GOLDEN = Path(__file__).parents[1] / "golden" / "attention"


def golden(family: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{family}.json").read_text())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n", "AltUp, Laurel and embeddings by layer"),
        ("gemma3n_text", "AltUp, Laurel and embeddings by layer"),
        ("gemma3", "images beside its text model, which alone is gemma3_text"),
    ],
)
def test_what_is_not_built_is_refused_by_name(family, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match=f"model_type = '{family}': is not built here: {reason}"):
        load_checkpoint(tmp_path)
    assert not FAMILIES.keys() & NOT_BUILT.keys()


def attention_of(family: str) -> list[AttentionConfig]:
    """The layers that a config.json of transformers describes."""
    file = golden(family)["config"]
    num_layers = file["num_hidden_layers"]
    shape = {
        "num_heads": file["num_attention_heads"],
        "num_kv_heads": file["num_key_value_heads"],
        "head_dim": file["head_dim"],
        "bias": file["attention_bias"],
    }
    if family == "gemma3n":
        shape |= {"qk_norm": True, "scale": 1.0}
    else:
        shape |= {"sink_logits": True}
    first_shared = num_layers - file.get("num_kv_shared_layers", 0)
    configs = []
    for index, kind in enumerate(file["layer_types"]):
        rope = file["rope_parameters"].get(kind, file["rope_parameters"])
        window = file["sliding_window"] if kind == "sliding_attention" else None
        more = {"window": window, "rope_base": rope["rope_theta"], "shares_kv": index >= first_shared}
        configs.append(AttentionConfig(**shape, **more))
    return configs


def built(family: str, configs: list[AttentionConfig]) -> Transformer:
    """The stack with the tensors that transformers had."""
    shapes, file = golden(family)["shapes"], golden(family)["config"]
    layers = [LayerConfig("attention", config) for config in configs]
    model = ModelConfig(model_dim=file["hidden_size"], norm_eps=1e-6)
    stack = Transformer(layers, model, file["vocab_size"], rngs=nnx.Rngs(0))
    places = {"embed_tokens.weight": (stack.embedding.embedding, False)}
    for index, block in enumerate(stack.blocks):
        theirs, mixer = f"layers.{index}.self_attn", block.mixer
        for mine, yours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            if (projection := getattr(mixer, mine, None)) is not None:
                places[f"{theirs}.{yours}_proj.weight"] = (projection.kernel, True)
                places[f"{theirs}.{yours}_proj.bias"] = (projection.bias, False)
            if (norm := getattr(mixer, f"{mine}_norm", None)) is not None:
                places[f"{theirs}.{yours}_norm.weight"] = (norm.scale, False)
        places[f"{theirs}.sinks"] = (getattr(mixer, "sink_logits", None), False)
    for name, (parameter, is_matrix) in places.items():
        if parameter is None:
            continue
        tensor = draw(name, tuple(shapes.pop(name)))
        parameter[...] = jnp.asarray(tensor.T if is_matrix else tensor)
    assert not shapes, "transformers has tensors that found no place"
    return stack


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3n"])
def test_attention_is_that_of_the_reference(family):
    """Of gpt-oss a sink logit a head, behind a window and without; of Gemma 3n the layers that read the keys and
    values of the last layer before them of their kind."""
    stack = built(family, attention_of(family))
    if family == "gemma3n":
        assert stack.sources == (None, None, None, None, 2, 2, 3)
    expected = np.asarray(golden(family)["hidden"])
    tokens = jnp.asarray([prompt(len(expected), golden(family)["config"]["vocab_size"])], jnp.int32)
    np.testing.assert_allclose(jax.jit(stack.parallel)(tokens)[0], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3n"])
def test_decoding_from_pages_is_the_reference_too(family):
    """Five tokens prefilled, the others one by one, from pools that hold NaN where nothing was written. The window of 7
    leaves pages of 4 behind."""
    stack = built(family, attention_of(family))
    structure, params = split(stack)
    hidden = np.asarray(golden(family)["hidden"])
    tokens = np.asarray(prompt(len(hidden), golden(family)["config"]["vocab_size"]), np.int32)
    memory = MemoryConfig("paged", page_size=4, chunk_len=5)
    layout = MemoryLayout.of(stack.states(), memory, max_sequences=1, max_len=len(tokens))
    session = Session(MemoryStep.of(structure, layout), params, layout.allocate(float("nan")))
    found = [np.asarray(session.advance({"a": tokens[:5]}, 5))[0]]
    found += [np.asarray(session.advance({"a": tokens[place : place + 1]}, 1))[0] for place in range(5, len(tokens))]
    expected = hidden @ np.asarray(stack.embedding.embedding).T
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-3)


def test_sharing_needs_the_same_window():
    """Otherwise layer 4 would read another layer's keys than the reference does."""
    configs = attention_of("gemma3n")
    configs[4] = replace(configs[4], window=3)
    with pytest.raises(ConfigError, match="layer 4 finds no keys and values that fit"):
        built("gemma3n", configs)


@pytest.mark.slow
def test_the_golden_files_are_what_the_reference_says_today(tmp_path):
    """Needs `make peers`."""
    python = Path(__file__).parents[2] / ".peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("transformers' environment is missing: make peers")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, GOLDEN / "make.py", tmp_path], check=True, env=environment, timeout=300)
    for family in ("gpt_oss", "gemma3n"):
        fresh = json.loads((tmp_path / f"{family}.json").read_text())
        assert fresh["shapes"] == golden(family)["shapes"]
        np.testing.assert_allclose(fresh["hidden"], golden(family)["hidden"], atol=2e-6)
