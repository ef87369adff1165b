"""What is predicted from machine code: the parts that need no compiler."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pallas_kernels import machine_code, predict, timing_model
from pallas_kernels.bench.paged import Problem
from pallas_kernels.bench.problems import PROBLEMS
from pallas_kernels.launches import count_launches, launches
from pallas_kernels.machine_code import Instruction, attending, fetching, loops, parse
from pallas_kernels.timing_model import Gpu, Kernel, kernel_us, scheduled_us

HLO = """HloModule jit_run, is_scheduled=true

%fused_add (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add.9 = f32[8]{0} add(%p, %p)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %get-tuple-element.1 = f32[8]{0} get-tuple-element(%arg), index=1
  %copy.1 = f32[8]{0} copy(%get-tuple-element.1)
  %fusion.3 = f32[8]{0} fusion(%copy.1), kind=kLoop, calls=%fused_add
  ROOT %tuple.2 = (s32[], f32[8]{0}) tuple(%get-tuple-element.1, %fusion.3)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %fusion.4 = pred[] fusion(%arg.1), kind=kLoop, calls=%fused_add
}

%called (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %fusion.5 = f32[8]{0} fusion(%p.1), kind=kLoop, calls=%fused_add
}

ENTRY %main.7 (keys: f32[8]) -> (f32[8], f32[8]) {
  %keys = f32[8]{0} parameter(0)
  %constant.1 = s32[] constant(0)
  %fusion.1 = (f32[8]{0}, f32[8]{0}) fusion(%keys), kind=kLoop, calls=%fused_add, metadata={op_name="jit(run)/while(x)"}
  %get-tuple-element.2 = f32[8]{0} get-tuple-element(%fusion.1), index=1
  %bitcast.1 = f32[8]{0} bitcast(%get-tuple-element.2)
  %while.1 = (s32[], f32[8]{0}) while(%tuple.1), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
  %call.1 = f32[8]{0} call(%keys), to_apply=%called
  %kernel.1 = (f32[65,8]{1,0}, f32[8]{0}) custom-call(%bitcast.1, /*index=1*/%call.1), \
custom_call_target="mosaic_gpu_v2"
  ROOT %tuple.3 = (f32[8]{0}, f32[8]{0}) tuple(%bitcast.1, %call.1)
}
"""


def test_launches_are_counted_in_loops_and_calls_and_not_inside_fusions():
    """One fusion and the kernel of the entry, one fusion of the call, and six turns of a copy and a fusion."""
    assert count_launches(HLO) == {"fusion": 1 + 1 + 6, "copy": 6, "custom-call": 1}
    assert launches(SimpleNamespace(as_text=lambda: HLO)) == 15


def test_a_loop_of_unknown_length_is_said_to_be_one():
    unknown = HLO.replace(', backend_config={"known_trip_count":{"n":"6"}}', "")
    assert count_launches(unknown) == {"fusion": 2, "while of unknown length": 2, "custom-call": 1}


def test_of_branches_the_longest_counts():
    branches = HLO.replace("call(%keys), to_apply=%called", "conditional(%keys), branch_computations={%called, %body}")
    assert count_launches(branches) == {"fusion": 1 + 6 + 1, "copy": 6 + 1, "custom-call": 1}
    two = HLO.replace(
        "call(%keys), to_apply=%called", "conditional(%keys), true_computation=%body, false_computation=%called"
    )
    assert count_launches(two) == count_launches(branches)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        count_launches("HloModule nothing")


SASS = """	.target	sm_90a
.text.kernel:
   -:-:1:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
   1:-:-:Y:05        /*0010*/               @P0 BRA `(.L_x_3)
.L_x_1:
   -:1:-:Y:04        /*0020*/                   UTMALDG.5D [UR16], [UR8]
   -:-:-:Y:05        /*0030*/               @P1 BRA `(.L_x_1)
   -:-:-:Y:05        /*0040*/                   EXIT
.L_x_3:
   -:-:2:Y:02        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5
   1:-:-:Y:09        /*0060*/              @!P1 BRA `(.L_x_8)
.L_x_4:
   -:-:-:Y:03        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
   -:-:-:-:02        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
   -:-:-:Y:11        /*0090*/              @!P3 BRA `(.L_x_5)
   -:-:-:Y:14        /*00a0*/                   FSEL R1, R2, R3, P4
   4&2:3:-:Y:06      /*00b0*/                   BAR.SYNC.DEFER_BLOCKING R179, 0x80
.L_x_5:
   -:-:1:Y:01        /*00c0*/                   SHFL.BFLY PT, R78, R53, 0x1, 0x1f
   -:-:-:Y:03        /*00d0*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8].tnspB, R24, gsb0
   -:-:-:Y:06        /*00e0*/               @P1 BRA `(.L_x_3)
   2:-:-:Y:05        /*00f0*/                   EXIT
.L_x_8:
   -:-:1:Y:13        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5
   1:-:-:Y:05        /*0110*/              @!P1 BRA `(.L_x_8)
   -:-:-:Y:05        /*0120*/                   BRA `(.L_x_4)
"""


def test_control_words_are_read():
    instructions, labels = parse(SASS)
    assert len(instructions) == 19
    assert labels[".L_x_3"] == 5
    assert instructions[5] == Instruction(0x50, "", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5", 2)
    assert [instruction.stall for instruction in instructions[6:11]] == [9, 3, 2, 11, 14]
    assert (instructions[6].predicate, instructions[6].target) == ("!P1", ".L_x_8")
    assert instructions[11].name == "BAR.SYNC.DEFER_BLOCKING"
    with pytest.raises(ValueError, match="MOSAIC_GPU_DUMP_SASS_CTRL"):
        parse(".text.kernel:\n  /*0000*/ LDC R1, c[0x0][0x28] ;\n")


def test_the_loops_of_both_warpgroups_are_found():
    """The block behind the end, where a wait is repeated, belongs to no loop but its own; what only an outer block
    needs is left out."""
    found = loops(SASS)
    assert [turn.address for turn in found] == [0x20, 0x50, 0x100]
    mine, other = attending(found), fetching(found)
    assert mine is not None
    assert other is not None
    assert mine.address == 0x50
    assert [instruction.address for instruction in mine.instructions] == [
        0x50,
        0x60,
        0x70,
        0x80,
        0x90,
        0xC0,
        0xD0,
        0xE0,
    ]
    assert mine.stall_cycles == 2 + 9 + 3 + 2 + 11 + 1 + 3 + 6
    assert mine.tensor_cycles == 32 + 64
    assert timing_model.waits(mine) == 20 + 10  # a poll and a shuffle; the barrier is in the part left out
    assert (other.address, other.stall_cycles) == (0x20, 9)
    assert attending(found[:1]) is None


def test_work_on_the_way_that_multiplies_or_copies_is_never_left_out():
    kept = SASS.replace("FSEL R1, R2, R3, P4", "UTMALDG.5D [UR16], [UR8]")
    mine = attending(loops(kept))
    assert mine is not None
    assert mine.counts["UTMALDG"] == 1
    assert mine.stall_cycles == 37 + 14 + 6


def test_the_loop_over_blocks_is_chosen_among_loops_in_loops():
    """Around it a loop over pieces; inside it one over a part of a product."""
    end = "   2:-:-:Y:05        /*00f0*/                   EXIT"
    part = "   -:-:-:Y:03        /*00b8*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24\n"
    inner = (
        SASS.replace("@P0 BRA `(.L_x_3)", "@P0 BRA `(.L_x_9)")
        .replace(".L_x_3:\n", ".L_x_9:\n   -:-:-:Y:07        /*0048*/                   MOV R1, R2\n.L_x_3:\n")
        .replace(end, end.replace("     EXIT", "@P6 BRA `(.L_x_9)") + "\n" + end.replace("f0", "f8"))
        .replace(".L_x_5:\n", f".L_x_7:\n{part}{part.replace('HGMMA', '@P5 BRA `(.L_x_7) //')}.L_x_5:\n")
        .replace("@!P3 BRA `(.L_x_5)", "@!P3 BRA `(.L_x_7)")
    )
    assert len(loops(inner)) == 5
    mine = attending(loops(inner))
    assert mine is not None
    assert mine.address == 0x50
    assert (mine.num_inner_loops, mine.tensor_cycles) == (1, 32 + 32 + 64)


def test_a_product_takes_its_arithmetic_or_its_factors():
    def product(text):
        return Instruction(0, "", text, 1).tensor_cycles

    assert product("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT") == 32
    assert product("HGMMA.64x8x16.F32 R24, gdesc[UR8], R24") == (64 + 8) * 32 / 128
    assert product("HGMMA.64x8x16.F32 R24, R4, gdesc[UR8], R24") == 8 / 2
    assert product("FFMA R1, R2, R3, R4") == 0


def test_blocks_go_in_order_to_the_slot_that_is_free_first():
    """Two slots: 3 + 1, then 1 + 1 beside it; the block of 5 comes last and nobody helps."""
    assert scheduled_us([3, 1, 1, 1, 5], 2, 10.0, 0.0) == 30 + 50
    assert scheduled_us([5, 3, 1, 1, 1], 2, 10.0, 0.0) == 60
    assert scheduled_us([2, 2], 1, 10.0, 4.7) == 2 * (20 + 4.7)
    assert scheduled_us([0, 1], 2, 10.0, 4.7) == 14.7


def kernel_of(stalls: int, tensor: int, registers: int = 202, shared_bytes: int = 208000) -> Kernel:
    """A decode kernel whose loop has 700 instructions, and products of 64 x 64."""
    products = [Instruction(0, "", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", 0)] * (tensor // 32)
    rest = [Instruction(0, "", "FMUL R1, R2, R3", 0)] * (700 - len(products) - 5)
    waits = [Instruction(0, "", "LDG.E R1", 0)] * 5  # 150 cycles
    turn = machine_code.Turn(0, (*products, *rest, *waits, Instruction(0, "", "BRA", stalls)), 0)
    return Kernel("kernel", (8, 65, 1), 256, shared_bytes, registers, 0, 2288, 4, turn, None)


def test_the_model_gives_what_the_review_of_todays_kernel_gives():
    """1,222 stalls, 768 cycles of products and 350 of waits a block of 64 tokens, 32 KiB; 64 pieces of 32 blocks for
    each of 8 heads."""
    today, turns = kernel_of(1222 + 200, 768), [32] * 512
    assert today.num_resident == 1
    predicted = [kernel_us(today, gpu, turns, 32768) for gpu in timing_model.GPUS]
    assert predicted == pytest.approx([170, 189, 203], rel=0.01)
    assert kernel_us(today, timing_model.GPUS[0], [256] * 512, 32768) == pytest.approx(1229, rel=0.01)


def test_two_blocks_on_a_multiprocessor_share_memory_and_products():
    """The review's prototype: 530 stalls, 256 of products, 350 of waits, and memory decides: twice 32 blocks of two at
    once."""
    swapped = kernel_of(530 + 200, 256, registers=62, shared_bytes=108_000)
    assert swapped.num_resident == 2
    h200, slow_memory = timing_model.GPUS[0], Gpu("", 1.98, 1e12)
    assert 135 <= kernel_us(swapped, h200, [32] * 512, 32768) <= 142
    assert kernel_us(swapped, slow_memory, [32] * 264, 32768) == pytest.approx(
        32 * 2 * 32768 / (1e12 / 132) * 1e6 + 4.7
    )
    assert kernel_us(swapped, slow_memory, [32] * 132, 32768) == pytest.approx(32 * 32768 / (1e12 / 132) * 1e6 + 4.7)
    many = replace(swapped, attending=kernel_of(730, 2048).attending)
    assert kernel_us(many, h200, [32] * 264, 1) == pytest.approx(32 * 2 * 2048 / 1980 + 4.7)


def test_registers_and_shared_memory_bound_the_blocks_on_a_multiprocessor():
    assert kernel_of(1, 32, registers=129, shared_bytes=1000).num_resident == 1
    assert kernel_of(1, 32, registers=128, shared_bytes=1000).num_resident == 2
    assert kernel_of(1, 32, registers=32, shared_bytes=114_000).num_resident == 2
    assert kernel_of(1, 32, registers=32, shared_bytes=115_000).num_resident == 1


LAUNCH = (
    "gpu.launch async [%0] blocks(%a, %b, %c) in (%d = %c8, %e = %c65, %f = %c1_54) "
    "threads(%g, %h, %i) in (%j = %c256, %k = %c1, %l = %c1_3) dynamic_shared_memory_size %c208000_i32 {\n"
)


def test_a_launch_is_read_from_the_log_of_passes(tmp_path):
    log = tmp_path / "kernel_0.mlir-passes.log"
    unknown = (
        "%1 = gpu.launch async [%0] blocks(%a, %b, %c) in (%d = %x, %e = %y, %f = %z) "
        "threads(%g, %h, %i) in (%j = %k, %l = %m, %n = %o) dynamic_shared_memory_size %p {\n"
    )
    log.write_text(f"module\n{unknown}%1 = {LAUNCH}")
    assert timing_model.launch_of(log) == (8, 65, 1, 256, 1, 1, 208000)
    log.write_text(unknown)
    with pytest.raises(ValueError, match="has no gpu"):
        timing_model.launch_of(log)


BLOCKS = {
    "a chunk of 2048 at 8K": 8 * sum(-(-(6144 + end) // 64) for end in range(32, 2049, 32)),
    "flash forward 4 x 48 x 8192, causal": 4 * 48 * sum(end // 64 for end in range(128, 8193, 128)),
    "decode B32 S32K, 1/8 of the pages by head": 32 * 8 * 64,
}
"""Of 64 tokens, that the tiles of 128 rows of all heads see, or that are selected."""


@pytest.mark.parametrize(
    "problem",
    [problem for problem in predict.problems() if isinstance(problem, Problem)],
    ids=lambda problem: problem.name,
)
def test_the_turns_of_all_thread_blocks_are_the_blocks_that_are_seen(problem):
    every_token = problem.num_kv_heads * sum(-(-length // 64) for length in problem.lengths)
    assert predict.turns_of(problem, (1, 1, 1)) == [BLOCKS.get(problem.name, every_token)]


def test_equal_shares_of_a_grid_that_is_not_cut_by_pieces():
    decode = PROBLEMS["full"][0]
    shares = predict.turns_of(decode, (264, 1, 1))
    assert sum(shares) == 32 * 64 * 8
    assert np.ptp(shares) <= 1
    pieces = predict.turns_of(decode, (8, 65, 1))
    assert (len(pieces), sum(pieces), pieces[:8], pieces[-8:]) == (520, 32 * 64 * 8, [64] * 8, [0] * 8)


PTXAS = (
    "ptxas info : Used 202 registers, used 16 barriers, 17 bytes smem\n 8 bytes spill stores, 12 bytes spill loads\n"
)


def test_every_kernel_of_a_program_is_read(tmp_path):
    """Two: one attends; the other, which has no products, has a longest loop."""
    merging = SASS.replace("HGMMA.64x64x16.F32.BF16", "FMUL").replace("HGMMA.64x128x16.F32", "FMUL")
    for number, text in ((0, SASS), (10, SASS), (2, merging)):
        (tmp_path / f"kernel_{number}.sass_ctrl").write_text(text)
        (tmp_path / f"kernel_{number}.ptxas").write_text(PTXAS)
        (tmp_path / f"kernel_{number}.mlir-passes.log").write_text(LAUNCH)
    first, second, third = timing_model.read_kernels(tmp_path)
    assert [first.name, second.name, third.name] == ["kernel_0", "kernel_2", "kernel_10"]
    assert (first.grid, first.num_threads, first.shared_bytes) == ((8, 65, 1), 256, 208000)
    assert (first.registers, first.spilled_bytes, first.num_instructions) == (202, 20, 19)
    assert first.attending is not None
    assert first.fetching is not None
    assert (first.longest, first.num_attending, first.fetching.address) == (None, 1, 0x20)
    assert second.longest is not None
    assert (second.attending, second.longest.address) == (None, 0x50)


def test_a_page_of_predictions_names_every_label():
    kernel = kernel_of(1422, 768)
    times: dict[str, float | None] = {gpu.name: 170.0 for gpu in timing_model.GPUS}
    floors = {gpu.name: 125.0 for gpu in timing_model.GPUS}
    prediction = predict.as_json(
        predict.Predicted("decode", {"fusion": 21, "custom-call": 1}, (kernel,), times, floors)
    )
    assert prediction["call_us"]["H100"] == pytest.approx((170 + 21 * 1.4, 170 + 21 * 2.2))
    kept = {"versions": {"jax": "0.12"}, "date": "today", "problems": [prediction]}
    text = predict.page({"before": kept, "after": kept})
    assert text.count("| decode | 22 | 202 | 1 | 701; 1422 + 768 + 150 = 2340 | - | 170 us, 0.74; 199-216 us |") == 2
    assert "## before" in text
    assert "## after" in text
