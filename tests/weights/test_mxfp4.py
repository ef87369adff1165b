"""Experts in MXFP4: beside the format's definition, number by number, and what transformers makes of the same bytes."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvlab.weights import WeightsError, load_checkpoint, save_checkpoint
from kvlab.weights.mxfp4 import Mxfp4
from tests.engine.families import golden, pretrained, write_folder
from tests.weights.test_weights import leaves

PROJECTIONS = ("gate_up_proj", "down_proj")


def number(code: int, exponent: int) -> float:
    """Of four bits s e e m: (-1)^s 2^(e - 1) (1 + m / 2), or m / 2 where e is 0; times 2^(exponent - 127)."""
    sign, e, m = code >> 3, code >> 1 & 3, code & 1
    return (-1) ** sign * (2 ** (e - 1) * (1 + m / 2) if e else m / 2) * 2.0 ** (exponent - 127)


def drawn(num_experts: int, num_outputs: int, num_inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and exponents; the numbers are at most 1.5."""
    rng = np.random.default_rng(seed)
    blocks = (num_experts, num_outputs, num_inputs // 32)
    return rng.integers(0, 256, (*blocks, 16), np.uint8), rng.integers(121, 126, blocks, np.uint8)


def expected(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """[experts, inputs, outputs], a number at a time: input 32 b + 2 i has the low half of byte i of block b."""
    num_experts, num_outputs, num_blocks, _ = codes.shape
    found = np.zeros((num_experts, 32 * num_blocks, num_outputs))
    for expert, place, output in np.ndindex(found.shape):
        byte = int(codes[expert, output, place // 32, place % 32 // 2])
        code = byte >> 4 if place % 2 else byte & 15
        found[expert, place, output] = number(code, int(exponents[expert, output, place // 32]))
    return found


def folder_of(directory: Path, **more: np.ndarray) -> dict[str, np.ndarray]:
    """The checkpoint with all its experts in MXFP4, in the form of the published files; returns their numbers."""
    write_folder("gpt_oss", directory)
    tensors, numbers = load_file(directory / "model.safetensors"), {}
    for seed, name in enumerate([name for name in tensors if name.endswith(PROJECTIONS)]):
        num_experts, num_inputs, num_outputs = tensors.pop(name).shape
        codes, exponents = drawn(num_experts, num_outputs, num_inputs, seed)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        numbers[name] = expected(codes, exponents)
    save_file(tensors | more, directory / "model.safetensors")
    stored = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (directory / "config.json").write_text(json.dumps(golden("gpt_oss")["config"] | stored))
    return numbers


def test_every_code_under_every_exponent_is_the_number_of_the_format():
    """Exponent 255 is NaN, and what float32 has no number for infinite."""
    exponents = np.arange(256, dtype=np.uint8).reshape(1, 1, -1)
    codes = np.broadcast_to((np.arange(16) * 17).astype(np.uint8), (1, 1, 256, 16))
    loaded = Mxfp4(("a", "b")).load([codes, exponents])
    assert loaded.dtype == ml_dtypes.bfloat16
    wanted = expected(codes, exponents)
    wanted = np.where(np.abs(wanted) >= 2.0**128, np.copysign(np.inf, wanted), wanted)
    np.testing.assert_array_equal(loaded[:, :-32].astype(np.float64), wanted[:, :-32])
    assert np.isnan(loaded[:, -32:].astype(np.float64)).all()


def test_the_bytes_mean_what_transformers_makes_of_them():
    """Beside 5.24, by tests/golden/generation/make.py."""
    kept = golden("gpt_oss")["mxfp4"]
    codes, exponents = (np.array(kept[name], np.uint8) for name in ("blocks", "scales"))
    loaded = Mxfp4(("a", "b")).load([codes, exponents])
    np.testing.assert_array_equal(loaded.astype(np.float64), np.array(kept["numbers"]))


def test_a_published_folder_is_read_and_written_as_floats(tmp_path):
    numbers = folder_of(tmp_path / "in")
    loaded = load_checkpoint(tmp_path / "in")
    assert loaded.architecture == pretrained("gpt_oss").architecture
    found = leaves(loaded.model.params)
    for layer in (0, 1):
        for ours, theirs in zip(("gate_up", "down"), PROJECTIONS, strict=True):
            name = f"model.layers.{layer}.mlp.experts.{theirs}"
            np.testing.assert_array_equal(found[f"blocks.{layer}.mlp.{ours}.kernel"], numbers[name])
    save_checkpoint(loaded, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, leaf in leaves(load_checkpoint(tmp_path / "out").model.params).items():
        np.testing.assert_array_equal(leaf, found[name], err_msg=name)


def test_blocks_that_do_not_fit_are_named(tmp_path):
    at = "model.layers.0.mlp.experts"
    folder_of(
        tmp_path,
        **{
            f"{at}.gate_up_proj_blocks": np.zeros((6, 192, 2, 8), np.uint8),
            f"{at}.down_proj_scales": np.zeros((6, 64, 3), np.float32),
            f"{at}.down_proj": np.zeros((6, 96, 64), np.float32),
        },
    )
    with pytest.raises(WeightsError) as error:
        load_checkpoint(tmp_path)
    for line in (
        f"{at}.gate_up_proj_blocks: shape [6, 192, 2, 8]: must be [6, 192, 2, 16]",
        f"{at}.down_proj_blocks: is unexpected",  # there are floats as well
        f"{at}.down_proj_scales: is unexpected",
    ):
        assert line in str(error.value)
    folder_of(tmp_path / "b", **{f"{at}.down_proj_scales": np.zeros((6, 64, 3), np.float32)})
    with pytest.raises(WeightsError, match="down_proj_scales: dtype F32: must be one of U8"):
        load_checkpoint(tmp_path / "b")


def test_a_row_that_is_no_whole_number_of_blocks_is_refused(tmp_path):
    folder_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 90}))
    with pytest.raises(WeightsError, match="down_proj_blocks: holds rows of 90: must be a multiple of 32"):
        load_checkpoint(tmp_path)
