"""Few rows over many keys, cut into pieces: results equal dense float64, whoever else is in the batch."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import few, launch
from maskflash.op import analyse, few_rows
from maskflash.testing import Shape, assert_matches_dense, error_budget, masks
from tests.backends.triton.test_run import DTYPES
from tests.backends.triton.test_scores import RUNS, scores

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of NaN and infinities
BY_HEAD = ("alibi", "relative bias", "temperature", "pairs", "hidden by value", "hidden by the score", "functions")


@contextmanager
def all_few():
    """Every call's rows count as few, and "auto" cuts each row into pieces of 16 keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "are_few", lambda q_len, kv_len: q_len > 0 and kv_len > 0)
        patch.setattr(few_rows, "may_be", lambda q, k: True)
        patch.setattr(few, "_SHORTEST", 16)
        patch.setattr(gpu, "programs", lambda device: 1 << 20)
        yield


@st.composite
def sizes(draw):
    """Sizes of a step or of drafts: few rows, groups of any size."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3)]))
    dims = draw(st.sampled_from([(16, 16), (8, 24), (20, 9), (1, 1)]))
    lengths = draw(st.integers(1, 9)), draw(st.integers(0, 64))
    return Shape(draw(st.integers(1, 2)), kv_heads * group, kv_heads, *lengths, *dims)


def dense(q, k, v, visible, sinks):
    """Out and lse by definition, in the dtype of q."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    values = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible, -math.inf)
    lse = values.logsumexp(-1) if k.shape[2] else values.new_full(values.shape[:3], -math.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(q)[:, None].expand_as(lse))
    return (values - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp() @ v, lse


@settings(max_examples=20)
@given(
    st.data(),
    sizes(),
    st.sampled_from(DTYPES),
    st.sampled_from([16, 32, (16, 48), (48, 16)]),
    st.sampled_from(["auto", 1, 2, 3]),
)
def test_every_mask_and_shape_matches_dense_float64(device, data, shape, dtype, block_size, splits):
    mask = data.draw(masks(max_len=64, batch=shape.batch, heads=shape.heads))
    sinks, q_offset = None, data.draw(st.integers(0, 40))
    if data.draw(st.booleans()):
        values = st.lists(st.sampled_from([-2.0, 0.5, 4.0, -math.inf]), min_size=shape.heads, max_size=shape.heads)
        sinks = torch.tensor(data.draw(values), device=device)
    if data.draw(st.booleans()):
        q_offset = torch.tensor([q_offset, 3], device=device)[: shape.batch]
    q, k, v = (x.detach() for x in shape.tensors(dtype, device=device))
    with all_few():
        attn = mf.compile(mask, block_size=block_size, backend="triton", splits=splits)
        found = attn(q, k, v, q_offset=q_offset, sinks=sinks, return_lse=True)
    sizes = {"batch": shape.batch, "heads": shape.heads, "q_offset": q_offset, "device": device}
    visible = mask.dense(shape.q_len, shape.kv_len, **sizes)
    exact, plain = (dense(*(x.to(kind) for x in (q, k, v)), visible, sinks) for kind in (torch.float64, dtype))
    norms = [float(x.norm(dim=-1).amax()) if x.numel() else 0.0 for x in (q.double(), k.double(), v.double())]
    terms = {"out": norms[2], "lse": norms[0] * norms[1] * shape.head_dim**-0.5}  # what each is summed from
    for name, ours, truth, other in zip(("out", "lse"), found, exact, plain, strict=True):
        blind = truth == -math.inf
        assert torch.equal(ours == -math.inf, blind), name
        if ours.numel():
            budget = error_budget(other, truth, dtype) + torch.finfo(dtype).eps * terms[name]
            assert float((ours.double() - truth).masked_fill(blind, 0.0).abs().amax()) <= budget, name


@pytest.mark.parametrize("name", [name for name in RUNS if name in BY_HEAD])
def test_scores_match_dense_float64(device, name):
    """With rows of several heads in one tile, so that what a score reads by head differs among them."""
    score = scores(device, heads=4)[name]
    with all_few():
        assert_matches_dense(
            mf.causal(),
            Shape(1, 4, 2, 3, 40, 16, 16),
            score=score,
            q_offset=30,
            block_size=16,
            backend="triton",
            device=device,
        )


def step(device, batch=3, heads=4, kv_heads=2, rows=1, keys=160):
    return [x.detach() for x in Shape(batch, heads, kv_heads, rows, keys, 16, 16).tensors(torch.float32, device=device)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("splits", [1, 3, 1000])
def test_a_row_has_the_same_bits_alone(device, rows, splits):
    """With a fixed number of splits: other requests, longer and shorter, change none."""
    q, k, v = step(device, heads=2, kv_heads=1, rows=rows)
    lengths = torch.tensor([160, 97, 30], device=device)
    visible = mf.mask(lambda b, h, q, kv, *, lengths: kv <= q + lengths[b] - rows)
    attn = mf.compile(visible, backend="triton", block_size=32, splits=splits)
    together = attn(q, k, v, lengths=lengths, return_lse=True)
    for b in range(3):
        own = slice(b, b + 1)
        alone = attn(q[own], k[own], v[own], lengths=lengths[own], return_lse=True)
        assert all(torch.equal(x[own], y) for x, y in zip(together, alone, strict=True))


def launched(monkeypatch):
    """The kernels that are launched from here on: pass and number of programs."""
    found, kernel = [], launch.kernel

    def recorded(special, pass_name):
        made = kernel(special, pass_name)

        class Launched:
            def launch(self, programs, tile, **named):
                found.append((pass_name, programs))
                made.launch(programs, tile, **named)

        return Launched()

    monkeypatch.setattr(few, "kernel", recorded)
    return found


def test_one_piece_needs_no_second_kernel(device, monkeypatch):
    q, k, v = step(device)
    found = launched(monkeypatch)
    sinks = torch.linspace(-1, 1, 4, device=device)
    call = {"q_offset": 159, "sinks": sinks, "return_lse": True}
    whole = mf.compile(mf.causal(), backend="triton", splits=1)(q, k, v, **call)
    assert found == [("split", 3 * 2)]  # batch rows and key heads: query heads of a group are in one tile
    found.clear()
    cut = mf.compile(mf.causal(), backend="triton", splits=2)(q, k, v, **call)
    assert found == [("split", 3 * 2 * 2), ("combine", 3 * 4)]
    for x, y in zip(whole, cut, strict=True):
        torch.testing.assert_close(x, y)


def test_what_no_row_sees_is_not_copied_and_may_hold_anything(device, monkeypatch):
    """Bit by bit; and nothing is zeroed before the kernels."""
    q, k, v = step(device, batch=1, rows=3, keys=200)
    mask = mf.sliding_window(40)
    hidden = ~mask.dense(3, 200, q_offset=190, device=device)[0, 0].any(0)
    assert hidden.any()
    attn = mf.compile(mask, backend="triton", block_size=64, splits=2)
    clean = attn(q, k, v, q_offset=190, return_lse=True)
    for poison in (math.nan, math.inf, -math.inf):
        dirty = [x.masked_fill(hidden[:, None], poison) for x in (k, v)]
        found = attn(q, *dirty, q_offset=190, return_lse=True)
        assert all(torch.equal(x, y) for x, y in zip(clean, found, strict=True))


def test_dropout_is_computed_by_the_kernel_of_many_rows(device, monkeypatch):
    found = launched(monkeypatch)
    q, k, v = step(device)
    attn = mf.compile(mf.causal(), backend="triton", splits=3)
    attn(q, k, v, q_offset=159, dropout_p=0.5, seed=1)
    assert found == []
    assert "row_words" in attn.source(q, k, v, q_offset=159, dropout_p=0.5)
    assert "def split(" in attn.source(q, k, v, q_offset=159)
    assert "def combine(" in attn.source(q, k, v, q_offset=159, pass_name="combine")


@pytest.mark.parametrize("splits", [0, -1, 1.5, "many", True, None])
def test_what_splits_may_be(splits):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match="compile: splits is"):
        mf.compile(mf.causal(), splits=splits)


def test_more_parts_than_are_joined_at_once(device):
    q, k, v = step(device, batch=1, heads=1, kv_heads=1, keys=1400)
    k[:, :, 700:] *= 4  # so that the largest scores come last
    call = {"q_offset": 1399, "sinks": torch.tensor([3.0], device=device), "return_lse": True}
    whole, cut = (
        mf.compile(mf.causal(), backend="triton", block_size=32, splits=n)(q, k, v, **call) for n in (1, 1000)
    )
    for x, y in zip(whole, cut, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("score", [None, lambda score, b, h, q, kv: score + table[b, h]])
def test_steps_are_not_analysed(device, monkeypatch, score):
    """Whatever moves: a number, a tensor of offsets, keys, a table that is written to."""
    q, k, v = step(device, keys=200)
    attn = mf.compile(lambda b, h, q, kv, *, lengths: kv <= q and kv < lengths[b], score=score, backend="triton")
    lengths = torch.tensor([100, 200, 50], device=device)
    monkeypatch.setattr(analyse, "analyse", None)
    for keys, offset in ((180, 179), (190, 189), (200, torch.tensor([10, 199, 70], device=device))):
        lengths -= 1
        found = attn(q, k[:, :, :keys], v[:, :, :keys], q_offset=offset, lengths=lengths, return_lse=True)
        kv, last = torch.arange(keys, device=device), lengths.minimum(torch.as_tensor(offset, device=device) + 1)
        visible = (kv < last[:, None])[:, None, None].expand(3, 4, 1, keys)
        visible = visible & (kv < lengths[:, None])[:, None, None]
        scores = q.repeat_interleave(1, 1) @ k[:, :, :keys].repeat_interleave(2, 1).mT * 0.25
        scores = scores if score is None else scores + table[:, :, None, None]
        truth = scores.masked_fill(~visible, -math.inf).logsumexp(-1)
        torch.testing.assert_close(found[1], truth, atol=2e-6, rtol=1e-5)


table = torch.linspace(-1, 1, 12).view(3, 4)


def test_look_ups_that_sizes_do_not_show_are_read(device):
    """As in any call: out of range is an error, unless a guard excludes it."""
    q, k, v = step(device)
    jumps = torch.tensor([0, 1, 500], device=device)
    ends = torch.arange(10, device=device)
    for mask, fails in (
        (mf.mask(lambda b, h, q, kv: kv <= ends[jumps[b]]), True),
        (mf.mask(lambda b, h, q, kv: jumps[b] < 10 and kv <= ends[jumps[b]]), False),
        (mf.mask(lambda b, h, q, kv: kv <= ends[min(jumps[b], 9)]), False),
        (mf.mask(lambda b, h, q, kv: kv <= ends[q]), True),
    ):
        attn = mf.compile(mask, backend="triton")
        if fails:
            with pytest.raises(mf.MaskIndexError):
                attn(q, k, v, q_offset=159)
        else:
            attn(q, k, v, q_offset=159)


def test_a_graph_that_nothing_shows_to_be_right_is_refused(device, monkeypatch):
    q, k, v = step(device)
    ends = torch.arange(10, device=device)
    monkeypatch.setattr(few_rows, "capturing", lambda device: True)
    attn = mf.compile(lambda b, h, q, kv: kv <= ends[q], backend="triton")
    with pytest.raises(mf.BackendError, match="only what tensors hold could show"):
        attn(q, k, v, q_offset=torch.tensor([5, 6, 7], device=device))
    assert attn(q, k, v, q_offset=7).isfinite().all()  # which sizes show


def test_pieces_are_for_the_processors(device):
    on = torch.device(device)
    programs = gpu.programs(on)
    assert few.pieces_of(None, 1, 1 << 20, 64, on) == programs
    assert few.pieces_of(None, 1, 1000, 64, on) == min(3, programs)
    assert few.pieces_of(None, programs, 1 << 20, 64, on) == 1
    assert few.pieces_of(4, programs, 1 << 20, 64, on) == 4
    assert few.pieces_of(1000, 1, 1000, 64, on) == 16


def test_explain_tells_the_kernel_of_few_rows_from_the_others(device):
    attn = mf.compile(mf.sliding_window(40), backend="triton", splits=3)
    found = attn.explain(1, 4096, q_offset=4095, device=device)
    assert found.to_dict()["passes"]["forward"] == {
        "rows, whose mask is evaluated in the kernel": 1,
        "pieces of a row": 3,
    }
    assert "kernel of dq, dkdv interval: it reads" in str(found)
    assert "kernel             interval: it reads" in str(attn.explain(40, 40, device=device))
