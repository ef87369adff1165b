"""Requests and answers as lines of JSON: one request, or one answer with all its completions, a line."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvlab.engine.intake import MAX_NAME
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


class Line(NamedTuple):
    """A request with the number of its line, or the reason why there is none."""

    number: int
    asked: Asked | str
    name: str
    """The request's own, or one that says which line it is."""

    def refused(self, reason: object) -> Answer:
        """The answer to a line that is no request, or one that cannot be answered."""
        return Answer(self.name, [], [], f"line {self.number}: {reason}")


def read_requests(lines: Iterable[str], sampling: Sampling) -> Iterator[Line]:
    """Requests of a JSONL stream, each a `RequestLine`; the sampling's other fields as given. A bad line spoils no
    other."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name: object = None
        try:
            values = json.loads(line)
            name = values.get("name") if isinstance(values, Mapping) else None
            asked = _request(values, sampling)
        except (ValueError, RecursionError) as error:
            asked = str(error)
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME):
            name = f"line-{number}"
        yield Line(number, asked, name)


def _request(values: object, sampling: Sampling) -> Asked:
    if not isinstance(values, Mapping) or "prompt" not in values:
        raise ValueError('must be an object with "prompt"')
    request = RequestLine.build(values)
    own = Sampling.build({**sampling_values(sampling), **(request.sampling or {})}, "sampling")
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    return Asked(prompt, own, request.options)


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
