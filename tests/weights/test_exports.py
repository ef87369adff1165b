"""What `save_checkpoint` writes, as readers of both spellings take it: transformers 4 reads `rope_theta` and
`rope_scaling` at the top and passes over `rope_parameters`, and either gives a field that is not there its default."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kvlab.weights import load_checkpoint, save_checkpoint
from kvlab.weights.checkpoint import peek_architecture
from tests.engine.families import FAMILIES, golden, pretrained, write_folder

SHAPE = {"vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"}
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
HEADS = {"num_attention_heads", "num_key_value_heads", "rope_theta", "attention_bias", "rms_norm_eps"}
CONTEXT = {"max_position_embeddings", "intermediate_size", "hidden_act"}
DECODER = SHAPE | TOKENS | HEADS | CONTEXT
LATENT = {"kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "first_k_dense_replace"}
DELTA = {f"linear_{name}" for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
MAMBA = {f"mamba_{name}" for name in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size")}
SCALES = {"embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"}
DEFAULTED = {
    "llama": DECODER | {"head_dim"},
    "mistral": DECODER - {"attention_bias"} | {"head_dim", "sliding_window"},
    "qwen3": DECODER - TOKENS | {"head_dim"},
    "qwen2": DECODER - TOKENS - {"attention_bias"} | {"use_sliding_window", "sliding_window", "max_window_layers"},
    "gemma": DECODER | {"head_dim", "hidden_activation"},
    "deepseek_v3": DECODER | LATENT - {"attention_bias"},
    "mamba2": SHAPE
    | TOKENS
    | {"num_heads", "head_dim", "state_size", "expand", "conv_kernel", "n_groups", "chunk_size"},
    "gemma3_text": DECODER - {"hidden_act"}
    | {"head_dim", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types"}
    | {"final_logit_softcapping", "rope_local_base_freq"},
    "gemma3n_text": DECODER - {"hidden_act"}
    | {"head_dim", "hidden_activation", "sliding_window", "layer_types"}
    | {"final_logit_softcapping", "rope_local_base_freq", "num_kv_shared_layers", "laurel_rank"}
    | {"vocab_size_per_layer_input", "hidden_size_per_layer_input", "activation_sparsity_pattern"}
    | {"altup_active_idx", "altup_correct_scale", "altup_num_inputs"},
    "granitemoehybrid": DECODER
    | SCALES
    | MAMBA
    | {"num_local_experts", "shared_intermediate_size", "position_embedding_type", "layer_types"},
    "recurrent_gemma": DECODER - {"max_position_embeddings", "hidden_act"}
    | {"lru_width", "attention_window_size", "conv1d_width", "logits_soft_cap", "hidden_activation", "block_types"}
    | {"partial_rotary_factor"},
    "gpt_oss": DECODER - TOKENS
    | {"head_dim", "sliding_window", "layer_types", "num_local_experts", "num_experts_per_tok", "rope_scaling"},
    "qwen3_next": DECODER - TOKENS
    | DELTA
    | {"linear_conv_kernel_dim", "head_dim", "num_experts", "layer_types", "partial_rotary_factor"},
}
"""By family the arguments with defaults of its configuration class in transformers 4.57.1 that say what a model is, as
its signature lists them; what concerns dropout, drawing, caches and experts is left out."""
ONLY_IN_5 = ("olmo_hybrid", "kimi_linear")


def exported(family: str, folder: Path) -> dict:
    save_checkpoint(pretrained(family), folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", [*FAMILIES, "granitemoehybrid_rope"])
def test_no_field_that_an_older_reader_defaults_is_left_out(family, tmp_path):
    values, original = exported(family, tmp_path / "out"), golden(family)["config"]
    if original["model_type"] in ONLY_IN_5:
        return
    needed = DEFAULTED[original["model_type"]]
    assert needed - values.keys() <= ({"attention_bias"} if family == "deepseek_v3" else set())
    rope = original.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in needed:
        assert values["rope_theta"] == rope["rope_theta"]
    if "max_position_embeddings" in needed:
        assert values["max_position_embeddings"] == 512
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if rope:
        defaults = {"beta_slow", "attention_factor"} if family == "gpt_oss" else set()  # what they are is said
        written = values.get("rope_scaling", {"rope_type": "default"})
        assert {name: value for name, value in written.items() if name not in defaults} == scaling
    assert [values[name] for name in TOKENS] == [None] * 3


def test_a_base_and_a_context_that_are_not_defaults_stand_in_both_spellings(tmp_path):
    model = pretrained("llama_gqa")
    layers = tuple(replace(layer, config=replace(layer.config, rope_base=5e5)) for layer in model.architecture.layers)
    architecture = replace(model.architecture, layers=layers, context_len=8192)
    save_checkpoint(replace(model, architecture=architecture), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["rope_theta"], values["rope_parameters"]["rope_theta"]) == (5e5, 5e5)
    assert values["max_position_embeddings"] == 8192
    assert load_checkpoint(tmp_path / "out").architecture == architecture


@pytest.mark.parametrize(
    ("family", "end"),
    [
        *(("llama_gqa", 2), ("mistral", 2), ("deepseek_v3", 1), ("mamba2", 2), ("gemma3_text", 1)),
        *(("recurrent_gemma", 1), ("granitemoehybrid", 2), ("qwen3", None), ("qwen3_next", None)),
        *(("qwen2", None), ("gemma", 1), ("gemma3n_text", 1), ("olmo_hybrid", None), ("kimi_linear", None)),
        ("gpt_oss", None),
    ],
)
def test_an_absent_end_is_the_readers_and_null_is_none(family, end, tmp_path):
    """transformers 5.23's defaults; those of the hybrids are no tokens of so small a vocabulary."""
    folder = write_folder(family, tmp_path / "in")
    assert load_checkpoint(folder).end_tokens == ()
    config = golden(family)["config"]
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    config["eos_token_id"] = None
    assert load_checkpoint(folder).end_tokens == (() if end is None else (end,))


def test_both_spellings_side_by_side_are_read_as_one(tmp_path):
    """As transformers 5: what `rope_scaling` says counts, the base at the top where none is inside."""
    folder = write_folder("llama3_rope", tmp_path / "in")
    config = golden("llama3_rope")["config"]
    rope = dict(config["rope_parameters"])
    base = rope.pop("rope_theta")
    for both in (
        {"rope_scaling": rope, "rope_theta": base, "rope_parameters": config["rope_parameters"]},
        {"rope_scaling": config["rope_parameters"], "rope_parameters": None},
        {"rope_scaling": rope, "rope_theta": base, "rope_parameters": {}},
    ):
        (folder / "config.json").write_text(json.dumps(config | both))
        assert peek_architecture(folder) == pretrained("llama3_rope").architecture


COMPARE = """
import json, sys
from pathlib import Path
from transformers import AutoConfig
aside = {"transformers_version", "dtype", "architectures", "_name_or_path", "initializer_range", "use_cache"}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    read = json.loads(json.dumps(AutoConfig.from_pretrained(folder).to_dict(), default=str))
    original = json.loads((folder / "original.json").read_text())
    found = {name: (value, read.get(name)) for name, value in original.items()
             if name not in aside and read.get(name) != value}
    print(json.dumps([folder.name, found]))
"""


@pytest.mark.slow
def test_transformers_reads_of_every_export_what_the_original_says(tmp_path):
    """Needs `make peers`."""
    python = Path(__file__).parents[2] / ".peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("transformers' environment is missing: make peers")
    for family in FAMILIES:
        exported(family, tmp_path / family)
        (tmp_path / family / "original.json").write_text(json.dumps(golden(family)["config"]))
    command, environment = [python, "-c", COMPARE, str(tmp_path)], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == set(FAMILIES)
    unread = {"block_types", "max_position_embeddings"}  # blocks are spelled out, and it has no context
    assert found.pop("recurrent_gemma").keys() <= unread
    original, read = found["gpt_oss"].pop("rope_parameters")
    assert read == original | {"beta_slow": 1.0, "attention_factor": read["attention_factor"]}
    assert not any(found.values()), found
