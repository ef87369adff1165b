"""Which tokens kvpress keeps of a prompt on tiny random Llamas: writes kvpress_kept.json beside this file.

    make peers-kvpress
    PYTHONPATH=. .peers-kvpress/bin/python tests/compression/golden/kvpress_kept.py

Kept tokens are found by looking every key of the compressed cache up in that of a run without a press, so that nothing
of a press but its effect is used.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.weights.random_checkpoint import draw

HERE = Path(__file__).parent
FAMILIES = ("llama_gqa", "llama3_rope")
LENGTH, KEPT, SEED = 92, 60, 7

# The method of kvlab, its fields, the press, and what the press is given.
ROWS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("knorm", {"sinks": 0, "recent": 0}, "KnormPress", {}),
    ("keydiff", {"sinks": 0, "recent": 0}, "KeyDiffPress", {}),
    ("snapkv", {"sinks": 0, "recent": 8, "window": 8, "pool": 5}, "SnapKVPress", {"window_size": 8, "kernel_size": 5}),
    ("h2o", {"sinks": 0, "recent": 0}, "ObservedAttentionPress", {}),
    ("tova", {"sinks": 0, "recent": 1}, "TOVAPress", {}),
    ("lagkv", {"sinks": 4, "recent": 0, "lag": 16}, "LagKVPress", {"n_sink": 4, "lag_size": 16}),
    (
        "lagkv",
        {"sinks": 4, "recent": 0, "lag": 16, "across": True},
        "LagKVPress",
        {"n_sink": 4, "lag_size": 16, "cross_scoring": True},
    ),
    ("expected", {"sinks": 4, "recent": 0}, "ExpectedAttentionPress", {}),
    (
        "expected",
        {"sinks": 4, "recent": 0, "future": 64, "covariance": False, "values": False},
        "ExpectedAttentionPress",
        {"n_future_positions": 64, "use_covariance": False, "use_vnorm": False},
    ),
    ("snapkv", {"sinks": 0, "recent": 8, "window": 8, "pool": 5}, "PyramidKVPress", {"window_size": 8, "beta": 5}),
]


def model_of(family: str) -> LlamaForCausalLM:
    """The model whose weights follow from its tensors' names."""
    saved = json.loads((HERE.parents[1] / "golden" / "generation" / f"{family}.json").read_text())
    model = LlamaForCausalLM._from_config(LlamaConfig(**saved["config"]), attn_implementation="eager").eval()
    tensors = {name: torch.from_numpy(draw(name, tuple(shape))) for name, shape in saved["shapes"].items()}
    model.load_state_dict(tensors)
    return model


def tokens_of(vocab_size: int) -> list[int]:
    """A prompt in which no token comes twice: in the first layer it would have two keys of the same length."""
    return np.random.default_rng(SEED).permutation(vocab_size)[:LENGTH].tolist()


@torch.no_grad()
def keys_of(model: LlamaForCausalLM, press: Any = None) -> list[torch.Tensor]:
    """[K, N, D] the keys of every layer after the prompt."""
    ids = torch.tensor([tokens_of(model.config.vocab_size)])
    cache = DynamicCache()
    if press is None:
        model(ids, past_key_values=cache)
    else:
        with press(model):
            model(ids, past_key_values=cache)
    return [layer.keys[0] for layer in cache.layers]


def kept_of(compressed: torch.Tensor, everything: torch.Tensor) -> list[list[int]]:
    """The tokens of every head, ascending."""
    found = []
    for mine, all_keys in zip(compressed, everything, strict=True):
        same = (mine[:, None] == all_keys[None]).all(dim=-1)
        assert (same.sum(dim=1) == 1).all(), "a key must be found once"
        found.append(sorted(same.int().argmax(dim=1).tolist()))
    return found


def main() -> None:
    rows = []
    for family in FAMILIES:
        model = model_of(family)
        everything = keys_of(model)
        for method, fields, name, given in ROWS:
            press = getattr(kvpress, name)(compression_ratio=1 - (KEPT + 0.5) / LENGTH, **given)
            kept = [kept_of(mine, other) for mine, other in zip(keys_of(model, press), everything, strict=True)]
            rows.append({"family": family, "method": method, "fields": fields, "press": name, "kept": kept})
    packages = ("kvpress", "transformers", "torch")
    made_with = {package: importlib.metadata.version(package) for package in packages}
    golden = {"made_with": made_with, "tokens": tokens_of(320), "kept_slots": KEPT, "rows": rows}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    head = json.dumps({name: value for name, value in golden.items() if name != "rows"})
    (HERE / "kvpress_kept.json").write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
