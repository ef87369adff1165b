"""What a family of published checkpoints is: how it spells a model in config.json, and its parameters in tensors."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvlab.models.transformer import LayerConfig, ModelConfig
from kvlab.weights.config_files import ConfigFile, DefaultRope
from kvlab.weights.tables import Table


@dataclass(frozen=True)
class Architecture:
    """A model as its layers; `family` is the `model_type` of its config.json."""

    family: str
    layers: tuple[LayerConfig, ...]
    model: ModelConfig
    vocab_size: int
    context_len: int | None = None
    """Tokens that the model was made for, as its file says; None: it says nothing."""


class Family[F: ConfigFile](abc.ABC):
    """One `model_type`. Reading and writing are inverse to each other, of the config and of the tensors."""

    model_type: ClassVar[str]
    transformers_class: ClassVar[str]
    File: ClassVar[type[ConfigFile]]
    """The fields of config.json."""
    has_rope: ClassVar[bool] = True
    rope_fraction: ClassVar[float | None] = None
    """The share of a head that is turned where the file names none; None: always all of it."""

    context_field: ClassVar[str | None] = "max_position_embeddings"
    """How config.json calls the context; None: it has no such field."""
    default_end: ClassVar[int | None] = None
    """`eos_token_id` where the file has none, as transformers has it."""

    @abc.abstractmethod
    def read(self, file: F, rope: DefaultRope, dtype: str) -> Architecture:
        """The model that a config.json describes. Raises ConfigError, in the file's words, for what is not built."""

    @abc.abstractmethod
    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The fields of config.json beside those that all families have."""

    @abc.abstractmethod
    def table(self, layers: Sequence[LayerConfig], model: ModelConfig) -> Table:
        """The tensors of every parameter but the head."""

    def is_unread(self, name: str, architecture: Architecture) -> bool:
        """Whether a tensor of the file is passed over, as transformers does it."""
        return False
