"""Writes the expected tokens and log-probabilities beside it: transformers' `generate`, in float32, on weights drawn by
numpy. Some are computed in float64.

    make peers && .peers/bin/python tests/golden/generation/make.py [FOLDER [FAMILY ...]]

Runs in the peers' environment and imports nothing of kvlab.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    KimiLinearConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    OlmoHybridConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "weights"))
from random_checkpoint import draw, prompt  # noqa: E402

VOCAB, NEW, WINDOW = 320, 40, 24
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 32,
}
"""Of pairs of a head of 32, of which each third is kept, blended and divided."""
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 28,
    "first_k_dense_replace": 2,
    "num_mtp_layers": 0,
    "rms_norm_eps": 1e-3,
}
"""Dense layers alone. The epsilon is not that of the norms inside attention."""
HYBRID = {
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 20,
    "layer_types": ["linear_attention", "full_attention"],
}
"""Heads of keys serve two heads of values each."""
KIMI = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 28,
    "rms_norm_eps": 1e-4,
    "linear_num_heads": 3,
    "linear_head_dim": 24,
    "layer_types": HYBRID["layer_types"],
    "mlp_layer_types": ["dense", "dense"],
}
"""Dense layers alone; the epsilon is not that of the norms inside latent attention."""
GRANITE = {
    **DECODER,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "shared_intermediate_size": 96,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.1,
    "logits_scaling": 1.5,
}
"""Dense, and with the multipliers of none."""
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES = {
    "llama_gqa": LlamaConfig(**DECODER, num_key_value_heads=2),
    "llama_mqa": LlamaConfig(**DECODER, num_key_value_heads=1, tie_word_embeddings=True),
    "llama_mha": LlamaConfig(**DECODER, num_key_value_heads=4, attention_bias=True, rms_norm_eps=1e-5),
    "llama3_rope": LlamaConfig(**DECODER, num_key_value_heads=2, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(
        **DECODER, num_key_value_heads=2, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma": GemmaConfig(**{**DECODER, "hidden_size": 80}, num_key_value_heads=1, head_dim=32),
    "qwen3": Qwen3Config(**DECODER, num_key_value_heads=2, head_dim=32),
    "qwen3_yarn": Qwen3Config(**DECODER, num_key_value_heads=2, head_dim=32, rope_parameters=YARN),
    "qwen3_next": Qwen3NextConfig(
        **DECODER, **HYBRID, head_dim=32, num_experts=0, attention_bias=True, rms_norm_eps=1e-4
    ),
    "qwen3_next_experts": Qwen3NextConfig(
        **DECODER,
        **HYBRID,
        head_dim=32,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
    ),
    "qwen3_next_some_experts": Qwen3NextConfig(
        **{**DECODER, "num_hidden_layers": 3},
        **{**HYBRID, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        head_dim=32,
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        norm_topk_prob=False,
        mlp_only_layers=[1],
    ),
    "mistral": MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=WINDOW),
    "deepseek_v3": DeepseekV3Config(**DECODER, **LATENT, q_lora_rank=40),
    "deepseek_v3_experts": DeepseekV3Config(
        **DECODER,
        **{**LATENT, "first_k_dense_replace": 1},
        q_lora_rank=40,
        n_routed_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
    ),
    "deepseek_v3_plain": DeepseekV3Config(**DECODER, **LATENT, q_lora_rank=None, rope_parameters=LLAMA3),
    "deepseek_v3_yarn": DeepseekV3Config(
        **DECODER, **LATENT, q_lora_rank=40, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
    ),
    "mamba2": Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=16,
        num_heads=8,
        head_dim=16,
        n_groups=2,
        chunk_size=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    ),
    "gemma3_text": Gemma3TextConfig(
        **{**DECODER, "num_hidden_layers": 3, "hidden_size": 80},
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
        final_logit_softcapping=20.0,
        tie_word_embeddings=False,
    ),
    "gemma3n_text": Gemma3nTextConfig(
        **{**DECODER, "num_hidden_layers": 7, "hidden_size": 48, "intermediate_size": [64, 96, 64, 80, 96, 64, 80]},
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        num_kv_shared_layers=3,
        layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
        },
        final_logit_softcapping=20.0,
        tie_word_embeddings=False,
        vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=12,
        altup_num_inputs=3,
        laurel_rank=10,
        activation_sparsity_pattern=[0.9, 0.0, 0.6, 0.0, 0.8, 0.0, 0.95],
    ),
    "olmo_hybrid": OlmoHybridConfig(
        **DECODER, **HYBRID, rms_norm_eps=1e-4, rope_parameters={"rope_theta": None, "rope_type": "default"}
    ),
    "olmo_hybrid_rope": OlmoHybridConfig(
        **DECODER, **HYBRID, linear_allow_neg_eigval=False, rope_parameters={"rope_theta": 5e4, "rope_type": "default"}
    ),
    "recurrent_gemma": RecurrentGemmaConfig(
        **{**DECODER, "num_hidden_layers": 3, "hidden_size": 80},
        num_key_value_heads=1,
        lru_width=96,
        attention_window_size=WINDOW,
        block_types=["recurrent", "attention"],
        logits_soft_cap=20.0,
    ),
    "kimi_linear": KimiLinearConfig(**DECODER, **KIMI),
    "kimi_linear_compressed": KimiLinearConfig(**DECODER, **KIMI, q_lora_rank=40),
    "gpt_oss": GptOssConfig(
        **DECODER,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=WINDOW,
        num_local_experts=6,
        num_experts_per_tok=2,
        swiglu_limit=4.0,
        rope_parameters={**YARN, "truncate": False},
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(**GRANITE),
    "granitemoehybrid_rope": GraniteMoeHybridConfig(**GRANITE, position_embedding_type="rope", attention_bias=True),
}
DOUBLE = ("recurrent_gemma",)
"""Families computed in float64: 1 - a^2 cancels where a channel hardly decays, and the peer's float32 differs by 2.6e-4
from its own float64, from which kvlab's float32 differs by 2e-5."""
NORMS_NEAR = {
    **dict.fromkeys(("qwen3_next", "qwen3_next_experts", "qwen3_next_some_experts"), 0.0),
    "gemma": 0.0,
}
"""Families that store norms less one."""
LENGTHS = (1, 2, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65)
"""Around multiples of the page sizes and chunks tested, and around the window."""


def published(model) -> dict[str, list[int]]:
    """Names and shapes of the tensors as the hub's files have them. transformers renames some when it loads them, and
    joins convolutions; its `save_pretrained` (5.23) does not undo that right, it cuts convolutions into equal parts."""
    tensors, found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}, {}
    family = model.config.model_type
    for name, shape in tensors.items():
        layer, _, last = name.rpartition("conv1d.weight")
        if family in ("olmo_hybrid", "kimi_linear") and layer and not last:
            for part in "qkv":
                found[f"{layer}{part}_conv1d.weight"] = [tensors[f"{layer}{part}_proj.weight"][0], *shape[1:]]
            continue
        if family != "gpt_oss" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found |= experts(name, shape)
            continue
        if family == "olmo_hybrid" and f"{'.'.join(name.split('.')[:3])}.linear_attn.A_log" in tensors:
            name = name.replace("input_layernorm", "attention_layer_norm")
            name = name.replace("post_attention_layernorm", "feedforward_layer_norm")
        found[name.replace(".forget_gate.", ".")] = shape
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def experts(name: str, shape: list[int]) -> dict[str, list[int]]:
    """The matrices of every expert, of which transformers makes one tensor [experts, outputs, inputs]."""
    layer, _, last = name.rpartition(".")
    num_experts, outputs, inputs = shape
    halves = {"gate": outputs // 2, "up": outputs // 2} if last == "gate_up_proj" else {"down": outputs}
    return {
        f"{layer}.{n}.{half}_proj.weight": [rows, inputs] for n in range(num_experts) for half, rows in halves.items()
    }


def build(config, norms_near: float):
    """The model as transformers loads it from a folder with every tensor drawn from its name; names and shapes."""
    shapes = published(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    tensors = {name: draw(name, tuple(shape), norms_near=norms_near) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors")
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    return model.eval(), shapes


def forget(model) -> None:
    """RecurrentGemma keeps its states in its modules: a prompt of one token would go on from the last answer's, and of
    a convolution as wide as the model."""
    for module in model.modules():
        if hasattr(module, "conv1d_state"):
            module.conv1d_state = torch.zeros(1, module.lru_width, module.conv1d_width - 1)
            module.rg_lru.recurrent_states = torch.zeros(1, module.lru_width)


def answers(model, ids: list[int], **options) -> dict:
    """Greedy continuation of one prompt, and the log-probability of each of its tokens under the model."""
    forget(model)
    inputs = torch.tensor([ids])
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    tokens = out.sequences[0, len(ids) :].tolist()
    if options:
        return {"tokens": tokens, "score": float(out.sequences_scores[0])}
    chosen = [float(torch.log_softmax(x[0].double(), -1)[t]) for x, t in zip(out.logits, tokens, strict=True)]
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens]), use_cache=False).logits[0, len(ids) - 1 : -1]
    whole = torch.log_softmax(logits.double(), -1)[torch.arange(NEW), tokens]
    assert (whole - torch.tensor(chosen).double()).abs().max() < 1e-4, "a full pass says something else"
    return {"tokens": tokens, "logprobs": [round(value, 6) for value in chosen]}


def mxfp4() -> dict:
    """Blocks of MXFP4 and the numbers that transformers makes of them, [experts, inputs, outputs]."""
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (2, 3, 2, 16), np.uint8), rng.integers(100, 140, (2, 3, 2), np.uint8)
    numbers = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    return {"blocks": blocks.tolist(), "scales": scales.tolist(), "numbers": numbers.tolist()}


def main(folder: Path, families: list[str]) -> None:
    torch.set_num_threads(1)
    for family in families or FAMILIES:
        config, norms_near = FAMILIES[family], NORMS_NEAR.get(family, 1.0)
        model, shapes = build(config, norms_near)
        model = model.to(torch.float64 if family in DOUBLE else torch.float32)
        results = {}
        for length in LENGTHS:
            results[str(length)] = answers(model, prompt(length, VOCAB))
        golden = {
            "made_with": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
            "config": {k: v for k, v in config.to_dict().items() if k != "transformers_version"},
            "shapes": shapes,
            "norms_near": norms_near,
            "answers": results,
        }
        golden["config"]["architectures"] = [type(model).__name__]
        if family == "gpt_oss":
            golden["mxfp4"] = mxfp4()
        if family == "llama_gqa":
            golden["beams"] = {
                f"{length}/{beams}": answers(
                    model, prompt(length, VOCAB), num_beams=beams, length_penalty=1.0, output_scores=True
                )
                for length in (1, 17, 33)
                for beams in (2, 4)
            }
        text = json.dumps(golden, default=str, allow_nan=True)
        (folder / f"{family}.json").write_text(text + "\n")
        distinct = [len(set(result["tokens"])) for result in results.values()]
        print(f"{family:14} distinct tokens of {NEW}: {min(distinct)} to {max(distinct)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE, sys.argv[2:])
