"""`kvlab generate`: a run's directory or a published checkpoint answers prompts, with a live table of requests and
memory."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live

from kvlab import terminal
from kvlab.config import GenerateConfig
from kvlab.engine.engine import Engine
from kvlab.engine.requests import Answer
from kvlab.host import keep_freed_memory
from kvlab.lab.live import print_answers, status, summary
from kvlab.lab.request_lines import Asked, Line, as_line, read_requests
from kvlab.lab.source import load_source, make_engine
from kvlab.memory.idle import idle_fields, idle_words
from kvlab.schema import ConfigError


def generate(
    folder: Path, config: GenerateConfig, prompts: Sequence[str], source: Path | None, output: Path | None, jsonl: bool
) -> int:
    """The command; returns the exit status, 1 when a request failed."""
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError("--output", str(output), "must be a file in a folder that exists")
    keep_freed_memory()
    loaded = load_source(folder, config.dtype)
    engine = make_engine(loaded, config)
    for words in idle_words(config.memory, idle_fields(config.memory)):
        print(f"kvlab: {words}", file=sys.stderr)
    asked = [Asked(_prompt(word, engine), config.sampling, {}) for word in prompts]
    lines = list(_lines(source, config)) if source is not None or (jsonl and not prompts) else []
    if not asked and not lines:
        legal = "give --prompt TEXT, --input FILE, or --jsonl with requests on standard input"
        raise ConfigError("prompt", None, legal)
    if config.stop_at_end:
        asked = [_stopping(request, loaded.end_tokens) for request in asked]
        lines = [
            line if isinstance(line.asked, str) else line._replace(asked=_stopping(line.asked, loaded.end_tokens))
            for line in lines
        ]
    console = terminal.console(stderr=True)
    names = submit_all(engine, asked)
    known, refused = submit_lines(engine, lines)
    names += known
    began = time.perf_counter()
    if output is not None:
        with output.open("w", encoding="utf-8") as file:
            answers = answer_all(engine, names, console, file, refused)
    else:
        answers = answer_all(engine, names, console, sys.stdout if jsonl else None, refused)
    if not jsonl and output is None:
        print_answers(answers, terminal.console())
    console.print(summary(engine, time.perf_counter() - began), markup=False, soft_wrap=True)
    return 1 if any(answer.error for answer in answers) else 0


def _lines(source: Path | None, config: GenerateConfig) -> Iterator[Line]:
    """Requests of a JSONL file, or of standard input. Bytes that are no UTF-8 spoil their own line alone."""
    if source is None or str(source) == "-":
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield from read_requests(sys.stdin, config.sampling)
        return
    with source.open(encoding="utf-8", errors="surrogateescape") as lines:
        yield from read_requests(lines, config.sampling)


def _stopping(request: Asked, end_tokens: tuple[int, ...]) -> Asked:
    """The request, ended by the checkpoint's end tokens, too."""
    stop_tokens = (*request.sampling.stop_tokens, *end_tokens)
    return request._replace(sampling=replace(request.sampling, stop_tokens=stop_tokens)) if end_tokens else request


def _prompt(word: str, engine: Engine) -> str | list[int]:
    """A prompt of the command line: text, or token ids where the model has no tokenizer."""
    if engine.tokenizer is not None:
        return word
    try:
        return [int(number) for number in word.replace(",", " ").split()]
    except ValueError:
        raise ConfigError("prompt", word, "must be token ids such as 1,2,3: this model has no tokenizer") from None


def submit_all(engine: Engine, requests: Iterable[Asked]) -> list[str]:
    """Queues every request and returns their names. Raises ValueError that says which one is bad, before anything is
    computed."""
    names = []
    for number, request in enumerate(requests, 1):
        try:
            names.append(engine.submit(request.prompt, request.sampling, **request.options))
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
    return names


def submit_lines(engine: Engine, lines: Iterable[Line]) -> tuple[list[str], list[Answer]]:
    """Queues what lines ask, and returns the names, and an answer for each line that cannot be asked."""
    names, refused = list[str](), list[Answer]()
    for line in lines:
        if isinstance(line.asked, str):
            refused.append(line.refused(line.asked))
            continue
        try:
            names.append(engine.submit(line.asked.prompt, line.asked.sampling, **line.asked.options))
        except ValueError as error:
            refused.append(line.refused(error))
    return names, refused


def answer_all(
    engine: Engine, names: Sequence[str], console: Console, output: TextIO | None, refused: Sequence[Answer] = ()
) -> list[Answer]:
    """Answers the queued requests, showing the live table on a terminal; each answer is written to `output` as soon
    as it is there, those `refused` first, and all are returned in the order of the names, those last."""
    answers: list[Answer] = []
    began = time.perf_counter()
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    if output is not None:
        for answer in refused:
            print(as_line(answer), file=output, flush=True)
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
    return [*sorted(answers, key=lambda answer: names.index(answer.name)), *refused]
