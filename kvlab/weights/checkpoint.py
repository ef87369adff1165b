"""Loading and saving a model in the layout of the Hugging Face hub: config.json and safetensors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from kvlab.models.model import Model
from kvlab.models.transformer import Transformer, path_name
from kvlab.schema import shown
from kvlab.typing import Params
from kvlab.units import counted
from kvlab.weights.architectures import read_architecture, table_of, write_architecture
from kvlab.weights.families import FAMILIES, Architecture
from kvlab.weights.files import (
    Stored,
    WeightsError,
    read_headers,
    read_json,
    read_tensor,
    refuse_gguf,
    write_shards,
)
from kvlab.weights.heads import HEAD, as_stored, with_embedding
from kvlab.weights.mxfp4 import with_blocks
from kvlab.weights.tables import Table
from kvlab.weights.windows import windowed

DTYPES = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}
"""What a model computes in by default, from the type its tensors are stored in. float16 is widened: its range is too
small for activations in bfloat16's place."""


@dataclass(frozen=True)
class Pretrained:
    """A model that was loaded; `Engine(pretrained.model)` generates from it."""

    architecture: Architecture
    model: Model
    end_tokens: tuple[int, ...] = ()
    """Tokens that end an answer, as the folder says; nothing stops at them unless `Sampling.stop_tokens` asks."""


def load_checkpoint(
    directory: str | Path, dtype: str | None = None, *, window: int | None = None, num_sinks: int = 0
) -> Pretrained:
    """A model from a folder with config.json and safetensors, one file or sharded.

    `dtype` ("float32", "bfloat16"; None: as stored) is that of matrices and of the computation; norms, decays and time
    steps are float32. With a `window` every layer of attention sees at most that many tokens, the current one included,
    and the first `num_sinks` (`kvlab.weights.windows`). Holds one parameter at a time beside the model. Raises
    WeightsError naming every missing, unexpected or mismatching tensor and every option that is not supported, before
    anything is allocated, and ConfigError for a window that its layers cannot have.
    """
    directory = Path(directory).expanduser()
    refuse_gguf(directory)
    headers = read_headers(directory)
    architecture = peek_architecture(directory, dtype, window=window, num_sinks=num_sinks)
    abstract = abstract_model(architecture)
    table = table_of(architecture)
    if architecture.model.tie_embeddings:
        table = with_embedding(table, headers)
    table = with_blocks(table, headers)
    if problems := mismatches(table, abstract.params, headers, architecture):
        raise WeightsError(directory, problems)

    def tensor(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        entry = table[path_name(path)]
        whole = entry.load([read_tensor(headers[name], name) for name in entry.names])
        return jax.device_put(np.ascontiguousarray(whole.astype(like.dtype, copy=False)))

    end_tokens = read_end_tokens(directory, architecture)
    params = jax.tree_util.tree_map_with_path(tensor, abstract.params)
    return Pretrained(architecture, Model(abstract.structure, params), end_tokens)


def peek_architecture(
    directory: Path, dtype: str | None = None, *, window: int | None = None, num_sinks: int = 0
) -> Architecture:
    """What model `load_checkpoint` makes of a folder, from config.json and the headers; a head that a tied model stores
    is compared with the embedding. Raises as it does."""
    refuse_gguf(directory)
    values, headers = read_json(directory / "config.json"), read_headers(directory)
    architecture, problems = read_architecture(values, dtype or _stored_dtype(headers))
    if architecture is None:
        raise WeightsError(directory, problems)
    if (num_layers := len(architecture.layers)) > len(headers):  # before any of them is built
        held = f"the folder has {counted(len(headers), 'tensor')}"
        raise WeightsError(directory, [f"config.json: num_hidden_layers = {num_layers}: {held}"])
    return windowed(as_stored(architecture, table_of(architecture), headers), window, num_sinks)


def read_end_tokens(directory: Path, architecture: Architecture) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or else of config.json: one id, several or none (null). Where neither
    has the field it is the family's default, if the vocabulary holds that. Raises WeightsError for anything else."""
    vocab_size, is_given = architecture.vocab_size, False
    for name in ("generation_config.json", "config.json"):
        values = read_json(directory / name) if (directory / name).exists() else {}
        is_given |= "eos_token_id" in values
        if (given := values.get("eos_token_id")) is None:
            continue
        ids = tuple(given) if isinstance(given, list) else (given,)
        if wrong := [token for token in ids if type(token) is not int or not 0 <= token < vocab_size]:
            legal = f"must be token ids in [0, {vocab_size})"
            raise WeightsError(directory, [f"{name}: eos_token_id = {shown(wrong[0])}: {legal}"])
        return ids
    default = FAMILIES[architecture.family].default_end
    return () if is_given or default is None or default >= vocab_size else (default,)


def save_checkpoint(
    pretrained: Pretrained, directory: str | Path, *, dtype: str | None = None, max_shard_bytes: int = 5 << 30
) -> None:
    """Writes config.json and safetensors that `load_checkpoint` and transformers read back.

    `dtype` of the tensors ("float32", "bfloat16", "float16"); None: each as it is. Raises ValueError for another, and
    for a model that its family's config cannot describe, and FileExistsError when the folder holds a model already.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype = {dtype!r}: must be None, float32, bfloat16 or float16")
    directory, architecture = Path(directory).expanduser(), pretrained.architecture
    values = write_architecture(architecture)
    if found := [*directory.glob("*.safetensors"), *directory.glob("config.json")]:
        raise FileExistsError(f"{found[0]}: the folder holds a model already")
    directory.mkdir(parents=True, exist_ok=True)
    table = table_of(architecture)
    write_shards(directory, file_tensors(pretrained.model.params, table, dtype), max_shard_bytes)
    values |= {"dtype": dtype or architecture.model.dtype}
    if pretrained.end_tokens:
        values["eos_token_id"] = list(pretrained.end_tokens)
    (directory / "config.json").write_text(json.dumps(values, indent=2))


def file_tensors(params: Params, table: Table, dtype: str | None) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The file's tensors by name, each in `dtype` or as its parameter is; one that several parameters have rows of when
    the last of them is there."""
    unfinished: dict[str, tuple[npt.NDArray[Any], int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entry = table[path_name(path)]
        for name, tensor in zip(entry.names, entry.unload(np.asarray(leaf)), strict=True):
            part = tensor if dtype is None else tensor.astype(jnp.dtype(dtype))
            if entry.num_rows is None:
                yield name, part
                continue
            empty = np.empty((entry.num_rows, *part.shape[1:]), part.dtype)
            whole, num_missing = unfinished.pop(name, (empty, entry.num_rows))
            whole[np.asarray(entry.order)] = part
            if num_missing == len(part):
                yield name, whole
            else:
                unfinished[name] = whole, num_missing - len(part)
    assert not unfinished, f"rows without a parameter: {list(unfinished)}"


def abstract_model(architecture: Architecture) -> Model:
    """The model with shapes and dtypes in place of parameters: matrices in the model's dtype, the rest float32."""
    model = nnx.eval_shape(
        lambda: Transformer(architecture.layers, architecture.model, architecture.vocab_size, rngs=nnx.Rngs(0))
    )
    shapes = Model.of(model)

    def typed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = path_name(path)
        is_matrix = name.endswith((".kernel", ".embedding")) and not name.endswith(".router.kernel")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(architecture.model.dtype) if is_matrix else jnp.float32)

    return Model(shapes.structure, jax.tree_util.tree_map_with_path(typed, shapes.params))


def _stored_dtype(headers: dict[str, Stored]) -> str:
    """The commonest type by number of tensors, in the words of `ModelConfig.dtype`."""
    kinds = [header.dtype for header in headers.values() if header.dtype in DTYPES]
    return DTYPES[max(DTYPES, key=kinds.count)]


def is_unread(name: str, architecture: Architecture) -> bool:
    """Whether a tensor that makes no parameter is passed over: frequencies that follow from config.json, a tied head
    that is stored twice, and what a family keeps besides."""
    is_second_head = name == HEAD and architecture.model.tie_embeddings
    is_of_family = FAMILIES[architecture.family].is_unread(name, architecture)
    return is_second_head or is_of_family or name.endswith("rotary_emb.inv_freq")


def mismatches(table: Table, abstract: Params, headers: dict[str, Stored], architecture: Architecture) -> list[str]:
    """Everything in which the file differs from the model."""
    problems, expected = [], set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        entry = table[path_name(path)]
        expected |= {*entry.names}
        try:
            shapes = entry.shapes(leaf.shape)
        except ValueError as error:
            problems.append(f"{entry.names[0]}: {error}")
            continue
        for name, shape in zip(entry.names, shapes, strict=True):
            if name not in headers:
                problems.append(f"{name}: is missing; must be {list(shape)}")
                continue
            stored = headers[name]
            if stored.shape != shape:
                problems.append(f"{name}: shape {list(stored.shape)}: must be {list(shape)}")
            if stored.dtype not in entry.dtypes:
                problems.append(f"{name}: dtype {stored.dtype}: must be one of {', '.join(entry.dtypes)}")
    unexpected = (name for name in sorted(headers.keys() - expected) if not is_unread(name, architecture))
    problems += [f"{name}: is unexpected" for name in unexpected]
    return problems
