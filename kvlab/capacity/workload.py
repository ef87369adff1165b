"""Who asks for what: request lengths and arrivals, from seeded generators or from recorded traces.

Traces: CSV with the columns of Azure's (TIMESTAMP, ContextTokens, GeneratedTokens) or of its processed form (arrived_at,
num_prefill_tokens, num_decode_tokens), and JSONL of Mooncake's form (timestamp in ms, input_length, output_length, hash_ids:
one id for each block of 512 tokens, equal ids meaning equal prefixes).
"""

import csv
import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from kvlab.ledger.tokens import TokenIds
from kvlab.schema import ConfigError, Schema, choice, integer, real, text

MOONCAKE_BLOCK = 512
STRATUM = 128
SHAPES = ("lognormal", "gamma")


class Request(NamedTuple):
    """One request. `tokens` are the prompt's ids and `answer` the ids generated, where their identity matters."""

    arrival_s: float
    prompt_len: int
    output_len: int
    tokens: TokenIds | None = None
    answer: TokenIds | None = None


@dataclass(frozen=True)
class WorkloadConfig(Schema):
    """Lengths are log-normal, or gamma distributed, with these means and coefficients of variation before values beyond the
    maxima are rejected; or they come from a trace (`path`). Arrivals: "poisson" at `rate` a second, "saturated" (all are waiting from the start) or
    "trace". `num_prefixes` > 0 puts one of so many shared prefixes of `prefix_len` tokens before each prompt."""

    name: str = text("sharegpt")
    source: str = text("none")
    arrival: str = choice("saturated", ("poisson", "saturated", "trace"))
    rate: float = real(1.0, 0.0, 1e9, open_low=True)
    num_requests: int = integer(400, 1, 10_000_000)
    prompt_mean: float = real(184.0, 0.0, 1e9, open_low=True)
    prompt_cv: float = real(1.4, 0.0, 100.0)
    prompt_shape: str = choice("lognormal", SHAPES)
    output_mean: float = real(340.0, 0.0, 1e9, open_low=True)
    output_cv: float = real(0.87, 0.0, 100.0)
    output_shape: str = choice("gamma", SHAPES)
    max_prompt: int = integer(1024, 1, 1 << 24)
    max_total: int = integer(2048, 2, 1 << 24)
    num_prefixes: int = integer(0, 0, 1_000_000)
    prefix_len: int = integer(0, 0, 1 << 24)
    path: str | None = text(None, optional=True)
    seed: int = integer(0, 0)

    def cross_check(self) -> None:
        if self.arrival == "trace" and self.path is None:
            raise ConfigError("path", None, "must name a trace when arrival = 'trace'")
        if self.max_prompt >= self.max_total:
            raise ConfigError("max_prompt", self.max_prompt, f"must be below max_total = {self.max_total}")
        if (self.num_prefixes > 0) != (self.prefix_len > 0):
            raise ConfigError(
                "prefix_len", self.prefix_len, f"must be positive iff num_prefixes = {self.num_prefixes} is"
            )
        if self.prefix_len + self.max_prompt >= self.max_total:
            raise ConfigError("prefix_len", self.prefix_len, f"must leave room below max_total = {self.max_total}")
        for name in ("prompt", "output"):
            mean, high = getattr(self, f"{name}_mean"), self.max_prompt if name == "prompt" else self.max_total
            if mean > high:
                raise ConfigError(f"{name}_mean", mean, f"must be at most {high}, beyond which lengths are rejected")


def requests(config: WorkloadConfig) -> list[Request]:
    """The workload's requests in order of arrival. Raises ConfigError for a trace that is missing or malformed."""
    if config.path is not None:
        return _from_trace(config)
    rng = np.random.default_rng(config.seed)
    found: list[tuple[int, int]] = []
    for _ in range(100 + 10 * config.num_requests // STRATUM):
        prompts = _lengths(rng, config.prompt_shape, config.prompt_mean, config.prompt_cv)
        outputs = _lengths(rng, config.output_shape, config.output_mean, config.output_cv)
        fits = (prompts <= config.max_prompt) & (config.prefix_len + prompts + outputs <= config.max_total)
        found += zip(prompts[fits].tolist(), outputs[fits].tolist(), strict=True)
        if len(found) >= config.num_requests:
            break
    else:
        raise ConfigError("max_total", config.max_total, "rejects nearly every length of this workload")
    lengths = found[: config.num_requests]
    gaps = rng.exponential(1 / config.rate, len(lengths)) if config.arrival == "poisson" else np.zeros(len(lengths))
    arrivals = np.cumsum(gaps).tolist()
    if not config.num_prefixes:
        return [Request(time, *pair) for time, pair in zip(arrivals, lengths, strict=True)]
    prefixes = rng.integers(0, 1 << 30, (config.num_prefixes, config.prefix_len), dtype=np.int32)
    chosen = rng.integers(0, config.num_prefixes, len(lengths))
    result = []
    for time, (prompt_len, output_len), which in zip(arrivals, lengths, chosen.tolist(), strict=True):
        own = rng.integers(0, 1 << 30, prompt_len + output_len, dtype=np.int32)
        tokens = np.concatenate([prefixes[which], own[:prompt_len]])
        result.append(Request(time, len(tokens), output_len, tokens, own[prompt_len:]))
    return result


def _lengths(rng: np.random.Generator, shape: str, mean: float, cv: float) -> np.ndarray:
    """`STRATUM` integers of at least 1 with this mean and coefficient of variation before rounding: one in each of as many
    equal parts of probability, shuffled, so that a short workload has the stated lengths as well."""
    parts = (rng.permutation(STRATUM) + rng.uniform(1e-9, 1, STRATUM)) / STRATUM
    if cv < 1e-3:
        lengths = np.full(STRATUM, mean)
    elif shape == "gamma":
        lengths = stats.gamma.ppf(parts, 1 / cv**2, scale=mean * cv**2)
    else:
        variance = math.log1p(cv * cv)
        lengths = np.exp(stats.norm.ppf(parts, math.log(mean) - variance / 2, math.sqrt(variance)))
    return np.maximum(1, np.rint(lengths)).astype(int)


def _from_trace(config: WorkloadConfig) -> list[Request]:
    assert config.path is not None
    path = Path(config.path)
    if not path.is_file():
        raise ConfigError("workload.path", config.path, "must be a file")
    found = read_trace(path)[: config.num_requests]
    if config.arrival == "saturated":
        return [request._replace(arrival_s=0.0) for request in found]
    if config.arrival == "poisson":
        gaps = np.random.default_rng(config.seed).exponential(1 / config.rate, len(found))
        return [one._replace(arrival_s=time) for one, time in zip(found, np.cumsum(gaps).tolist(), strict=True)]
    return found


def read_trace(path: Path) -> list[Request]:
    """Every request of a CSV or JSONL trace, sorted by arrival, the first one at 0 s.

    Raises ConfigError naming the file, the line and the field of the first row that is malformed or truncated.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError("workload.path", str(path), f"is no text ({error})") from None
    rows = _json_rows(path, lines) if path.suffix in (".jsonl", ".json") else _csv_rows(path, lines)
    try:
        found = sorted(rows, key=lambda request: request.arrival_s)
    except csv.Error as error:
        raise ConfigError("workload.path", str(path), f"is no CSV ({error})") from None
    if not found:
        raise ConfigError("workload.path", str(path), "holds no request")
    return [request._replace(arrival_s=request.arrival_s - found[0].arrival_s) for request in found]


def _wrong(path: Path, line: int, field: str, value: object, legal: str) -> ConfigError:
    return ConfigError(f"{path}:{line}: {field}", value, legal)


def _length(path: Path, line: int, field: str, value: object, low: int) -> int:
    try:
        number = (
            int(value) if isinstance(value, str) and value.isascii() and value.strip().lstrip("-").isdigit() else value
        )
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= 1 << 24:
        raise _wrong(path, line, field, value, f"must be an integer in [{low}, {1 << 24}]")
    return number


def _seconds(path: Path, line: int, field: str, value: object) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        try:
            moment = datetime.datetime.fromisoformat(str(value))
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
        except ValueError:
            seconds = math.nan
    if not math.isfinite(seconds):
        raise _wrong(path, line, field, value, "must be a time in seconds or YYYY-MM-DD HH:MM:SS")
    return seconds


CSV_COLUMNS = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
)


def _csv_rows(path: Path, lines: list[str]) -> Iterator[Request]:
    rows = csv.reader(lines)
    header = [name.strip() for name in next(rows, [])]
    names = next((names for names in CSV_COLUMNS if set(names) <= set(header)), None)
    if names is None:
        legal = " or ".join(",".join(names) for names in CSV_COLUMNS)
        raise _wrong(path, 1, "header", ",".join(header), f"must have the columns {legal}")
    places = [header.index(name) for name in names]
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise _wrong(path, line, "row", ",".join(row), f"must have {len(header)} columns; is the file truncated?")
        time, prompt, output = (row[place] for place in places)
        arrival_s, prompt_len = _seconds(path, line, names[0], time), _length(path, line, names[1], prompt, 1)
        if output_len := _length(path, line, names[2], output, 0):  # traces record failed requests with no output
            yield Request(arrival_s, prompt_len, output_len)


def _json_rows(path: Path, lines: list[str]) -> Iterator[Request]:
    for line, content in enumerate(lines, 1):
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _wrong(path, line, "row", content[:60], f"must be JSON ({error}); is the file truncated?") from None
        if not isinstance(row, dict):
            raise _wrong(path, line, "row", content[:60], "must be a JSON object")
        for field in ("timestamp", "input_length", "output_length"):
            if field not in row:
                raise _wrong(path, line, field, None, "is missing")
        prompt_len = _length(path, line, "input_length", row["input_length"], 1)
        output_len = _length(path, line, "output_length", row["output_length"], 0)
        tokens = answer = None
        if (ids := row.get("hash_ids")) is not None:
            tokens = _expand(path, line, ids, prompt_len)
            answer = np.full(output_len, (1 << 30) + line, np.int32)  # nobody else's
        if output_len:
            yield Request(
                _seconds(path, line, "timestamp", row["timestamp"]) / 1e3, prompt_len, output_len, tokens, answer
            )


def _expand(path: Path, line: int, ids: object, prompt_len: int) -> np.ndarray:
    """Tokens that are equal where block ids are: each block repeats its id."""
    num_blocks = -(-prompt_len // MOONCAKE_BLOCK)
    if not isinstance(ids, list) or len(ids) != num_blocks:
        raise _wrong(path, line, "hash_ids", ids, f"must be a list of {num_blocks} ids for {prompt_len} tokens")
    for one in ids:
        _length(path, line, "hash_ids", one, 0)
    return np.repeat(np.array(ids, np.int32), MOONCAKE_BLOCK)[:prompt_len]
