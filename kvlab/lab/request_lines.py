"""Requests and answers as lines of JSON: one request, or one answer with all its completions, a line."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvlab.engine.requests import Answer
from kvlab.engine.sampling import Sampling
from kvlab.schema import Schema, integer, integer_type, list_type


@dataclass(frozen=True)
class RequestLine(Schema):
    """A line: text or token ids, fields of `Sampling` where it differs, and what `Engine.submit` may be asked
    beside."""

    prompt: str | tuple[int, ...] = field(metadata={"type": str | list_type(integer_type(-(1 << 62), 1 << 62))})
    sampling: dict[str, Any] | None = None
    name: str | None = None
    priority: int | None = integer(None, -(1 << 62), 1 << 62, optional=True)
    namespace: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What was given beside prompt and sampling."""
        given = {"name": self.name, "priority": self.priority, "namespace": self.namespace}
        return {name: value for name, value in given.items() if value is not None}


class Asked(NamedTuple):
    """One request, as `Engine.submit` takes it."""

    prompt: Any
    sampling: Sampling
    options: dict[str, Any]


def read_requests(lines: Iterable[str], sampling: Sampling) -> Iterator[Asked]:
    """Requests of a JSONL stream, each a `RequestLine`; the sampling's other fields as given. Raises ValueError
    naming the line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, Mapping) or "prompt" not in values:
                raise ValueError('must be an object with "prompt"')
            request = RequestLine.build(values)
            own = Sampling.build({**sampling_values(sampling), **(request.sampling or {})}, "sampling")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        yield Asked(prompt, own, request.options)


def sampling_values(sampling: Sampling) -> dict[str, Any]:
    """A sampling as plain values."""
    return {name: getattr(sampling, name) for name in Sampling.defaults()}


def as_line(answer: Answer) -> str:
    """An answer as one line of JSON; what is not finite is null."""
    completions = [
        {
            "text": completion.text,
            "tokens": completion.tokens,
            "logprobs": [_rounded(value) for value in completion.logprobs],
            "finish_reason": completion.finish_reason,
            **({} if completion.score is None else {"score": completion.score}),
            **(
                {
                    "alternatives": [
                        [(token, _rounded(lp)) for token, lp in zip(*a, strict=True)] for a in completion.alternatives
                    ]
                }
                if completion.alternatives
                else {}
            ),
        }
        for completion in answer.completions
    ]
    line = {"name": answer.name, "prompt": answer.prompt, "completions": completions, "error": answer.error}
    return json.dumps(line, allow_nan=False)


def _rounded(logprob: float) -> float | None:
    return round(logprob, 6) if math.isfinite(logprob) else None
