"""What a checkpoint's config.json says, in kvlab's words; and back. Whatever is not understood is refused, all at
once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvlab.schema import ConfigError, nearest, shown
from kvlab.weights.config_files import DefaultRope, older_rope, read_context, read_part, read_rope, untagged
from kvlab.weights.families import FAMILIES, NOT_BUILT, Architecture
from kvlab.weights.tables import Table, linear

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""What config.json says of special tokens where it is not to mean transformers' defaults: ids of the published
vocabulary, at which generation would stop, and which a smaller one does not hold."""


def read_architecture(values: Mapping[str, Any], dtype: str) -> tuple[Architecture | None, list[str]]:
    """The architecture of a config.json, or every reason why it cannot be built."""
    values = {name: untagged(value) for name, value in values.items()}
    name = values.get("model_type")
    if isinstance(name, str) and name in NOT_BUILT and name not in FAMILIES:
        return None, [f"config.json: model_type = {shown(name)}: is not built here: {NOT_BUILT[name]}"]
    if not isinstance(name, str) or name not in FAMILIES:
        return None, [f"config.json: model_type = {shown(name)}: {nearest(str(name), FAMILIES)}"]
    found: list[str] = []
    try:
        family = FAMILIES[name]
    except ConfigError as error:
        return None, [f"config.json: {error}"]
    file = read_part(family.File, values, found)
    context_len = read_context(values, family.context_field, found)
    rope = read_rope(values, found, family.rope_fraction) if family.has_rope else DefaultRope()
    if file is None or rope is None or found:
        return None, found
    try:
        return replace(family.read(file, rope, dtype), context_len=context_len), []
    except (ConfigError, TypeError, ValueError) as error:
        return None, [f"config.json: {error}"]


def write_architecture(architecture: Architecture) -> dict[str, Any]:
    """The config.json of an architecture, which transformers 4 and 5 read alike. Raises ValueError for what its family
    cannot say."""
    model, family = architecture.model, FAMILIES[architecture.family]
    values: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.transformers_class],
        "vocab_size": architecture.vocab_size,
        "hidden_size": model.model_dim,
        "num_hidden_layers": len(architecture.layers),
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": model.dtype,
        **NO_TOKENS,
        **family.write(architecture),
    }
    if family.context_field and architecture.context_len:
        values[family.context_field] = architecture.context_len
    values = older_rope(values) | values
    restored, problems = read_architecture(values, model.dtype)
    if restored != architecture:
        reasons = "; ".join(problems) or "some options of its layers have no field there"
        raise ValueError(f"family = {architecture.family!r}: its config.json cannot say what this model is ({reasons})")
    return values


def table_of(architecture: Architecture) -> Table:
    """Every parameter and its tensors; the head is absent where it is the embedding."""
    table = FAMILIES[architecture.family].table(architecture.layers, architecture.model)
    return table if architecture.model.tie_embeddings else table | linear("head", "lm_head")
