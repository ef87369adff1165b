"""Published checkpoints: what is read is what was written, what cannot be read is said all at once, nothing lies in
memory twice."""

import json
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvlab.models.transformer import path_name
from kvlab.weights import WeightsError, load_checkpoint, save_checkpoint
from kvlab.weights.families import FAMILIES as LOADED
from tests.engine.families import FAMILIES, golden, pretrained, write_folder

ROOT = Path(__file__).parents[2]


def leaves(params):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3_plain"])
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
    for name in original:
        np.testing.assert_array_equal(written[name], original[name], err_msg=name)
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


def test_old_spellings_of_the_rotary_embedding(tmp_path):
    folder = write_folder("llama3_rope", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(folder).architecture == pretrained("llama3_rope").architecture


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama_gqa", {"model_type": "lama"}, "model_type = 'lama': did you mean llama"),
        ("llama_gqa", {"model_type": None}, "model_type = None"),
        ("llama_gqa", {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ("llama_gqa", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama_gqa", {"hidden_size": "64"}, "hidden_size = '64': must be a positive integer"),
        ("llama_gqa", {"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ("llama_gqa", {"num_key_value_heads": 3}, "num_kv_heads = 3: must divide"),
        ("llama_gqa", {"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "linear"}}, "factor = None"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
        ("llama_gqa", {"eos_token_id": 320}, "eos_token_id = 320"),
        ("llama_gqa", {"eos_token_id": ["x"]}, "eos_token_id = 'x'"),
        ("llama_gqa", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("mistral", {"layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ("deepseek_v3", {"first_k_dense_replace": 1}, "= 1: must be at least num_hidden_layers = 2: .* have experts"),
        ("deepseek_v3", {"first_k_dense_replace": None, "num_hidden_layers": 4}, "first_k_dense_replace = 3"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False: only True"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "mscale": 1.0}}, "rope_type = 'yarn'"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2: must be num_attention_heads = 4"),
        ("deepseek_v3", {"qk_rope_head_dim": 11}, "rope_dim = 11: must be even"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_a_proj.weight: is unexpected"),
        ("mamba2", {"time_step_limit": [0.1, 1.0]}, "time_step_limit"),
        ("mamba2", {"use_bias": True}, "use_bias = True"),
        ("mamba2", {"expand": 3}, "must be expand"),
    ],
)
def test_options_that_are_not_built_are_refused(family, changes, message, tmp_path):
    folder = write_folder(family, tmp_path)
    edit(folder, **changes)
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(folder)


def test_every_wrong_field_is_said_at_once_and_null_is_absent(tmp_path):
    folder = write_folder("llama_gqa", tmp_path)
    edit(folder, attention_bias=None, num_experts=None, torch_dtype=["not", "read"])
    assert load_checkpoint(folder).architecture == pretrained("llama_gqa").architecture
    edit(folder, hidden_size="6" * 10_000, mlp_bias=True, rope_parameters={"rope_type": "linear", "factor": 0})
    config = json.loads((folder / "config.json").read_text())
    del config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as error:
        load_checkpoint(folder)
    for line in (
        "config.json: hidden_size = '666",
        "config.json: mlp_bias = True: only False is supported",
        "config.json: vocab_size = None: is missing",
        "config.json: factor = 0: must be a finite positive number",
    ):
        assert line in str(error.value)
    assert len(str(error.value)) < 1_000


def test_end_tokens_and_what_an_absent_window_means(tmp_path):
    folder = write_folder("mistral", tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    loaded = load_checkpoint(folder)
    assert loaded.end_tokens == (7,)
    assert {layer.config.window for layer in loaded.architecture.layers} == {4096}  # transformers' own default
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    loaded = load_checkpoint(folder)
    assert loaded.end_tokens == (7, 9)
    save_checkpoint(loaded, tmp_path / "b")
    assert load_checkpoint(tmp_path / "b").end_tokens == (7, 9)
    for dtype in ("int8", "float64", "no"):
        with pytest.raises(ValueError, match="dtype ="):
            save_checkpoint(loaded, tmp_path / "c", dtype=dtype)
    assert not (tmp_path / "c").exists()


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
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError):
        load_checkpoint(folder)
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


def test_every_family_of_the_golden_files_is_a_family_of_the_loader():
    assert {golden(family)["config"]["model_type"] for family in FAMILIES} == set(LOADED)
