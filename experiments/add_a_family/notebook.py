# %% [markdown]
# # A family of checkpoints of one's own, in a notebook
# Somebody publishes "Nimbus": a model of Llama's form whose tensors have other names, keys and values in one matrix,
# and a config.json with fields of its own. No library reads it. Here its author's program is some lines of numpy, in
# float64, that write the folder and say what the model answers. A class then tells kvlab how Nimbus spells things;
# everything else (checks, the paged memory, generation, writing it back) is there.
#
# Nothing is trained: this takes seconds. Files lie in `results/nimbus`, or where `KVLAB_NIMBUS` says.

# %%
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file, save_file

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.memory.layout import MemoryConfig
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.weights import load_checkpoint, save_checkpoint
from kvlab.weights.architectures import table_of
from kvlab.weights.config_files import ConfigFile, DefaultRope, positive, size
from kvlab.weights.families import FAMILIES
from kvlab.weights.families.base import Architecture, Family
from kvlab.weights.families.decoder import first_config
from kvlab.weights.tables import TRANSPOSED, Entry, Table

FOLDER = Path(os.environ.get("KVLAB_NIMBUS", "results/nimbus"))

# %% [markdown]
# ## The author's program
# A model as its author has it: RMS norms, rotary positions, grouped-query attention, a gated MLP, and the embedding
# once more as the head.

# %%
V, E, M, H, K, D, LAYERS, BASE, EPS = 320, 64, 96, 4, 2, 16, 3, 10_000.0, 1e-5
VALUES = {
    "model_type": "nimbus",
    "architectures": ["NimbusModel"],
    "vocab_size": V,
    "hidden_size": E,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": True,
    "ffn_width": M,
    "query_heads": H,
    "shared_heads": K,
    "head_width": D,
    "epsilon": EPS,
    "rope_theta": BASE,
    "max_position_embeddings": 512,
}
rng = np.random.default_rng(0)
TENSORS = {"cloud.tokens": rng.normal(0, 0.5, (V, E)), "cloud.last_norm": 1 + 0.1 * rng.normal(size=E)}
for layer in range(LAYERS):
    shapes = {"wq": (H * D, E), "wkv": (2 * K * D, E), "wo": (E, H * D), "up": (2 * M, E), "down": (E, M)}
    TENSORS |= {f"cloud.{layer}.{name}": rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    TENSORS |= {f"cloud.{layer}.norm_{part}": 1 + 0.1 * rng.normal(size=E) for part in ("in", "mid")}
TENSORS = {name: tensor.astype(np.float32) for name, tensor in TENSORS.items()}


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """RMS norm over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale


def turned(x: np.ndarray) -> np.ndarray:
    """Heads [T, heads, D] by their positions: the first half of each against the second."""
    angles = np.arange(len(x))[:, None] * BASE ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def nimbus(tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of one sequence."""
    w = {name: tensor.astype(np.float64) for name, tensor in TENSORS.items()}
    x, length = w["cloud.tokens"][list(tokens)], len(tokens)
    for layer in range(LAYERS):
        own = {name.rpartition(".")[2]: each for name, each in w.items() if name.startswith(f"cloud.{layer}.")}
        y = norm(x, own["norm_in"])
        queries = turned((y @ own["wq"].T).reshape(length, H, D))
        keys, values = np.split(y @ own["wkv"].T, 2, axis=-1)
        keys = np.repeat(turned(keys.reshape(length, K, D)), H // K, axis=1)
        values = np.repeat(values.reshape(length, K, D), H // K, axis=1)
        scores = np.einsum("thd,shd->hts", queries, keys) / np.sqrt(D)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), values)
        x = x + heads.reshape(length, H * D) @ own["wo"].T
        gate, up = np.split(norm(x, own["norm_mid"]) @ own["up"].T, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ own["down"].T
    return norm(x, w["cloud.last_norm"]) @ w["cloud.tokens"].T


shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)
save_file(TENSORS, FOLDER / "model.safetensors")
(FOLDER / "config.json").write_text(json.dumps(VALUES, indent=2))
try:
    load_checkpoint(FOLDER)
except ValueError as error:
    print(error)

# %% [markdown]
# ## How Nimbus spells things
# `File` has the fields of config.json, each with its legal values. `read` makes layers of them, `write` says them
# again, and `table` has the tensors of every parameter: as they are, transposed, several as one, or some rows of one.
# [Published weights](../../docs/weights.md) lists the families that are built in; `kvlab/weights/families` has a file
# of each.


# %%
@dataclass(frozen=True, kw_only=True)
class NimbusFile(ConfigFile):
    """Nimbus' own fields."""

    ffn_width: int = size()
    query_heads: int = size()
    shared_heads: int = size()
    head_width: int = size()
    epsilon: float = positive(1e-5)


class Nimbus(Family[NimbusFile]):
    """Llama's form; keys and values are rows of one matrix, and so are the MLP's gate and what it gates."""

    model_type = "nimbus"
    transformers_class = "NimbusModel"
    File = NimbusFile

    def read(self, file: NimbusFile, rope: DefaultRope, dtype: str) -> Architecture:
        attention = AttentionConfig(
            num_heads=file.query_heads,
            num_kv_heads=file.shared_heads,
            head_dim=file.head_width,
            rope_base=rope.rope_theta,
        )
        layers = (LayerConfig("attention", attention),) * file.num_hidden_layers
        model = ModelConfig(
            model_dim=file.hidden_size,
            mlp_dim=file.ffn_width,
            norm_eps=file.epsilon,
            tie_embeddings=file.tie_word_embeddings,
            dtype=dtype,
        )
        return Architecture(self.model_type, layers, model, file.vocab_size)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        attention, model = first_config(architecture, AttentionConfig), architecture.model
        widths = {"ffn_width": model.mlp_dim, "epsilon": model.norm_eps, "rope_theta": attention.rope_base}
        heads = {"query_heads": attention.num_heads, "shared_heads": attention.num_kv_heads}
        return widths | heads | {"head_width": attention.head_dim}

    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        table: Table = {"embedding.embedding": Entry(("cloud.tokens",)), "norm.scale": Entry(("cloud.last_norm",))}
        for index, layer in enumerate(layers):
            ours, theirs = f"blocks.{index}", f"cloud.{index}"
            num_rows = layer.config.num_kv_heads * layer.config.head_dim
            keys, values = tuple(range(num_rows)), tuple(range(num_rows, 2 * num_rows))
            table |= {
                f"{ours}.mixer_norm.scale": Entry((f"{theirs}.norm_in",)),
                f"{ours}.mlp_norm.scale": Entry((f"{theirs}.norm_mid",)),
                f"{ours}.mixer.query.kernel": Entry((f"{theirs}.wq",), TRANSPOSED),
                f"{ours}.mixer.key.kernel": Entry((f"{theirs}.wkv",), TRANSPOSED, keys, 2 * num_rows),
                f"{ours}.mixer.value.kernel": Entry((f"{theirs}.wkv",), TRANSPOSED, values, 2 * num_rows),
                f"{ours}.mixer.out.kernel": Entry((f"{theirs}.wo",), TRANSPOSED),
                f"{ours}.mlp.gate_up.kernel": Entry((f"{theirs}.up",), TRANSPOSED),
                f"{ours}.mlp.down.kernel": Entry((f"{theirs}.down",), TRANSPOSED),
            }
        return table


FAMILIES["nimbus"] = Nimbus()

# %% [markdown]
# ## Loaded
# Every tensor is used once and has its shape, or the folder is refused with all that is wrong.

# %%
pretrained = load_checkpoint(FOLDER)
print(pretrained.model)
found = table_of(pretrained.architecture)
for name in ("embedding.embedding", "blocks.0.mixer.key.kernel", "blocks.0.mlp.gate_up.kernel"):
    (tensor,) = found[name].names
    print(f"{name}: of {tensor} {list(TENSORS[tensor].shape)}")

damaged = dict(TENSORS) | {"cloud.0.wq": TENSORS["cloud.0.wq"][1:], "cloud.3.wo": TENSORS["cloud.0.wo"]}
damaged.pop("cloud.last_norm")
save_file(damaged, FOLDER / "model.safetensors")
try:
    load_checkpoint(FOLDER)
except ValueError as error:
    print(error)
save_file(TENSORS, FOLDER / "model.safetensors")

# %% [markdown]
# ## The same model
# The author's logits beside ours, computed in parallel form; then greedy answers, which the engine decodes from pages.
# Written back, the tensors are the same bits.

# %%
tokens = np.random.default_rng(1).integers(0, V, 96)
theirs = nimbus(tokens)


def logits_of(folder: Path) -> np.ndarray:
    """What the folder's model answers here, in parallel form."""
    model = load_checkpoint(folder).model.merge()
    return np.asarray(model.logits(model.parallel(jnp.asarray(tokens[None], jnp.int32))))[0]


def difference_of(ours: np.ndarray) -> np.ndarray:
    """By how much logits differ from the author's, at each place: the largest difference over the largest logit."""
    return np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)


ours = logits_of(FOLDER)
difference = difference_of(ours)
print(f"logits differ by at most {difference.max():.1e} of the largest; the same choice at every place:", end=" ")
print((ours.argmax(1) == theirs.argmax(1)).all())
assert difference.max() < 1e-4, "this is another model"

prompt, answer = tokens[:16].tolist(), []
for _ in range(12):
    answer.append(int(nimbus([*prompt, *answer])[-1].argmax()))
engine = Engine(pretrained.model, memory=MemoryConfig(page_size=8), config=EngineConfig(max_batch=1, max_len=64))
(decoded,) = engine.generate([prompt], Sampling(max_tokens=len(answer)))
print("the author's program:", answer)
print("the engine, by pages:", list(decoded.completions[0].tokens))
assert list(decoded.completions[0].tokens) == answer

save_checkpoint(pretrained, FOLDER / "again")
written = load_file(FOLDER / "again" / "model.safetensors")
assert written.keys() == TENSORS.keys()
print("written back bit for bit:", all((written[name] == tensor).all() for name, tensor in TENSORS.items()))

# %% [markdown]
# ## A picture
# What is left is float32 beside float64. A comparison that cannot fail shows nothing: with another base of its rotary
# positions in config.json, the same folder is another model from its second place on.

# %%
(FOLDER / "config.json").write_text(json.dumps(VALUES | {"rope_theta": 2 * BASE}))
mistaken = difference_of(logits_of(FOLDER))
(FOLDER / "config.json").write_text(json.dumps(VALUES, indent=2))

figure, panel = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
panel.semilogy(mistaken, "o", ms=4, color="tab:orange", label="rope_theta doubled")
panel.semilogy(difference, "o", ms=4, color="tab:blue", label="as it is")
panel.set(xlabel="place in the sequence", ylabel="difference of logits, relative", ylim=(1e-7, 2))
panel.legend(loc="center right")
panel.set_title("Nimbus in kvlab (float32) beside its author's program (float64)")
panel.grid(alpha=0.25)
picture = FOLDER / "add_a_family.png"
figure.savefig(picture, dpi=130)
print(picture)
