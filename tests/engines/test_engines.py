"""Engines of other libraries beside ours: the same results, through stand-ins that record what they are called with."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import maskflash as mf
from maskflash.engines import fa4
from maskflash.engines.named import ENGINES
from maskflash.forms import cute
from maskflash.op import cache, spec
from maskflash.testing import masks
from tests.engines import fakes

NAMES = ["cudnn", "fa4", "magi", "flashinfer"]
TRAINING = ["cudnn", "fa4", "magi"]
DIMS = {"cudnn": 16, "fa4": 16, "magi": 64, "flashinfer": 64}


def stand_in_cute(patch):
    """The function of a mask as a plain one, which computes it by our evaluation."""

    def to_cute(problem):
        def function():
            def mask_mod(b, h, row, column, aux_tensors, aux_scalars):
                return problem.visible(b, h, row, column)

            return mask_mod

        return SimpleNamespace(function=function, aux_scalars=lambda: None)

    patch.setattr(fa4, "to_cute", to_cute)


@pytest.fixture
def library(monkeypatch):
    """A function that makes an engine's library a stand-in that runs on the CPU, and gives what it is called with."""

    def install(name):
        kind = type(ENGINES[name])
        monkeypatch.setattr(kind, "dtypes", {"cpu": (torch.float32, torch.bfloat16)})
        monkeypatch.setattr(kind, "with_lse", ("cpu",))
        if kind.with_gradients:
            monkeypatch.setattr(kind, "with_gradients", ("cpu",))
        monkeypatch.setattr(fa4, "capability", lambda device: (10, 0))
        stand_in_cute(monkeypatch)
        cache.invalidate()
        return fakes.install(name, monkeypatch)

    return install


def inputs(batch, heads, kv_heads, q_len, kv_len, dim, grad=False):
    shapes = (batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)
    return [torch.randn(shape).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=masks(), q_len=st.integers(0, 24), kv_len=st.integers(0, 24), offset=st.sampled_from([0, 3, "rows"]))
def test_results_are_ours(name, library, mask, q_len, kv_len, offset):
    library(name)
    q, k, v = inputs(2, 4, 2, q_len, kv_len, DIMS[name])
    q_offset = torch.tensor([2, 5]) if offset == "rows" else offset
    given_ = {"q_offset": q_offset, "return_lse": True}
    try:
        expected, lse = mf.compile(mask)(q, k, v, **given_)
        found, found_lse = mf.compile(mask, block_size=16, backend=name)(q, k, v, **given_)
    except (mf.MaskIndexError, mf.UnsupportedMask):
        assume(False)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_lse, lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_without_b_serves_any_batch(name, library):
    """It is analysed once, and its form has an entry for each batch row."""
    library(name)
    attn = mf.compile(mf.causal() & mf.document([3, 9]), backend=name, block_size=16)
    for batch in (1, 3, 2, 1):
        q, k, v = inputs(batch, 2, 2, 12, 12, DIMS[name])
        torch.testing.assert_close(attn(q, k, v), mf.attention(q, k, v, attn.mask), rtol=1e-4, atol=1e-5)


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv] and doc[b, q] >= 0


DOC = torch.tensor([[0] * 17 + [1] * 20 + [-1] * 3, [0] * 5 + [-1] * 2 + [1] * 33])  # -1 sees nothing, and isn't seen


class Watching(TorchDispatchMode):
    """Sees all operations, and changes none; with one, calls go the way of torch.compile."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def results(attn, tensors, through_lse):
    out, lse = attn(*tensors, doc=DOC, return_lse=True)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    if through_lse:
        loss = loss + lse.masked_fill(lse == -math.inf, 0.0).square().sum()
    return [out, lse, *torch.autograd.grad(loss, tensors)]


def hidden(tensors):
    """k and v with NaN where nobody sees them."""
    q, k, v = (x.detach().clone() for x in tensors)
    nobody = (DOC < 0)[:, None, :, None]
    return [x.requires_grad_() for x in (q, k.masked_fill(nobody, math.nan), v.masked_fill(nobody, math.nan))]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("name", TRAINING)
def test_gradients_are_ours(name, library, watched, monkeypatch):
    library(name)
    if name == "magi":  # it has none for lse
        monkeypatch.setattr(type(ENGINES[name]), "learns_from_lse", True)
    tensors = hidden(inputs(2, 4, 2, 40, 40, DIMS[name]))
    through_lse = name != "magi"
    expected = results(mf.compile(packed), tensors, through_lse)
    attn = mf.compile(packed, backend=name, block_size=16, deterministic=False)
    with Watching() if watched else nullcontext():
        found = results(attn, tensors, through_lse)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_what_cudnn_is_called_with(library):
    calls = library("cudnn")
    attn = mf.compile(packed, backend="cudnn", scale=0.5)
    tensors = inputs(2, 4, 2, 40, 40, 16, grad=True)
    for _ in range(2):
        attn(*tensors, doc=DOC)
    with torch.no_grad():
        attn(*tensors, doc=DOC)
    planned = calls.of("create_mask_plan")
    assert [plan["build_backward"] for plan in planned] == [True, False]  # one for each kind of call
    assert planned[0]["mask_func"].shape == (1, 3, 80)
    assert planned[0]["q"].shape == (2, 40, 4, 16)
    assert planned[0]["k"].shape == (2, 40, 2, 16)
    assert calls.of("flex_attn_func") == [{"scale": 0.5, "deterministic": True, "lse": True}] * 3


def test_cudnn_has_columns_for_all_batch_rows_and_rows_of_heads(library):
    calls = library("cudnn")
    tensors = inputs(3, 2, 2, 8, 8, 16)
    mf.attention(*tensors, mf.causal(), backend="cudnn")
    mf.attention(*tensors, lambda b, h, q, kv: q >= kv + h, backend="cudnn")
    assert [plan["mask_func"].shape for plan in calls.of("create_mask_plan")] == [(1, 1, 24), (2, 1, 24)]


def test_what_fa4_is_called_with(library):
    calls = library("fa4")
    attn = mf.compile(packed, backend="fa4", scale=0.5, deterministic=False)
    attn(*inputs(2, 4, 2, 40, 40, 16, grad=True), doc=DOC)
    (call,) = calls
    arguments = call[1]
    assert (arguments["scale"], arguments["causal"], arguments["window"]) == (0.5, False, (None, None))
    assert arguments["lse"] is True and arguments["deterministic"] is False
    assert arguments["forward"].block_size == (128, 128) and arguments["forward"].mask_block_cnt.shape == (2, 1, 1)
    assert arguments["backward"].block_size == (128, 128)
    assert arguments["aux_tensors"][0] is DOC and arguments["aux_scalars"] is None


@pytest.mark.parametrize(
    ("generation", "q_len", "dims", "expected"),
    [
        (9, 4096, (64, 64), ((128, 128), (128, 128))),
        (9, 4096, (192, 128), ((128, 64), (128, 96))),
        (9, 4096, (256, 256), ((128, 64), (128, 64))),
        (10, 100, (64, 64), ((128, 128), (128, 128))),
        (10, 4096, (64, 64), ((256, 128), (128, 128))),
        (10, 4096, (128, 128), ((256, 128), (128, 256))),
        (10, 4096, (256, 256), ((128, 128), (128, 256))),
    ],
)
def test_blocks_of_fa4(generation, q_len, dims, expected):
    assert fa4.blocks(generation, q_len, *dims) == expected


@pytest.mark.parametrize("offset", [0, 3, torch.tensor([1, 2])])
def test_what_fa4_reads_is_what_its_text_does(offset):
    flags, table = torch.arange(9) % 2 == 0, torch.arange(20)
    mask = mf.mask(lambda b, h, q, kv: flags[kv % 9] and table[q] > kv)
    problem = mask.at(9, 9, batch=2, q_offset=offset, kv_offset=offset).problem
    for x, y in zip(cute.aux_tensors(problem), cute.to_cute(problem).aux_tensors, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_what_magi_is_called_with(library):
    calls = library("magi")
    attn = mf.compile(packed, backend="magi", scale=0.5)
    attn(*inputs(2, 4, 2, 40, 40, 64), doc=DOC)
    ((name, arguments),) = calls
    assert name == "flex_flash_attn_func"
    assert arguments["q_ranges"].tolist() == [[0, 17], [17, 37], [40, 45], [47, 80]]
    assert arguments["k_ranges"].tolist() == arguments["q_ranges"].tolist()
    assert arguments["types"].tolist() == [1, 1, 1, 1]
    assert arguments["scale"] == 0.5 and arguments["deterministic"] is True


def test_what_flashinfer_is_called_with(library):
    calls = library("flashinfer")
    attn = mf.compile(packed, backend="flashinfer", scale=0.5, block_size=16)
    for _ in range(2):
        attn(*inputs(2, 4, 2, 40, 40, 64), doc=DOC)
    assert [name for name, _ in calls] == ["wrapper", "plan", "run", "run"]
    assert calls[0][1]["backend"] == "fa2" and calls[0][1]["workspace"].nbytes == 128 << 20
    plan = calls[1][1]
    assert plan["sizes"][1:] == (96, 16, 16, 4, 2, 64) and plan["sizes"][0] in (88, 96)
    assert plan["dtypes"] == (torch.float32,) * 3 and plan["scale"] == 0.5
    assert plan["mask"].shape == (len(plan["indices"]), 16, 16)
    assert calls[2][1] == {"lse": True}


@pytest.mark.parametrize("name", ["magi", "flashinfer"])
def test_heads_that_differ_have_no_such_form(name, library):
    library(name)
    with pytest.raises(mf.UnsupportedMask, match=r"row 0 of batch row 0 sees .* head 1"):
        mf.attention(*inputs(1, 2, 2, 8, 8, 64), lambda b, h, q, kv: q >= kv + h, backend=name)


ASKED = {
    "dropout": ({"dropout_p": 0.5}, "has no dropout; leave dropout_p out"),
    "sinks": ({"sinks": torch.zeros(2)}, "is given no sinks; leave sinks out"),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", NAMES)
def test_what_an_engine_cant_do_is_refused_before_any_work(name, asked, library):
    calls = library(name)
    arguments, message = ASKED[asked]
    with pytest.raises(mf.BackendError, match=f"the {name} engine {message}, or let backend="):
        mf.compile(mf.causal(), backend=name)(*inputs(1, 2, 2, 8, 8, DIMS[name]), **arguments)
    assert calls == []


@pytest.mark.parametrize("name", NAMES)
def test_scores_dtypes_and_head_dims_are_refused(name, library):
    calls = library(name)
    tensors = inputs(1, 2, 2, 8, 8, DIMS[name])
    with pytest.raises(mf.BackendError, match=f"the {name} engine takes no score functions; leave score out"):
        mf.compile(mf.causal(), score=mf.scores.softcap(5.0), backend=name)(*tensors)
    with pytest.raises(mf.BackendError, match=f"the {name} engine takes float32, bfloat16 on cpu, got float64"):
        mf.compile(mf.causal(), backend=name)(*(x.double() for x in tensors))
    with pytest.raises(mf.BackendError, match=f"the {name} engine takes .* got 9 with 9; pad them with zeros"):
        mf.compile(mf.causal(), backend=name)(*inputs(1, 2, 2, 8, 8, 9))
    assert calls == []


def test_gradients_are_refused_where_there_are_none(library):
    calls = library("flashinfer")
    attn = mf.compile(mf.causal(), backend="flashinfer")
    tensors = inputs(1, 2, 2, 8, 8, 64, grad=True)
    with pytest.raises(mf.BackendError, match="the flashinfer engine has no backward on cpu; detach q, k and v"):
        attn(*tensors)
    assert calls == []
    with torch.no_grad():
        assert attn(*tensors).shape == tensors[0].shape


def test_a_gradient_of_lse_that_would_be_lost_is_refused(library):
    calls = library("magi")
    attn = mf.compile(mf.causal(), backend="magi")
    with pytest.raises(mf.BackendError, match="the magi engine has no gradient of lse; leave return_lse out"):
        attn(*inputs(1, 2, 2, 8, 8, 64, grad=True), return_lse=True)
    assert calls == []


def test_gradients_in_any_order_are_asked_for(library):
    library("fa4")
    with pytest.raises(mf.BackendError, match="adds gradients up in any order; pass deterministic=False"):
        mf.compile(mf.causal(), backend="fa4")(*inputs(1, 2, 2, 8, 8, 16, grad=True))


@pytest.mark.parametrize("name", TRAINING)
def test_second_derivatives_are_refused(name, library):
    library(name)
    attn = mf.compile(mf.causal(), backend=name, deterministic=False)
    q, k, v = inputs(1, 2, 2, 8, 8, DIMS[name], grad=True)
    (gradient,) = torch.autograd.grad(attn(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        torch.autograd.grad(gradient.sum(), q)


@pytest.mark.parametrize("name", NAMES)
def test_without_its_library_an_engine_says_how_to_get_it(name):
    with pytest.raises(mf.BackendError, match=f"the {name} engine can't run here: .* is not installed; `pip install"):
        mf.attention(*inputs(1, 2, 2, 8, 8, 64), mf.causal(), backend=name)


@pytest.mark.parametrize("name", NAMES)
def test_with_its_library_it_wants_a_gpu(name, monkeypatch):
    fakes.install(name, monkeypatch)
    with pytest.raises(mf.BackendError, match="it runs on cuda tensors, got cpu; move q, k and v"):
        mf.attention(*inputs(1, 2, 2, 8, 8, 64), mf.causal(), backend=name)


def test_the_op_knows_all_engines():
    assert tuple(ENGINES) == spec.ENGINES


@pytest.mark.parametrize("name", NAMES)
def test_explain_tells_the_form(name, library):
    library(name)
    attn = mf.compile(packed, backend=name)
    told = attn.explain(40, 40, batch=2, doc=DOC)
    assert told.backend == name and told.to_dict()["passes"]["form"]
    assert f"backend            {name}, as asked for" in str(told)
