"""A pipe in the place of a checkpoint's file is refused: opened as a file, it might never end."""

import json
import os

import pytest

from kvlab.tokenizers import FileTokenizer
from kvlab.weights.checkpoint import load_checkpoint, peek_architecture
from kvlab.weights.files import WeightsError
from kvlab.weights.section import WeightsConfig

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 256,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 1e4, "tie_word_embeddings": False,
    "hidden_act": "silu", "head_dim": 8,
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors"])
def test_no_file_of_a_checkpoint_may_be_a_pipe(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "model.safetensors":
        WeightsConfig(path=str(tmp_path)).fingerprint()
    with pytest.raises(WeightsError, match="is no regular file"):
        (peek_architecture if name == "config.json" else load_checkpoint)(tmp_path)


@pytest.mark.timeout(60)
def test_no_tokenizer_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="is no regular file"):
        FileTokenizer(tmp_path / "tokenizer.json")
