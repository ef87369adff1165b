"""Generators by their moments, traces by their rows, and every way in which a trace can be wrong."""

import json
import tracemalloc

import numpy as np
import pytest

from kvlab.capacity.traces import read_trace
from kvlab.capacity.workload import WorkloadConfig, requests
from kvlab.compose import compose_capacity
from kvlab.schema import ConfigError

PUBLISHED = {  # means in and out
    "sharegpt": (161.31, 337.99),
    "alpaca": (19.31, 58.45),
    "azure_conv": (1154.7, 211.1),
    "azure_code": (2047.8, 27.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_generators_have_the_published_means(name):
    for seed in (0, 1):
        config = compose_capacity([f"workload={name}", "workload.num_requests=2000", f"workload.seed={seed}"]).workload
        asked = requests(config)
        means = np.mean([(r.prompt_len, r.output_len) for r in asked], axis=0)
        assert means == pytest.approx(PUBLISHED[name], rel=0.03)
        assert max(r.prompt_len for r in asked) <= config.max_prompt
        assert max(r.prompt_len + r.output_len for r in asked) <= config.max_total


def test_same_seed_same_requests_and_poisson_gaps():
    config = WorkloadConfig(arrival="poisson", rate=4.0, num_requests=3000)
    asked = requests(config)
    assert asked == requests(config)
    assert asked != requests(WorkloadConfig(arrival="poisson", rate=4.0, num_requests=3000, seed=1))
    gaps = np.diff([0.0, *(r.arrival_s for r in asked)])
    assert gaps.mean() == pytest.approx(0.25, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential
    assert {r.arrival_s for r in requests(WorkloadConfig(num_requests=5))} == {0.0}


def test_shared_prefixes_are_shared():
    config = WorkloadConfig(num_requests=50, num_prefixes=3, prefix_len=64, max_total=4096)
    asked = requests(config)
    heads = {tuple(r.tokens[:64].tolist()) for r in asked}
    assert len(heads) == 3
    assert all(len(r.tokens) == r.prompt_len and len(r.answer) == r.output_len for r in asked)
    assert len({tuple(r.tokens.tolist()) for r in asked}) == 50


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
)
PROCESSED = "arrived_at,num_prefill_tokens,num_decode_tokens\n4.3,396,109\n0.0,374,44\n9.0,5,0\n"
MOONCAKE = (
    '{"timestamp": 27000, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 30000, "input_length": 1100, "output_length": 26, "hash_ids": [46, 47, 5]}\n'
)


def test_traces_of_every_form(tmp_path):
    (tmp_path / "azure.csv").write_text(AZURE)
    first, second = read_trace(tmp_path / "azure.csv")
    assert (first.prompt_len, first.output_len, second.prompt_len) == (4808, 10, 3180)
    assert second.arrival_s == pytest.approx(0.052, abs=1e-5)
    (tmp_path / "processed.csv").write_text("\ufeff" + PROCESSED + "\n")
    asked = read_trace(tmp_path / "processed.csv")
    assert [(r.arrival_s, r.prompt_len, r.output_len) for r in asked] == [(0.0, 374, 44), (4.3, 396, 109)]
    (tmp_path / "mooncake.jsonl").write_text(MOONCAKE)
    first, second = read_trace(tmp_path / "mooncake.jsonl")
    assert second.arrival_s == 3.0
    assert (first.tokens[:512] == second.tokens[:512]).all()
    assert len(first.tokens) == 600
    assert not set(first.answer.tolist()) & set(second.answer.tolist())


def test_a_trace_takes_the_arrivals_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text(PROCESSED)
    path = str(tmp_path / "t.csv")
    times = {
        kind: [r.arrival_s for r in requests(WorkloadConfig(path=path, arrival=kind))]
        for kind in ("trace", "saturated")
    }
    assert times == {"trace": [0.0, 4.3], "saturated": [0.0, 0.0]}
    assert requests(WorkloadConfig(path=path, arrival="poisson"))[0].arrival_s > 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv:1: header = '': must have the columns TIMESTAMP"),
        ("a.csv", "time,in,out\n1,2,3\n", "a.csv:1: header = 'time,in,out'"),
        ("a.csv", PROCESSED + "10.0,37", "a.csv:5: row = '10.0,37': must have 3 columns; is the file truncated"),
        ("a.csv", PROCESSED + "10.0,-3,4\n", r"a.csv:5: num_prefill_tokens = '-3': must be an integer in \[1"),
        ("a.csv", PROCESSED + "10.0,0,4\n", "a.csv:5: num_prefill_tokens = '0'"),
        ("a.csv", PROCESSED + "10.0,3.5,4\n", "num_prefill_tokens = '3.5'"),
        ("a.csv", PROCESSED + "soon,3,4\n", "arrived_at = 'soon': must be a time in seconds"),
        ("a.csv", PROCESSED + "nan,3,4\n", "arrived_at = 'nan'"),
        ("a.csv", PROCESSED.splitlines()[0] + "\n", "holds no request"),
        ("a.jsonl", MOONCAKE[:-20], "a.jsonl:2: row = .*must be JSON.*is the file truncated"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: row = '\[1\]': must be a JSON object"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 3}\n', "a.jsonl:1: output_length = None: is missing"),
        ("a.jsonl", '{"timestamp": 1, "input_length": true, "output_length": 3}\n', "input_length = True"),
        (
            "a.jsonl",
            json.dumps({"timestamp": 1, "input_length": 600, "output_length": 3, "hash_ids": [1]}),
            "must be a list of 2 ids for 600",
        ),
        (
            "a.jsonl",
            json.dumps({"timestamp": 1, "input_length": 6, "output_length": 3, "hash_ids": [-1]}),
            r"hash_ids = \[-1\]: must be a list, each an integer in \[0",
        ),
        ("a.jsonl", "\x00\x01", "must be JSON"),
        ("a.jsonl", "[" * 100_000, "must be JSON"),
        ("a.jsonl", '{"timestamp": ' + "9" * 400 + ', "input_length": 3, "output_length": 3}', "timestamp = 999"),
        ("a.jsonl", '{"timestamp": false, "input_length": 3, "output_length": 3}', "timestamp = False"),
        ("a.csv", PROCESSED + "10.0,1_0,4\n", "num_prefill_tokens = '1_0'"),
        ("a.csv", PROCESSED + "10.0,-1,0\n", "num_prefill_tokens = '-1'"),
        ("a.csv", PROCESSED + "1" * 200_000 + ",3,4\n", "is no CSV|must be a time"),
    ],
)
def test_malformed_traces_name_file_line_and_field(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / name)


def test_of_a_long_trace_no_more_is_held_than_is_asked_for(tmp_path):
    arrivals = [(7919 * place) % 20_011 for place in range(20_000)]
    lines = ["arrived_at,num_prefill_tokens,num_decode_tokens", *(f"{arrival},3,4" for arrival in arrivals)]
    (tmp_path / "long.csv").write_text("\n".join(lines) + "\n\n")
    tracemalloc.start()
    found = read_trace(tmp_path / "long.csv", 10)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    first = sorted(arrivals)[:10]
    assert [request.arrival_s for request in found] == [arrival - first[0] for arrival in first]
    assert peak_bytes < 2**20  # the file has 200 KB, its requests have 3 MB


def test_binary_and_missing_traces(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no text"):
        read_trace(tmp_path / "b.csv")
    with pytest.raises(ConfigError, match=r"workload.path = '/nowhere.csv': must be a file"):
        requests(WorkloadConfig(path="/nowhere.csv"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arrival": "trace"}, "path = None: must name a trace"),
        ({"rate": 0.0}, "rate = 0.0"),
        ({"rate": -1.0}, "rate = -1.0"),
        ({"num_requests": 0}, "num_requests = 0"),
        ({"max_prompt": 2048}, "max_prompt = 2048: must be below max_total"),
        ({"prefix_len": 5}, "prefix_len = 5: must be positive iff num_prefixes"),
        ({"num_prefixes": 2, "prefix_len": 1024}, "prefix_len = 1024: must leave room"),
        ({"prompt_mean": 5000.0}, "prompt_mean = 5000.0: must be at most 1024"),
        ({"output_shape": "normal"}, "output_shape = 'normal'"),
    ],
)
def test_bad_workloads_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        WorkloadConfig(**fields)
