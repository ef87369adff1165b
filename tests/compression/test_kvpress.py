"""The tokens kept of a prompt are those that kvpress keeps, on random Llamas: sets, layer by layer and head by head.
`golden/kvpress_kept.py` writes what it keeps."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvlab.engine.step import MemoryStep
from kvlab.evaluation.session import Session
from kvlab.evaluation.trail import trail
from kvlab.ledger.pyramid import shares
from kvlab.memory.layout import MemoryConfig, MemoryLayout
from tests.engine.families import pretrained

GOLDEN = json.loads((Path(__file__).parent / "golden" / "kvpress_kept.json").read_text())
LENGTH, NUM_KEPT = len(GOLDEN["tokens"]), GOLDEN["kept_slots"]
SHARED = [row for row in GOLDEN["rows"] if row["press"] != "PyramidKVPress"]
PYRAMIDS = [row for row in GOLDEN["rows"] if row["press"] == "PyramidKVPress"]


def kept(row: dict, num_slots: int) -> list[list[list[int]]]:
    """For each layer and head, the tokens that kvlab keeps, through pages and chunks of the prompt."""
    model = pretrained(row["family"]).model
    compression = {"type": row["method"], **row["fields"]}
    memory = MemoryConfig(page_size=8, chunk_len=32, compression=compression, budget=num_slots)  # pyright: ignore
    layout = MemoryLayout.of(model.states, memory, max_sequences=1, max_len=LENGTH)
    session = Session(MemoryStep.of(model.structure, layout), model.params)
    session.prompt_len = LENGTH
    tokens = np.asarray(GOLDEN["tokens"], np.int32)
    for start in range(0, LENGTH, 32):
        session.advance({0: tokens[start : start + 32]}, 32)
    gone = trail(layout, session.compacted, 1, LENGTH)
    return [[np.flatnonzero(head > LENGTH).tolist() for head in layer["kv"][0]] for layer in gone]


@pytest.mark.parametrize("row", SHARED, ids=[f"{row['family']} {row['method']} {row['fields']}" for row in SHARED])
def test_the_same_tokens_stay(row):
    assert kept(row, NUM_KEPT) == row["kept"]


@pytest.mark.parametrize("row", PYRAMIDS, ids=[row["family"] for row in PYRAMIDS])
def test_a_pyramids_layers_hold_what_kvpress_gives_them(row):
    """kvpress has the whole count of a layer fall linearly, where the paper and kvlab have what is beyond the window
    fall, and rounds each layer for itself: so are its counts, within a slot. Of as many slots the same tokens stay."""
    counts = [len(layer[0]) for layer in row["kept"]]
    window = row["fields"]["window"]
    np.testing.assert_allclose(counts, shares(NUM_KEPT, LENGTH - window, len(counts), 5), atol=1)
    for layer, num_slots in enumerate(counts):
        assert kept(row, num_slots)[layer] == row["kept"][layer]
