"""Recorded requests from files, each row validated.

CSV with the columns of Azure's traces (TIMESTAMP, ContextTokens, GeneratedTokens) or of their processed form
(arrived_at, num_prefill_tokens, num_decode_tokens). JSONL of Mooncake's form (timestamp in ms, input_length,
output_length, hash_ids): a hash id stands for a block of 512 tokens, and equal ids mean equal prefixes.
"""

import contextlib
import csv
import datetime
import heapq
import json
import math
import re
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from pydantic import BeforeValidator, Field, Strict

from kvlab.ledger.tokens import TokenIds
from kvlab.schema import ConfigError, validated
from kvlab.units import counted

MOONCAKE_BLOCK = 512
MAX_LEN = 1 << 24


class Request(NamedTuple):
    """One request. `tokens` are the prompt's ids and `answer` the ids generated, where their identity matters."""

    arrival_s: float
    prompt_len: int
    output_len: int
    tokens: TokenIds | None = None
    answer: TokenIds | None = None


def _whole(value: Any) -> Any:
    """Digits, as a CSV file writes a number, as that number."""
    is_number = isinstance(value, str) and re.fullmatch(r" *-?[0-9]{1,20} *", value)
    return int(value) if is_number else value


def _seconds(value: Any) -> float:
    """A number, or a date as ISO 8601 writes it, in seconds."""
    seconds = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except (ValueError, OverflowError):
            with contextlib.suppress(ValueError):
                moment = datetime.datetime.fromisoformat(str(value))
                seconds = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError("must be a time in seconds or YYYY-MM-DD HH:MM:SS")
    return seconds


Seconds = Annotated[float, BeforeValidator(_seconds)]
PromptLen = Annotated[int, Strict(), Field(ge=1, le=MAX_LEN), BeforeValidator(_whole)]
OutputLen = Annotated[int, Strict(), Field(ge=0, le=MAX_LEN), BeforeValidator(_whole)]
"""0 where the request failed."""
BlockId = Annotated[int, Strict(), Field(ge=0, le=MAX_LEN)]


class AzureRow(TypedDict):
    """A request of Azure's traces."""

    TIMESTAMP: Seconds
    ContextTokens: PromptLen
    GeneratedTokens: OutputLen


class ProcessedRow(TypedDict):
    """A request of their processed form."""

    arrived_at: Seconds
    num_prefill_tokens: PromptLen
    num_decode_tokens: OutputLen


class MooncakeRow(TypedDict):
    """A request of Mooncake's traces; what else a line says is ignored."""

    timestamp: Seconds
    input_length: PromptLen
    output_length: OutputLen
    hash_ids: NotRequired[list[BlockId] | None]


CSV_ROWS = (AzureRow, ProcessedRow)
"""Each with its columns in the order arrival, prompt, output."""


def read_trace(path: Path, num_requests: int | None = None) -> list[Request]:
    """Every request of a CSV or JSONL trace, or the first `num_requests`, sorted by arrival, the first one at 0 s. No
    more requests are held at once than are asked for.

    Raises ConfigError naming the file, the line and the field of the first row that is malformed or truncated.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = _without_blank_end(file)
            rows = _json_rows(path, lines) if path.suffix in (".jsonl", ".json") else _csv_rows(path, lines)
            if num_requests is None:
                found = sorted(rows, key=attrgetter("arrival_s"))
            else:
                found = heapq.nsmallest(num_requests, rows, key=attrgetter("arrival_s"))
    except UnicodeDecodeError as error:
        raise ConfigError("workload.path", str(path), f"is no text ({error})") from None
    except csv.Error as error:
        raise ConfigError("workload.path", str(path), f"is no CSV ({error})") from None
    if not found:
        raise ConfigError("workload.path", str(path), "holds no request")
    return [request._replace(arrival_s=request.arrival_s - found[0].arrival_s) for request in found]


def _without_blank_end(lines: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, and without blank ones behind the last that is not."""
    blank: list[str] = []
    for line in lines:
        if line.strip():
            yield from blank
            blank.clear()
            yield line.rstrip("\n")
        elif len(blank) < 2:  # one is an error already
            blank.append("")


def _wrong(path: Path, line: int, field: str, value: object, legal: str) -> ConfigError:
    return ConfigError(f"{path}:{line}: {field}", value, legal)


def _row[T](path: Path, line: int, kind: type[T], values: object) -> T:
    """A line's values as a row of that kind."""
    try:
        return validated(kind, values)
    except ConfigError as error:
        raise _wrong(path, line, error.name, error.value, error.legal) from None


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[Request]:
    rows = csv.reader(lines)
    header = [name.strip() for name in next(rows, [])]
    kind = next((kind for kind in CSV_ROWS if set(kind.__annotations__) <= set(header)), None)
    if kind is None:
        legal = " or ".join(",".join(kind.__annotations__) for kind in CSV_ROWS)
        raise _wrong(path, 1, "header", ",".join(header), f"must have the columns {legal}")
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            legal = f"must have {counted(len(header), 'column')}; is the file truncated?"
            raise _wrong(path, line, "row", ",".join(row), legal)
        cells: Any = _row(path, line, kind, dict(zip(header, row, strict=True)))
        arrival_s, prompt_len, output_len = (cells[name] for name in kind.__annotations__)
        if output_len:
            yield Request(arrival_s, prompt_len, output_len)


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[Request]:
    for line, content in enumerate(lines, 1):
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            legal = f"must be JSON ({error}); is the file truncated?"
            raise _wrong(path, line, "row", content[:60], legal) from None
        if not isinstance(values, dict):
            raise _wrong(path, line, "row", content[:60], "must be a JSON object")
        row = _row(path, line, MooncakeRow, values)
        prompt_len, output_len = row["input_length"], row["output_length"]
        tokens = answer = None
        if (ids := row.get("hash_ids")) is not None:
            tokens = _expand(path, line, ids, prompt_len)
            answer = np.full(output_len, (1 << 30) + line, np.int32)  # nobody else's
        if output_len:
            yield Request(row["timestamp"] / 1e3, prompt_len, output_len, tokens, answer)


def _expand(path: Path, line: int, ids: list[int], prompt_len: int) -> np.ndarray:
    """Tokens that are equal where block ids are: each block repeats its id."""
    num_blocks = -(-prompt_len // MOONCAKE_BLOCK)
    if len(ids) != num_blocks:
        legal = f"must be a list of {counted(num_blocks, 'id')} for {counted(prompt_len, 'token')}"
        raise _wrong(path, line, "hash_ids", ids, legal)
    return np.repeat(np.array(ids, np.int32), MOONCAKE_BLOCK)[:prompt_len]
