"""Who asks for what: request lengths and arrivals, from seeded generators or from recorded traces."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import gammaincinv, ndtri

from kvlab.capacity.traces import Request, read_trace
from kvlab.schema import ConfigError, Schema, choice, integer, real, text

STRATUM = 128
SHAPES = ("lognormal", "gamma")


@dataclass(frozen=True)
class WorkloadConfig(Schema):
    """Lengths are log-normal, or gamma distributed, with these means and coefficients of variation before values
    beyond the maxima are rejected; or they come from a trace (`path`). Arrivals: "poisson" at `rate` a second,
    "saturated" (all are waiting from the start) or "trace". `num_prefixes` > 0 puts one of so many shared prefixes of
    `prefix_len` tokens before each prompt."""

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
    """`STRATUM` integers of at least 1 with this mean and coefficient of variation before rounding: one in each of as
    many equal parts of probability, shuffled, so that a short workload has the stated lengths as well."""
    parts = (rng.permutation(STRATUM) + rng.uniform(1e-9, 1, STRATUM)) / STRATUM
    if cv < 1e-3:
        lengths = np.full(STRATUM, mean)
    elif shape == "gamma":
        lengths = gammaincinv(1 / cv**2, parts) * (mean * cv**2)
    else:
        variance = math.log1p(cv * cv)
        lengths = np.exp(ndtri(parts) * math.sqrt(variance) + math.log(mean) - variance / 2)
    return np.maximum(1, np.rint(lengths)).astype(int)


def _from_trace(config: WorkloadConfig) -> list[Request]:
    assert config.path is not None
    path = Path(config.path)
    if not path.is_file():
        raise ConfigError("workload.path", config.path, "must be a file")
    found = read_trace(path, config.num_requests)
    if config.arrival == "saturated":
        return [request._replace(arrival_s=0.0) for request in found]
    if config.arrival == "poisson":
        gaps = np.random.default_rng(config.seed).exponential(1 / config.rate, len(found))
        return [request._replace(arrival_s=time) for request, time in zip(found, np.cumsum(gaps).tolist(), strict=True)]
    return found
