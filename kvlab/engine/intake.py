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
from kvlab.schema import ConfigError
from kvlab.tokenizers import Tokenizer
from kvlab.units import counted


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
        sampling = sampling or Sampling()
        ids = self._encoded(prompt)
        self._check_ids(ids)
        self._check_lengths(len(ids), sampling, ledger)
        self._check_budget(len(ids))
        self._check_sampling(sampling)
        if name is None:
            name = self._free_name(taken)
        elif not isinstance(name, str) or name in taken:
            raise ValueError(f"name = {name!r}: {'is in use' if isinstance(name, str) else 'must be a string'}")
        if type(priority) is not int:
            raise ValueError(f"priority = {priority!r}: must be an integer")
        if not isinstance(namespace, str):
            raise ValueError(f"namespace = {namespace!r}: must be a string")
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
        if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, str | bytes):
            return list(prompt)
        if not isinstance(prompt, str):
            raise ValueError(f"prompt = {prompt!r}: must be text or a list of token ids")
        if self.tokenizer is None:
            raise ValueError("prompt: is text, and the engine has no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    def _check_ids(self, ids: list[Any]) -> None:
        if not ids:
            raise ValueError("prompt = []: must have at least one token")
        wrong = [token for token in ids if not isinstance(token, int | np.integer) or isinstance(token, bool)]
        if wrong:
            raise ValueError(f"prompt: token {wrong[0]!r}: must be an integer")
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"prompt: token {outside[0]}: must be in [0, {self.vocab_size})")

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
            raise ValueError(f"stop = {list(sampling.stop)}: stop strings need a tokenizer")
        if beam_width > max_batch:
            raise ValueError(f"beam_width = {beam_width}: must be at most max_batch = {max_batch}")
        if beam_width and self.memory.name != "paged":
            raise ValueError(f"beam_width = {beam_width}: beams need memory=paged, which can be shared")
        most = self.vocab_size // 2 if beam_width else self.vocab_size
        for field_name, value in (("num_logprobs", sampling.num_logprobs), ("beam_width", beam_width)):
            if value > most:
                raise ValueError(f"{field_name} = {value}: must be at most {most} of a vocabulary of {self.vocab_size}")


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
