"""What may be asked of an engine: prompts and settings, checked before anything of them is queued."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from kvlab.compression.budget import Budget
from kvlab.engine.config import EngineConfig
from kvlab.engine.requests import Request
from kvlab.engine.sampling import Sampling
from kvlab.ledger.ledger import Ledger
from kvlab.memory.config import MemoryConfig
from kvlab.schema import ConfigError, shown
from kvlab.tokenizers import Tokenizer
from kvlab.units import counted

MAX_NAME = 256
"""Characters of a request's name, and of a namespace."""


class Intake:
    """Makes requests of what callers ask. Raises ValueError with the field, the value and what is legal."""

    def __init__(self, config: EngineConfig, memory: MemoryConfig, vocab_size: int, tokenizer: Tokenizer | None):
        self.config, self.memory, self.vocab_size, self.tokenizer = config, memory, vocab_size, tokenizer
        self._num_submitted = 0

    def request(
        self,
        prompt: Sequence[int] | str,
        sampling: Sampling | None,
        *,
        name: str | None,
        priority: int,
        namespace: str,
        ledger: Ledger,
        taken: Collection[str],
    ) -> Request:
        """A request that can be answered; its name is none of those `taken`."""
        if not isinstance(sampling, Sampling | None):
            raise ConfigError("sampling", sampling, "must be a Sampling, or None")
        sampling = sampling or Sampling()
        ids = self._encoded(prompt)
        self._check_ids(ids)
        self._check_lengths(len(ids), sampling, ledger)
        self._check_budget(len(ids))
        self._check_sampling(sampling)
        if name is None:
            name = self._free_name(taken)
        else:
            _check_name(name, taken)
        if type(priority) is not int:
            raise ConfigError("priority", priority, "must be an integer")
        if not isinstance(namespace, str) or len(namespace) > MAX_NAME or not _is_unicode(namespace):
            legal = f"must be a string of at most {MAX_NAME} characters that UTF-8 can write"
            raise ConfigError("namespace", namespace, legal)
        seed = sampling.seed
        if seed is None:
            seed = int(np.random.default_rng([self.config.seed, self._num_submitted]).integers(2**31))
        self._num_submitted += 1
        return Request(name, [int(token) for token in ids], sampling, seed, priority, namespace)

    def _free_name(self, taken: Collection[str]) -> str:
        number = self._num_submitted
        while (name := f"request-{number}") in taken:
            number += 1
        return name

    def _encoded(self, prompt: Sequence[int] | str) -> list[Any]:
        listed = prompt.ndim == 1 if isinstance(prompt, np.ndarray) else isinstance(prompt, Sequence)
        if listed and not isinstance(prompt, str | bytes):
            return list(prompt)
        if not isinstance(prompt, str):
            raise ConfigError("prompt", prompt, "must be text or a list of token ids")
        if self.tokenizer is None:
            raise ValueError("prompt: is text, and the engine has no tokenizer; give token ids")
        if not _is_unicode(prompt):
            raise ConfigError("prompt", prompt, "must be text that UTF-8 can write: it has half of a surrogate pair")
        return self.tokenizer.encode(prompt)

    def _check_ids(self, ids: list[Any]) -> None:
        if not ids:
            raise ValueError("prompt = []: must have at least one token")
        wrong = [token for token in ids if not isinstance(token, int | np.integer) or isinstance(token, bool)]
        if wrong:
            raise ValueError(f"prompt: token {shown(wrong[0])}: must be an integer")
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            said = outside[0] if abs(outside[0]) < 1 << 64 else "of more than 64 bits"
            raise ValueError(f"prompt: token {said}: must be in [0, {self.vocab_size})")

    def _check_lengths(self, prompt_len: int, sampling: Sampling, ledger: Ledger) -> None:
        longest = self.config.max_len - prompt_len + 1
        if sampling.max_tokens > longest:
            if longest < 1:
                legal = f"must be at most max_len = {self.config.max_len}"
                raise ValueError(f"prompt: {counted(prompt_len, 'token')}: {legal}")
            legal = f"must be in [1, {longest}], since prompt and answer share max_len = {self.config.max_len}"
            raise ValueError(f"max_tokens = {sampling.max_tokens}: {legal}")
        if never := ledger.never(prompt_len + sampling.max_tokens - 1, prompt_len):
            asked = f"prompt: {counted(prompt_len, 'token')} and max_tokens = {sampling.max_tokens}"
            raise ValueError(f"{asked}: {never.reason}")

    def _check_budget(self, prompt_len: int) -> None:
        """Raises ConfigError for a fraction of the prompt that is less than what is protected: more would be kept than
        was asked for."""
        method, budget = self.memory.compression, self.memory.budget
        if method is None or budget is None or (fraction := Budget.of(budget).fraction) is None:
            return
        if legal := method.too_short(fraction, {"of this prompt": prompt_len}):
            raise ConfigError("memory.budget", budget, legal)

    def _check_sampling(self, sampling: Sampling) -> None:
        beam_width, max_batch = sampling.beam_width or 0, self.config.max_batch
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("stop", list(sampling.stop), "stop strings need a tokenizer")
        if beam_width > max_batch:
            raise ValueError(f"beam_width = {beam_width}: must be at most max_batch = {max_batch}")
        if beam_width and self.memory.name != "paged":
            raise ValueError(f"beam_width = {beam_width}: beams need memory=paged, which can be shared")
        most = self.vocab_size // 2 if beam_width else self.vocab_size
        for field_name, value in (("num_logprobs", sampling.num_logprobs), ("beam_width", beam_width)):
            if value > most:
                raise ValueError(f"{field_name} = {value}: must be at most {most} of a vocabulary of {self.vocab_size}")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can write a text: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_name(name: Any, taken: Collection[str]) -> None:
    """Raises ConfigError for what cannot name a request beside those `taken`, or be shown on a terminal."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ConfigError("name", name, f"must be a string of 1 to {MAX_NAME} printable characters")
    if name in taken:
        raise ConfigError("name", name, "is in use")


def each_sampling(
    prompts: Sequence[Any], sampling: Sampling | Sequence[Sampling] | None
) -> list[tuple[Any, Sampling | None]]:
    """Every prompt with its sampling. Raises ValueError for a single prompt, and for counts that differ."""
    each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        raise ValueError("prompts: must be a list of prompts; put a single one into a list")
    if len(each) != len(prompts):
        given = f"{len(each)} of them for {counted(len(prompts), 'prompt')}"
        raise ValueError(f"sampling: {given}: must be one, or one for each")
    return list(zip(prompts, each, strict=True))
