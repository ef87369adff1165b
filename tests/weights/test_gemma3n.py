"""What a file of Gemma 3n's text model says, in either spelling and unsaid; and which of its layers hold bytes."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvlab.models.transformer import Transformer
from kvlab.schema import ConfigError
from kvlab.weights import WeightsError, load_checkpoint, save_checkpoint
from kvlab.weights.architectures import read_architecture, write_architecture
from kvlab.weights.checkpoint import peek_architecture
from tests.engine.families import WINDOW, golden, pretrained, write_folder

FAMILY = "gemma3n_text"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(FAMILY, tmp_path / "in")


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


PUBLISHED = {
    "model_type": FAMILY,
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": None,
    "altup_coef_clip": 120.0,
    "hidden_act": "not read",
}
"""Some of what the hub's E4B says of its text; the rest is transformers' defaults."""


def test_what_a_file_does_not_say():
    """Five layers a pattern, ten sparse ones, and fifteen that read the keys and values of layers 18 and 19."""
    architecture, problems = read_architecture(PUBLISHED, "bfloat16")
    assert not problems
    model, layers = architecture.model, architecture.layers
    assert [layer.config.window for layer in layers] == [512, 512, 512, 512, None] * 7
    assert [layer.config.rope_base for layer in layers] == [1e4, 1e4, 1e4, 1e4, 1e6] * 7
    assert [layer.mlp_sparsity for layer in layers] == [0.95] * 10 + [0.0] * 25
    assert {(layer.config.num_heads, layer.config.num_kv_heads, layer.config.scale) for layer in layers} == {(8, 2, 1)}
    assert [layer.config.value_norm for layer in layers] == [True] * 20 + [False] * 15
    assert (model.num_streams, model.active_stream, model.layer_embed_dim, model.laurel_rank) == (4, 0, 256, 64)
    assert (model.layer_embed_vocab, model.logit_cap, model.tie_embeddings) == (262_144, 30.0, True)
    shapes = nnx.eval_shape(lambda: Transformer(layers, model, architecture.vocab_size, rngs=nnx.Rngs(0)))
    assert shapes.sources == (None,) * 20 + (18, 18, 18, 18, 19) * 3
    held = [sum(state.unit_bytes for state in states.values()) for states in shapes.states()]
    assert held == [2 * 2 * 256 * 2] * 20 + [0] * 15  # keys and values of two heads, in 16 bits
    few, _ = read_architecture(PUBLISHED | {"num_hidden_layers": 10, "num_kv_shared_layers": 5}, "bfloat16")
    assert {layer.mlp_sparsity for layer in few.layers} == {0.0}


def test_the_published_size_is_written_and_read():
    architecture, _ = read_architecture(PUBLISHED, "bfloat16")
    again, problems = read_architecture(json.loads(json.dumps(write_architecture(architecture))), "bfloat16")
    assert (again, problems) == (architecture, [])


def test_one_width_and_a_list_of_it_are_the_same():
    one, _ = read_architecture(PUBLISHED, "float32")
    many, _ = read_architecture(PUBLISHED | {"intermediate_size": [16384] * 35}, "float32")
    assert one == many
    assert {layer.mlp_dim for layer in many.layers} == {None}


def test_the_hubs_older_spelling(folder):
    older = {"rope_theta": 5e5, "rope_local_base_freq": 1e4, "rope_parameters": None, "query_pre_attn_scalar": 256}
    edit(folder, **older)
    assert load_checkpoint(folder).architecture == pretrained(FAMILY).architecture


def test_no_cap_of_logits_is_null(folder, tmp_path):
    """Absent is 30."""
    edit(folder, final_logit_softcapping=None)
    uncapped = load_checkpoint(folder)
    assert uncapped.architecture.model.logit_cap is None
    save_checkpoint(uncapped, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").architecture == uncapped.architecture


def test_keys_that_no_layer_reads_may_be_in_the_file(folder):
    """transformers 4 saved them of layers that share; of others a second set is unexpected."""
    tensors = load_file(folder / "model.safetensors")
    unread = {
        name.replace("layers.3.", "layers.6."): tensor.copy()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.3.self_attn.") and name.split(".")[-2] in ("k_proj", "v_proj", "k_norm")
    }
    assert len(unread) == 3
    save_file(tensors | unread, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(folder).model.params, pretrained(FAMILY).model.params)
    save_file(
        tensors | {"model.layers.6.self_attn.x_proj.weight": np.zeros(3, np.float32)}, folder / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=r"layers\.6\.self_attn\.x_proj\.weight: is unexpected"):
        load_checkpoint(folder)


def test_tokens_behind_the_last_embedding_of_layers_take_the_first(folder):
    """As the reference does with ids of images and sound: 300 to 319 here."""
    model = pretrained(FAMILY).model.merge()
    streams = [model.embedded(jnp.asarray([[token, 7]], jnp.int32)).embeddings for token in (0, 300)]
    first = nnx.state(model.streams.embedding)["embedding"][0] * 12**0.5
    rows = [np.asarray(each)[:, 0, 0] for each in streams]
    made = model.streams.norm(
        (model.streams.projection(model.embedded(jnp.asarray([[300]], jnp.int32)).values[0]) * 48**-0.5).reshape(7, 12)
    )
    np.testing.assert_allclose(rows[1], (made + np.asarray(first).reshape(7, 12)) * 2**-0.5, rtol=1e-5, atol=1e-6)
    assert abs(rows[0] - rows[1]).max() > 0.1  # their embeddings differ all the same


def test_a_window_keeps_who_reads_whose_keys(folder):
    """A narrower one is legal while the bases tell the two kinds apart, and is refused where nothing does."""
    layers = [layer.config for layer in load_checkpoint(folder, window=8).architecture.layers]
    assert {config.window for config in layers} == {8}
    assert peek_architecture(folder, window=WINDOW + 1).layers[6].config.window == WINDOW + 1
    same = {"rope_type": "default", "rope_theta": 1e4}
    edit(folder, rope_parameters={"sliding_attention": same, "full_attention": same})
    assert peek_architecture(folder, window=WINDOW + 1)
    with pytest.raises(ConfigError, match=r"window = 8: .* layer 4 would read .* layer 3 in place of layer 2"):
        load_checkpoint(folder, window=8)


def test_sharing_needs_the_same_window():
    """Otherwise layer 4 would read another layer's keys than the reference does."""
    architecture = pretrained(FAMILY).architecture
    assert pretrained(FAMILY).model.merge().sources == (None, None, None, None, 2, 2, 3)
    layers = list(architecture.layers)
    layers[4] = replace(layers[4], config=replace(layers[4].config, window=3))
    with pytest.raises(ConfigError, match="layer 4 finds no keys and values that fit"):
        Transformer(layers, architecture.model, 8, rngs=nnx.Rngs(0))


def test_it_computes_in_bfloat16(folder):
    """Matrices are of that type, the streams too; logits are near those of float32."""
    tokens = jnp.arange(8, dtype=jnp.int32)[None]

    def logits(dtype):
        model = load_checkpoint(folder, dtype).model.merge()
        assert model.embedded(tokens).values.dtype == model.embedded(tokens).embeddings.dtype == dtype
        return np.asarray(jax.jit(lambda ids: model.logits(model.parallel(ids)))(tokens))

    exact = logits("float32")
    assert 1e-4 < np.abs(logits("bfloat16") - exact).mean() / np.abs(exact).mean() < 0.08


def test_the_golden_model_has_what_it_is_to_show():
    config = golden(FAMILY)["config"]
    assert len(set(config["intermediate_size"])) > 1
    assert {0.0} < set(config["activation_sparsity_pattern"])
    assert config["vocab_size_per_layer_input"] < config["vocab_size"]
