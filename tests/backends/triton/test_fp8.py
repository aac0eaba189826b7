"""Forward in 8 bits: its kernel computes what e4m3 operands and scales say; and what can't have it is told."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from benchmarks.fp8_accuracy import P_SCALE, as_the_kernel, attended, gradients
from maskflash.backends.reference import error_budget
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import modules, tile_choice
from maskflash.backends.triton import run as triton
from maskflash.errors import BackendError
from maskflash.testing import Shape, masks
from tests.conftest import DEVICE

HALVES = st.sampled_from([torch.bfloat16, torch.float16])
DIMS = st.sampled_from([(32, 32), (64, 64), (40, 72), (128, 64)])
runs = pytest.mark.skipif(DEVICE in ("cpu", "sm_80", "sm_86"), reason="needs 8-bit products, emulated at least")
SHAPE = Shape(1, 2, 1, 140, 180, 64, 64)


def op(mask, **options):
    return mf.compile(mask, backend="triton", precision="fp8", **{"block_size": (64, 32), **options})


def of_8_bits(q, k, v, visible):
    """The float32 numbers that the kernel's operands stand for: hidden tokens are zeros before they are quantised."""
    group = q.shape[1] // k.shape[1]
    used = visible.expand(q.shape[0], q.shape[1], *visible.shape[2:]).any(2).unflatten(1, (-1, group)).any(2)
    k, v = (x.detach().cpu().masked_fill(~used[..., None], 0.0) for x in (k, v))
    q = q.detach().cpu().masked_fill(~visible.any(-1, keepdim=True), 0.0)
    q, k, v = as_the_kernel(q, k, v)
    return q, *(x.repeat_interleave(group, 1) for x in (k, v))


def assert_matches(attn, q, k, v, visible, **call):
    """Out within twice what rounding P costs, and a unit of out; lse, which has no P, within float32's budget."""
    out, lse = (x.detach().cpu() for x in attn(q, k, v, return_lse=True, **call))
    assert out.dtype == q.dtype
    visible, scale = visible.cpu(), q.shape[3] ** -0.5
    operands = of_8_bits(q, k, v, visible)
    exact = attended(*(x.double() for x in operands), visible, scale, None)
    plain = attended(*operands, visible, scale, P_SCALE)
    seen = visible.any(-1).expand(lse.shape)
    assert not out[~seen].any()
    assert (lse[~seen] == -torch.inf).all()
    if seen.any():
        unit = torch.finfo(q.dtype).eps * exact.out.abs().max()
        assert (out.double() - exact.out).abs().max() <= error_budget(plain.out, exact.out) + unit
        unit = 8 * torch.finfo(torch.float32).eps
        budget = error_budget(plain.lse[seen], exact.lse[seen]) + unit
        assert (lse.double() - exact.lse)[seen].abs().max() <= budget


@runs
@settings(max_examples=4)
@given(masks(max_len=200), HALVES, DIMS, st.integers(1, 200), st.integers(1, 200), st.data())
def test_any_mask_and_length(device, mask, dtype, dims, q_len, kv_len, data):
    batch, kv_heads, group = (data.draw(st.integers(1, 2)) for _ in range(3))
    q_len = max(q_len, min(65, kv_len // 16 + 1))  # few rows are refused
    shape = Shape(batch, kv_heads * group, kv_heads, q_len, kv_len, *dims)
    q, k, v = shape.tensors(dtype, device=device, seed=data.draw(st.integers(0, 99)))
    assert_matches(op(mask), q, k, v, mask.dense(q_len, kv_len, batch=batch, heads=shape.heads))


@runs
@pytest.mark.parametrize("dims", [(80, 80), (128, 128), (256, 256), (8, 200)])
def test_head_dims(device, dims):
    shape = replace(SHAPE, head_dim=dims[0], v_head_dim=dims[1])
    q, k, v = shape.tensors(torch.bfloat16, device=device)
    assert_matches(op(mf.causal(), block_size=128), q, k, v, mf.causal().dense(140, 180))


@runs
def test_blocks_of_very_different_size(device):
    """A document for each block of 128 tokens, then all together: sums come from one block's scale to the next."""
    q, k, v = Shape(1, 1, 1, 384, 384, 32, 32).tensors(torch.bfloat16, device=device)
    sizes = torch.tensor([2.0**-40, 2.0**30, 0.0], device=device).repeat_interleave(128)[:, None]
    v = (v.detach() * sizes).to(v.dtype)
    for first in (0, 128, 256):
        rows = slice(first, first + 128)
        mask = mf.document([128, 128, 128])
        out = op(mask)(q, k, v)[:, :, rows]
        visible = mask.dense(384, 384)
        exact = attended(*(x.double() for x in of_8_bits(q, k, v, visible)), visible, 32**-0.5, None).out[:, :, rows]
        plain = attended(*of_8_bits(q, k, v, visible), visible, 32**-0.5, P_SCALE).out[:, :, rows]
        error = (out.detach().cpu().double() - exact).abs().max()
        assert error <= error_budget(plain, exact) + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    both = op(mf.full())(q, k, v)
    assert both.isfinite().all()
    large = attended(
        *(x.double() for x in of_8_bits(q, k, v, torch.ones(1, 1, 384, 384, dtype=torch.bool))), None, 32**-0.5, None
    )
    assert (both.detach().cpu().double() - large.out).norm() <= 0.03 * large.out.norm()


@runs
def test_what_nobody_sees_may_be_anything_and_nan_stays_with_its_rows(device):
    q, k, v = (x.detach() for x in SHAPE.tensors(torch.float16, device=device))
    mask = mf.sliding_window(20)
    expected = op(mask)(q, k, v)
    hidden = k.clone(), v.clone()
    for x in hidden:
        x[:, :, 150:] = torch.nan
    assert torch.equal(op(mask)(q, *hidden), expected)
    broken = k.clone()
    broken[:, :, 70] = torch.inf
    found = op(mask)(q, broken, v)
    seen = mask.dense(140, 180)[0, 0, :, 70]
    assert found[:, :, seen].isnan().all()
    assert found[:, :, ~seen].isfinite().all()
    rows = q.clone()
    rows[:, :, 33] = torch.nan
    found = op(mask)(rows, k, v)
    assert found[:, :, 33].isnan().all()
    assert found[:, :, [*range(33), *range(34, 140)]].isfinite().all()


@runs
def test_scores_sinks_dropout_and_offsets(device):
    q, k, v = (x.detach() for x in SHAPE.tensors(torch.bfloat16, device=device))
    mask, scale = mf.causal(), 64**-0.5
    visible = mask.dense(140, 180, q_offset=40)
    assert_matches(op(mask), q, k, v, visible, q_offset=40)
    operands = [x.double() for x in of_8_bits(q, k, v, visible)]
    scores = operands[0] @ operands[1].mT * scale
    sinks, slopes = torch.tensor([0.5, 2.0], device=device), torch.tensor([0.5, 0.25], device=device)
    distance = torch.arange(140)[:, None] + 40 - torch.arange(180)
    cases = {
        "sinks": (op(mask), {"sinks": sinks}, scores, sinks.cpu().double()),
        "alibi": (op(mask, score=mf.scores.alibi(slopes)), {}, scores - slopes.cpu()[:, None, None] * distance, None),
        "soft-cap": (op(mask, score=mf.scores.softcap(0.5)), {}, 0.5 * torch.tanh(scores / 0.5), None),
    }
    for name, (attn, call, changed, sink) in cases.items():
        out, lse = attn(q, k, v, q_offset=40, return_lse=True, **call)
        shown = changed.masked_fill(~visible, -torch.inf)
        top = shown if sink is None else torch.cat((shown, sink[:, None, None].expand(1, 2, 140, 1)), -1)
        expected = top.logsumexp(-1)
        assert (lse.cpu() - expected).abs().max() <= 2e-5, name
        exact = (shown - expected[..., None]).exp() @ operands[2]
        assert (out.cpu().double() - exact).norm() <= 0.03 * exact.norm(), name
    out = op(mask)(q, k, v, q_offset=40, dropout_p=0.5, seed=7)
    kept = mf.testing.dropout_keep(7, 0.5, 1, 2, 140, 180, q_offset=40)
    p = (scores.masked_fill(~visible, -torch.inf)).softmax(-1) * kept * 2
    exact = p @ operands[2]
    assert (out.cpu().double() - exact).norm() <= 0.03 * exact.norm()


@runs
def test_gradients_are_those_of_full_precision_from_out_and_lse(device):
    q, k, v = Shape(1, 2, 2, 140, 180, 64, 64).tensors(torch.bfloat16, device=device)
    out, lse = op(mf.full())(q, k, v, return_lse=True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    given = [x.detach().cpu() for x in (q, k, v, dout, out, lse)]
    exact = gradients(*(x.double() for x in given), 64**-0.5)
    plain = gradients(*(x.to(torch.bfloat16) for x in given[:5]), given[5], 64**-0.5)
    for one, truth, other in zip(found, exact, plain, strict=True):
        assert (one.cpu().double() - truth).abs().max() <= error_budget(other, truth)


@runs
@pytest.mark.parametrize("block_size", [(64, 32), (192, 64), (128, 128), (64, 128)])
def test_blocks_that_reach_beyond_the_keys(device, block_size):
    q, k, v = replace(SHAPE, kv_len=100).tensors(torch.bfloat16, device=device)
    assert_matches(op(mf.causal(), block_size=block_size), q, k, v, mf.causal().dense(140, 100))


@runs
def test_very_large_scores_leave_probabilities_what_they_are(device):
    q, k, v = (x.detach() for x in SHAPE.tensors(torch.bfloat16, device=device))
    biased = op(mf.full(), score=lambda score, b, h, q, kv: score - 1.2e8)
    out, lse = biased(q / 8, k, v, return_lse=True)
    exact = v.double().mean(2, keepdim=True).expand(out.shape)  # scores of less than 4 leave float32's -1.2e8 as it is
    assert (out.double() - exact).norm() <= 0.08 * exact.norm()
    torch.testing.assert_close(lse, torch.full_like(lse, -1.2e8), rtol=1e-6, atol=0)


@runs
def test_out_is_near_attention_in_full_precision(device):
    q, k, v = Shape(1, 2, 2, 256, 256, 64, 64).tensors(torch.bfloat16, device=device)
    out = op(mf.full())(q, k, v).detach().cpu()
    exact = attended(*(x.detach().cpu().double() for x in (q, k, v)), None, 64**-0.5, None).out
    assert (out.double() - exact).norm() <= 0.08 * exact.norm()


@runs
def test_a_second_call_of_a_kind_measures_no_tile(device, monkeypatch, tmp_path):
    monkeypatch.setenv(modules.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tile_choice, "_known", {})
    timed = []
    monkeypatch.setattr(gpu, "seconds", lambda function, device: timed.append(function.args[:2]) or len(timed))
    shape = replace(SHAPE, head_dim=40, v_head_dim=36)
    op(mf.causal(), tune=True)(*shape.tensors(torch.bfloat16, device=device))
    count = len(timed)
    tiles = [tile for pass_name, tile in timed if pass_name == "forward"]
    assert len(tiles) > 2
    assert all(tile.block_m >= 64 and tile.block_n >= 32 for tile in tiles)
    monkeypatch.setattr(tile_choice, "_known", {})  # a later process
    op(mf.sliding_window(9), tune=True)(*shape.tensors(torch.bfloat16, device=device))
    assert len(timed) == count


@runs
def test_same_inputs_same_bits(device):
    q, k, v = SHAPE.tensors(torch.float16, device=device)
    assert torch.equal(op(mf.causal())(q, k, v), op(mf.causal())(q, k, v))


# What can't have it


@pytest.mark.skipif(DEVICE != "cpu", reason="interpreted")
def test_the_interpreter_is_refused():
    q, k, v = SHAPE.tensors(torch.bfloat16)
    with pytest.raises(BackendError, match=r"precision=\"fp8\" can't serve this call: Triton's interpreter"):
        op(mf.causal())(q, k, v)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [(80, "8.9 .* or later, got 8.0"), (86, "8.9 .* or later, got 8.6"), ("gfx942", "NVIDIA's GPUs alone, got gfx942")],
)
def test_devices_without_such_products_are_told(monkeypatch, arch, reason):
    monkeypatch.setattr(gpu, "arch", lambda device: arch)
    monkeypatch.setattr(gpu, "interprets", lambda: False)
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    with pytest.raises(BackendError, match=f"precision=.fp8.*{reason}; leave precision out"):
        op(mf.causal())(*SHAPE.tensors(torch.bfloat16))


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "reason"),
    [
        (SHAPE, torch.float32, {}, "bfloat16 and float16.*got float32; cast"),
        (SHAPE, torch.float64, {}, "got float64"),
        (SHAPE, torch.bfloat16, {"block_size": (64, 16)}, r"32, 64 or 128 keys, got block_size \(64, 16\)"),
        *(
            (SHAPE, torch.bfloat16, {"block_size": (64, keys)}, rf"128 keys, got block_size \(64, {keys}\)")
            for keys in (96, 192, 256)
        ),
        (replace(SHAPE, head_dim=272), torch.bfloat16, {}, "head dims to 256, got 272"),
        (SHAPE, torch.bfloat16, {"block_size": 32}, r"multiple of 64 rows.*got block_size \(32, 32\)"),
        (replace(SHAPE, q_len=1), torch.bfloat16, {}, "1 queries and 180 keys.*another op without precision"),
        (replace(SHAPE, kv_len=2**23), torch.bfloat16, {}, "keys, got 8388608"),
    ],
)
def test_calls_that_can_not_have_it_are_told(monkeypatch, shape, dtype, options, reason):
    """Before the mask is analysed: nothing of it is evaluated."""
    monkeypatch.setattr(gpu, "without_products_in_8_bits", lambda device: None)
    monkeypatch.setattr(triton, "plan", lambda *args: pytest.fail("planned"))
    lengths = shape.q_len, shape.kv_len, shape.kv_len
    tensors = [torch.zeros(1, dtype=dtype).expand(1, 2, n, shape.head_dim) for n in lengths]
    with pytest.raises(BackendError, match=reason):
        op(mf.causal(), **options)(*tensors)


def test_few_rows_are_told_in_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(gpu, "without_products_in_8_bits", lambda device: None)
    q, k, v = replace(SHAPE, q_len=1).tensors(torch.bfloat16)
    spec = op(mf.full())._spec(mf.functions.sizes.Sizes.of(q, k), q, None, {})
    with pytest.raises(BackendError, match="1 queries and 180 keys"):
        torch.ops.maskflash.forward(q.detach(), k.detach(), v.detach(), *spec)


def test_pages_are_refused():
    pages = mf.PageTable(torch.zeros(1, 2, dtype=torch.int32), torch.tensor([20]), 16)
    pools = torch.randn(2, 2, 16, 2, 64).to(torch.bfloat16).unbind()
    with pytest.raises(BackendError, match=r"paged: precision is \"fp8\".*compile another op without it"):
        mf.compile(mf.causal(), precision="fp8").paged(torch.randn(1, 2, 1, 64).to(torch.bfloat16), *pools, pages)


def test_the_text_of_its_kernel_can_be_had_anywhere():
    q, k, v = SHAPE.tensors(torch.bfloat16)
    text = op(mf.causal()).source(q, k, v)
    assert "v_scale" in text
    assert "v_scale" not in mf.compile(mf.causal()).source(q, k, v)
    assert "v_scale" not in op(mf.causal()).source(q, k, v, pass_name="dq")
