"""What the analysis of a GPU's tensors waits for: one copy of the tables at most, whatever the mask; and what it moves.

There is no GPU here; `stand_in.Device` notes for what the host of a real one would wait.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.classify import classify
from maskflash.backends.triton import launch as triton_launch
from maskflash.backends.triton import run as kernels
from maskflash.functions.sizes import Sizes
from maskflash.ground import copies as table_copies
from maskflash.ground import transfer
from maskflash.op import autograd, cache
from maskflash.op.spec import Spec
from tests.ground.stand_in import CPU, CUDA, Device, OnDevice, Stream

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")


@pytest.fixture
def device(monkeypatch):
    """A stand-in, its streams and its properties; no kernel runs on it."""
    cache._entries.clear()
    main = Stream()
    limits = SimpleNamespace(L2_cache_size=1 << 25, multi_processor_count=100, shared_memory_per_block_optin=1 << 17)
    answers = {
        "current_stream": main,
        "is_current_stream_capturing": False,
        "_lazy_init": None,
        "is_available": True,
        "current_device": 0,
        "device": nullcontext(),
        "device_count": 1,
        "get_device_name": "stand-in",
        "get_device_capability": (9, 0),
        "get_device_properties": limits,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    for module in (kernels, triton_launch):
        monkeypatch.setattr(module, "kernel", lambda *args: SimpleNamespace(launch=lambda *a, **k: None))
    with Device() as made:
        yield made
    cache._entries.clear()


DOC = [[0] * 90 + [1] * 50 + [2] * 60, [0] * 120 + [1] * 80]
SCATTERED = mf.mask(lambda b, h, q, kv: (q - kv) * (q + 1) % 64 > 3 and kv <= q + h)


def packed(b, h, q, kv, *, doc, weight):
    return q >= kv and doc[b, q] == doc[b, kv] and weight[q % 5] > 0.5


def step(mask, offset=0, **mask_args):
    """Forward and backward as a call has them, but for the kernels themselves: problem and plan."""
    q, k, v, dout = (torch.randn(2, 4, 200, 16, device=CUDA) for _ in range(4))
    attn = mf.compile(mask, block_size=32)
    sizes = Sizes.of(q, k, offset)
    slots, params, tables = attn._bound(attn.mask, sizes, mask_args)
    spec = Spec.make(slots.text, params, tables, offset, 0, None, 0.25, (32, 32), "triton")
    out, lse = autograd._forward(q, k, v, *spec)
    autograd._backward(dout, None, q, k, v, out, lse, *spec)
    return spec.problem(sizes), cache.find(spec, sizes).plan


def on_device(*tensors):
    """Tensors of the stand-in, without a trace in its notes."""
    return [OnDevice(x.clone()) for x in tensors]


def arguments(device):
    """Tables of a batch, on the stand-in."""
    doc, weight = on_device(torch.tensor(DOC), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))
    return {"doc": doc, "weight": weight}


def memory(tensors):
    return [x if x is None else x.memory for x in tensors]


def test_tables_of_a_device_are_waited_for_once(device):
    tables, (offset,) = arguments(device), on_device(torch.tensor([0, -7]))
    for start in (0, offset):
        step(mf.mask(packed), start, **tables)
        assert device.waits == ["_to_copy"]
        assert device.copies.count("to host") == 1
        copies = len(device.copies)
        step(mf.mask(packed), start, **tables)  # and now nothing is copied
        assert len(device.copies) == copies
        device.waits.clear()
        device.copies.clear()


@pytest.mark.parametrize(
    "mask",
    [
        mf.causal(),
        SCATTERED,
        mf.causal() & mf.document([120, 60]),
        mf.document([50, 90]) & mf.padding(torch.tensor([130, 200])),
        mf.ColumnIntervals(torch.arange(200).view(1, 1, -1).int() // 50 * 50 + 50, causal=True),
    ],
    ids=["formula", "elements", "intervals", "two tables", "vectors"],
)
def test_tables_of_the_host_and_none_at_all_are_not_waited_for(device, mask):
    step(mask)
    assert device.waits == []
    assert "to host" not in device.copies
    assert "to device" in device.copies


def test_a_captured_table_may_be_written_to(device):
    ids = torch.tensor(DOC[0])
    mask = mf.mask(lambda b, h, q, kv: q >= kv and ids[q] == ids[kv])
    before = step(mask)[1].nbytes
    ids.zero_()
    problem, after = step(mask)
    assert device.waits == []
    assert after.nbytes != before
    assert not problem.inputs.tables[0].memory.any()


def test_a_write_while_a_table_is_copied_is_noticed(device, monkeypatch):
    table = torch.zeros(4, dtype=torch.int64)
    copied = transfer.moved

    def written_to(*args):
        result = copied(*args)
        table.fill_(1)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "moved", written_to)
        table_copies.on(table, CUDA)
    assert table_copies.on(table, CUDA).memory.tolist() == [1] * 4


def test_an_original_with_other_memory_is_none(device):
    table = torch.arange(4)
    (copy,) = transfer.Upload([table], CUDA).tensors
    transfer.remember(copy, table, table._version)
    table.data = torch.zeros(9, dtype=torch.int64)  # no version tells
    assert transfer.to_host([copy])[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("which", ["original", "copy"])
def test_what_was_written_to_is_no_original(device, which):
    table = torch.arange(7)
    (copy,) = transfer.Upload([table], CUDA).tensors
    assert transfer.to_host([copy])[0].tolist() == list(range(7))
    transfer.remember(copy, table, table._version)
    assert len(device.waits) == 1
    assert transfer.to_host([copy])[0].data_ptr() == table.data_ptr()
    assert len(device.waits) == 1
    (table if which == "original" else copy).add_(1)
    assert transfer.to_host([copy])[0].tolist() == [x + (which == "copy") for x in range(7)]
    assert len(device.waits) == 2


def test_what_was_prepared_for_cuda_is_found_by_calls(device):
    tables = arguments(device)
    mf.compile(mf.mask(packed), block_size=32, backend="triton").prepare(200, 200, batch=2, device="cuda", **tables)
    assert device.copies == ["to host", "to device"]
    step(mf.mask(packed), **tables)
    assert "to host" not in device.copies[2:]
    assert len(device.waits) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_the_device_gets_what_the_interpreter_walks(device, inference):
    with torch.inference_mode(inference):
        problem, plan = step(mf.mask(packed), **arguments(device))
    here = kernels.plan(classify(problem), CPU)
    assert plan.narrow == here.narrow
    for rows in (True, False):
        for x, y in zip(memory([plan.seen(rows=rows)]), [here.seen(rows=rows)], strict=True):
            assert (x is None and y is None) or torch.equal(x, y)
        walked, expected = plan.walked(rows, 7, 1), here.walked(rows, 7, 1)
        assert all(x.device == CUDA and x.is_contiguous() for x in walked.values())
        assert walked.keys() == expected.keys()
        assert all(torch.equal(walked[name].memory, x) for name, x in expected.items())


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 1).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, x),
        lambda x: torch.arange(3).to(CUDA),
        lambda x: torch.arange(3).to(CUDA, non_blocking=True),  # from memory that isn't page-locked
        lambda x: torch.empty(3, pin_memory=True).to(CUDA),
    ],
)
def test_the_stand_in_notices_waits(device, ask):
    ask(*on_device(torch.arange(4)))
    assert len(device.waits) == 1


def test_the_stand_in_keeps_devices_apart(device):
    with pytest.raises(AssertionError, match="here and there"):
        on_device(torch.arange(4))[0] + torch.arange(4)
    (on_device(torch.arange(4))[0] + 1) * torch.tensor(2)  # a number may come from anywhere


def test_nothing_is_copied_while_a_graph_is_captured(device, monkeypatch):
    tables = arguments(device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for mask, mask_args in ((mf.mask(packed), tables), (mf.causal(), {}), (mf.document([77, 3]), {})):
        with pytest.raises(mf.BackendError, match=r"CUDA graph is being captured.*run the same call once before"):
            step(mask, **mask_args)
    assert device.copies == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    plan = step(mf.mask(packed), **tables)[1]  # a refusal leaves nothing behind
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    step(mf.mask(packed), **tables)
    with pytest.raises(mf.BackendError, match="CUDA graph is being captured"):
        plan.walked(False, 3, 5)  # an order that isn't there yet


def test_other_streams_wait_for_the_copy_on_the_device(device, monkeypatch):
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((tensor, stream)))
    made, other, graph = torch.cuda.current_stream(), Stream(), Stream()
    upload = transfer.Upload([torch.arange(3), torch.ones(2)], CUDA)
    upload.lend()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
    for _ in range(2):
        upload.lend()
    assert [event.of for event in other.waited] == [made]
    assert [tensor is own and stream is other for (tensor, stream), own in zip(kept, upload.tensors, strict=True)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    upload.lend()  # it may not wait for what isn't in the graph
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graph.waited == []
    upload.lend()
    assert [event.of for event in graph.waited] == [made]
    assert made.waited == []


def test_public_answers_are_where_they_were_asked_for(device):
    tables = arguments(device)
    here = {name: table.memory for name, table in tables.items()}
    sizes = {"batch": 2, "block_size": 32}
    mask = mf.mask(packed)
    found = mask.block_map(200, 200, **sizes, device=CUDA, **tables)
    assert device.waits == ["_to_copy"]
    assert found.device == CUDA
    for x, y in zip(memory(found.rows.tensors), mask.block_map(200, 200, **sizes, **here).rows.tensors, strict=True):
        assert torch.equal(x, y)
    doc = mf.document(ids=DOC[0])
    intervals = (mf.causal() & doc).to_flashmask(200, 200, device=CUDA)
    assert intervals.lts.device == CUDA
    assert torch.equal(intervals.lts.memory, (mf.causal() & doc).to_flashmask(200, 200).lts)
    assert mf.implies(mf.causal() & doc, doc, 200, 200, device=CUDA)
    told = mf.compile(mask, block_size=32, backend="triton").explain(200, 200, batch=2, device=CUDA, **tables)
    expected = mf.compile(mask, block_size=32, backend="triton").explain(200, 200, batch=2, **here)
    assert told.to_dict()["passes"] == expected.to_dict()["passes"]


DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def tensors(draw):
    """A tensor of any dtype, shape and strides, empty and expanded ones too."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randint(0, 100, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    for dim in range(x.ndim):
        how = draw(st.sampled_from(["as it is", "strided", "flipped last", "expanded"]))
        if how == "strided":
            x = x.repeat_interleave(2, dim).narrow(dim, 0, 2 * x.shape[dim]).unflatten(dim, (-1, 2)).select(dim + 1, 0)
        if how == "flipped last":
            x = x.transpose(dim, -1)
        if how == "expanded" and x.shape[dim]:
            x = x.narrow(dim, 0, 1).expand(*x.shape[:dim], draw(st.integers(1, 9)), *x.shape[dim + 1 :])
    return x


@given(st.lists(tensors(), max_size=6))
def test_tensors_arrive_as_they_are(many):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with Device() as device:
            there = transfer.moved(many, CUDA)
            assert device.waits == []
            back = transfer.to_host(there)
            assert device.copies == ["to device", "to host"][: 2 * bool(many)]
            assert len(device.waits) == bool(many)
    for x, y, own in zip(many, back, memory(there), strict=True):
        assert y.device == CPU
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert torch.equal(x, y)
        assert torch.equal(x, own)
        assert own.storage_offset() * own.itemsize % 128 == 0
        repeated = [size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)]
        assert [size > 1 and step == 0 for size, step in zip(y.shape, y.stride(), strict=True)] == repeated


def test_what_is_there_is_not_copied():
    many = [torch.arange(3), torch.ones(2)]
    assert all(x is y for x, y in zip(transfer.moved(many, CPU), many, strict=True))
    assert transfer.moved([], CUDA) == []
