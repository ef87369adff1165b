"""Tile sizes: what a search takes, where it is remembered, and that kernels are called with it."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tiles
from pallas_kernels.bench import clock, tuning
from pallas_kernels.bench.inputs import bucket_of, make_inputs
from pallas_kernels.bench.problems import PROBLEMS
from pallas_kernels.paged_attention import Lists, api, paged_attention

BUCKET = tiles.bucket("paged_attention", "bfloat16", "", (128, 128), 4, 64, (3, 1, 4096))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_TILES", str(tmp_path / "deep" / "tiles.json"))
    return tiles.cache_path()


def test_sizes_share_a_bucket_up_to_the_next_power_of_two():
    of = lambda *sizes: tiles.bucket("paged_attention", "int8", "token", (64, 64), 1, 64, sizes)  # noqa: E731
    assert of(3, 1, 4000) == of(4, 1, 4096) != of(5, 1, 4096)
    assert "int8 by token" in of(1, 1, 1)


def test_what_is_found_is_remembered_for_this_device_and_jax(cache):
    assert tiles.lookup("blocked", BUCKET) == {}
    tuning.remember(cache, "blocked", BUCKET, {"block_len": 128})
    tuning.remember(cache, "blocked", "another", {"block_len": 512})
    assert tiles.lookup("blocked", BUCKET) == {"block_len": 128}
    assert tiles.lookup("mosaic_gpu", BUCKET) == {}
    found = json.loads(cache.read_text())
    assert list(found[jax.devices()[0].device_kind]) == [jax.__version__]
    tuning.remember(cache, "blocked", BUCKET, {})
    assert tiles.lookup("blocked", BUCKET) == {}
    assert tiles.lookup("blocked", "another") == {"block_len": 512}


def test_what_is_committed_holds_for_any_jax_and_gives_way_to_what_was_found_here(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "COMMITTED", tmp_path / "committed.json")
    tuning.remember(tiles.COMMITTED, "blocked", BUCKET, {"block_len": 512}, "any")
    assert tiles.lookup("blocked", BUCKET) == {"block_len": 512}
    tuning.remember(cache, "blocked", BUCKET, {"block_len": 128})
    assert tiles.lookup("blocked", BUCKET) == {"block_len": 128}


def test_the_committed_file_can_be_read():
    assert isinstance(tiles.choices(tiles.COMMITTED), dict)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cpu": {"any": {"blocked": {"b": {"depth": 3}}}}}',
        '{"cpu": {"any": {"blocked": {"b": {"block_len": 0}}}}}',
    ],
)
def test_a_file_that_is_none_is_named(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    said = r"deep/tiles.json: not a file of tile sizes .*delete it, or set PALLAS_KERNELS_TILES"
    with pytest.warns(UserWarning, match=said):
        assert tiles.lookup("blocked", BUCKET) == {}


@pytest.mark.parametrize(
    ("implementation", "sizes", "message"),
    [
        ("blocked", {"foo": 3}, "must be positive whole numbers for block_len"),
        ("blocked", {"block_len": 0}, "must be positive whole numbers for block_len"),
        ("reference", {"block_len": 16}, "of reference: it has none"),
    ],
)
def test_tile_sizes_that_are_none_are_refused(implementation, sizes, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(*asked(make_inputs(PROBLEMS["tiny"][0])), tiles=sizes, implementation=implementation)


def asked(inputs):
    """What `paged_attention` is given of a problem's inputs."""
    return inputs.queries, inputs.pages, Lists(inputs.tables[0], inputs.starts[0]), inputs.positions, inputs.lens


def test_a_search_takes_the_fastest_and_nothing_that_gains_little():
    times = {"{}": 1.0, '{"block_len": 128}': 0.8, '{"block_len": 256}': 1.2}

    def seconds_of(choice):
        if choice == {"block_len": 512}:
            raise ValueError("too large")
        return times[json.dumps(choice)]

    assert tuning.search("blocked", seconds_of) == ({"block_len": 128}, times)
    times['{"block_len": 128}'] = 0.97
    assert tuning.search("blocked", seconds_of)[0] == {}


def test_kernels_are_called_with_what_is_remembered(cache, monkeypatch):
    taken = []
    real = api.IMPLEMENTATIONS["blocked"]
    monkeypatch.setitem(
        api.IMPLEMENTATIONS,
        "blocked",
        lambda *arrays, **how: taken.append(how.get("block_len")) or real(*arrays, **how),
    )
    problem = PROBLEMS["tiny"][0]
    inputs = make_inputs(problem)
    arrays = asked(inputs)
    plain = paged_attention(*arrays)[0]
    tuning.remember(cache, "blocked", bucket_of(inputs), {"block_len": 16})
    tuned = paged_attention(*arrays)[0]
    named = paged_attention(*arrays, tiles={"block_len": 32})[0]
    assert taken == [None, 16, 32]
    for answer in (tuned, named):
        assert jnp.allclose(answer.astype(jnp.float32), plain.astype(jnp.float32), atol=0.02)


def test_the_command_searches_every_problem(cache, monkeypatch, capsys):
    monkeypatch.setattr(clock, "LOOP_SECONDS", 0.0)
    monkeypatch.setitem(PROBLEMS, "tiny", PROBLEMS["tiny"][:1])
    monkeypatch.setattr("sys.argv", ["tuning", "--rounds=1"])
    assert tuning.main() == 0
    said = capsys.readouterr().out
    problem = PROBLEMS["tiny"][0]
    assert bucket_of(make_inputs(problem)) in said
    assert cache.exists()
