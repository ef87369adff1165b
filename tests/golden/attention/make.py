"""Writes what the attention of families that are not built gives, beside it: transformers' own modules, in float64, on
weights drawn by numpy.

    make peers && .peers/bin/python tests/golden/attention/make.py [FOLDER]

A stack of them alone: x + attention(norm(x)) from an embedding, and a last norm. Runs in the peers' environment and
imports nothing of kvlab.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "weights"))
from random_checkpoint import draw, prompt  # noqa: E402

VOCAB, NUM_TOKENS = 64, 24
SLIDING, FULL = "sliding_attention", "full_attention"
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 7,
}
GPT_OSS = GptOssConfig(
    **FIELDS,
    num_hidden_layers=3,
    layer_types=[SLIDING, FULL, SLIDING],
    rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
)


def normed(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def hidden(layers, config, rope) -> tuple[torch.Tensor, dict]:
    """What the stack gives for the tokens, [T, E], and the shapes of its tensors."""
    shapes = {"embed_tokens.weight": [VOCAB, config.hidden_size]}
    for index, layer in enumerate(layers):
        for name, tensor in layer.state_dict().items():
            full_name = f"layers.{index}.self_attn.{name}"
            shapes[full_name] = list(tensor.shape)
            tensor.copy_(torch.from_numpy(draw(full_name, tuple(tensor.shape))))
    embedding = torch.from_numpy(draw("embed_tokens.weight", (VOCAB, config.hidden_size))).double()
    x = embedding[torch.tensor([prompt(NUM_TOKENS, VOCAB)])]
    positions = torch.arange(NUM_TOKENS)
    distance = positions[:, None] - positions[None, :]
    seen = {FULL: distance >= 0, SLIDING: (distance >= 0) & (distance < config.sliding_window)}
    for layer, kind in zip(layers, config.layer_types, strict=True):
        mask = torch.where(seen[kind], 0.0, float("-inf")).double()[None, None]
        x = x + layer.double()(normed(x), rope(x, positions[None], kind), mask)[0]
    return normed(x)[0], shapes


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    GPT_OSS._attn_implementation = "eager"
    gpt_oss = [GptOssAttention(GPT_OSS, index) for index in range(GPT_OSS.num_hidden_layers)]
    rope = GptOssRotaryEmbedding(GPT_OSS)
    stacks = {"gpt_oss": (gpt_oss, GPT_OSS, lambda x, positions, kind: rope(x, positions))}
    for name, stack in stacks.items():
        with torch.no_grad():
            found, shapes = hidden(*stack)
        golden = {
            "made_with": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
            "config": {key: value for key, value in stack[1].to_dict().items() if key != "transformers_version"},
            "shapes": shapes,
            "hidden": [[round(value, 6) for value in row] for row in found.tolist()],
        }
        (folder / f"{name}.json").write_text(json.dumps(golden, default=str) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
