"""A model to generate with, from a run's directory or a published checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from kvlab.config import Config, GenerateConfig
from kvlab.engine.engine import Engine
from kvlab.lab.execute import load_params
from kvlab.lab.foreign import read_yaml
from kvlab.lab.record import first_error
from kvlab.memory.budgets import in_slots
from kvlab.models.model import Model
from kvlab.schema import ConfigError
from kvlab.tasks import Text
from kvlab.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from kvlab.weights import load_checkpoint
from kvlab.weights.files import refuse_gguf


@dataclass(frozen=True)
class Source:
    """A model from a folder, whatever kind of folder it is."""

    model: Model
    tokenizer: Tokenizer | None
    end_tokens: tuple[int, ...] = ()


def load_source(folder: Path, dtype: str | None = None) -> Source:
    """The model of a finished run's directory, or of a folder in the layout of the Hugging Face hub.

    Raises FileNotFoundError for a folder that is neither, and what the loaders raise.
    """
    refuse_gguf(folder)
    if (folder / "training.yaml").exists():
        raise FileNotFoundError(f"{folder}: this is a training; give a run's folder, beside trained/")
    if (folder / "config.yaml").exists():
        if dtype not in (None, "stored"):
            raise ConfigError("dtype", dtype, 'must be "stored" for a run: it computes as it was trained')
        config = config_of(folder)
        lab, params = load_params(config, folder)
        is_bytes = isinstance(lab.task, Text) and lab.task.vocab_size == ByteTokenizer.vocab_size
        return Source(Model(lab.model.structure, params), ByteTokenizer() if is_bytes else None)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: neither a run's directory (config.yaml) nor a checkpoint (config.json)")
    loaded = load_checkpoint(folder, None if dtype == "stored" else dtype)
    return Source(loaded.model, load_tokenizer(folder), loaded.end_tokens)


def config_of(folder: Path) -> Config:
    """The configuration of a run's folder. Raises ConfigError for a damaged file, and for one of another kvlab."""
    path = folder / "config.yaml"
    try:
        return Config.build(read_yaml(path))
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError("config", str(path), f"is damaged: {first_error(error)}") from None


def make_engine(source: Source, config: GenerateConfig) -> Engine:
    """The engine over a loaded model, with its draft model if one is named."""
    draft = None
    if config.draft is not None:
        draft = load_source(Path(config.draft), config.dtype).model
    return Engine(
        source.model,
        memory=in_slots(source.model.states, config.memory, config.engine.max_len),
        config=config.engine,
        tokenizer=source.tokenizer,
        draft=draft,
    )
