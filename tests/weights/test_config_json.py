"""A checkpoint's config.json: every spelling in use is read as transformers reads it, and what cannot be read is said
all at once."""

import json
from pathlib import Path

import pytest

from kvlab.weights import WeightsError, load_checkpoint, save_checkpoint
from kvlab.weights.architectures import read_architecture
from kvlab.weights.checkpoint import peek_architecture
from tests.engine.families import pretrained, write_folder


def test_old_spellings_of_the_rotary_embedding(tmp_path):
    folder = write_folder("llama3_rope", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(folder).architecture == pretrained("llama3_rope").architecture


def test_the_hubs_spelling_of_gemma_3(tmp_path):
    """A pattern in place of types, bases and scaling in fields of their own, as the first models were published."""
    folder = write_folder("gemma3_text", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"], config["rope_parameters"], config["tie_word_embeddings"]
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    pattern = {"sliding_window_pattern": 2, "hidden_act": "not read"}
    (folder / "config.json").write_text(json.dumps(config | old | pattern))
    layers = [layer.config for layer in peek_architecture(folder).layers]
    assert [(layer.window, layer.rope_base, layer.rope_scaling) for layer in layers] == [
        (24, 2e4, ()), (None, 5e5, (4.0,)), (24, 2e4, ())
    ]  # fmt: skip
    read, _ = read_architecture(config | old | pattern, "float32")
    assert read.model.tie_embeddings  # what an absent field means there; the file has a head of its own, which counts
    assert peek_architecture(folder).model.embed_scale == pytest.approx(80**0.5)


def test_the_hubs_spelling_of_gemma_and_qwen2(tmp_path):
    """Gemma says gelu and means its tanh form; most of Qwen 2 name a window that is not used."""
    folder = write_folder("gemma", tmp_path / "gemma")
    edit(folder, hidden_act="gelu", hidden_activation=None, head_dim=32, rope_parameters=None, rope_theta=1e4)
    assert load_checkpoint(folder).architecture == pretrained("gemma").architecture
    folder = write_folder("qwen2", tmp_path / "qwen2")
    edit(folder, layer_types=None)
    assert load_checkpoint(folder).architecture == pretrained("qwen2").architecture
    assert [layer.config.window for layer in peek_architecture(folder).layers] == [None, 24]
    edit(folder, use_sliding_window=False)
    assert [layer.config.window for layer in peek_architecture(folder).layers] == [None, None]


def test_the_hubs_spelling_of_granite_4(tmp_path):
    """Layers by their older names, positions "nope", and head dims left to the widths."""
    folder = write_folder("granitemoehybrid", tmp_path)
    older = {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope", "mamba_d_head": "auto"}
    edit(folder, **older, embedding_multiplier=3)
    assert load_checkpoint(folder).architecture == pretrained("granitemoehybrid").architecture
    edit(folder, layer_types=None)
    assert {layer.mixer for layer in peek_architecture(folder).layers} == {"mamba2"}


def test_what_recurrent_gemma_does_not_say(tmp_path):
    """Half of each head turns, in the hub's older spelling and unsaid; blocks are repeated; heads are tied."""
    folder = write_folder("recurrent_gemma", tmp_path)
    edit(folder, rope_parameters=None, rope_theta=1e4, partial_rotary_factor=0.5, head_dim=None)
    assert load_checkpoint(folder).architecture == pretrained("recurrent_gemma").architecture
    edit(folder, partial_rotary_factor=None, block_types=None, num_hidden_layers=4, lru_width=None)
    architecture = peek_architecture(folder)
    assert [layer.mixer for layer in architecture.layers] == ["rglru", "rglru", "attention", "rglru"]
    assert architecture.layers[2].config.rope_fraction == 0.5
    assert architecture.layers[0].config.width == 80
    assert architecture.model.embed_scale == 8.9375  # sqrt(80) = 8.944 in bfloat16


def test_the_hubs_spelling_of_qwen3_next(tmp_path):
    """An interval in place of layer types, the turned share and the base as fields of their own, dense layers by
    name."""
    folder = write_folder("qwen3_next", tmp_path)
    edit(folder, full_attention_interval=2, num_experts=512, mlp_only_layers=[0, 1], layer_types=None)
    edit(folder, rope_parameters=None, rope_theta=5e5, partial_rotary_factor=0.5)
    linear, full = (layer.config for layer in load_checkpoint(folder).architecture.layers)
    assert (full.rope_base, full.rope_fraction, full.head_dim, linear.heads) == (5e5, 0.5, 32, 4)
    edit(folder, partial_rotary_factor=None)
    assert peek_architecture(folder).layers[1].config.rope_fraction == 0.25  # what an absent field means there


def test_the_hubs_spelling_of_kimi_linear(tmp_path):
    """Linear layers in an object of their own, counted from 1, and fields that are not read."""
    folder = write_folder("kimi_linear", tmp_path)
    linear = {"num_heads": 3, "head_dim": 24, "short_conv_kernel_size": 4}
    edit(folder, layer_types=None, mlp_layer_types=None, linear_num_heads=None, linear_head_dim=None)
    edit(folder, first_k_dense_replace=2, num_experts=256, rope_theta=1e4, head_dim=72, moe_layer_freq=1)
    edit(folder, linear_attn_config=linear | {"kda_layers": [1], "full_attn_layers": [2]})
    assert load_checkpoint(folder).architecture == pretrained("kimi_linear").architecture
    edit(folder, linear_attn_config=linear, num_hidden_layers=9, first_k_dense_replace=9)
    kinds = [layer.mixer for layer in peek_architecture(folder).layers]
    assert [place for place, kind in enumerate(kinds) if kind == "latent"] == [4, 8]  # transformers' default


def test_the_hubs_spelling_of_gpt_oss(tmp_path):
    """The rotary embedding in the older spelling, and fields that nothing here reads."""
    folder = write_folder("gpt_oss", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = {**config["rope_parameters"], "beta_slow": 1.0}
    older = {"rope_parameters": None, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    edit(folder, **older, experts_per_token=2, initial_context_length=32, router_aux_loss_coef=0.9)
    assert load_checkpoint(folder).architecture == pretrained("gpt_oss").architecture


def test_what_a_gpt_oss_is_where_its_file_says_little(tmp_path):
    """As transformers' config: a window in every layer of an even number, YaRN, and clamps at 7."""
    folder = write_folder("gpt_oss", tmp_path)
    absent = dict.fromkeys(("layer_types", "rope_parameters", "rms_norm_eps", "attention_bias", "swiglu_limit"))
    edit(folder, **absent, swiglu_alpha=None, num_hidden_layers=3, head_dim=None)
    architecture = peek_architecture(folder)
    layers = [layer.config for layer in architecture.layers]
    assert [layer.window for layer in layers] == [24, None, 24]
    longer = pytest.approx(1.3466, abs=1e-4)
    assert (layers[0].rope_base, layers[0].rope_scaling) == (150_000.0, (32.0, 1.0, 32.0, 4096.0, longer, 1.0))
    assert (layers[0].head_dim, layers[0].bias, architecture.model.norm_eps) == (16, True, 1e-5)
    assert (architecture.layers[0].mlp.limit, architecture.layers[0].mlp.gain) == (7.0, 1.702)
    config = json.loads((folder / "config.json").read_text())
    for name in ("head_dim", "sliding_window", "num_key_value_heads"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    first = peek_architecture(folder).layers[0].config
    assert (first.head_dim, first.window, first.num_kv_heads) == (64, 128, 8)


@pytest.mark.parametrize("family", ["mamba2", "granitemoehybrid"])
def test_numbers_that_json_lacks_are_read_as_transformers_5_saves_them(family, tmp_path):
    folder = write_folder(family, tmp_path)
    edit(folder, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert load_checkpoint(folder).architecture == pretrained(family).architecture
    for wrong in ([0.0, {"__float__": "-Infinity"}], [0.0, {"__float__": "NaN"}], [0.0, {"__float__": "many"}]):
        edit(folder, time_step_limit=wrong)
        with pytest.raises(WeightsError, match="time_step_limit = "):
            load_checkpoint(folder)


@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({"rope_parameters": None, "rope_theta": None}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": 5e5}, None),
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default"}}, 1e4),
    ],
)
def test_olmo_hybrids_base_of_null_turns_nothing(fields, base, tmp_path):
    """What transformers makes of each."""
    folder = write_folder("olmo_hybrid", tmp_path)
    edit(folder, **fields)
    attention = peek_architecture(folder).layers[1].config
    assert (attention.rope_base if attention.rope else None) == base


def test_what_an_olmo_hybrid_is_where_its_file_says_little(tmp_path):
    """As transformers' config: heads of linear layers as of attention, keys of three quarters of the width."""
    folder = write_folder("olmo_hybrid", tmp_path)
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    absent = {f"linear_{name}": None for name in (*names, "allow_neg_eigval")}
    edit(folder, layer_types=None, num_hidden_layers=6, **absent)
    layers = peek_architecture(folder).layers
    assert [layer.mixer for layer in layers] == [*["linear"] * 3, "attention", *["linear"] * 2]
    linear = layers[0].config
    assert (linear.num_heads, linear.heads, linear.key_dim, linear.value_dim, linear.conv_len) == (4, 4, 12, 24, 4)
    assert linear.negative_eigenvalues
    edit(folder, num_hidden_layers=3)
    assert [layer.mixer for layer in peek_architecture(folder).layers] == ["linear", "linear", "attention"]


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
        ("llama_gqa", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "linear"}}, "factor = None"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor = 0.5: must be"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "yarn", "truncate": "no"}}, "truncate = 'no': must be"),
        ("llama_gqa", {"eos_token_id": 320}, "eos_token_id = 320"),
        ("llama_gqa", {"eos_token_id": ["x"]}, "eos_token_id = 'x'"),
        ("llama_gqa", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
            "layer_types = .*: must be 2",
        ),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers = -1: must be an integer in"),
        ("qwen2", {"use_mrope": True}, "use_mrope = True: only False"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act = 'silu': must be one of gelu_pytorch_tanh, gelu"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: only False"),
        ("mistral", {"layer_types": ["full_attention", "chunked"]}, "layer_types"),
        (
            "deepseek_v3",
            {"first_k_dense_replace": 1},
            r"experts.0.down_proj.weight: is missing; must be .64, 2048.",
        ),
        ("deepseek_v3_experts", {"first_k_dense_replace": 2}, "layers.1.mlp.gate_proj.weight: is missing"),
        (
            "deepseek_v3_experts",
            {"num_experts_per_tok": 7},
            "num_experts_per_tok = 7: must be at most 6, the exp",
        ),
        ("deepseek_v3_experts", {"n_group": 5}, "n_group = 5: must divide n_routed_experts = 12 into groups of two"),
        ("deepseek_v3_experts", {"n_group": 12}, "n_group = 12: must divide n_routed_experts = 12 into groups of two"),
        ("deepseek_v3_experts", {"topk_group": 5}, "topk_group = 5: must be at most n_group = 4"),
        ("deepseek_v3_experts", {"n_shared_experts": 0}, "n_shared_experts = 0: must be a positive integer"),
        ("deepseek_v3_experts", {"num_local_experts": 8}, "num_local_experts = 8: must be n_routed_experts = 12"),
        ("deepseek_v3_experts", {"topk_method": "greedy"}, "topk_method = 'greedy': only 'noaux_tc'"),
        ("deepseek_v3_experts", {"scoring_func": "softmax"}, "scoring_func = 'softmax': only 'sigmoid'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False: only True"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "longrope", "mscale": 1.0}}, "rope_type = 'longrope'"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2: must be num_attention_heads = 4"),
        ("deepseek_v3", {"qk_rope_head_dim": 11}, "rope_dim = 11: must be even"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_a_proj.weight: is unexpected"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu': only 'gelu_pytorch_tanh'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: only None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"query_pre_attn_scalar": 0.5}, "query_pre_attn_scalar = 0.5: must be a positive integer"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, "layer_types = .*: must be 3 of"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters = .*: must be an object with full"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rope_type = 'longrope'"),
        ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts = 4: must be 0: experts are not built"),
        ("granitemoehybrid", {"num_local_experts": None}, "num_local_experts = 8: must be 0"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention", "moe"]}, "layer_types = .*: must be 3 of"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi': must be one of"),
        ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba_proj_bias = True: only False"),
        ("granitemoehybrid", {"mamba_d_head": 8}, "mamba_n_heads . mamba_d_head = 64: must be .* = 128"),
        ("granitemoehybrid", {"residual_multiplier": 0}, "residual_multiplier = 0: must be a finite positive number"),
        ("recurrent_gemma", {"block_types": ["recurrent", "mamba"]}, "block_types = .*: must be a list of at least 1"),
        ("recurrent_gemma", {"block_types": []}, "block_types = .*: must be a list of at least 1"),
        ("recurrent_gemma", {"hidden_activation": "silu"}, "hidden_activation = 'silu': only 'gelu_pytorch_tanh'"),
        ("recurrent_gemma", {"conv1d_width": 1}, "conv_len = 1: must be 0"),
        ("recurrent_gemma", {"lru_width": 90}, "num_heads = 4: must divide width = 90"),
        ("recurrent_gemma", {"rope_parameters": {"partial_rotary_factor": 0.45}}, "partial_rotary_factor = 0.45: must"),
        ("recurrent_gemma", {"attention_bias": True}, "q_proj.bias: is missing"),
        ("qwen3_next", {"num_experts": 8}, "num_experts_per_tok = 10: must be at most num_experts = 8"),
        (
            "qwen3_next",
            {"num_experts": None, "mlp_only_layers": [0]},
            "layers.1.mlp.experts.0.down_proj.weight: is missing",
        ),
        ("qwen3_next_experts", {"decoder_sparse_step": 2}, "layers.0.mlp.gate_proj.weight: is missing"),
        ("qwen3_next_experts", {"num_experts": 70_000}, r"num_experts = 70000: must be an integer in .1, 65536."),
        ("qwen3_next_experts", {"norm_topk_prob": 1}, "norm_topk_prob = 1: must be"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 2}, "layer_types = .*: must be 2 of linear_attention"),
        ("qwen3_next", {"layer_types": ["full_attention", ["linear_attention"]]}, "layer_types = .*: must be 2 of"),
        ("qwen3_next", {"layer_types": None}, "layer_types = .'linear_attention', 'linear_attention'.: must be 2 of"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_value_heads = 3: must be a multiple of"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "conv_len = 1: must be 0 .none. or a width"),
        ("qwen3_next", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_type = 'longrope'"),
        ("qwen3_next", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor = 1.5: must be"),
        (
            "qwen3_next",
            {"rope_parameters": {"partial_rotary_factor": 0.1}},
            "= 0.1: must turn an even part of a head",
        ),
        ("qwen3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: only 1.0"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only 1.0"),
        (
            "olmo_hybrid",
            {"layer_types": ["linear_attention"] * 2},
            "layer_types = .*: must be 2 of linear_attention",
        ),
        ("olmo_hybrid", {"linear_num_key_heads": 3}, "linear_num_value_heads = 4: must be a multiple of .* = 3"),
        ("olmo_hybrid", {"linear_allow_neg_eigval": 1}, "linear_allow_neg_eigval = 1"),
        ("olmo_hybrid", {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ("olmo_hybrid", {"num_experts": 4}, "num_experts = 4: only 0"),
        ("olmo_hybrid", {"rope_theta": -1.0}, "rope_theta = -1.0: must be a finite positive number"),
        ("olmo_hybrid_rope", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ("kimi_linear", {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types = .*: must be 2 of dense: experts"),
        (
            "kimi_linear",
            {"mlp_layer_types": None},
            "first_k_dense_replace = 1: must be at least .* have experts",
        ),
        ("kimi_linear", {"tie_word_embeddings": True}, "tie_word_embeddings = True: only False"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope = False: only True"),
        ("kimi_linear", {"attention_bias": True}, "attention_bias = True: only False"),
        ("kimi_linear", {"num_key_value_heads": 2}, "num_key_value_heads = 2: must be num_attention_heads = 4"),
        ("kimi_linear", {"linear_attn_config": {"num_heads": 0}}, "linear_attn_config.num_heads = 0: must be"),
        ("kimi_linear", {"linear_attn_config": 3}, "linear_attn_config = 3: must be"),
        ("kimi_linear", {"layer_types": ["linear_attention"] * 2}, "layer_types = .*: must be 2 of linear_attention"),
        (
            "kimi_linear",
            {"layer_types": None, "linear_attn_config": {"full_attn_layers": [2], "kda_layers": [2]}},
            "full_attn_layers = .2.: must name, with kda_layers, every layer from 1 to 2 once",
        ),
        ("gpt_oss", {"num_experts_per_tok": 7}, "num_experts_per_tok = 7: must be at most num_local_experts = 6"),
        ("gpt_oss", {"num_local_experts": 0}, "num_local_experts = 0: must be a positive integer"),
        ("gpt_oss", {"num_local_experts": 5}, r"experts.gate_up_proj: shape .6, 64, 192.: must be .5, 64, 192."),
        ("gpt_oss", {"num_experts": 6}, "num_experts = 6: only 0 is supported"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit = 0: must be a finite positive number"),
        ("gpt_oss", {"swiglu_limit": 1e7}, r"limit = 10000000.0: must be"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ("gpt_oss", {"layer_types": ["full_attention", "chunked"]}, "layer_types = .*: must be 2 of full_attention"),
        ("gpt_oss", {"sliding_window": None}, "layer_types = .*: must be 2 of full_attention"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ("gpt_oss", {"rope_theta": -1}, "rope_theta = -1: must be a finite positive number"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method = 'fp8': only"),
        ("gpt_oss", {"quantization_config": {}}, "quantization_config.quant_method = '': only 'mxfp4'"),
        ("llama_gqa", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config = .*: only None"),
        ("mamba2", {"time_step_limit": [0.1, 1.0]}, "time_step_limit"),
        ("mamba2", {"use_bias": True}, "use_bias = True"),
        ("mamba2", {"expand": 3}, "must be expand"),
        (
            "gemma3n_text",
            {"activation_sparsity_pattern": [1.0] * 7},
            "activation_sparsity_pattern = .1.0, .*: must be a list, each",
        ),
        ("gemma3n_text", {"intermediate_size": [64] * 6}, "intermediate_size = .*: must have an item for each of"),
        ("gemma3n_text", {"intermediate_size": [64, 0]}, r"intermediate_size\S* = .*: must be"),
        ("gemma3n_text", {"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern = .*: must have an item"),
        ("gemma3n_text", {"activation_sparsity_pattern": 0.95}, "activation_sparsity_pattern = 0.95: must be a list"),
        ("gemma3n_text", {"num_kv_shared_layers": 6}, "= 6: must leave a layer of each kind below; none of full"),
        ("gemma3n_text", {"num_kv_shared_layers": 7}, "= 7: must leave a layer of each kind below; none of full"),
        ("gemma3n_text", {"num_kv_shared_layers": -1}, "num_kv_shared_layers = -1: must be an integer in"),
        ("gemma3n_text", {"num_kv_shared_layers": 2}, "layers.4.self_attn.k_norm.weight: is missing"),
        ("gemma3n_text", {"altup_active_idx": 3}, "altup_active_idx = 3: must be in .0, 2., .* altup_num_inputs = 3"),
        ("gemma3n_text", {"altup_num_inputs": 1}, "altup_num_inputs = 1: must be an integer in .2, 64."),
        ("gemma3n_text", {"altup_correct_scale": False}, "altup_correct_scale = False: only True"),
        ("gemma3n_text", {"laurel_rank": 0}, "laurel_rank = 0: must be a positive integer"),
        ("gemma3n_text", {"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input = 0: must be a positive"),
        ("gemma3n_text", {"final_logit_softcapping": -1.0}, "final_logit_softcapping = -1.0: must be"),
        ("gemma3n_text", {"hidden_activation": "silu"}, "hidden_activation = 'silu': only 'gelu_pytorch_tanh'"),
        ("gemma3n_text", {"layer_types": ["sliding_attention"] * 2}, "layer_types = .*: must be 7 of"),
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
