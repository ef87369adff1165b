"""GGUF files as the specification has them, written by struct alone; quantisers and decoders of their own, and the
row order of rotary pairs by its definition. Nothing of kvlab is used."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8}


def q4_1(row: np.ndarray) -> tuple[bytes, list[float]]:
    """One block of 32 numbers: its bytes, and what they mean."""
    least, scale = np.float16(row.min()), np.float16((row.max() - row.min()) / 15)
    codes = [min(15, max(0, round((float(x) - float(least)) / float(scale)))) for x in row]
    packed = bytes(codes[i] | codes[i + 16] << 4 for i in range(16))
    return struct.pack("<ee", scale, least) + packed, [float(scale) * code + float(least) for code in codes]


def q8_0(row: np.ndarray) -> tuple[bytes, list[float]]:
    """One block of 32 numbers: its bytes, and what they mean."""
    scale = np.float16(np.abs(row).max() / 127)
    codes = [min(127, max(-127, round(float(x) / float(scale)))) for x in row]
    return struct.pack("<e32b", scale, *codes), [float(scale) * code for code in codes]


def quantised(tensor: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """A tensor's bytes in a type, and the float32 numbers that they mean."""
    if kind in ("F32", "F16"):
        stored = tensor.astype("<f4" if kind == "F32" else "<f2")
        return stored.tobytes(), stored.astype(np.float32)
    blocks = [{"Q4_1": q4_1, "Q8_0": q8_0}[kind](row) for row in tensor.reshape(-1, 32)]
    numbers = np.array([numbers for _, numbers in blocks], np.float64).astype(np.float32)
    return b"".join(raw for raw, _ in blocks), numbers.reshape(tensor.shape)


def text(words: str) -> bytes:
    raw = words.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(given: Any) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(given, bool):
        return struct.pack("<I?", 7, given)
    if isinstance(given, int):
        return struct.pack("<II", 4, given) if given >= 0 else struct.pack("<Ii", 5, given)
    if isinstance(given, float):
        return struct.pack("<If", 6, given)
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    parts = [value(item) for item in given]
    (kind,) = {part[:4] for part in parts}
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]], alignment: int = 32
) -> bytes:
    """A file of version 3. `tensors` are shapes (outermost axis first), type numbers and bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value(given) for key, given in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += text(name) + dims + struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % alignment) + data


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The name that a hub's tensor has in a GGUF."""
    part, kind = name.rsplit(".", 1)
    if part.startswith("model.layers."):
        _, _, layer, inner = part.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES[part]}.{kind}"


def side_by_side(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows i and i + head_dim / 2 of each head beside each other, as a GGUF keeps W_q and W_k."""
    order = []
    for head in range(0, len(rows), head_dim):
        for i in range(head_dim // 2):
            order += [head + i, head + i + head_dim // 2]
    return rows[order]


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF says of a Llama's config.json."""
    return {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
    }


def write_pair(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    folder: Path,
    kinds: Mapping[str, str],
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """The same model twice: a GGUF, and a folder of the hub whose float32 tensors are what the GGUF's bytes mean.

    `kinds` are the types by the number of axes, "1" and "2", or by the hub's name.
    """
    entries, meant = {}, {}
    for name, tensor in tensors.items():
        kind = kinds.get(name, kinds[str(tensor.ndim)])
        rotated = name.rsplit(".", 1)[0].endswith(("q_proj", "k_proj"))
        order = side_by_side(np.arange(len(tensor)), config["head_dim"]) if rotated else np.arange(len(tensor))
        raw, numbers = quantised(tensor[order], kind)
        entries[gguf_name(name)] = (tensor.shape, TYPE_NUMBERS[kind], raw)
        meant[name] = np.empty_like(numbers)
        meant[name][order] = numbers
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.gguf"
    path.write_bytes(gguf_bytes(metadata_of(config) | dict(metadata or {}), entries))
    hub = folder / "hub"
    hub.mkdir()
    save_file(meant, hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps(config))
    return path, hub
