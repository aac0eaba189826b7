"""Compiled kernels that are broken on purpose, and the fault that each ends with."""

import re

import pytest
import torch

import maskflash as mf
from maskflash.testing import Shape
from tests.ptx.driver import DEVICE
from tests.ptx.faults import Fault

pytestmark = pytest.mark.skipif(DEVICE.arch == 0, reason="compiles, with MASKFLASH_TEST_DEVICE=sm_80 or sm_90")
LENGTH = 350  # no multiple of any tile, and long enough that full tiles are walked
KERNELS = ("forward", "delta", "dkdv", "dq")
ORDERING = ("bar.sync", "cp.async.wait_group", "fence.proxy.async", "wgmma.fence", "wgmma.wait_group")

# How many of a kind may be dropped from a kernel unnoticed, at most: what they order, another one orders too. After a
# loop Triton waits again for what the loop's last wait has seen end, and has a barrier behind it. A second fence stands
# before products whose registers, or operands, the first one has ordered.
REDUNDANT = {
    ("forward", "bar.sync"): 4,
    ("forward", "cp.async.wait_group"): 1,
    ("forward", "fence.proxy.async"): 2,
    ("dkdv", "bar.sync"): 3,
    ("dkdv", "cp.async.wait_group"): 1,
    ("dkdv", "fence.proxy.async"): 1,
    ("dkdv", "wgmma.fence"): 2,
    ("dkdv", "wgmma.wait_group"): 1,
    ("dq", "bar.sync"): 2,
    ("dq", "cp.async.wait_group"): 1,
    ("dq", "fence.proxy.async"): 2,
    ("dq", "wgmma.fence"): 2,
    ("dq", "wgmma.wait_group"): 1,
}
KINDS = {
    "bar.sync": {"shared race", "shared proxy"},
    "cp.async.wait_group": {"shared in flight"},
    "fence.proxy.async": {"shared proxy"},
    "wgmma.fence": {"wgmma fence"},
    "wgmma.wait_group": {"wgmma registers", "shared in flight"},
}


@pytest.fixture(scope="module")
def calls():
    """The launches of a causal forward and backward pass in bfloat16, by kernel."""
    q, k, v = Shape(1, 2, 1, LENGTH, LENGTH, 64, 64).tensors(torch.bfloat16)
    DEVICE.calls = []
    out = mf.attention(q, k, v, mf.causal(), backend="triton")
    out.backward(torch.randn_like(out))
    found = {call.name: call for call in DEVICE.calls}
    DEVICE.calls = None
    assert set(found) == set(KERNELS)
    return found


def fault(call, *args, **kwargs):
    """How a changed launch ends."""
    with pytest.raises(Fault) as caught:
        call.run(*args, **kwargs)
    return caught.value


def without(text, number):
    """PTX without a line, which is left empty."""
    lines = text.splitlines()
    lines[number] = ""
    return "\n".join(lines)


def places(text, start):
    return [number for number, line in enumerate(text.splitlines()) if line.strip().startswith(start)]


@pytest.mark.parametrize("name", KERNELS)
def test_what_orders_memory_and_registers_may_not_be_dropped(calls, name):
    call = calls[name]
    unnoticed = []
    for kind in ORDERING:
        for number in places(call.text, kind):
            try:
                call.run(without(call.text, number))
            except Fault as found:
                assert found.kind in KINDS[kind], found
            else:
                unnoticed.append((kind, number + 1))
    print(f"{name}: redundant:", *(f"{kind} in line {number}" for kind, number in unnoticed))
    for kind in ORDERING:
        many = len(places(call.text, kind))
        count = sum(one == kind for one, _ in unnoticed)
        assert count <= REDUNDANT.get((name, kind), 0), unnoticed
        assert many == 0 or count < many, f"no {kind} of {name} is noticed"


@pytest.mark.parametrize(
    ("name", "pointer"),
    [("forward", "q_ptr"), ("forward", "k_ptr"), ("dkdv", "dout_ptr"), ("dq", "v_ptr"), ("dq", "dq_ptr")],
)
def test_a_tensor_that_is_less_aligned_than_it_was_said_to_be(calls, name, pointer):
    found = fault(calls[name], shift={pointer: 8})
    assert found.kind == "global alignment"
    assert f"16 bytes at {pointer}" in str(found)


@pytest.mark.parametrize(
    ("name", "stride"), [("forward", "k_s"), ("forward", "out_h"), ("dkdv", "q_s"), ("dq", "dout_s")]
)
def test_strides_that_lead_out_of_a_tensor(calls, name, stride):
    found = fault(calls[name], **{stride: calls[name].values[stride] * 2 + 1})
    assert found.kind == "global bounds"
    assert stride[:-2] in str(found)


@pytest.mark.parametrize(
    ("name", "length"), [("forward", "q_len"), ("forward", "kv_len"), ("dkdv", "q_len"), ("dq", "kv_len")]
)
def test_lengths_that_are_one_too_long(calls, name, length):
    assert fault(calls[name], **{length: LENGTH + 1}).kind in ("global bounds", "global double write", "global foreign")


@pytest.mark.parametrize("name", ["forward", "dkdv", "dq"])
def test_loads_without_their_guards(calls, name):
    text = re.sub(r"@!?%p\d+ (ld\.global)", r"\1", calls[name].text)
    assert text != calls[name].text
    assert fault(calls[name], text).kind == "global bounds"


@pytest.mark.parametrize("name", ["forward", "dkdv", "dq"])  # delta has one, and then has no results at all
def test_a_store_that_is_left_out(calls, name):
    text = calls[name].text
    numbers = [n for n, line in enumerate(text.splitlines()) if re.search(r"\bst\.global", line)]
    found = fault(calls[name], without(text, numbers[0]))
    assert found.kind == "global unwritten"


def test_an_input_that_nobody_wrote(calls):
    lse = torch.empty(calls["dq"].values["lse_ptr"].shape)
    found = fault(calls["dq"], lse_ptr=lse)
    assert found.kind == "global uninitialised"


def test_a_fault_names_the_line_of_the_ptx_and_of_the_kernel(calls):
    message = str(fault(calls["forward"], shift={"k_ptr": 8}))
    assert re.search(r"forward, PTX line \d+: .*(ld\.global|cp\.async)", message)
    assert re.search(r"from [0-9a-f]+\.py:\d+: (k_tile = )?tl\.load", message), message


def test_what_is_not_broken_runs_again(calls):
    for call in calls.values():
        call.run()
