"""vLLM's block manager under the steps of `ledger.py`, driven by the calls of its scheduler for a running request.

Runs in an environment of its own (make peers-ledger): the wheel's pure Python, no device. Prints one line of JSON.
"""

import gc
import json
import os
import random
import statistics
import sys
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

PAGE, STEPS = 16, 64


def steps(num_sequences: int, num_tokens: int, prefix_caching: bool) -> dict[str, float]:
    """Milliseconds of a step and of a prompt."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.worker.block_table import BlockTable

    most = num_tokens + STEPS + 2
    table_len = -(-most // PAGE)
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    config = KVCacheConfig(
        num_blocks=1 + (num_sequences + 2) * table_len,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    manager = KVCacheManager(
        config, max_model_len=most, scheduler_block_size=PAGE, hash_block_size=PAGE, enable_caching=prefix_caching
    )
    table = BlockTable(PAGE, num_sequences, table_len, num_sequences, False, torch.device("cpu"), 1)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(PAGE, sha256) if prefix_caching else None
    sampling = SamplingParams(max_tokens=STEPS + 16, ignore_eos=True)
    rng = random.Random(0)
    prompts = [rng.choices(range(32_000), k=num_tokens - i % PAGE) for i in range(num_sequences)]
    requests = []
    began = time.perf_counter()
    for row, prompt in enumerate(prompts):
        request = Request(f"r{row}", prompt, sampling, None, block_hasher=hasher)
        blocks, hit, _ = manager.get_computed_blocks(request)
        assert manager.allocate_slots(request, request.num_tokens - hit, hit, blocks) is not None
        request.status, request.num_computed_tokens = RequestStatus.RUNNING, request.num_tokens
        requests.append(request)
    fill = (time.perf_counter() - began) / num_sequences * 1e3
    for row, request in enumerate(requests):
        table.add_row(manager.get_block_ids(request.request_id)[0], row)
        request.append_output_token_ids(7)
    manage, tables = [], []
    gc.collect()
    gc.freeze()
    for _ in range(STEPS):
        start = time.perf_counter()
        manager.new_step_starts()
        given = [manager.allocate_slots(request, 1) for request in requests]
        allocated = time.perf_counter()
        for row, blocks in enumerate(given):
            if (ids := blocks.get_block_ids(allow_none=True)) is not None:
                table.append_row(ids[0], row)
        listed = time.perf_counter()
        for request in requests:
            request.num_computed_tokens += 1
            request.append_output_token_ids(7)
        manage.append(time.perf_counter() - listed + allocated - start)
        tables.append(listed - allocated)
    lookups = []
    for _ in range(9 if prefix_caching else 0):
        start = time.perf_counter()
        again = Request("again", prompts[0], sampling, None, block_hasher=hasher)
        assert manager.get_computed_blocks(again)[1] == (len(prompts[0]) - 1) // PAGE * PAGE
        lookups.append(time.perf_counter() - start)
    found = {"manage_ms": statistics.median(manage) * 1e3, "tables_ms": statistics.median(tables) * 1e3}
    found |= {"slowest_ms": statistics.median(sorted(manage)[-4:]) * 1e3, "prompt_ms": fill}
    return found | ({"lookup_ms": statistics.median(lookups) * 1e3} if lookups else {})


if __name__ == "__main__":
    sequences, tokens, caching = (int(value) for value in sys.argv[1:])
    print(json.dumps(steps(sequences, tokens, bool(caching))))
