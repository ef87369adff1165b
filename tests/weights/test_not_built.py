"""Families that are refused by name, with the reason."""

import json

import pytest

from kvlab.weights import WeightsError, load_checkpoint
from kvlab.weights.families import FAMILIES, NOT_BUILT


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n", "images and sound beside its text model, which alone is gemma3n_text"),
        ("gemma3", "images beside its text model, which alone is gemma3_text"),
    ],
)
def test_what_is_not_built_is_refused_by_name(family, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match=f"model_type = '{family}': is not built here: {reason}"):
        load_checkpoint(tmp_path)
    assert not FAMILIES.keys() & NOT_BUILT.keys()
