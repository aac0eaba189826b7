"""mbarriers, barriers of some warps, registers that warps give back, elections: single instructions, and deadlocks."""

import numpy as np
import pytest

from tests.ptx.faults import Fault, Unsupported
from tests.ptx.orders import ORDERS
from tests.ptx.snippets import kernel, launch, value_of

INIT = ["setp.eq.u32 %p1, %r99, 0;", "@%p1 mbarrier.init.shared::cta.b64 [0], 1;"]
ALL = "bar.sync 0;"


def ends(lines, threads=64, shared=256, **options):
    """The kind of the fault in which these lines end, %r99 being the thread; None if there is none."""
    try:
        kernel(["mov.u32 %r99, %tid.x;", *lines], 0, threads, **options).launch(1, [], shared)
    except Fault as fault:
        return fault.kind
    return None


def arrive(warp, more="", place=0):
    """The first thread of a warp arrives."""
    name = "mbarrier.arrive.expect_tx" if more else "mbarrier.arrive"
    return [f"setp.eq.u32 %p2, %r99, {32 * warp};", f"@%p2 {name}.shared::cta.b64 _, [{place}]{more};"]


def wait(parity, place=0, name="again"):
    """What Triton writes where a warp waits."""
    return [
        *("{", ".reg .pred complete;", f"{name}:"),
        f"mbarrier.try_wait.parity.shared::cta.b64 complete, [{place}], {parity};",
        *(f"@!complete bra.uni {name};", "}"),
    ]


def by_warp(first, second):
    """Warp 0 runs one text, warp 1 the other."""
    return ["setp.ge.u32 %p9, %r99, 32;", "@%p9 bra $second;", *first, "bra $end;", "$second:", *second, "$end:"]


STORE, LOAD = "st.shared.b32 [128], 7;", "ld.shared.b32 %r5, [128];"


def test_a_warp_may_read_what_another_one_wrote_before_it_arrived():
    read = [*wait(0), LOAD]
    assert ends([*INIT, ALL, *by_warp([STORE, *arrive(0)], read)]) is None
    assert ends([*INIT, ALL, *by_warp([*arrive(0), STORE], read)]) == "shared race"
    assert ends([*INIT, ALL, *by_warp([STORE, *arrive(0)], [LOAD])]) in ("shared race", "shared uninitialised")


def test_a_warp_may_write_what_another_one_read_before_it_arrived():
    before = [*INIT, STORE.replace("7", "%r99 ").replace("%r99 ", "7"), ALL]
    assert ends([*before, *by_warp([LOAD, *arrive(0)], [*wait(0), STORE.replace("7", "8")])]) is None
    assert ends([*before, *by_warp([*arrive(0), LOAD], [*wait(0), STORE.replace("7", "8")])]) == "shared race"


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_phases_alternate(order):
    """Two warps hand a number to and fro, one more each time: mbarriers at 0 and 8."""
    out = np.zeros(1, np.uint32)
    lines = ["mov.u32 %r99, %tid.x;", *INIT, "@%p1 mbarrier.init.shared::cta.b64 [8], 1;", ALL]
    add = ["ld.shared.b32 %r5, [128];", "add.s32 %r5, %r5, 1;", "st.shared.b32 [128], %r5;"]
    one, other = ["st.shared.b32 [128], 0;"], []
    for n in range(6):
        one += [*arrive(0), *wait(n % 2, 8, "one"), *add]
        other += [*wait(n % 2, 0, "other"), *add, *arrive(1, place=8)]
    last = ["bar.sync 0;", "ld.param.b64 %rd1, [p0];", "st.global.b32 [%rd1], %r5;"]
    body = [*lines, *by_warp([*one, "st.shared.b32 [132], %r5;"], other), ALL, "ld.shared.b32 %r5, [132];", *last]
    launch(body, out, threads=64, shared=256, order=order)
    assert out[0] == 12


def test_expected_bytes_hold_a_phase():
    more = [*INIT, ALL, *arrive(0, ", 16"), *wait(0)]
    assert ends(more) == "deadlock"
    late = ["setp.eq.u32 %p2, %r99, 0;", "@%p2 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [0], 16;"]
    assert ends([*INIT, ALL, *late, *arrive(0), *wait(0)]) == "deadlock"
    assert ends([*INIT, ALL, *late]) == "mbarrier bytes"
    assert ends([*INIT, ALL, *late, ALL, "@%p1 mbarrier.inval.shared::cta.b64 [0];"]) == "mbarrier bytes"


def test_one_look_at_a_phase():
    look = "mbarrier.test_wait.parity.shared::cta.b64 %p{}, [0], {};"
    body = [*INIT, ALL, look.format(3, 0), look.format(4, 1), ALL, *arrive(0), ALL, look.format(5, 0)]
    bits = [f"selp.b32 %r{n}, 1, 0, %p{n};" for n in (3, 4, 5)]
    body += [*bits, "shl.b32 %r4, %r4, 1;", "shl.b32 %r5, %r5, 2;", "or.b32 %r0, %r3, %r4;", "or.b32 %r0, %r0, %r5;"]
    assert (value_of("\n".join(body), shared=64) == 0b110).all()


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("mbarrier", [*arrive(0)]),  # not initialised
        ("mbarrier", [*INIT, *INIT]),
        ("mbarrier", [*INIT, ALL, "@%p1 mbarrier.inval.shared::cta.b64 [0];", ALL, *arrive(0)]),
        ("mbarrier init", [*INIT, *arrive(1)]),  # nothing orders it before
        ("mbarrier arrivals", [*INIT, ALL, "mbarrier.arrive.shared::cta.b64 _, [0], 2;"]),
        ("mbarrier arrivals", ["@%p1 mbarrier.init.shared::cta.b64 [0], 0;"]),
        ("mbarrier bytes", [*INIT, ALL, *arrive(0, ", 1048576")]),
        ("shared mbarrier", [*INIT, ALL, "ld.shared.b32 %r5, [4];"]),
        ("shared mbarrier", [*INIT, ALL, "st.shared.b32 [0], 0;"]),
        ("shared alignment", ["@%p1 mbarrier.init.shared::cta.b64 [4], 1;"]),
        ("deadlock", [*INIT, ALL, *wait(0)]),
        ("deadlock", [*INIT, ALL, *arrive(0), *wait(1)]),  # a phase off by one: the next one never ends
    ],
)
def test_how_mbarriers_go_wrong(kind, lines):
    assert ends(["setp.eq.u32 %p1, %r99, 0;", *lines]) == kind


def test_a_deadlock_names_every_warp_and_what_it_waits_for():
    lines = ["mov.u32 %r99, %tid.x;", *INIT, ALL, *by_warp(wait(0), ["bar.sync 3, 64;"])]
    with pytest.raises(Fault, match="deadlock") as caught:
        kernel(lines, 0, 64).launch(1, [], 64)
    text = str(caught.value)
    assert "warps [0] wait for parity 0 at byte 0, phase 0 of an mbarrier: 0 of 1 arrivals, 0 bytes missing" in text
    assert "warps [1] wait for barrier 3 of 64 threads, where warps [1] are" in text
    assert "mbarrier.try_wait" in text
    assert "bar.sync" in text


def test_barriers_of_some_warps():
    exchange = [STORE, "bar.sync 1, 64;"], ["barrier.sync 1, 64;", LOAD]
    assert ends(by_warp(*exchange), 96 - 32) is None
    assert ends([*by_warp([STORE, "bar.sync 1, 32;"], ["bar.sync 1, 32;", LOAD])]) in ("shared race", "barrier")
    assert ends([*by_warp([STORE, "bar.sync 1, 64;"], ["bar.sync 2, 64;", LOAD])]) == "deadlock"
    assert ends([*by_warp(["bar.sync 1, 96;"], ["bar.sync 1, 64;"])], 96) == "barrier"


def test_registers_are_given_back_before_others_get_them():
    take, give = ["setmaxnreg.inc.sync.aligned.u32 240;"], ["setmaxnreg.dec.sync.aligned.u32 24;"]
    quarter = ["setp.ge.u32 %p9, %r99, 256;", "@%p9 bra $others;", *take, "bra $end;", "$others:", *give, "$end:"]
    # 8 warps of 240 registers and 4 of 24 fit into 64 K; 12 warps of 168 do at the start.
    assert ends(quarter, 384, registers=168) is None
    assert ends([*quarter[:4], "$others:", "$end:"], 384, registers=168) == "deadlock"
    assert ends([*give, "setmaxnreg.dec.sync.aligned.u32 32;"], 384, registers=168) == "registers"
    assert ends(["setmaxnreg.inc.sync.aligned.u32 160;"], 384, registers=168) == "registers"
    for wrong in ("20", "100", "264"):
        with pytest.raises(Unsupported, match="24 to 256, in eights"):
            ends([give[0].replace("24", wrong)], registers=168)


def test_one_lane_is_elected():
    found = value_of("elect.sync %r5|%p0, -1;", np.zeros(64, np.uint32), out="pred")
    assert found.tolist() == ([1] + 31 * [0]) * 2


def test_an_index_chooses_a_target():
    table = "$table: .branchtargets\n$zero,\n$one,\n$two;"
    targets = (
        "$zero:\nmov.b32 %r0, 5;\nbra.uni $end;\n$one:\nmov.b32 %r0, 6;\nbra.uni $end;\n$two:\nmov.b32 %r0, 7;\n$end:"
    )
    body = f"{table}\nbrx.idx %r1, $table;\n{targets}"
    index = np.arange(64, dtype=np.uint32) % 3
    assert np.array_equal(value_of(body, index), index + 5)
    with pytest.raises(Fault, match="branch: to target 3 of 3"):
        value_of(body, index + 1)
