"""What is measured of the models that were trained here beside their runs: the attention that goes to the first token,
outlier channels of keys, and what rounding keys by channel or by token costs, with outliers put in and without."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pandas as pd

from kvlab.config import Config
from kvlab.evaluation.layerwise import Blockwise, layers_of
from kvlab.evaluation.rounding import Rounding, rounded
from kvlab.evaluation.score import Scorer
from kvlab.evaluation.sinks import sink_shares
from kvlab.lab.execute import load_params
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.record import Done
from kvlab.ledger.states import TokenState
from kvlab.mixers.attention import AttentionConfig
from kvlab.models.model import Model
from kvlab.random import named_key
from kvlab.schema import ConfigError
from pallas_kernels.formats import Scheme

GROUP = 16
"""Numbers that share a scale: tokens of a page by channel, and all channels of a head by token."""
SCALES = (1, 4, 16)
"""Powers of two, so that logits in full precision stay the same to the last bit."""
NUM_SEQUENCES = 32
FIRST = 64
"""Queries from here on are asked how much of their attention goes to token 0."""


def trained(record: Done) -> tuple[Laboratory, Model]:
    """A finished run's laboratory, and its model with the parameters that were trained."""
    assert record.directory
    laboratory, params = load_params(Config.build(record.config), Path(record.directory))
    return laboratory, Model(laboratory.model.structure, params)


def sequences(laboratory: Laboratory) -> npt.NDArray[np.int32]:
    """[NUM_SEQUENCES, T + 1] of the test data of a text: the last token is a label only. Of a recall: [.., T]."""
    key = jax.random.fold_in(named_key(laboratory.config.seed, "eval"), 1)
    (part,) = laboratory.task.slices("test")
    batch = laboratory.task.eval_batch(key, "test", part, 0, NUM_SEQUENCES)
    tokens = np.asarray(batch.tokens)
    if laboratory.config.task_name != "text":
        return tokens
    return np.concatenate([tokens, np.asarray(batch.labels)[:, -1:]], axis=1)


def scaled_pairs(model: Model, scale: float) -> Model:
    """The same function with outlier channels in its keys: two channels of every head, which rotary embeddings turn
    together, are `scale` times as large in keys and as small in queries. Raises ConfigError where that would change the
    function: after a query-key norm, with a bias, or without a rotary pair."""
    params = jax.tree.map(lambda leaf: leaf, model.params)  # dicts of its own
    for layer, block in enumerate(model.merge().blocks):
        config = getattr(block.mixer, "config", None)
        if not isinstance(config, AttentionConfig) or config.qk_norm or config.bias or not config.rope:
            raise ConfigError("mixer", "", "must be attention with rotary embeddings, without qk_norm and bias")
        half = config.rotary_dim // 2
        factors = np.ones(config.head_dim, np.float32)
        factors[[half - 1, 2 * half - 1]] = scale
        mixer = params["blocks"][layer]["mixer"]
        mixer["key"]["kernel"] = mixer["key"]["kernel"] * np.tile(factors, config.num_kv_heads)[None, :]
        mixer["query"]["kernel"] = mixer["query"]["kernel"] / np.tile(factors, config.num_heads)[None, :]
    return Model(model.structure, params)


def channel_ratios(model: Blockwise, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """[L, K]: mean |k| of the largest channel over that of the median one, keys as they are stored, of [B, T]."""
    _, after = layers_of(model, tokens, lambda layer, state, whole: whole)
    found = []
    for states, views in zip(model.states(), after, strict=True):
        for name, state in states.items():
            if isinstance(state, TokenState):
                view: Any = views[name]
                size = np.abs(np.asarray(view.pool["keys"], np.float64)).mean(axis=(0, 1))
                found.append(size.max(axis=1) / np.median(size, axis=1))
    return np.stack(found)


def schemes(bits: int) -> dict[str, Scheme]:
    """Keys by channel and by token in equal groups, asymmetric, scales and zeros in bfloat16."""
    return {
        axis: Scheme(f"int{bits}", axis, has_zeros=True, scale_dtype="bfloat16")  # pyright: ignore[reportArgumentType]
        for axis in ("channel", "token")
    }


def axes(record: Done) -> list[dict[str, Any]]:
    """A row for each scale, axis and number of bits (0: not rounded): perplexity a byte of the text's second halves,
    the relative error of keys, and the ratio of channels. Values are not rounded."""
    laboratory, model = trained(record)
    tokens, num_scored = sequences(laboratory), record.config["task"]["num_scored"]
    rows = []
    for scale in SCALES:
        blockwise = Blockwise(scaled_pairs(model, scale))
        ratios = channel_ratios(blockwise, tokens[:, :-1])
        cells: dict[tuple[str, int], Scheme | None] = {("none", 0): None}
        cells |= {(axis, bits): scheme for bits in (4, 2) for axis, scheme in schemes(bits).items()}
        for (axis, bits), scheme in cells.items():
            found = rounded(blockwise, tokens, num_scored, Rounding(scheme, None, GROUP))
            row = {"seed": record.config["seed"], "scale": scale, "axis": axis, "bits": bits}
            row |= {"perplexity": found.perplexity, "key_error": found.key_errors.mean()}
            rows.append(row | {"channel_ratio": ratios.mean(), "worst_ratio": ratios.max()})
    return rows


def silenced(record: Done) -> list[dict[str, Any]]:
    """A row a layer: the metric in the parallel form where that layer's attention adds nothing; and of all of them."""
    laboratory, model = trained(record)
    config = laboratory.config
    key = named_key(config.seed, "eval")
    scorer = Scorer(model.structure, laboratory.task, key, config.measure.batch_size)
    rows = []
    for layer in (None, *model.params["blocks"]):
        params = jax.tree.map(lambda leaf: leaf, model.params)
        if layer is not None:
            out = params["blocks"][layer]["mixer"]["out"]
            out["kernel"] = 0 * out["kernel"]
        value = laboratory.task.metric.mean(scorer.parallel(params, "test"))
        rows.append({"task": config.task_name, "seed": record.config["seed"], "silent": layer, "value": value})
    return rows


def sinks(record: Done) -> pd.DataFrame:
    """A row a query head: the share of its attention that goes to token 0."""
    laboratory, model = trained(record)
    tokens = sequences(laboratory)[:, : laboratory.task.context_len]
    shares = sink_shares(Blockwise(model), tokens, FIRST)
    rows = [
        {
            "task": laboratory.config.task_name,
            "seed": record.config["seed"],
            "layer": layer,
            "head": head,
            "share": share,
        }
        for (layer, head), share in np.ndenumerate(shares)
    ]
    return pd.DataFrame(rows)
