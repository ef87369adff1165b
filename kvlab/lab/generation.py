"""`kvlab generate`: a run's directory or a published checkpoint answers prompts, with a live table of requests and memory."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import yaml
from flax import nnx
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text as RichText

from kvlab.config import Config
from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.requests import Answer
from kvlab.engine.sampling import Sampling
from kvlab.host import keep_freed_memory
from kvlab.lab.execute import load_params
from kvlab.ledger.accounting import PARTS
from kvlab.memory.layout import MemoryConfig
from kvlab.models.transformer import Transformer
from kvlab.schema import ConfigError, Schema, choice, nearest, text
from kvlab.tasks import Text
from kvlab.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from kvlab.typing import Params
from kvlab.units import human_bytes
from kvlab.weights import load_checkpoint

TOP = ("dtype", "draft", "stop_at_end")
SECTIONS: dict[str, type[Schema]] = {"sampling": Sampling, "engine": EngineConfig, "memory": MemoryConfig}


@dataclass(frozen=True)
class GenerateConfig(Schema):
    """What `kvlab generate` takes as field=value. `dtype` null: as stored; `draft` is the folder of a draft model; with `stop_at_end`
    answers end at the checkpoint's own end tokens, too."""

    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_batch=8))
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(chunk_len=256))
    dtype: str | None = choice("stored", ("stored", "float32", "bfloat16"))
    draft: str | None = text(None, legal="a folder", optional=True)
    stop_at_end: bool = True

    @classmethod
    def parse(cls, overrides: Sequence[str]) -> "GenerateConfig":
        """From words such as sampling.temperature=0.7. Raises ConfigError for whatever is not a field or not legal."""
        values: dict[str, Any] = {}
        sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        sections["memory"] = {"chunk_len": 256}
        for word in overrides:
            name, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(word, None, "must be field=value, such as sampling.temperature=0.7")
            try:
                parsed = yaml.safe_load(value)
            except yaml.YAMLError:
                parsed = value
            section, dot, inner = name.partition(".")
            if dot and section in sections:
                sections[section][inner] = parsed
            elif not dot and name in TOP:
                values[name] = parsed
            elif not dot and name in sections:
                fields = ", ".join(SECTIONS[name].defaults())
                raise ConfigError(
                    name, parsed, f"is a section: give one of its fields, {name}.field=value; legal: {fields}"
                )
            else:
                raise ConfigError(name, parsed, f"no such field; {nearest(section, (*SECTIONS, *TOP))}")
        built = {name: kind.build(sections[name], name) for name, kind in SECTIONS.items()}
        return cls.build({**values, **built})


@dataclass(frozen=True)
class Source:
    """A model from a folder, whatever kind of folder it is."""

    structure: nnx.GraphDef[Transformer]
    params: Params
    tokenizer: Tokenizer | None
    end_tokens: tuple[int, ...] = ()


def load_source(folder: Path, dtype: str | None = None) -> Source:
    """The model of a finished run's directory, or of a folder in the layout of the Hugging Face hub.

    Raises FileNotFoundError for a folder that is neither, and what the loaders raise.
    """
    if (folder / "record.json").exists() or (folder / "status.json").exists():
        if dtype not in (None, "stored"):
            raise ConfigError("dtype", dtype, 'must be "stored" for a run: it computes as it was trained')
        config = Config.build(yaml.safe_load((folder / "config.yaml").read_text()))
        lab, params = load_params(config, folder)
        is_bytes = isinstance(lab.task, Text) and lab.task.vocab_size == ByteTokenizer.vocab_size
        return Source(lab.structure, params, ByteTokenizer() if is_bytes else None)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder}: neither a run's directory (config.yaml, params/) nor a checkpoint (config.json)"
        )
    loaded = load_checkpoint(folder, None if dtype == "stored" else dtype)
    return Source(loaded.structure, loaded.params, load_tokenizer(folder), loaded.end_tokens)


def make_engine(source: Source, config: GenerateConfig) -> Engine:
    """The engine over a loaded model, with its draft model if one is named."""
    draft = None
    if config.draft is not None:
        drafting = load_source(Path(config.draft), config.dtype)
        draft = (drafting.structure, drafting.params)
    return Engine(
        source.structure,
        source.params,
        memory=config.memory,
        config=config.engine,
        tokenizer=source.tokenizer,
        draft=draft,
    )


OPTIONS = ("name", "priority", "namespace")
"""What a line may ask of `Engine.submit` beside prompt and sampling."""


class Asked(NamedTuple):
    """One request, as `Engine.submit` takes it."""

    prompt: Any
    sampling: Sampling
    options: dict[str, Any]


def read_requests(lines: Iterable[str], sampling: Sampling) -> Iterator[Asked]:
    """Requests of a JSONL stream, {"prompt": text or token ids, "sampling": {...}} and OPTIONS; the sampling's other fields as
    given. Raises ValueError naming the line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, Mapping) or "prompt" not in value:
                raise ValueError('must be an object with "prompt"')
            legal = ("prompt", "sampling", *OPTIONS)
            if unknown := sorted(set(value).difference(legal)):
                raise ValueError(f"{unknown[0]!r}: {nearest(unknown[0], legal)}")
            given = value.get("sampling") or {}
            if not isinstance(given, Mapping):
                raise ValueError(f"sampling = {given!r}: must be an object")
            own = Sampling.build({**sampling_values(sampling), **given}, "sampling")
            options = {name: value[name] for name in OPTIONS if value.get(name) is not None}
            yield Asked(value["prompt"], own, options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number}: {error}") from None


def sampling_values(sampling: Sampling) -> dict[str, Any]:
    """A sampling as plain values."""
    return {name: getattr(sampling, name) for name in Sampling.defaults()}


def as_line(answer: Answer) -> str:
    """An answer as one line of JSON; what is not finite is null."""
    completions = [
        {
            "text": one.text,
            "tokens": one.tokens,
            "logprobs": [_rounded(value) for value in one.logprobs],
            "finish_reason": one.finish_reason,
            **({} if one.score is None else {"score": one.score}),
            **(
                {
                    "alternatives": [
                        [(token, _rounded(lp)) for token, lp in zip(*a, strict=True)] for a in one.alternatives
                    ]
                }
                if one.alternatives
                else {}
            ),
        }
        for one in answer.completions
    ]
    line = {"name": answer.name, "prompt": answer.prompt, "completions": completions, "error": answer.error}
    return json.dumps(line, allow_nan=False)


def _rounded(logprob: float) -> float | None:
    return round(logprob, 6) if math.isfinite(logprob) else None


def submit_all(engine: Engine, requests: Iterable[Asked]) -> list[str]:
    """Queues every request and returns their names. Raises ValueError that says which one is bad, before anything is
    computed."""
    names = []
    for number, one in enumerate(requests, 1):
        try:
            names.append(engine.submit(one.prompt, one.sampling, **one.options))
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
    return names


def answer_all(engine: Engine, names: Sequence[str], console: Console, output: TextIO | None) -> list[Answer]:
    """Answers the queued requests, showing the live table on a terminal; each answer is written to `output` as soon as it is
    there."""
    answers: list[Answer] = []
    began = time.perf_counter()
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    if live:
        live.start()
    try:
        while engine.requests:
            ended = {event.name for event in engine.step() if event.finish_reason is not None}
            for name in [name for name in names if name in ended and name in engine.answers]:
                answers.append(engine.answers.pop(name))
                if output is not None:
                    print(as_line(answers[-1]), file=output, flush=True)
            if live:
                live.update(status(engine, time.perf_counter() - began), refresh=True)
    finally:
        if live:
            live.stop()
    return sorted(answers, key=lambda one: names.index(one.name))


def status(engine: Engine, seconds: float, most: int = 12) -> Group:
    """The live table: requests that run and wait, where every byte of the memory is, and how fast it goes."""
    requests = Table("request", "state", "prompt", "answer", "text", title_justify="left")
    shown = [one for request in engine.requests.values() for one in request.samples]
    for one in shown[:most]:
        text = one.transcript.text[-60:] if one.transcript else " ".join(map(str, one.answer[-12:]))
        length = f"{len(one.answer)}/{one.request.sampling.max_tokens}"
        requests.add_row(str(one.name), one.state, str(len(one.request.prompt)), length, RichText(text))
    if len(shown) > most:
        requests.add_row(f"and {len(shown) - most} more", "", "", "", "")
    accounts = engine.ledger.audit()
    memory = Table("memory", "pool", *(part for part in PARTS if any(getattr(one, part) for one in accounts)))
    for one in accounts:
        parts = (getattr(one, part) for part in PARTS if any(getattr(other, part) for other in accounts))
        memory.add_row(one.name, human_bytes(one.pool), *(f"{100 * part / one.pool:.1f}%" for part in parts))
    return Group(requests, memory, RichText(summary(engine, seconds)))


def summary(engine: Engine, seconds: float) -> str:
    """One line about what was done."""
    stats, counters = engine.stats, engine.scheduler.counters
    total = stats.prefilled_tokens + stats.decoded_tokens
    words = [
        f"{stats.decoded_tokens} tokens decoded, {stats.prefilled_tokens} prefilled, {counters.hit_tokens} found in memory",
        f"{total / max(seconds, 1e-9):,.0f} tok/s",
        f"{stats.read_bytes / max(seconds, 1e-9) / 1e9:.1f} GB/s read",
        f"{counters.preempted} preempted",
    ]
    if stats.drafted_tokens:
        words.append(f"{100 * stats.acceptance_rate:.0f}% of {stats.drafted_tokens} drafts accepted")
    return ", ".join(words)


def print_answers(answers: Sequence[Answer], console: Console) -> None:
    """Prompts and answers for reading."""
    for one in answers:
        console.rule(one.name, align="left")
        if one.error:
            console.print(f"failed: {one.error}", markup=False)
        for completion in one.completions:
            console.print(completion.text or str(completion.tokens), markup=False, highlight=False, soft_wrap=True)


def generate(
    folder: Path, config: GenerateConfig, prompts: Sequence[str], source: Path | None, output: Path | None, jsonl: bool
) -> int:
    """The command; returns the exit status, 1 when a request failed."""
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError("--output", str(output), "must be a file in a folder that exists")
    keep_freed_memory()
    loaded = load_source(folder, config.dtype)
    engine = make_engine(loaded, config)
    asked = [Asked(_prompt(one, engine), config.sampling, {}) for one in prompts]
    if source is not None or (jsonl and not prompts):
        if source is None or str(source) == "-":
            asked += read_requests(sys.stdin, config.sampling)
        else:
            with source.open(encoding="utf-8") as lines:
                asked += read_requests(lines, config.sampling)
    if not asked:
        raise ConfigError(
            "prompt", None, "give --prompt TEXT, --input FILE, or --jsonl with requests on standard input"
        )
    if config.stop_at_end and loaded.end_tokens:
        asked = [
            one._replace(sampling=replace(one.sampling, stop_tokens=(*one.sampling.stop_tokens, *loaded.end_tokens)))
            for one in asked
        ]
    console = Console(stderr=True, highlight=False)
    names = submit_all(engine, asked)
    began = time.perf_counter()
    if output is not None:
        with output.open("w", encoding="utf-8") as file:
            answers = answer_all(engine, names, console, file)
    else:
        answers = answer_all(engine, names, console, sys.stdout if jsonl else None)
    if not jsonl and output is None:
        print_answers(answers, Console(highlight=False))
    console.print(summary(engine, time.perf_counter() - began), markup=False, soft_wrap=True)
    return 1 if any(one.error for one in answers) else 0


def _prompt(word: str, engine: Engine) -> str | list[int]:
    """A prompt of the command line: text, or token ids where the model has no tokenizer."""
    if engine.tokenizer is not None:
        return word
    try:
        return [int(one) for one in word.replace(",", " ").split()]
    except ValueError:
        raise ConfigError("prompt", word, "must be token ids such as 1,2,3: this model has no tokenizer") from None
