"""transformers under the work of `engine.py`, in an environment of its own (make peers): one JSON command a line, one answer."""

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


def prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """The prompts of `engine.py`."""
    return [np.random.default_rng([7, i, n]).integers(0, vocab_size, n).tolist() for i, n in enumerate(lengths)]


def decode(model, lengths: list[int], num_new: int) -> dict:
    """Seconds of one decode step: a long answer less a short one; and the first row's tokens."""
    ids = torch.tensor(prompts(lengths, model.config.vocab_size))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def run(count: int) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        return time.perf_counter() - began, out

    short, _ = run(1)
    long, out = run(num_new + 1)
    return {"prefill_s": short, "step_s": (long - short) / num_new, "tokens": out[0, ids.shape[1] :].tolist()}


def batch(model, lengths: list[int], num_new: list[int], max_batch_tokens: int) -> dict:
    """Seconds for ragged requests through continuous batching. Every request gets the longest answer asked for, since
    the call takes one bound; only the tokens asked for count."""
    total = 0.0
    for count in sorted(set(num_new)):
        chosen = [n for n, new in zip(lengths, num_new, strict=True) if new == count]
        began = time.perf_counter()
        out = model.generate_batch(
            prompts(chosen, model.config.vocab_size),
            generation_config=GenerationConfig(
                max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=16, num_blocks=2048, max_batch_tokens=max_batch_tokens, allow_block_sharing=False
            ),
        )
        total += time.perf_counter() - began
        wrong = [one.error for one in out.values() if one.error or len(one.generated_tokens) != count]
        if wrong:
            raise RuntimeError(f"generate_batch failed: {wrong[0]}")
    return {"seconds": total}


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    commands = {"decode": decode, "batch": batch}
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("run")](model, **command)), flush=True)


if __name__ == "__main__":
    main()
