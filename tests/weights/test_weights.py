"""Published checkpoints: what is read is what was written, what cannot be read is said all at once, nothing lies in
memory twice."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvlab.models.transformer import path_name
from kvlab.weights import WeightsError, load_checkpoint, save_checkpoint
from kvlab.weights.architectures import table_of
from kvlab.weights.checkpoint import is_unread, peek_architecture
from kvlab.weights.families import FAMILIES as LOADED
from kvlab.weights.tables import LESS_ONE
from tests.engine.families import FAMILIES, golden, pretrained, write_folder

ROOT = Path(__file__).parents[2]


def leaves(params):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


OTHERS = (
    "deepseek_v3_plain",
    "deepseek_v3_yarn",
    "qwen3_yarn",
    "granitemoehybrid_rope",
    "olmo_hybrid_rope",
    "kimi_linear_compressed",
    "qwen3_next_experts",
    "qwen3_next_some_experts",
    "deepseek_v3_experts",
)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_checkpoint_written_and_read_is_the_same(family, tmp_path):
    """Through three shards, tied heads left out; and the tensors are those that transformers wrote."""
    model = pretrained(family)
    save_checkpoint(model, tmp_path / "out", max_shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) >= 3
    again = load_checkpoint(tmp_path / "out")
    assert again.architecture == model.architecture
    for name, leaf in leaves(again.model.params).items():
        np.testing.assert_array_equal(leaf, leaves(model.model.params)[name], err_msg=name)
    original = load_file(write_folder(family, tmp_path / "in") / "model.safetensors")
    written = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    assert written.keys() == original.keys()
    entries = table_of(model.architecture).values()
    shifted = {name for entry in entries if entry.transform is LESS_ONE for name in entry.names}
    for name in original:  # 1 is added to weights up to 2 in float32: half a unit in the last place
        np.testing.assert_allclose(written[name], original[name], 0, 2**-23 if name in shifted else 0, err_msg=name)
    with pytest.raises(FileExistsError, match="holds a model already"):
        save_checkpoint(model, tmp_path / "out")


def test_dtypes(tmp_path):
    """bfloat16 files compute in bfloat16, float16 is widened, an asked-for dtype wins; norms stay float32."""
    folder = write_folder("llama_gqa", tmp_path)
    single = load_file(folder / "model.safetensors")
    import ml_dtypes

    for stored, asked, expected in (
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (np.float16, None, "float32"),
        (ml_dtypes.bfloat16, "float32", "float32"),
        (np.float32, "bfloat16", "bfloat16"),
    ):
        save_file({name: tensor.astype(stored) for name, tensor in single.items()}, folder / "model.safetensors")
        model = load_checkpoint(folder, asked)
        assert model.architecture.model.dtype == expected
        assert model.model.params["head"]["kernel"].dtype == expected
        assert model.model.params["norm"]["scale"].dtype == np.float32


def test_distances_from_one_are_stored_in_their_own_precision(tmp_path):
    """A file in bfloat16 has what a norm is above one, rounded; not one more than that, rounded."""
    model = pretrained("gemma3_text")
    save_checkpoint(model, tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(write_folder("gemma3_text", tmp_path / "in") / "model.safetensors")
    for name in original:
        np.testing.assert_allclose(found[name].astype(np.float32), original[name], 2**-8, 2**-22, err_msg=name)


def test_recurrent_gemma_computes_in_bfloat16(tmp_path):
    """The gates' matrices too are then of that type; logits are near those of float32."""
    folder, tokens = write_folder("recurrent_gemma", tmp_path), jnp.arange(8, dtype=jnp.int32)[None]

    def logits(dtype):
        model = load_checkpoint(folder, dtype).model.merge()
        return np.asarray(jax.jit(lambda ids: model.logits(model.parallel(ids)))(tokens))

    exact = logits("float32")
    assert 1e-4 < np.abs(logits("bfloat16") - exact).mean() / np.abs(exact).mean() < 0.05


def test_norms_less_one_keep_their_digits_in_fewer_bits(tmp_path):
    """What is rounded is the distance from one, as the file has it."""
    original = load_file(write_folder("qwen3_next", tmp_path / "in") / "model.safetensors")
    save_checkpoint(pretrained("qwen3_next"), tmp_path / "out", dtype="float16")
    (written,) = (tmp_path / "out").glob("*.safetensors")
    name = "model.layers.1.self_attn.q_norm.weight"
    np.testing.assert_allclose(load_file(written)[name], original[name], rtol=2**-11, atol=2**-23)


def test_every_mismatch_is_reported_at_once(tmp_path):
    folder = write_folder("llama_gqa", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :60]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.int32)
    tensors["model.layers.7.stranger"] = np.zeros(3, np.float32)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_checkpoint(folder)
    for line in (
        "model.norm.weight: is missing; must be [64]",
        "lm_head.weight: shape [320, 60]: must be [320, 64]",
        "model.layers.0.mlp.up_proj.weight: dtype I32: must be one of F32, F16, BF16",
        "model.layers.7.stranger: is unexpected",
    ):
        assert line in str(error.value)


def test_damaged_files_are_named(tmp_path):
    """Truncated at many lengths, one byte flipped in the header, sharded with a shard missing, a pickle, no file, no
    JSON."""
    folder = write_folder("llama_gqa", tmp_path / "a")
    path, rng = folder / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    for length in [0, 7, 8, 9, 200, *(rng.randrange(len(whole)) for _ in range(20)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            load_checkpoint(folder)
    for place in rng.sample(range(8), 8):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            load_checkpoint(folder)
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="is a pickle, which is never read"):
        load_checkpoint(folder)
    for damaged in ("{", '{"layer_types": ' + "[" * 900 + "]" * 900 + "}", "[" * 100_000):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(WeightsError) as error:
            peek_architecture(folder)
        assert len(str(error.value)) < 2_000
    with pytest.raises(WeightsError, match="holds neither"):
        load_checkpoint(tmp_path / "nowhere")

    sharded = tmp_path / "b"
    save_checkpoint(pretrained("llama_gqa"), sharded, max_shard_bytes=60_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = sorted(sharded.glob("model-*"))[0]
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(WeightsError, match=first.name):
        load_checkpoint(sharded)
    first.write_bytes(kept)
    index["weight_map"]["model.norm.weight"] = "../../etc/passwd.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"must be a \.safetensors file of this folder"):
        load_checkpoint(sharded)


def test_loading_holds_little_more_than_the_model(tmp_path):
    """Peak resident memory of a fresh process, less what it had after loading a tiny model (code, compilation), below
    1.3 times the weights (190 MB here)."""
    from flax import nnx

    from kvlab.mixers.attention import AttentionConfig
    from kvlab.models.model import Model
    from kvlab.models.transformer import LayerConfig, ModelConfig, Transformer
    from kvlab.weights import Pretrained
    from kvlab.weights.families import Architecture

    layers = (LayerConfig("attention", AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64)),) * 40
    config = ModelConfig(model_dim=256, mlp_dim=1024, tie_embeddings=False)
    model = Model.of(Transformer(layers, config, 1000, rngs=nnx.Rngs(0)))
    size = model.num_bytes
    save_checkpoint(
        Pretrained(Architecture("llama", layers, config, 1000), model),
        tmp_path / "big",
        max_shard_bytes=40 << 20,
    )
    tiny = write_folder("llama_gqa", tmp_path / "tiny")
    script = f"""
import re
from kvlab.host import keep_freed_memory
import jax
from kvlab.weights import load_checkpoint
jax.block_until_ready(load_checkpoint({str(tiny)!r}).model.params)
def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = load_checkpoint({str(tmp_path / "big")!r})
jax.block_until_ready(model.model.params)
print((kib("VmHWM") - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 1.3 * size, f"{int(done.stdout) / size:.2f} times the weights"


def test_what_a_config_cannot_say_is_not_written(tmp_path):
    from dataclasses import replace

    model = pretrained("llama_gqa")
    layers = tuple(replace(layer, config=replace(layer.config, soft_cap=5.0)) for layer in model.architecture.layers)
    odd = replace(model, architecture=replace(model.architecture, layers=layers))
    with pytest.raises(ValueError, match="cannot say what this model is"):
        save_checkpoint(odd, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid", "kimi_linear"])
def test_a_hybrid_of_one_kind_of_layer_is_not_written(family, tmp_path):
    """Its config.json would say nothing of the other kind, or transformers not read it."""
    from dataclasses import replace

    model = pretrained(family)
    for layer in model.architecture.layers:
        odd = replace(model, architecture=replace(model.architecture, layers=(layer, layer)))
        with pytest.raises(ValueError, match="cannot say"):
            save_checkpoint(odd, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_every_family_of_the_golden_files_is_a_family_of_the_loader():
    assert {golden(family)["config"]["model_type"] for family in FAMILIES} == set(LOADED)


@pytest.mark.parametrize(
    ("family", "name", "num_layers", "is_passed_over"),
    [
        ("qwen3_next", "mtp.layers.0.mlp.gate.weight", 2, True),
        ("qwen3_next", "model.layers.2.mtp.weight", 2, False),
        ("deepseek_v3", "model.layers.61.eh_proj.weight", 61, True),
        ("deepseek_v3", "model.layers.61.eh_proj.weight", 60, False),
        ("deepseek_v3", "model.layers.2.eh_proj.weight", 2, False),
        ("llama_gqa", "mtp.fc.weight", 2, False),
        ("llama_gqa", "model.layers.0.self_attn.rotary_emb.inv_freq", 2, True),
    ],
)
def test_what_predicts_tokens_behind_the_next_is_passed_over(family, name, num_layers, is_passed_over):
    architecture = pretrained(family).architecture
    assert is_unread(name, replace(architecture, layers=architecture.layers[:1] * num_layers)) is is_passed_over


def test_a_qwen3_next_with_a_head_for_further_tokens_is_read(tmp_path):
    folder = write_folder("qwen3_next_experts", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    assert load_checkpoint(folder).architecture == pretrained("qwen3_next_experts").architecture
    save_file(tensors | {"mtq.fc.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"mtq\.fc\.weight: is unexpected"):
        load_checkpoint(folder)
