"""transformers beside the pieces of `gpu_pieces.py`: the same weights, prompts and number of tokens, on the same
device.

    python -m benchmarks.gpu_peer decode|requests MODEL --size full --scratch FOLDER

torch runs in a process of its own (`engine_peer.py`): by this interpreter, or by that of `make peers` if there is one.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.answers import say, spread
from benchmarks.engine_setup import PEER_PYTHON, Peer
from benchmarks.gpu_pieces import SIZES, Size, batches_of, ragged

WAYS = {
    "manager": "its manager, set up once, each request with its own bound",
    "grouped": "a call of generate_batch for each length of answer, its set-up included",
}


def missing() -> str | None:
    """Why there is no peer here; None: there is one."""
    if PEER_PYTHON.exists():
        return None
    absent = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def peer_of(name: str, size: str, scratch: Path) -> Peer:
    """transformers with the weights that kvlab's piece left. Raises FileNotFoundError where it left none."""
    folder = scratch / f"{size}-{name}"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: no weights; kvlab's piece writes them, and did not come so far")
    python = PEER_PYTHON if PEER_PYTHON.exists() else Path(sys.executable)
    threads = len(os.sched_getaffinity(0))
    dtype = "float32" if name.endswith("float32") else "bfloat16"
    return Peer(str(folder), threads, device="auto", dtype=dtype, python=python, errors=None)


def leading_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """How much of the answers is equal up to each row's first difference: a row that differs goes on from another
    text."""
    shares = []
    for mine, other in zip(ours, theirs, strict=True):
        first = next((place for place, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]), None)
        shares.append(1.0 if first is None else first / len(mine))
    return statistics.fmean(shares)


def decode(name: str, size: Size, scratch: Path, peer: Peer) -> None:
    """`generate`'s decode step: a long answer less a short one, by batch."""
    batches: dict[str, Any] = {}
    for batch in batches_of(size, name):
        asked = {"lengths": [size.prompt_len] * batch, "num_new": size.num_new}
        said = [peer("decode", **asked) for _ in range(size.rounds)][1:]
        samples = [answer["step_s"] for answer in said]
        step = statistics.median(samples)
        batches[str(batch)] = {"step_ms": spread(samples, 1e3), "tokens_per_s": batch / step}
        tokens = scratch / f"tokens-{name}-{batch}.json"
        if tokens.exists():
            share = leading_share(json.loads(tokens.read_text()), said[-1]["tokens"])
            batches[str(batch)]["share_of_tokens_equal_to_ours"] = share
        say(by="transformers generate", versions=peer.versions, model=name, batches=batches)


def requests(name: str, size: Size, scratch: Path, peer: Peer) -> None:
    """The ragged requests, by continuous batching; tokens count as far as they were asked for."""
    del scratch
    lengths, new = ragged(size)
    total, page_size = sum(new), size.page_size
    num_pages = 2 * len(new) + sum(a + b for a, b in zip(lengths, new, strict=True)) // page_size
    fields = {"max_batch_tokens": 4 * size.chunk_len, "page_size": page_size, "num_pages": num_pages}
    ways: dict[str, Any] = {}
    for way, what in WAYS.items():
        passes = size.rounds + 1 if way == "manager" else 1
        samples = peer("batch", lengths=lengths, num_new=new, way=way, passes=passes, **fields)["samples"]
        samples = samples[1:] or samples  # the first sets up
        ways[way] = {"what": what, "seconds": spread(samples), "tokens_per_s": total / statistics.median(samples)}
        say(by="transformers continuous batching", versions=peer.versions, model=name, tokens=total, ways=ways)


def main() -> None:
    """One piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("decode", "requests"))
    parser.add_argument("name")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    if reason := missing():
        return say(by="transformers", model=options.name, missing=reason)
    peer = peer_of(options.name, options.size, options.scratch)
    run = decode if options.kind == "decode" else requests
    run(options.name, SIZES[options.size], options.scratch, peer)
    peer.process.terminate()
    return None


if __name__ == "__main__":
    sys.exit(main())
