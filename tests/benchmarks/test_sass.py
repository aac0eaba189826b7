"""The model of machine code: its parts on loops small enough to know the answer, then one kernel of the table."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import amdgcn, report, runner, sass_model
from benchmarks.processors import PROCESSORS, programs_at_once
from benchmarks.sass import roles
from benchmarks.sass import simulate as simulation
from benchmarks.sass.flow import loops
from benchmarks.sass.instructions import Instruction, local_accesses, parse, products_under_copies
from benchmarks.sass.predict import EFFICIENCY, predict
from benchmarks.sass.simulate import LATENCY, NO_BULK, Bulk, Part
from benchmarks.sass.work import Kind, Pipe, Work, works
from maskflash.backends.triton.signature import HOPPER
from maskflash.backends.triton.tiles import ROWS

ROOT = Path(__file__).parents[2]
BOARDS = st.one_of(st.none(), st.integers(0, 5))


def instruction(text, address=0, stall=1, result_board=None, operands_board=None, waits=()):
    predicate, text = text.split(" ", 1) if text.startswith("@") else ("", text)
    opcode, _, operands = text.partition(" ")
    return Instruction(address, predicate, opcode, operands, stall, result_board, operands_board, tuple(waits))


def written(each):
    """An instruction as a disassembler writes it, with its control word."""
    boards = [7 if board is None else board for board in (each.result_board, each.operands_board)]
    word = each.stall << 41 | boards[0] << 46 | boards[1] << 49 | sum(1 << board for board in each.waits) << 52
    text = " ".join(part for part in (each.predicate, each.opcode, each.operands) if part)
    return f"        /*{each.address:04x}*/ {text} ; /* 0x{0xABC:016x} */\n{' ' * 40}/* 0x{word | 0x1FF:016x} */\n"


def program(*texts):
    """Instructions in order, 16 bytes each."""
    return [instruction(text, 16 * place) for place, text in enumerate(texts)]


@given(st.integers(0, 15), BOARDS, BOARDS, st.sets(st.integers(0, 5)), st.sampled_from(["", "@P0 ", "@!UP3 "]))
def test_what_a_control_word_says(stall, result_board, operands_board, waits, predicate):
    made = instruction(f"{predicate}FFMA.FTZ R1, R2, R3, R4", 0x1F0, stall, result_board, operands_board, sorted(waits))
    end = instruction("EXIT", 0x200)
    header = '\tFunction : dq\n\t.headerflags @"EF_CUDA_SM90"\n'
    assert parse(header + written(made) + written(end)) == [made, end]


def test_loops_are_the_innermost_that_hold_products():
    made = program(
        "MOV R1, R2",
        "FADD R1, R2, R3",  # 0x10: a loop of no product
        "@P0 BRA 0x10",
        "IADD3 R1, R1, 0x1, RZ",  # 0x30: the outer loop
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 0x40: an inner one, which leaves by a branch and goes on by another
        "@!P0 BRA 0x70",
        "BRA 0x40",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",  # 0x70: the next
        "BRA 0xa0",
        "STL [R1], R2",  # jumped over
        "@P1 BRA 0x70",
        "@P2 BRA 0x30",
        "BRA 0xc0",
    )
    first, second = loops(made)
    assert [each.address for each in first] == [0x40, 0x50, 0x60]
    assert [each.address for each in second] == [0x70, 0x80, 0xA0]
    assert local_accesses(second) == 0


def test_local_accesses_are_counted():
    assert local_accesses(program("LDL R1, [R1]", "FADD R1, R2, R3", "STL.64 [R1], R2")) == 2


PRODUCT, COPY, COMMIT = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR"


@pytest.mark.parametrize(
    ("turn", "under"),
    [
        ((PRODUCT, PRODUCT), None),
        (("DEPBAR.LE SB0, 0x0", PRODUCT, PRODUCT, COPY, COMMIT), 0),  # two stages: copied when all is computed
        (("DEPBAR.LE SB0, 0x1", PRODUCT, PRODUCT, COPY, COMMIT), 2),  # three: waits for the copy before
        (("DEPBAR.LE SB0, 0x2", PRODUCT, PRODUCT, COPY, COMMIT, COPY, COMMIT), 2),
        (("DEPBAR.LE SB0, 0x0", COPY, COMMIT, PRODUCT), 1),  # copied before it is computed
        (("DEPBAR.LE SB0, 0x1", PRODUCT, "DEPBAR.LE SB0, 0x0", PRODUCT, COPY, COMMIT, COPY, COMMIT), 0),  # the first
    ],
)
def test_what_stages_prefetch(turn, under):
    assert products_under_copies(program(*turn)) == under


def one(text):
    (found,) = works(program(text), 8)
    return found


@pytest.mark.parametrize(
    ("text", "kind", "pipe", "cycles"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0", Kind.PRODUCT, "tensor", 64),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24", Kind.PRODUCT, "tensor", 24),  # its left side has to arrive
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, R120, gdesc[UR8], R24, gsb0", Kind.PRODUCT, "tensor", 64),
        (PRODUCT, Kind.PRODUCT, "tensor", 8),
        ("MUFU.EX2 R1, R2", Kind.PLAIN, "special", 8),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", Kind.PLAIN, "fma", 1),
        ("IMAD.WIDE R1, R2, R3, R4", Kind.PLAIN, "fma", 2),
        ("FSEL R1, R2, R3, P0", Kind.PLAIN, "alu", 2),
        ("LDSM.16.M88.4 R1, [R2]", Kind.PLAIN, "memory", 16),
        ("STS.64 [R1], R2", Kind.PLAIN, "memory", 8),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", Kind.PLAIN, "memory", 4),
        (COPY, Kind.COPY, "memory", 16),
        ("UTMALDG.2D [UR8], [UR4]", Kind.BULK_COPY, "memory", 4),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6+0x280a0], R5", Kind.WAIT_BARRIER, "memory", 4),
        ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6+0x280b0], RZ", Kind.ARRIVE, "memory", 4),
        ("SYNCS.ARRIVE.TRANS64 RZ, [UR6+0x280a0], R3", Kind.PLAIN, "memory", 4),  # tells it what to expect
        ("ULDC UR4, c[0x0][0x208]", Kind.PLAIN, "constant", 2),
        ("UIADD3 UR4, UR4, 0x1, URZ", Kind.PLAIN, "uniform", 2),
    ],
)
def test_what_an_instruction_costs(text, kind, pipe, cycles):
    found = one(text)
    assert (found.kind, found.pipe.name, found.pipe.cycles) == (kind, pipe, cycles)


def test_products_and_copies_are_counted_for_four_schedulers():
    assert one("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24").flops == 2 * 64 * 128 * 16
    assert one("QGMMA.64x128x32.F32.E4M3.E4M3 R24, R120, gdesc[UR8], R24").flops == 2 * 64 * 128 * 32
    assert one(PRODUCT).flops == 4 * 2 * 16 * 8 * 16
    assert one(COPY).size == 16 * 32 * 4
    assert one("BAR.SYNC.DEFER_BLOCKING 0x0").kind is Kind.BARRIER
    assert one("WARPGROUP.DEPBAR.LE gsb0, 0x1").left == 1
    assert one("DEPBAR.LE SB0, 0x2").left == 2


def simulate(turn, warps, programs, **options):
    """A loop that all warps run."""
    return together([Part(turn, warps)], programs, **options)


together = partial(simulation.simulate, cycles=10_000)


def work(kind=Kind.PLAIN, pipe=None, stall=1, **more):
    control = {"result_board": None, "operands_board": None, "waits": ()}
    return Work(kind, pipe, stall, **control | more)


def product(cycles, **more):
    return work(Kind.PRODUCT, Pipe("tensor", cycles, 0), flops=1000, **more)


def test_long_products_keep_the_tensor_cores_busy():
    found = simulate([product(1000)], 1, 2)
    assert found.tensor_share == pytest.approx(1, abs=0.02)
    assert found.flops_per_cycle == pytest.approx(1, rel=0.03)


def test_a_pipe_serves_one_warp_at_a_time():
    turn = [work(pipe=Pipe("special", 8, 20)) for _ in range(200)] + [product(8)]
    assert simulate(turn, 1, 1).turn == pytest.approx(1600, rel=0.1)
    assert simulate(turn, 2, 1).turn == pytest.approx(3200, rel=0.1)


def test_stalls_of_one_warp_are_anothers_turn():
    turn = [work(stall=10) for _ in range(100)] + [product(8)]
    alone, together = simulate(turn, 1, 1), simulate(turn, 1, 4)
    assert alone.turn == pytest.approx(1000, rel=0.1)
    assert together.flops_per_cycle == pytest.approx(4 * alone.flops_per_cycle, rel=0.1)


def test_a_result_is_waited_for():
    load = work(pipe=Pipe("memory", 4, 250), result_board=3)
    assert simulate([load, product(8)], 1, 1).turn < 100
    assert simulate([load, product(8, waits=(3,))], 1, 1).turn > 250


def copying(left):
    """Copies, computes for a thousand cycles, waits for all but the last `left` copies."""
    copy, commit = work(Kind.COPY, Pipe("memory", 16, 28), size=2048), work(Kind.COMMIT)
    return [copy, commit, work(Kind.WAIT_COPIES, left=left), *(work(stall=15) for _ in range(20)), product(8)]


def test_copies_are_waited_for_unless_they_have_a_turn_to_arrive():
    waiting, ahead = simulate(copying(0), 1, 1).turn, simulate(copying(1), 1, 1).turn
    assert waiting - ahead == pytest.approx(LATENCY, rel=0.2)


def test_another_program_computes_while_one_waits():
    assert simulate(copying(0), 1, 2).flops_per_cycle > 1.9 * simulate(copying(0), 1, 1).flops_per_cycle


def test_bulk_copies_arrive_as_many_turns_later_as_there_are_stages():
    copy = work(Kind.BULK_COPY, closes=True)
    turn = [work(Kind.WAIT_BARRIER), *(work(stall=15) for _ in range(20)), product(8), copy]
    turns = [simulate(turn, 1, 1, bulk=Bulk(2048, ahead)).turn for ahead in (1, 2)]
    assert turns[0] - turns[1] == pytest.approx(LATENCY, rel=0.2)


def test_the_products_of_a_group_are_waited_for():
    wait = work(Kind.WAIT_PRODUCTS, left=0)
    assert simulate([product(500, closes=True), wait], 1, 1).turn > 530
    assert simulate([product(500, closes=True), work(Kind.WAIT_PRODUCTS, left=1)], 1, 1).turn < 520


def test_warps_of_a_program_leave_a_barrier_together():
    """The slowest of four holds the others up; without the barrier each goes its own way."""
    turn = [*(work(stall=10) for _ in range(20)), product(8)]
    assert simulate([work(Kind.BARRIER), *turn], 4, 1).turn > 1.05 * simulate(turn, 4, 1).turn


def test_products_left_pending_are_handed_in_early():
    """A warp that waits for all but the last group computes beside it; one that waits for all does not."""
    group, other = [product(100) for _ in range(7)], [work(stall=10) for _ in range(60)]
    turns = [[*group, product(100, closes=True), work(Kind.WAIT_PRODUCTS, left=left), *other] for left in (0, 1)]
    waiting, beside = (simulate(turn, 1, 1).turn for turn in turns)
    assert waiting > 800 + 600
    assert beside < 1150


def test_the_same_seed_gives_the_same_speed():
    assert simulate(copying(0), 2, 2, seed=7) == simulate(copying(0), 2, 2, seed=7)
    assert simulate(copying(0), 2, 2, seed=7) != simulate(copying(0), 2, 2, seed=8)


FULL, EMPTY, DEPTH = 0x100, 0x200, 2
"""Places of a ring's barriers, and how many slots it has."""


def producing(stall=1):
    """Waits for an empty slot and fills it."""
    return [work(Kind.WAIT_BARRIER, place=EMPTY), work(stall=stall), work(Kind.BULK_COPY, place=FULL, closes=True)]


def consuming(cycles):
    """Waits for a full slot, computes, and leaves it empty."""
    product_of_slot = product(cycles, closes=True)
    wait = work(Kind.WAIT_PRODUCTS, left=0)
    return [work(Kind.WAIT_BARRIER, place=FULL), product_of_slot, wait, work(Kind.ARRIVE, place=EMPTY)]


def ring(consumers, depth=DEPTH, producer=None, size=2048):
    parts = [*(Part(turn, 1) for turn in consumers), Part(producer or producing(), 1)]
    return together(parts, 1, bulk=Bulk(size), depths={EMPTY: depth}, cycles=50_000)


def test_a_producer_keeps_the_ring_full():
    """One slot is copied to only after it has been read; two are enough to hide the latency of copies."""
    alone, ahead = ring([consuming(1000)], depth=1), ring([consuming(1000)])
    assert LATENCY < alone.turn - ahead.turn < 1.4 * LATENCY
    assert alone.lost["mbarriers"] > 0.8 * LATENCY
    assert ahead.lost.get("mbarriers", 0) < 20


def test_a_slow_producer_is_waited_for():
    found = ring([consuming(100)], producer=[work(stall=15) for _ in range(100)] + producing())
    assert found.turn == pytest.approx(1500, rel=0.1)


def test_copies_share_the_bandwidth():
    size = 96_000  # more than two turns' worth of time
    assert ring([consuming(500)], size=size).turn == pytest.approx(size / simulation.BYTES_PER_CYCLE, rel=0.1)


def test_consumers_take_turns_at_the_tensor_core():
    """One computes while the other does something else: both together lose nothing."""
    softmax = [work(stall=10) for _ in range(80)]
    found = ring([[*softmax, *consuming(800)]] * 2)
    assert found.tensor_share > 0.9
    assert ring([[*softmax, *consuming(800)]]).tensor_share < 0.55


def turns_of_three(depth):
    """How many turns each of three consumers has made; two of them would keep the tensor core busy."""
    softmax = [work(stall=10) for _ in range(40)]
    parts = [*[Part([*softmax, *consuming(800)], 1)] * 3, Part(producing(), 1)]
    scheduler = simulation._Scheduler(parts, 1, Bulk(2048), {EMPTY: depth}, 1)
    scheduler.run(100_000)
    return [warp.turns for warp in scheduler.residents[:3]]


@pytest.mark.parametrize("depth", [DEPTH, 100])
def test_no_consumer_starves(depth):
    """Who waited longest goes first: three go on at one pace, also where a ring is too deep to hold a fast one back."""
    turns = turns_of_three(depth)
    assert min(turns) > 30
    assert max(turns) - min(turns) <= DEPTH


def test_the_slowest_consumer_sets_the_pace():
    """A slot is empty when both have read it: with one slot the fast one waits for the slow one at each turn."""
    slow, fast = [*(work(stall=15) for _ in range(100)), *consuming(8)], consuming(8)
    assert ring([slow, fast], depth=1).turn == pytest.approx(ring([slow, slow], depth=1).turn, rel=0.05)


def test_a_wait_that_nobody_ends_is_an_error():
    with pytest.raises(ValueError, match="got waits at 0x200"):
        ring([consuming(100)[:-1]])


ROLES = (
    "@!P0 BRA 0x60",
    "BRX R2 -0x20",  # the others are told where to go
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x108], R5",  # 0x20: the producer
    "UTMALDG.2D [UR8], [UR4]",
    "@P1 BRA 0x20",
    "EXIT",
    "SYNCS.EXCH.64 URZ, [UR4+0x100], UR6",  # 0x60: the first consumer, which also prepares barriers
    "SYNCS.EXCH.64 URZ, [UR4+0x108], UR6",
    "SYNCS.EXCH.64 URZ, [UR4+0x110], UR6",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x100], R5",  # 0x90: its first walk
    "@!P0 BRA 0x120",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "BAR.SYNC.DEFER_BLOCKING 0x0, 0x80",
    "@P1 BRA 0x90",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",  # 0xe0: and its second
    "@P1 BRA 0xe0",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x100], R5",  # 0x120: where the wait in its first walk goes on
    "@!P0 BRA 0x120",
    "BRA 0xb0",
)


def test_loops_are_not_what_returns_from_elsewhere():
    assert [(loop[0].address, loop[-1].address) for loop in loops(program(*ROLES))] == [(0x90, 0xD0), (0xE0, 0xF0)]
    assert [loop[0].address for loop in loops(program(*ROLES), roles.BULK_COPY)] == [0x20]


def test_roles_need_as_many_loops_each():
    with pytest.raises(ValueError, match=r"got \[\(2, 4\), \(1, 1\)\]"):
        roles.roles(program(*ROLES), 12)
    consumer, producer = roles.roles(program(*ROLES[:14], "EXIT", *ROLES[15:]), 12)
    assert (len(consumer.loops), consumer.warps, len(producer.loops), producer.warps) == (1, 4, 1, 1)
    with pytest.raises(ValueError, match="at most 4 warps"):
        roles.roles(program(*ROLES[:14], "EXIT", *ROLES[15:]), 4)


def test_warps_without_roles_are_one_role():
    made = program(
        "UTMALDG.2D [UR8], [UR4]", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "@P1 BRA 0x0", "EXIT"
    )
    (found,) = roles.roles(made, 8)
    assert (len(found.loops), found.warps) == (1, 8)


def test_how_deep_rings_are():
    assert roles.depths(program(*ROLES)) == {0x100: 1, 0x108: 2}


def test_a_prediction_is_below_what_the_chip_can_do():
    loop = program(*["HGMMA.64x256x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24"] * 20)
    found = predict([(loop, 8)], 90, 1, bulk=NO_BULK, depths={}, cycles=10_000)
    peak = 4096 * PROCESSORS[90].multiprocessors * PROCESSORS[90].gigahertz / 1e3
    assert 0.9 * EFFICIENCY * peak < found.tflops < EFFICIENCY * peak
    assert found.tensor_share > 0.95
    copied = predict(
        [([*loop, *program(*[COPY] * 200)], 8)], 90, 1, bulk=NO_BULK, depths={}, cycles=10_000
    )  # more than the L2 cache gives
    assert copied.tflops < 0.7 * found.tflops


AMD = """
.LBB0_1:
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	scratch_load_dword v1, off, off
	s_cbranch_scc1 .LBB0_1
	scratch_store_dword off, v1, off
.LBB0_2:
	v_add_f32 v0, v1, v2
	scratch_load_dword v1, off, off
	s_cbranch_vccnz .LBB0_2
; NumVgprs: 250
; TotalNumVgprs: 302
; ScratchSize: 12
; Occupancy: 1
"""


def test_what_an_amd_kernel_needs():
    """Scratch counts in the loop that has products, not after it and not in another."""
    assert amdgcn.read(AMD) == amdgcn.Found(302, 12, 1, "mfma", 1)
    assert amdgcn.read(AMD.replace("v_mfma", "v_fma").replace("; Total", "")).product == ""
    assert amdgcn.read(AMD.replace("; TotalNum", "; No")).registers == 250


def test_what_fits_a_multiprocessor():
    assert programs_at_once(90, 8, 255, 131_072) == 1  # registers: 8 warps of 255 fill it
    assert programs_at_once(90, 4, 255, 98_304) == 2
    assert programs_at_once(90, 8, 128, 98_304) == 2
    assert programs_at_once(90, 4, 160, 131_072) == 1  # shared memory
    assert programs_at_once(86, 4, 32, 1024) == 12  # warps
    assert programs_at_once(100, 4, 64, 1024, tensor_memory=256) == 2


def test_a_kernel_of_the_table_is_predicted(tmp_path):
    """In a process of its own: kernels here are interpreted, and triton decides once."""
    path = tmp_path / "model.json"
    only = ["--arch", "90", "--pass", "dq", "--dim", "64", "--quick", "--json", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sass_model", *only],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert [row["name"] for row in stored["validation"]] == [
        "FlexAttention, forward",
        "Triton's tutorial, forward",
        "FlexAttention, backward",
        "FlashAttention-3's steps, one after another",
        "FlashAttention-3's steps, overlapped",
    ]
    assert all(100 < row["predicted"] < 800 for row in stored["validation"])
    (row,) = stored["rows"]
    full, partial = row["loops"]
    assert 100 < partial["tflops"] < full["tflops"] < 800
    assert full["instructions"] < partial["instructions"]


def test_predictions_stand_beside_the_rows_of_the_table(tmp_path):
    path, (row, *_) = tmp_path / "model.json", sass_model.table_cases()
    loops = [{"tflops": speed, "instructions": 9, "turn": 1.0, "tensor_share": 0.5} for speed in (321.4, 123.4)]
    stored = {"conditions": runner.conditions(False), "rows": [{**asdict(row), "loops": loops}]}
    stored["validation"] = [{"name": "someone's", "known": 400, "predicted": 390.6, "use": "test"}]
    path.write_text(json.dumps(stored), encoding="utf-8")
    blocks = "".join(f"<!-- figures: model {name} -->\n<!-- end figures -->\n" for name in ("validation", "tiles"))
    text = report.filled_in(blocks, report.load_model(path))
    assert "| someone's | 400 | 391 | test |" in text
    assert f"| {sass_model.tile_text(row.tile)} | static gate | 321 | 123 |" in text
    assert text.count("| static gate |  |  |") == sum(each.bits == 16 for each in ROWS) - 1
    assert report.MISSING in report.filled_in(blocks, report.load_model(tmp_path / "none"))
    path.write_text(json.dumps({**stored, "rows": [{**asdict(row), "loops": loops[:1]}]}), encoding="utf-8")
    with pytest.raises(ValueError, match="longer"):  # a row without a cell for each column
        report.filled_in(blocks, report.load_model(path))
    path.write_text(json.dumps({**stored, "conditions": {"quick": True}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="--quick run"):
        report.load_model(path)


def test_every_16_bit_row_of_a_modelled_architecture_is_a_case():
    assert {case.arch for case in sass_model.table_cases()} == {80, 86, 90}
    assert {case.bits for case in sass_model.table_cases()} == {16}
    assert {case.pass_name for case in sass_model.table_cases()} == {"forward", "dkdv", "dq", *HOPPER}
