"""Engines whose device is a few lines of Python: what a sequence draws is a hash of what came before. So a thousand
steps take a second, and every ledger, scheduler and book is the real one."""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.runner import Batch, Fetched, Launched, Runner
from kvlab.engine.sampling import Choices, Drawn, Mode
from kvlab.memory.layout import MemoryConfig
from kvlab.tokenizers import Tokenizer
from tests.engine.bytes_model import build_bytes

VOCAB, MAX_LEN = 256, 48


@functools.cache
def model():
    """Whose states the layouts are of; it never runs."""
    return build_bytes()


def said(prefix: Sequence[int], num: int) -> list[tuple[int, float]]:
    """The most likely tokens behind a prefix with their log-probabilities, best first."""
    begin = zlib.crc32(np.asarray(prefix, np.int32).tobytes())
    return [((begin + 37 * rank) % VOCAB, -0.5 - rank - (begin >> 8) % 7 / 8) for rank in range(num)]


class FakeRunner(Runner):
    """Plans as the real one, and draws by `said`."""

    def prepare(self, before):
        pass

    def launch(self, ledger, group, behind=None):
        samples: list[Any] = [part.entry for part in group.work]
        ledger.plan([sample.name for sample in samples], len(samples), group.width)
        mode = Mode.of([sample.request.sampling for sample in samples])
        num_top = max(1, mode.num_logprobs)
        places = group.width if group.everywhere else 1
        drawn = np.zeros((len(samples), places, num_top)), np.zeros((len(samples), places, num_top))
        fed = {} if behind is None else dict(zip(behind.batch.samples, behind.drawn.tokens[:, 0], strict=True))
        for row, (sample, num_new, lookahead) in enumerate(group.work):
            known = [*sample.ids, int(fed[sample])] if sample in fed else [*sample.ids, *sample.draft_ids]
            for place in range(places):
                end = sample.num_computed + (place + 1 if group.everywhere else num_new)
                if end <= sample.num_computed + num_new + lookahead:
                    top = said(known[:end], num_top)
                    drawn[0][row, place], drawn[1][row, place] = zip(*top, strict=True)
        self.stats.launches += 1
        tokens, logprobs = drawn[0].astype(np.int32), drawn[1]
        is_plain = all(not sample.request.sampling.reports_more for sample in samples)
        batch = Batch(samples, Choices(*[None] * 6), mode, is_plain)
        told = Drawn(tokens[:, :, 0], logprobs[:, :, 0], tokens[:, :, : mode.num_logprobs], logprobs)
        return Launched(group, batch, told, np.ones(len(samples), bool), behind is not None, [False] * len(samples))

    def fetch(self, launched):
        return [Fetched(each.drawn, each.finite) for each in launched]


def deviceless(*, page_size: int = 4, chunk_len: int = 8, tokenizer: Tokenizer | None = None, **fields: Any) -> Engine:
    """An engine over bytes that computes nothing."""
    config = EngineConfig(**{"max_batch": 4, "max_len": MAX_LEN, **fields})
    engine = Engine(model(), memory=MemoryConfig("paged", page_size, chunk_len), config=config, tokenizer=tokenizer)
    engine.runner = FakeRunner(model(), engine.layout, config, engine.stats)
    return engine
