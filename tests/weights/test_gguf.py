"""GGUF files: blocks mean what the specification says, and whatever is cut, damaged or not read is answered in a
sentence."""

import random
import struct

import numpy as np
import pytest

from kvlab.weights import WeightsError
from kvlab.weights.gguf import TYPES, read_gguf
from tests.weights.gguf_writer import TYPE_NUMBERS, gguf_bytes, quantised, text, value

HAND_MADE = bytes.fromhex(
    "47475546 03000000 0100000000000000 0200000000000000"  # GGUF, version 3, 1 tensor, 2 pairs
    "0100000000000000 61 04000000 07000000"  # "a": uint32 7
    "0100000000000000 62 09000000 08000000 0200000000000000"  # "b": an array of 2 texts
    "0200000000000000 c3a9 0000000000000000"  # "é", ""
    "0100000000000000 77 02000000 0200000000000000 0300000000000000 00000000 0000000000000000"  # "w": 2, 3; F32; at 0
)


def file_of(tmp_path, raw: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    return path


def test_a_file_made_by_hand(tmp_path):
    """ggml's order of dimensions is innermost first; tensors begin at a multiple of 32."""
    numbers = np.arange(6, dtype="<f4") - 2.5
    assert len(HAND_MADE) == 125
    found = read_gguf(file_of(tmp_path, HAND_MADE + bytes(3) + numbers.tobytes()))
    assert found.metadata == {"a": 7, "b": ["é", ""]}
    assert (found.tensors["w"].shape, found.tensors["w"].begin) == ((3, 2), 128)
    np.testing.assert_array_equal(found.read("w"), [[-2.5, -1.5], [-0.5, 0.5], [1.5, 2.5]])


def test_blocks_made_by_hand(tmp_path):
    """Q4_1: 0.5 * code - 1, the low halves of 16 bytes first. Q8_0: 0.25 * code. F16: as it is."""
    codes = [15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    q4_1 = bytes.fromhex("0038 00bc") + bytes(code | (15 - code) << 4 for code in codes)
    signed = [-128, -127, -1, 0, 1, 127, *range(26)]
    q8_0 = bytes.fromhex("0034") + bytes(code % 256 for code in signed)
    f16 = bytes.fromhex("003c 00c0 ff7b 0100")
    raw = gguf_bytes({}, {"q4": ((1, 32), 3, q4_1), "q8": ((32,), 8, q8_0), "f": ((4,), 1, f16)})
    found = read_gguf(file_of(tmp_path, raw))
    expected = [0.5 * code - 1 for code in codes] + [0.5 * (15 - code) - 1 for code in codes]
    np.testing.assert_array_equal(found.read("q4"), [expected])
    np.testing.assert_array_equal(found.read("q8"), [0.25 * code for code in signed])
    np.testing.assert_array_equal(found.read("f"), [1, -2, 65504, 2**-24])


@pytest.mark.parametrize("kind", TYPE_NUMBERS)
def test_random_tensors_are_what_their_quantiser_meant(kind, tmp_path, monkeypatch):
    """In several pieces, of which the last is shorter."""
    monkeypatch.setattr("kvlab.weights.gguf.CHUNK", 7)
    tensor = np.random.default_rng(0).standard_normal((5, 3, 64)).astype(np.float32)
    raw, meant = quantised(tensor, kind)
    found = read_gguf(file_of(tmp_path, gguf_bytes({}, {"w": (tensor.shape, TYPE_NUMBERS[kind], raw)})))
    np.testing.assert_array_equal(found.read("w"), meant)
    assert np.abs(meant - tensor).max() < {"F32": 1e-9, "F16": 2e-3, "Q4_1": 0.25, "Q8_0": 0.02}[kind]


def test_every_type_of_metadata(tmp_path):
    letters = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    expected = {0: 255, 1: -128, 2: 65535, 3: -1, 4: 2**32 - 1, 5: -(2**31), 6: 1e-5, 7: True}
    expected |= {10: 2**64 - 1, 11: -(2**63), 12: 0.1}
    pairs = b"".join(
        text(f"k{kind}") + struct.pack("<I", kind) + struct.pack(f"<{letters[kind]}", number)
        for kind, number in expected.items()
    )
    arrays = b"".join(
        text(f"a{kind}") + struct.pack("<IIQ", 9, kind, 2) + struct.pack(f"<2{letters[kind]}", number, 0)
        for kind, number in expected.items()
        if kind != 6
    )
    raw = b"GGUF" + struct.pack("<IQQ", 2, 0, 2 * len(expected) - 1) + pairs + arrays
    found = read_gguf(file_of(tmp_path, raw)).metadata
    assert {kind: found[f"k{kind}"] for kind in expected} == expected
    assert {kind: found[f"a{kind}"] for kind in expected if kind != 6} == {
        kind: [number, 0] for kind, number in expected.items() if kind != 6
    }


def small(**changes) -> bytes:
    metadata = {
        "general.architecture": "llama",
        "x": [1, 2, 3],
        "y": ["a", "b"],
        "z": 0.5,
        "t": [True, False],
        **changes,
    }
    tensors = {}
    for index, kind in enumerate(TYPE_NUMBERS):
        tensor = np.random.default_rng(index).standard_normal((2, 32))
        tensors[f"w{index}"] = (tensor.shape, TYPE_NUMBERS[kind], quantised(tensor, kind)[0])
    return gguf_bytes(metadata, tensors)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = small()
    read_gguf(file_of(tmp_path, whole))
    header = whole.index(b"w3") + 64
    for length in (*range(header), *range(header, len(whole), 7), len(whole) - 1):
        with pytest.raises(WeightsError, match=r"x\.gguf: cannot be loaded"):
            read_gguf(file_of(tmp_path, whole[:length]))


def test_a_flipped_byte_is_an_answer_or_another_file(tmp_path):
    """Never anything but WeightsError, and numbers that are not finite are not handed on."""
    whole, rng, refused = small(), random.Random(0), 0
    for _ in range(250):
        place = rng.randrange(len(whole))
        path = file_of(tmp_path, whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            found = read_gguf(path)
            assert all(np.isfinite(found.read(name)).all() for name in found.tensors)
        except WeightsError:
            refused += 1
    assert refused > 60


HUGE = 2**63
KEY = text("k")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + b"\0" * 60, "begins with b'GGML'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version = 1: must be 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), f"tensor count: {HUGE} at byte 24, but only 0 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), f"metadata count: {HUGE}"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + b"\0" * 20, "a metadata key"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IQ", 8, HUGE), "k: "),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 4, HUGE), "k: "),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 8, HUGE), "k: "),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 0), "arrays in arrays"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 13, 0), "no metadata type 13"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IQ", 99, 0), "no metadata type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IB", 7, 2), "must be 0 or 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"\xff" + b"\0" * 8, "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (KEY + value(1)), "k: is there twice"),
        (gguf_bytes({}, {"w": ((2**40, 2**40), 0, b"")}), "cut or damaged"),
        (gguf_bytes({}, {"w": ((0, 4), 0, b"")}), r"shape \[0, 4\]"),
        (gguf_bytes({}, {"w": ((4, 33), 8, b"")}), "whole blocks of 32"),
        (gguf_bytes({}, {"w": ((1,) * 5, 0, b"\0" * 4)}), "5 dimensions: must be 1 to 4"),
        (gguf_bytes({}, {"w": ((256,), 12, b"\0" * 144), "v": ((1,), 77, b"")}), r"w: tensors of Q4_K \(1 .*, type 77"),
        (gguf_bytes({"general.alignment": 12}, {}), "general.alignment = 12"),
        (gguf_bytes({"general.alignment": "x"}, {}), "general.alignment = 'x'"),
        (gguf_bytes({}, {"v": ((2,), 0, bytes(8)), "w": ((2,), 0, bytes(8))}, alignment=16), "a multiple of 32"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_of_its_size_is_made(raw, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        read_gguf(file_of(tmp_path, raw))


def test_tensors_over_each_other_and_other_alignments(tmp_path):
    raw = gguf_bytes({"general.alignment": 64}, {"v": ((2,), 0, b"\0" * 8), "w": ((1,), 0, b"\0\0\x80\x3f")}, 64)
    found = read_gguf(file_of(tmp_path, raw))
    assert found.tensors["v"].begin % 64 == 0
    assert found.read("w") == [1]
    second = struct.pack("<Q", 64)
    assert raw.count(second) == 1
    with pytest.raises(WeightsError, match="w: lies over v"):
        read_gguf(file_of(tmp_path, raw.replace(second, struct.pack("<Q", 0))))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    block = struct.pack("<e", float("inf")) + bytes(32)
    found = read_gguf(file_of(tmp_path, gguf_bytes({}, {"w": ((32,), 8, block)})))
    with pytest.raises(WeightsError, match="w: holds numbers that are not finite"):
        found.read("w")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(WeightsError, match="there is no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(WeightsError, match="not a GGUF file"):
        read_gguf(tmp_path)


def test_the_tests_write_every_type_that_is_read():
    assert {held.name: number for number, held in TYPES.items()} == TYPE_NUMBERS
