"""transformers under the work of `engine.py`, in an environment of its own (make peers). Reads one JSON command a line,
prints one answer.

python engine_peer.py FOLDER THREADS cpu|cuda|auto float32|bfloat16
"""

import dataclasses
import json
import logging
import sys
import time

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PAGE_FIELD = next(
    field.name for field in dataclasses.fields(ContinuousBatchingConfig) if field.name in ("page_size", "block_size")
)
"""Its name before and since transformers 5.2x."""


def prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """The prompts of `engine.py`."""
    return [np.random.default_rng([7, i, n]).integers(0, vocab_size, n).tolist() for i, n in enumerate(lengths)]


def decode(model, lengths: list[int], num_new: int) -> dict:
    """Seconds of one decode step: a long answer less a short one; and every row's tokens."""
    ids = torch.tensor(prompts(lengths, model.config.vocab_size), device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def run(count: int) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options).cpu()  # waits for a GPU
        return time.perf_counter() - began, out

    short, _ = run(1)
    long, out = run(num_new + 1)
    return {"prefill_s": short, "step_s": (long - short) / num_new, "tokens": out[:, ids.shape[1] :].tolist()}


def batch(
    model,
    lengths: list[int],
    num_new: list[int],
    max_batch_tokens: int,
    way: str,
    page_size: int = 16,
    num_pages: int = 2048,
    passes: int = 1,
) -> dict:
    """Seconds for ragged requests through continuous batching.

    `generate_batch` takes one bound for all its requests. "whole" is one call, in which each gets the longest answer
    asked for. "grouped" is a call for every length of answer. "manager" hands each request with its own bound to what
    lies beneath, all of them `passes` times over, so that what is set up at first counts once."""
    asked = prompts(lengths, model.config.vocab_size)

    def configs(count: int) -> dict:
        return {
            "generation_config": GenerationConfig(
                max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
            "continuous_batching_config": ContinuousBatchingConfig(
                **{PAGE_FIELD: page_size},
                num_blocks=num_pages,
                max_batch_tokens=max_batch_tokens,
                allow_block_sharing=False,
            ),
        }

    began, longest, samples = time.perf_counter(), max(num_new), []
    if way == "manager":
        manager = model.init_continuous_batching(**configs(longest))
        manager.start()
        for _ in range(passes):
            out = all_of(manager, asked, num_new)
            samples.append(time.perf_counter() - began)
            began = time.perf_counter()
        manager.stop(block=True)
        total = sum(num_new)
    else:
        bounds = [longest] * len(lengths) if way == "whole" else num_new
        out = []
        for count in sorted(set(bounds)):
            chosen = [n for n, bound in zip(lengths, bounds, strict=True) if bound == count]
            out += model.generate_batch(prompts(chosen, model.config.vocab_size), **configs(count)).values()
        samples.append(time.perf_counter() - began)
        total = sum(bounds)
    wrong = [result.error for result in out if result.error]
    if wrong or sum(len(result.generated_tokens) for result in out) != total:
        raise RuntimeError(f"continuous batching failed: {wrong[:1]}")
    return {"seconds": samples[-1], "samples": samples}


def all_of(manager, asked: list[list[int]], num_new: list[int]) -> list:
    """The results of all requests, each with its own bound."""
    for ids, count in zip(asked, num_new, strict=True):
        manager.add_request(ids, max_new_tokens=count)
    out = []
    while len(out) < len(asked):
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            out.append(result)
    return out


def main() -> None:
    folder, threads, device, dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"torch_device": device}), flush=True)
    commands = {"decode": decode, "batch": batch}
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("run")](model, **command)), flush=True)


if __name__ == "__main__":
    main()
