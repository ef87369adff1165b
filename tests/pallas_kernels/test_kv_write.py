"""Writing into pages: bit for bit what numpy writes, on every backend, in the simulators with race detection."""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.debug import debugging
from pallas_kernels.formats import Quantised, Scheme, kivi, quantised
from pallas_kernels.kv_write import api, gpu, kv_write, proof, tpu
from pallas_kernels.kv_write.cases import CASES, generated
from pallas_kernels.kv_write.gpu import tiles_of
from pallas_kernels.pages import Pages
from pallas_kernels.selection import Asked
from tests.pallas_kernels.cases import Fetched, numbers, on_tpu


class Contract:
    """What every implementation must do; a subclass says how to run it, and over which option space."""

    dtype = "bfloat16"
    check = staticmethod(proof.check)
    space: ClassVar[dict[str, Any]] = {}

    def write(self, number: int = 0):
        raise NotImplementedError

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_equals_numpy(self, case, capfd):
        self.check(self.write(), **{"dtype": self.dtype, **case})
        assert "RACE" not in capfd.readouterr().out

    @pytest.mark.parametrize("number", numbers(1))
    def test_equals_numpy_over_the_option_space(self, number, capfd):
        self.check(self.write(number), **generated(number, **self.space))
        assert "RACE" not in capfd.readouterr().out

    def test_a_wrong_slot_is_caught(self):
        with pytest.raises(AssertionError, match="keys, payload"):
            self.check(self.write(), **{"dtype": self.dtype, **CASES["int8 by token"]}, misplace=1)


class TestReference(Contract):
    dtype = "float32"
    space: ClassVar[dict[str, Any]] = {
        "dtypes": ("bfloat16", "float32"),
        "page_sizes": (1, 3, 8, 32),
        "dims": (2, 16, 80),
    }

    def write(self, number=0):
        return partial(kv_write, implementation="reference")


class TestGPU(Contract):
    check = staticmethod(partial(proof.check, is_compiled=False))
    space: ClassVar[dict[str, Any]] = {
        "dtypes": ("bfloat16", "float16"),
        "page_sizes": (8, 16, 32, 64, 128),
        "quantised_page_sizes": (32, 64, 128),
        "dims": (16, 64, 80, 128),
        "quantised_dims": (64, 128),
    }

    @pytest.fixture(autouse=True)
    def clean(self):
        yield
        reset_gpu_interpret_mode_state()

    def write(self, number=0):
        return partial(gpu.kv_write, interpret=plgpu.InterpretGPUParams(detect_races=True))

    @pytest.mark.parametrize(("format", "a_token"), [(None, 2 * 64), ("int8", 64 + 4), ("int4", 32 + 4)])
    def test_tokens_come_once_and_leave_once(self, format, a_token, monkeypatch):
        """Of whole pages: keys and values, 128 tokens of 2 heads, in 16 bits; and out again as the pages hold them."""
        come, go = Fetched(), Fetched()
        come.count_loads(monkeypatch)
        go.count_stores(monkeypatch)
        case = {
            "counts": [128],
            "begins": [0],
            "page_size": 64,
            "dims": (64, 64),
            "format": format,
            "dtype": "bfloat16",
        }
        self.check(self.write(), **case)
        jax.effects_barrier()
        assert come.num_bytes == 2 * 128 * 2 * 2 * 64
        assert go.num_bytes == 2 * 128 * 2 * a_token

    @pytest.mark.parametrize(("format", "a_row"), [(None, 2 * 64), ("int8", 64), ("int4", 32)])
    def test_single_tokens_come_once_and_leave_once(self, format, a_row, monkeypatch):
        """The two of three that are not dropped: keys and values of 2 heads. Scales go without a copy."""
        come, go = Fetched(), Fetched()
        come.count_loads(monkeypatch)
        go.count_stores(monkeypatch)
        case = {"counts": [1, 0, 1], "begins": [5, 0, 64], "page_size": 64, "dims": (64, 64), "format": format}
        self.check(self.write(), **case, dtype="bfloat16")
        jax.effects_barrier()
        assert come.num_bytes == 2 * 2 * 2 * 2 * 64
        assert go.num_bytes == 2 * 2 * 2 * a_row

    @pytest.mark.parametrize(
        ("kv_heads", "format", "per"),
        [
            (8, "int8", "channel"),
            (3, "int4", "token"),
            (3, "int4", "channel"),
            (66, "fp8", "token"),
            (67, None, "token"),
        ],
    )
    def test_single_tokens_of_any_number_of_heads(self, kv_heads, format, per, capfd):
        """Groups of 8 and others, and more heads than a tile has rows."""
        case = {"counts": [1], "begins": [32], "dims": (64, 128), "dtype": "bfloat16"}
        self.check(self.write(), **case, kv_heads=kv_heads, format=format, per=per)
        assert "RACE" not in capfd.readouterr().out

    @pytest.mark.parametrize(("num_tokens", "dim"), [(1, 16), (1, 112), (30, 16), (70, 112)])
    def test_plain_pages_of_any_multiple_of_16_dims(self, num_tokens, dim, capfd):
        case = {"counts": [num_tokens, 1], "begins": [9, 0], "page_size": 16, "dims": (dim, 64), "dtype": "float16"}
        self.check(self.write(), **case)
        assert "RACE" not in capfd.readouterr().out

    @pytest.mark.parametrize(
        "case", ["int8 by token", "fp8 by token, one token each", "int4 by channel, one token each"]
    )
    def test_a_missing_wait_is_caught(self, case, monkeypatch, capfd):
        monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
        said = ""
        try:
            self.check(self.write(), **CASES[case], dtype="bfloat16")
        except (AssertionError, ValueError, jax.errors.JaxRuntimeError) as error:
            said = str(error)
        assert "race" in (said + capfd.readouterr().out).lower()


class TestTPU(Contract):
    space: ClassVar[dict[str, Any]] = {
        "dtypes": ("bfloat16", "float32"),
        "page_sizes": (16, 32, 64),
        "quantised_page_sizes": (32, 64),
        "dims": (16, 32, 80),
    }

    @pytest.fixture(autouse=True)
    def clean(self):
        yield
        pltpu.reset_tpu_interpret_mode_state()

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_copies_that_arrive_at_the_wait(self, case, capfd):
        """The other way that the simulator has of running them."""
        self.check(self.write(1), **{"dtype": self.dtype, **case})
        assert "RACE" not in capfd.readouterr().out

    @pytest.mark.parametrize(("format", "a_token"), [(None, 2 * 64), ("int8", 64), ("fp8", 64), ("int4", 32)])
    @pytest.mark.parametrize(("begin", "num_partial"), [(0, 0), (64, 0), (40, 2)])
    def test_tokens_come_once_and_of_pages_what_stays(self, format, a_token, begin, num_partial, monkeypatch):
        """Of 128 tokens of 2 heads, keys and values, in 16 bits; and the granules at both ends, where these are not
        written whole. Beside them flags, and where nothing stays one granule all the same."""
        ledger, size = Fetched(), 16 if format is None else 32
        ledger.listen(monkeypatch)
        case = {"counts": [128], "begins": [begin], "page_size": 64, "dims": (64, 64), "format": format}
        self.check(self.write(), dtype="bfloat16", **case)
        num_granules = 128 // size + (num_partial > 0)
        tokens, old = 2 * 2 * num_granules * size * 2 * 64, 2 * 2 * max(num_partial, 1) * size * a_token
        assert ledger.num_bytes == tokens + old + num_granules * size * 4
        if num_partial == 0:
            assert (ledger.num_bytes - old) / tokens <= 1.05

    def write(self, number=0):
        return partial(tpu.kv_write, interpret=on_tpu("on_wait" if number % 2 else "eager"))


def kernel_calls(program: Any) -> list[Any]:
    """The kernels in a traced program."""
    return [equation for equation in program.jaxpr.eqns if equation.primitive.name == "custom_vmap_call"]


def traced(num_rows: int, num_tokens: int, pool: Any, dim: int) -> Any:
    """The program of a write by the GPU kernel, which nothing runs."""
    tokens = jnp.zeros((num_rows, num_tokens, 2, dim), jnp.bfloat16)
    slots = jnp.zeros((num_rows, num_tokens), jnp.int32)
    return jax.make_jaxpr(partial(gpu.kv_write, chip="hopper"))(Pages(pool, pool), tokens, tokens, slots)


@pytest.mark.parametrize("num_tokens", [13, 65, 70, 100, 140])
def test_what_gpus_are_handed_is_a_tile_and_whole_groups_of_8_rows(num_tokens):
    """Which the compiler asks for, and no simulator."""
    pool = quantised(jnp.zeros((4, 2, 32, 64)), "int8")
    (call,) = kernel_calls(traced(1, num_tokens, pool, 64))
    rows = [operand.aval.shape[0] for operand in call.invars if operand.aval.dtype == jnp.bfloat16]
    assert len(rows) == 2
    assert all(num_rows % 8 == 0 and num_rows >= 64 for num_rows in rows)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_hold_every_token_where_a_copy_fetches_it_from(data):
    """A copy into shared memory of tiles of 8 rows counts its rows within tiles: what begins at row 1 of one has zeros
    in the place of each eighth row. An H200 showed it; no simulator does, and no compiler complains."""
    batch, num_tokens = data.draw(st.sampled_from([(1, 9), (2, 70), (3, 45), (2, 136)]))
    page_size, step = data.draw(st.sampled_from([(32, 8), (64, 8), (128, 8), (32, 1)]))
    per_row, slots = -(-(num_tokens + page_size) // page_size), []
    for row in range(batch):
        begin = data.draw(st.integers(0, page_size - 1))
        count = data.draw(st.integers(0, num_tokens))
        mine = row * per_row * page_size + begin + np.arange(num_tokens)
        slots.append(np.where(np.arange(num_tokens) < count, mine, batch * per_row * page_size))
    asked = jnp.asarray(np.stack(slots), jnp.int32)
    loaded, tile_slots, wholes = map(np.asarray, tiles_of(asked, batch * per_row, page_size, step=step))
    fetched = np.arange(batch * num_tokens + 72)  # the number of each token, in place of what it holds
    unit, found = min(page_size, 64), {}
    for begin, there, whole in zip(loaded, tile_slots, wholes, strict=True):
        if begin < 0:
            assert (there < 0).all()
            continue
        assert begin + 64 <= max(64, -(-batch * num_tokens // 8) * 8)
        places = begin % step + np.arange(64) % step
        rows = np.where(places < step, fetched[begin // step * step :][np.arange(64) // step * step + places], -1)
        for number, flag in enumerate(whole):
            mine = there[number * unit :][:unit]
            assert flag == ((mine[0] >= 0) and mine[0] % unit == 0 and (mine == mine[0] + np.arange(unit)).all())
        for row, slot in zip(rows, there, strict=True):
            if slot >= 0:
                assert found.setdefault(slot, row) == row
    past = batch * per_row * page_size
    assert found == {slot: row for row, slot in enumerate(np.concatenate(slots)) if slot < past}


@pytest.mark.parametrize(("dim", "wide"), [(16, 64), (80, 128), (128, 128)])
def test_rows_that_leave_alone_begin_where_a_copy_may(dim, wide):
    """At multiples of 128 bytes, which no simulator asks for."""
    (call,) = kernel_calls(traced(1, 70, jnp.zeros((4, 2, 32, dim), jnp.bfloat16), dim))
    assert [operand.aval.shape[2] for operand in call.invars if operand.aval.shape[:1] == (72,)] == [wide, wide]


@pytest.mark.parametrize(("dim", "wanted"), [(16, 4), (80, 4), (96, 2), (64, 2)])
def test_a_single_token_is_fetched_in_whole_128_bytes(dim, wanted, monkeypatch):
    """Which the compiler asks for: of 2 heads 4 rows, the last token's from behind the end. No simulator does."""
    fetched = []
    copy = plgpu.copy_gmem_to_smem
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", lambda *refs: (fetched.append(refs[1].shape), copy(*refs)))
    (call,) = kernel_calls(traced(3, 1, jnp.zeros((4, 2, 32, dim), jnp.bfloat16), dim))
    assert set(fetched) == {(wanted, dim)}
    assert [operand.aval.shape for operand in call.invars[1:3]] == [(6 + wanted - 2, dim)] * 2


@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_a_single_token_is_one_launch(format, per):
    """Around the kernel there are but other names for the same bytes."""
    pool = jnp.zeros((4, 2, 32, 64), jnp.bfloat16)
    program = traced(3, 1, pool if format is None else quantised(pool, format, per), 64)
    assert len(kernel_calls(program)) == 1
    around = {equation.primitive.name for equation in program.jaxpr.eqns}
    assert around <= {"new_ref", "reshape", "custom_vmap_call", "freeze"}


def test_donated_pages_are_written_in_place():
    pool = jnp.zeros((64, 2, 16, 64))
    tokens, slots = jnp.ones((2, 1, 2, 64)), jnp.array([[5], [40]])
    write = jax.jit(kv_write, donate_argnums=0)
    analysis = write.lower(Pages(pool, pool + 0), tokens, tokens, slots).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= 2 * pool.nbytes
    assert analysis.temp_size_in_bytes < pool.nbytes / 16


def test_no_tokens_write_nothing():
    pool = quantised(jnp.ones((3, 2, 8, 16)), "int8", "channel")
    tokens = jnp.zeros((0, 1, 2, 16))
    pages = Pages(pool, pool)
    assert kv_write(pages, tokens, tokens, jnp.zeros((0, 1), jnp.int32)) is pages


def test_whole_pages_by_channel_hold_what_quantising_them_gives():
    """And tokens that come later are cut off at the page's largest number."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.standard_normal((1, 8, 2, 16)), jnp.float32)
    empty = quantised(jnp.zeros((3, 2, 8, 16)), "int8", "channel")
    written = kv_write(Pages(empty, empty), tokens, tokens, jnp.arange(8, 16, dtype=jnp.int32)[None])
    keys = written.keys
    wanted = quantised(tokens[0].swapaxes(0, 1), "int8", "channel")
    np.testing.assert_array_equal(keys.payload[1], wanted.payload)
    np.testing.assert_array_equal(keys.scales[1], wanted.scales)
    later = kv_write(written, 100 * tokens[:, :1], tokens[:, :1], jnp.array([[9]])).keys
    np.testing.assert_array_equal(later.scales, keys.scales)
    assert set(np.abs(np.asarray(later.payload[1, :, 1])).flatten().tolist()) <= {127}


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int2"),
        Scheme("int4", "token", 8, has_zeros=True, scale_dtype="bfloat16"),
        Scheme("int2", "token", has_zeros=True),
        Scheme("int8", scale_dtype="bfloat16"),
    ],
    ids=str,
)
def test_tokens_are_written_in_every_scheme_by_token(scheme):
    """As quantising them gives, one after the other; every other bit stays."""
    tokens = jnp.asarray(3 + np.random.default_rng(0).standard_normal((2, 3, 2, 16)), jnp.float32)
    pool = quantised(jnp.ones((4, 2, 8, 16)), scheme)
    slots = jnp.asarray([[6, 7, 16], [25, 26, 99]], jnp.int32)  # page 0 and then page 2; page 3, and one dropped
    written = jax.jit(kv_write)(Pages(pool, pool), tokens, -tokens, slots)
    for found, new in ((written.keys, tokens), (written.values, -tokens)):
        found.check("pages")
        held = np.asarray(found.values()).swapaxes(1, 2).reshape(32, 2, 16)
        wanted = np.asarray(pool.values()).swapaxes(1, 2).reshape(32, 2, 16).copy()
        exact = np.asarray(quantised(new, scheme).values())
        for row, place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
            wanted[slots[row, place]] = exact[row, place]
        np.testing.assert_array_equal(held, wanted)


def test_by_channel_with_zeros_pages_are_only_sealed():
    pool = quantised(jnp.zeros((3, 2, 8, 32)), kivi()[0])
    tokens = jnp.zeros((1, 1, 2, 32))
    with pytest.raises(ValueError, match=r"pages.keys of int4 by channel with zeros.*: must be sealed whole"):
        kv_write(Pages(pool, pool), tokens, tokens, jnp.zeros((1, 1), jnp.int32))


POOL = jnp.zeros((3, 2, 8, 16))


def _arguments(**changes):
    arguments = {
        "pages": Pages(POOL, POOL),
        "keys": jnp.zeros((2, 1, 2, 16)),
        "values": jnp.zeros((2, 1, 2, 16)),
        "write_slots": jnp.array([[0], [8]]),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": jnp.zeros((2, 2, 2, 16))}, r"keys = \(2, 2, 2, 16\): must be \(2, 1, 2, 16\)"),
        ({"values": jnp.zeros((2, 1, 2, 8))}, r"values = \(2, 1, 2, 8\): must be \(2, 1, 2, 16\)"),
        (
            {"pages": Pages(POOL, quantised(POOL, "int8"))},
            "pages.values of int8: must be stored as keys are, float32",
        ),
        (
            {"pages": Pages(*2 * [Quantised(jnp.zeros((3, 2, 8, 16), jnp.int8), jnp.zeros((3, 2, 16)), "int8")])},
            r"pages.keys.scales = \(3, 2, 16\): must be \(3, 2, 8\), one for each token",
        ),
        ({"values": jnp.zeros((2, 1, 2, 16), jnp.bfloat16)}, "values of bfloat16: must be of the keys' type, float32"),
        (
            {"pages": Pages(*2 * [jnp.zeros((3, 2, 8, 16), jnp.int8)])},
            "pages.keys of int8: must be floating, of the tokens' type float32, or Quantised",
        ),
        ({"values": None}, "values = None: must be given, as the pages have some"),
        (
            {"pages": Pages(POOL, value_dim=8)},
            r"values = \(2, 1, 2, 16\): must be None, as they are columns of the keys",
        ),
        ({"write_slots": jnp.zeros((2, 1))}, r"write_slots = float32\[2, 1\]: must be int32 \[B, T\]"),
        ({"implementation": "mosaic_gpu"}, "cannot run here: it needs a Hopper or Blackwell GPU, this is cpu"),
    ],
)
def test_wrong_arguments_name_the_limit(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        kv_write(**_arguments(**changes))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[3], [4]], r"write_slots\[1, 0\] = 4: page 0 is written by row 0 already"),
        ([[3, 9]], r"write_slots\[0, 1\] = 9: the tokens of a row must go to consecutive positions"),
        ([[3, 5]], r"write_slots\[0, 1\] = 5: page 0 is written by row 0 already, not up to this slot"),
    ],
)
def test_slots_against_the_rules_are_refused_while_debugging(slots, message):
    slots = jnp.array(slots)
    tokens = jnp.zeros((*slots.shape, 2, 16))
    with debugging(), pytest.raises(ValueError, match=message):
        kv_write(**_arguments(write_slots=slots, keys=tokens, values=tokens))
    with debugging():  # what is dropped may be anything, a page's end and another's beginning follow one another
        tokens = jnp.zeros((1, 4, 2, 16))
        kv_write(**_arguments(write_slots=jnp.array([[6, 7, 16, -1]]), keys=tokens, values=tokens))


@pytest.mark.parametrize(
    ("pages", "said"),
    [
        ({"format": "float32"}, "pages of float32: must be of the tokens' type bfloat16"),
        ({"page_size": 24}, "page_size = 24: must be 8, 16, 32 or a multiple of 64"),
        ({"head_dims": (72, 128)}, r"head dims = \(72, 128\): must be multiples of 16 in \[16, 256\]"),
        ({"head_dims": (128, 272)}, r"head dims = \(128, 272\): must be multiples of 16 in \[16, 256\]"),
        ({"format": "int4", "head_dims": (96, 96)}, "multiples of 64"),
        ({"dtype": "float32"}, "tokens of float32: must be bfloat16 or float16"),
        ({}, None),
        ({"format": "fp8", "head_dims": (96, 96), "page_size": 32}, None),
        ({"head_dims": (16, 240)}, None),
    ],
)
def test_what_the_gpu_kernel_cannot_write_says_why(monkeypatch, pages, said):
    class Chip:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"

    monkeypatch.setattr(jax, "devices", lambda: [Chip()])
    refused = api.refusals(Asked(**pages))
    if said is None:
        assert "mosaic_gpu" not in refused
    else:
        with pytest.raises(AssertionError, match=said):
            assert not refused["mosaic_gpu"], refused["mosaic_gpu"]
