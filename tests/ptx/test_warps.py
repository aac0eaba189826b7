"""Shuffles, votes and barriers; blocks and threads that part at branches and meet again."""

from pathlib import Path

import numpy as np
import pytest

from tests.ptx.faults import Fault, Unsupported
from tests.ptx.instructions import INSTRUCTIONS
from tests.ptx.parse import parse
from tests.ptx.snippets import launch, value_of

LANES = np.arange(64)
VALUE = (LANES * 7 + 3).astype(np.uint32)


@pytest.mark.parametrize(
    ("form", "source"),
    [
        ("bfly.b32 %r0, %r1, 4, 31", LANES ^ 4),
        ("idx.b32 %r0, %r1, 5, 31", LANES // 32 * 32 + 5),
        ("idx.b32 %r0, %r1, 1, 7199", LANES // 4 * 4 + 1),  # segments of four: a mask of 28, a clamp of 31
        ("up.b32 %r0, %r1, 2, 0", np.where(LANES % 32 < 2, LANES, LANES - 2)),
        ("down.b32 %r0, %r1, 2, 31", np.where(LANES % 32 > 29, LANES, LANES + 2)),
    ],
)
def test_shuffles(form, source):
    assert np.array_equal(value_of(f"shfl.sync.{form}, -1;", VALUE), VALUE[source])


def test_votes():
    found = value_of("setp.gt.u32 %p1, %r1, 200; vote.sync.ballot.b32 %r0, %p1, -1; bar.warp.sync -1;", VALUE)
    bits = [sum(1 << n for n in range(32) if VALUE[32 * warp + n] > 200) for warp in range(2)]
    assert np.array_equal(found, np.repeat(np.array(bits, np.uint32), 32))


LOOP = """
    mov.b32 %r0, 0; and.b32 %r2, %r1, 7;
    $again:
    add.s32 %r0, %r0, %r2; sub.s32 %r2, %r2, 1;
    setp.gt.s32 %p1, %r2, 0;
    @%p1 bra $again;
    add.s32 %r0, %r0, 100;
"""


def test_threads_part_and_meet_again():
    n = VALUE.astype(np.int64) & 7
    together = "xor.b32 %r3, %r0, 0; shfl.sync.idx.b32 %r3, %r3, 3, 31, -1; add.s32 %r0, %r0, %r3;"
    found = value_of(LOOP.replace("; ", ";\n") + together, VALUE)
    sums = n * (n + 1) // 2 + 100
    assert np.array_equal(found, sums + sums[LANES // 32 * 32 + 3])


def test_blocks_go_ways_of_their_own():
    out = np.zeros(11 * 32, np.uint32)
    head = ["mov.u32 %r1, %ctaid.x;", "mov.u32 %r4, %tid.x;", "mad.lo.s32 %r5, %r1, 32, %r4;"]
    tail = ["ld.param.b64 %rd1, [p0];", "mul.wide.u32 %rd2, %r5, 4;", "add.s64 %rd1, %rd1, %rd2;"]
    loop = [line.strip() for line in LOOP.replace("; ", ";\n").splitlines()]
    launch([*head, *loop, "bar.sync 0;", *tail, "st.global.b32 [%rd1], %r0;"], out, grid=11)
    n = np.arange(11) & 7
    assert np.array_equal(out, (n * (n + 1) // 2 + 100).repeat(32))


def test_threads_may_return_early():
    out = np.zeros(20, np.uint32)
    lines = ["mov.u32 %r1, %tid.x;", "setp.ge.u32 %p1, %r1, 20;", "@%p1 ret;", "ld.param.b64 %rd1, [p0];"]
    lines += ["mul.wide.u32 %rd2, %r1, 4;", "add.s64 %rd1, %rd1, %rd2;", "st.global.b32 [%rd1], %r1;"]
    launch(lines, out)
    assert np.array_equal(out, np.arange(20))


def test_a_barrier_where_threads_have_parted():
    with pytest.raises(Fault, match=r"deadlock[\s\S]*the rest of its warps[\s\S]*bar\.sync"):
        value_of("setp.gt.u32 %p1, %r1, 200;\n@%p1 bra $end;\nbar.sync 0;\n$end:\nmov.b32 %r0, 1;", VALUE)


def test_a_register_that_nothing_wrote():
    with pytest.raises(Fault, match=r"register: it is read[\s\S]*add\.s32 %r0, %r50, 1"):
        value_of("add.s32 %r0, %r50, 1;")


@pytest.mark.parametrize(
    "line",
    ["bar.sync 16;", "shfl.sync.bfly.b32 %r0|%p1, %r1, 1, 31, -1;", "shfl.sync.bfly.b32 %r0, %r1, 1, 31, 15;"],
)
def test_what_is_unknown_is_named(line):
    with pytest.raises(Unsupported, match=line.split()[0]):
        value_of(line)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "tcgen05.mma.cta_group::1.kind::f16",
            "mbarrier.complete_tx.shared::cta.b64",
            "cp.async.bulk.prefetch.L2.global",
        ),
        *("barrier.cluster.arrive", "redux.sync.add.s32", "griddepcontrol.wait", "fence.acq_rel.gpu"),
        *("ld.const.b32", "atom.add.u32", "red.global.add.f32", "match.all.sync.b32", "discard.L2", "made.up"),
    ],
)
def test_every_unknown_instruction_is_refused_by_its_name(name):
    with pytest.raises(Unsupported, match=name.replace(".", r"\.")):
        value_of(f"{name} %r0, [%rd1], %r1;")


def test_a_directive_that_is_unknown():
    with pytest.raises(Unsupported, match=r"directive \.calltargets"):
        parse(".calltargets $a, $b;")


def test_every_instruction_is_tested():
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in INSTRUCTIONS if name not in text] == []
