"""Heads that config.json says are the embedding, beside one that the file stores: what transformers 5 makes of them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvlab.weights import WeightsError, load_checkpoint, save_checkpoint
from kvlab.weights.checkpoint import peek_architecture
from tests.engine.families import write_folder
from tests.weights.random_checkpoint import draw

HEAD = "lm_head.weight"
EMBEDDING = {"llama_mqa": "model.embed_tokens.weight", "recurrent_gemma": "model.embed_tokens.weight"}


def store(folder, **tensors):
    """Adds tensors to the file, or takes those that are None from it; returns what it has."""
    kept = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return kept


def logits_and_hidden(loaded):
    model = loaded.model.merge()
    hidden = jax.jit(model.parallel)(jnp.arange(6, dtype=jnp.int32)[None])
    return np.asarray(model.logits(hidden), np.float64)[0], np.asarray(hidden, np.float64)[0]


def test_a_stored_head_that_is_another_is_the_head(tmp_path):
    """The file is believed, not the flag: logits are products with the rows that it stores."""
    folder = write_folder("llama_mqa", tmp_path / "in")
    stored = store(folder, **{HEAD: draw(HEAD, (320, 64))})
    loaded = load_checkpoint(folder)
    assert not loaded.architecture.model.tie_embeddings
    logits, hidden = logits_and_hidden(loaded)
    np.testing.assert_allclose(logits, hidden @ stored[HEAD].T.astype(np.float64), atol=1e-4)
    np.testing.assert_array_equal(loaded.model.params["embedding"]["embedding"], stored[EMBEDDING["llama_mqa"]])
    save_checkpoint(loaded, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stored.keys()
    assert load_checkpoint(tmp_path / "out").architecture == loaded.architecture


@pytest.mark.parametrize("family", EMBEDDING)
def test_a_stored_head_that_is_the_same_is_tied(family, tmp_path):
    """However it is stored: a bfloat16 copy of what bfloat16 holds too."""
    folder = write_folder(family, tmp_path)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING[family]]
    store(folder, **{HEAD: embedding})
    assert peek_architecture(folder).model.tie_embeddings
    coarse = embedding.astype(ml_dtypes.bfloat16)
    store(folder, **{HEAD: coarse, EMBEDDING[family]: coarse.astype(np.float32)})
    assert "head" not in load_checkpoint(folder).model.params
    last = embedding.copy()
    last[-1, -1] += 1
    store(folder, **{HEAD: last, EMBEDDING[family]: embedding})
    assert not peek_architecture(folder).model.tie_embeddings, "one number differs"


def test_a_tied_embedding_that_is_stored_as_the_head_alone(tmp_path):
    folder = write_folder("llama_mqa", tmp_path)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING["llama_mqa"]]
    store(folder, **{HEAD: embedding, EMBEDDING["llama_mqa"]: None})
    loaded = load_checkpoint(folder)
    assert loaded.architecture.model.tie_embeddings
    np.testing.assert_array_equal(loaded.model.params["embedding"]["embedding"], embedding)
    store(folder, **{HEAD: None})
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight: is missing"):
        load_checkpoint(folder)


def test_a_stored_head_of_another_shape_is_refused(tmp_path):
    folder = write_folder("llama_mqa", tmp_path)
    store(folder, **{HEAD: draw(HEAD, (321, 64))})
    with pytest.raises(WeightsError, match=r"lm_head\.weight: shape \[321, 64\]: must be \[320, 64\]"):
        load_checkpoint(folder)
