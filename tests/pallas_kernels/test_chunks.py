"""Chunks over pages, ragged: against float64 on every backend, with NaN in all that must not be read."""

import time
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import Barrier
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.debug import debugging
from pallas_kernels.masking import Scoring
from pallas_kernels.paged_attention import Lists, Pages, chunk_positions, gpu, proof, sharing, tpu
from pallas_kernels.paged_attention.cases import generated
from tests.pallas_kernels.cases import CHUNK_CASES, Fetched, named, numbers, on_tpu

CASES: dict[str, dict[str, Any]] = {
    "ragged, two tiles, an empty sequence": {"lengths": [70, 3, 0, 9], "num_queries": 40, "group": 2},
    "window, sinks, soft cap": {"lengths": [33, 9], "num_queries": 20, "group": 4, "window": 7, "sinks": 2, "cap": 5.0},
    "int8": {"lengths": [100], "num_queries": 70, "group": 1, "format": "int8", "page_size": 32, "dims": (32, 32)},
    "each query in its own 24 tokens": {"lengths": [70, 9, 0], "num_queries": 40, "group": 2, "chunk": 24},
    "two blocks of a chunk of 100 tokens, no page mass": {
        "lengths": [250],
        "num_queries": 80,
        "group": 1,
        "chunk": 100,
        "with_mass": False,
        "dims": (32, 64),
    },
    "lists of each head, slots that are not valid": {
        "lengths": [50, 7],
        "num_queries": 35,
        "group": 2,
        "lists": "heads",
        "kept": 0.5,
    },
}


class Contract:
    """What every implementation must do; a subclass says how to run it, and over which option space."""

    dtype = "bfloat16"
    check = staticmethod(proof.check)
    space: ClassVar[dict[str, Any]] = {}

    def prefill(self, number: int = 0):
        raise NotImplementedError

    @named(CASES)
    def test_equals_float64(self, case, capfd):
        self.check(self.prefill(), prefill=True, **{"dtype": self.dtype, **case})
        assert "RACE" not in capfd.readouterr().out

    @pytest.mark.parametrize("number", numbers(1))
    def test_equals_float64_over_the_option_space(self, number, capfd):
        case = generated(number, formats=("int8", "fp8", "int4"), **self.space)
        self.check(
            self.prefill(number),
            prefill=True,
            **{**case, "num_queries": (3, 17, 40)[number % 3], "group": 1 + number % 4},
        )
        assert "RACE" not in capfd.readouterr().out

    def test_a_wrong_page_is_caught(self):
        with pytest.raises(AssertionError):
            self.check(self.prefill(), prefill=True, misread=1, dtype=self.dtype, **CASES["window, sinks, soft cap"])


class TestBlocked(Contract):
    dtype = "float32"
    space: ClassVar[dict[str, Any]] = {
        "dtypes": ("float32", "bfloat16"),
        "page_sizes": (1, 3, 8, 40),
        "dims": (2, 8, 16, 80),
    }

    def prefill(self, number=0):
        return proof.by_api(implementation="blocked", tiles={"block_len": 16})


class TestReference(TestBlocked):
    def prefill(self, number=0):
        return proof.by_api(implementation="reference")


class TestGPU(Contract):
    check = staticmethod(partial(proof.check, is_compiled=False))
    space: ClassVar[dict[str, Any]] = {
        "dtypes": ("bfloat16", "float16"),
        "page_sizes": (8, 16, 32, 64),
        "quantised_page_sizes": (32, 64),
        "dims": (32, 64),
    }

    @pytest.fixture(autouse=True)
    def clean(self):
        yield
        reset_gpu_interpret_mode_state()

    def prefill(self, number=0, num_pieces=3, max_stages=2):
        """With few stages and pieces, so that the ring turns and short sequences are split."""
        how = plgpu.InterpretGPUParams(detect_races=True)
        chip = ("hopper", "blackwell")[number % 2]
        return partial(gpu.paged_attention, interpret=how, chip=chip, num_pieces=num_pieces, max_stages=max_stages)

    @named(CHUNK_CASES, "one tile", "int8")
    def test_every_tile_fetches_its_live_pages_once(self, case, monkeypatch):
        """And its rows of queries: where a list is not cut, nothing else."""
        ledger = Fetched()
        ledger.count_loads(monkeypatch)
        rows = 64 if case["num_queries"] * case["group"] <= 64 else 128
        tile_len = rows // case["group"]
        num_tiles = sum(-(-min(length, case["num_queries"]) // tile_len) for length in case["lengths"])
        beside = ledger.of_chunk(self.check, self.prefill(num_pieces=1), case, tile_len)
        assert beside == num_tiles * 2 * rows * 64 * 2

    def test_one_of_two_warpgroups_may_be_late(self, monkeypatch):
        """By as many blocks as the ring is deep: the other must not signal twice what has not been waited for once."""
        real = Barrier.wait

        def wait(barrier, thread, **rest):
            if getattr(thread, "warpgroup_id", None) == 1:
                time.sleep(0.15)
            real(barrier, thread, **rest)

        monkeypatch.setattr(Barrier, "wait", wait)
        case = {"lengths": [250], "num_queries": 100, "group": 1, "kv_heads": 1, "dims": (32, 32), "page_size": 64}
        run = self.prefill(num_pieces=1, max_stages=4)
        self.check(run, prefill=True, dtype="bfloat16", with_mass=False, **case)

    def test_what_fills_up_a_chunk_sees_nothing(self, capfd):
        """Not even of a block that every other row sees all of."""
        rng = np.random.default_rng(0)
        queries, keys, values = (
            jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((1, 70, 1, 32), *2 * [(3, 1, 64, 32)])
        )
        lists = Lists(jnp.array([[2, 1]], jnp.int32), jnp.array([[0, 64]], jnp.int32))
        asked = queries, Pages(keys, values), lists, *chunk_positions(jnp.array([100]), jnp.array([3]), 70)
        scoring = Scoring(0.2, with_page_mass=True)
        outputs, sums, mass = self.prefill()(*asked, scoring)
        wanted = proof.by_api(implementation="reference")(*asked, scoring)
        np.testing.assert_allclose(np.float32(outputs[:, :3]), np.float32(wanted[0][:, :3]), atol=4e-3)
        assert not outputs[:, 3:].any()
        assert (sums[:, 3:] == -jnp.inf).all()
        np.testing.assert_allclose(mass, wanted[2], atol=1e-4)
        assert "RACE" not in capfd.readouterr().out

    @pytest.mark.parametrize(("dtype", "cap"), [("bfloat16", None), ("float16", 3.0)])
    def test_a_list_that_is_not_cut_leaves_the_type_of_its_queries(self, dtype, cap, monkeypatch, capfd):
        """Of many blocks, so that products and softmax of two run at once."""
        monkeypatch.setattr(sharing, "ENOUGH", 1)
        case = {"lengths": [300], "num_queries": 70, "group": 1, "kv_heads": 1, "dims": (32, 32), "page_size": 64}
        self.check(self.prefill(num_pieces=1, max_stages=3), prefill=True, dtype=dtype, cap=cap, **case)
        assert "RACE" not in capfd.readouterr().out

    def test_two_warpgroups_attend_where_rows_abound(self, monkeypatch):
        asked = []
        monkeypatch.setattr(gpu, "in_tiles", lambda *_, **options: asked.append(options["num_consumers"]) or ())
        for tokens, value_dim, chip, with_mass, has_valid in (
            (40, 64, "hopper", False, False),
            (30, 48, "hopper", False, False),
            (40, 64, "blackwell", False, False),
            (40, 192, "hopper", False, False),
            (40, 128, "hopper", False, False),
            (40, 128, "hopper", True, False),
            (40, 128, "hopper", False, True),
            (40, 64, "hopper", True, True),
        ):
            keys, values = (jnp.zeros((3, 1, 8, dim), jnp.bfloat16) for dim in (64, value_dim))
            table = jnp.zeros((1, 2), jnp.int32)
            lists = Lists(table, table, jnp.ones((1, 2, 8), bool) if has_valid else None)
            queries = jnp.zeros((1, tokens, 2, 64), jnp.bfloat16)
            positions = chunk_positions(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), tokens)
            scoring = Scoring(0.1, with_page_mass=with_mass)
            gpu.paged_attention(queries, Pages(keys, values), lists, *positions, scoring, chip=chip)
        assert asked == [2, 1, 1, 1, 2, 1, 1, 2], "registers do not suffice for more"


class TestTPU(Contract):
    space: ClassVar[dict[str, Any]] = {
        "dtypes": ("bfloat16", "float32"),
        "page_sizes": (8, 16, 64),
        "quantised_page_sizes": (32, 64),
        "dims": (16, 32, 80),
    }

    @pytest.fixture(autouse=True)
    def clean(self):
        yield
        pltpu.reset_tpu_interpret_mode_state()

    @named(CHUNK_CASES, "one tile", "int8")
    def test_every_tile_fetches_its_live_pages_once(self, case, monkeypatch):
        """And nothing else: queries come through the grid."""
        ledger = Fetched()
        ledger.count_copies(monkeypatch)
        assert ledger.of_chunk(self.check, self.prefill(max_rows=64), case, 64 // case["group"]) == 0

    @named(CASES, "ragged, two tiles, an empty sequence", "window, sinks, soft cap")
    def test_copies_that_arrive_at_the_wait(self, case, capfd):
        """The other way that the simulator has of running them."""
        self.check(self.prefill(1), prefill=True, **{"dtype": self.dtype, **case})
        assert "RACE" not in capfd.readouterr().out

    def prefill(self, number=0, max_rows=8):
        return partial(
            tpu.paged_attention, block_len=16, max_rows=max_rows, interpret=on_tpu("on_wait" if number % 2 else "eager")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_starts": jnp.zeros(1)}, "query_starts of float32: must be int32"),
        ({"query_lens": jnp.ones(2, jnp.int32)}, r"query_lens = \(2,\): must be \[B\], the same for both"),
        ({"query_starts": jnp.ones((1, 2), jnp.int32)}, r"query_starts = \(1, 2\): must be \[B\]"),
    ],
)
def test_wrong_arguments_name_the_limit(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        chunk_positions(**CHUNK | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_starts": jnp.array([-2])}, r"query_starts\[0\] = -2: must be at least 0"),
        ({"query_lens": jnp.array([4])}, r"query_lens\[0\] = 4: must be in \[0, 3\]"),
    ],
)
def test_chunks_that_cannot_be_are_refused_while_debugging(changes, message):
    chunk_positions(**CHUNK | changes)  # harmless
    with debugging(), pytest.raises(ValueError, match=message):
        chunk_positions(**CHUNK | changes)


CHUNK: dict[str, Any] = {
    "query_starts": jnp.zeros(1, jnp.int32),
    "query_lens": jnp.ones(1, jnp.int32),
    "num_queries": 3,
}
