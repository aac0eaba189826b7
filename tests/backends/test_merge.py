"""Parts of the keys, merged, are attention over all of them: values, gradients, parts that saw nothing, and errors."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.merge import merge_into
from maskflash.backends.reference import error_budget, reference
from maskflash.errors import ArgumentError, ArgumentTypeError

INF = torch.inf
SHAPES = st.sampled_from([(), (4,), (2, 0), (2, 3, 4)])


def parts_of(n, shape=(2, 5), dim=3, dtype=torch.float64, hidden=0.3):
    """n random parts, some of which saw nothing in some rows."""
    outs, lses = torch.randn(n, *shape, dim).to(dtype), 3 * torch.randn(n, *shape, dtype=torch.float64)
    return outs, lses.masked_fill(torch.rand(n, *shape) < hidden, -INF)


def by_definition(outs, lses):
    """Σ exp(lse) out / Σ exp(lse) row by row, of the parts that saw something."""
    flat_outs, flat_lses = (
        outs.double().reshape(len(outs), lses[0].numel(), outs.shape[-1]),
        lses.double().reshape(len(lses), lses[0].numel()),
    )
    out, lse = torch.zeros_like(flat_outs[0]), torch.full_like(flat_lses[0], -INF)
    for row in range(flat_lses.shape[1]):
        seen = [n for n in range(len(lses)) if flat_lses[n, row] > -INF]
        if seen:
            weights = flat_lses[seen, row].exp()
            out[row] = (weights[:, None] * flat_outs[seen, row]).sum(0) / weights.sum()
            lse[row] = weights.sum().log()
    return out.view(outs.shape[1:]), lse.view(lses.shape[1:])


@given(st.integers(1, 5), SHAPES, st.integers(0, 3), st.sampled_from([0, 0.5, 1]))
def test_it_is_the_sum_by_weights(n, shape, dim, hidden):
    outs, lses = parts_of(n, shape, dim, hidden=hidden)
    junk = outs.masked_fill((lses == -INF)[..., None], torch.nan)
    want = by_definition(outs, lses)
    for got in (mf.merge(junk, lses), mf.merge(list(junk), tuple(lses))):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_of_float32_and_rounded_once(dtype):
    outs, lses = parts_of(40, dtype=dtype)
    out, lse = mf.merge(outs, lses.float())
    exact, exact_lse = by_definition(outs, lses.float())
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert ((out - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    assert [x.dtype for x in mf.merge(outs, lses)] == [dtype, torch.float64]


def test_large_lses_do_not_overflow():
    outs, lses = torch.randn(2, 4, 3), torch.tensor([[1e4, -1e4, 88.0, 1e30], [1e4, -1e4, -1e4, -1e30]])
    out, lse = mf.merge(outs, lses)
    want = torch.cat((outs[:, :2].mean(0), outs[0, 2:]))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, lses[0] + torch.tensor([2.0, 2.0, 1.0, 1.0]).log())


def test_its_gradients_are_those_of_finite_differences():
    outs, lses = parts_of(3, (4,), hidden=0)
    lses[:, 0] = -INF
    lses[:2, 1] = -INF
    seen = lses > -INF

    def merged(outs, finite):
        out, lse = mf.merge(outs, torch.full_like(lses, -INF).masked_scatter(seen, finite))
        return out, lse[1:]

    args = outs.requires_grad_(), lses[seen].requires_grad_()
    assert torch.autograd.gradcheck(merged, args)
    assert torch.autograd.gradgradcheck(merged, args)


def test_parts_that_saw_nothing_get_zero_gradients_whatever_they_hold():
    outs, lses = parts_of(3, (40,))
    lses[:, :5] = -INF
    nothing = lses == -INF
    outs = outs.masked_fill(nothing[..., None], torch.nan).requires_grad_()
    lses.requires_grad_()
    out, lse = mf.merge(outs, lses)
    nowhere = nothing.all(0)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dout[nowhere], dlse[nowhere] = torch.nan, torch.nan
    douts, dlses = torch.autograd.grad((out, lse), (outs, lses), (dout, dlse))
    assert not dlses.isnan().any()
    assert (dlses[nothing] == 0).all()
    assert (douts[nothing] == 0).all()
    assert not douts.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(0, 70, 100), (0, 1, 50, 51, 100)])
def test_disjoint_keys_merged_are_attention_over_all(dtype, cuts):
    mask = mf.causal() & ~mf.document([30, 20, 50])  # nothing in the first rows, nothing of later parts in most
    q = torch.randn(1, 4, 100, 8, dtype=dtype)
    k, v = torch.randn(2, 1, 2, 100, 8, dtype=dtype).unbind()
    dout, dlse = torch.randn(1, 4, 100, 8, dtype=dtype), torch.randn(1, 4, 100)
    visible = mask.dense(100, 100)

    def results(attend, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves)
        seen = lse > -INF
        grads = torch.autograd.grad((out, lse[seen]), leaves, (dout.to(dtype), dlse.to(lse.dtype)[seen]))
        return [out.detach(), lse.detach(), *grads]

    def by_parts(q, k, v):
        parts = []
        for low, high in pairwise(cuts):
            part = mf.mask(lambda b, h, q, kv, low=low: ~_same(q, kv + low) & (q >= kv + low))
            parts.append(mf.attention(q, k[:, :, low:high], v[:, :, low:high], part, return_lse=True))
        return mf.merge(*zip(*parts, strict=True))

    ids = torch.arange(3).repeat_interleave(torch.tensor([30, 20, 50]))

    def _same(q, kv):
        return ids[q] == ids[kv]

    def dense(q, k, v):
        return reference(q, k, v, visible, 8**-0.5)

    exact, plain, got = results(dense, torch.float64), results(dense, dtype), results(by_parts, dtype)
    for got_x, plain_x, exact_x in zip(got, plain, exact, strict=True):
        finite = exact_x.isfinite()
        assert torch.equal(got_x.isfinite(), finite)
        error = (got_x.double() - exact_x)[finite].abs().max().item()
        # Each part's out is rounded to the dtype before they are merged, and the truth itself is of float64.
        rounding = torch.finfo(dtype).eps * exact_x[finite].abs().max().item() + 20 * torch.finfo(torch.float64).eps
        assert error <= error_budget(plain_x, exact_x, dtype) + rounding


@pytest.mark.parametrize("seen", [(True, True), (True, False), (False, True), (False, False)])
def test_two_parts_in_place_are_the_same(seen):
    outs, lses = torch.randn(2, 3, 5, 8, dtype=torch.float64), 5 * torch.randn(2, 3, 5, dtype=torch.float64)
    for part, sees in enumerate(seen):  # in one row
        if not sees:
            outs[part, 1, 2], lses[part, 1, 2] = 0, -torch.inf
    expected = mf.merge(outs, lses)
    merge_into(outs[0], lses[0], outs[1], lses[1])
    torch.testing.assert_close((outs[0], lses[0]), expected, rtol=1e-12, atol=1e-12)


def test_a_fault_of_a_part_stays_in_place():
    """NaN is no part that saw nothing."""
    outs, lses = torch.randn(2, 4, 8), torch.randn(2, 4)
    outs[1, 2], lses[1, 2] = torch.nan, torch.nan
    merge_into(outs[0], lses[0], outs[1], lses[1])
    assert outs[0, 2].isnan().all() and lses[0].isnan().tolist() == [False, False, True, False]


def test_it_compiles_and_maps():
    outs, lses = parts_of(3)
    want = mf.merge(outs, lses)
    torch.testing.assert_close(torch.compile(mf.merge, backend="eager", fullgraph=True)(outs, lses), want)
    torch.testing.assert_close(torch.vmap(mf.merge, in_dims=1)(outs, lses), want)


OUT, LSE = torch.zeros(4, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (None, [LSE], ArgumentTypeError, "outs is a NoneType, expected a sequence of tensors"),
        (torch.tensor(1.0), [LSE], ArgumentTypeError, "outs is a Tensor, expected a sequence of tensors"),
        ([], [], ArgumentError, "outs is empty, expected at least one part"),
        ([OUT], [], ArgumentError, "lses is empty"),
        ([OUT, 3], [LSE, LSE], ArgumentTypeError, r"outs\[1\] is 3, expected a Tensor; pass what attention returns"),
        ([OUT.long()], [LSE], ArgumentTypeError, r"outs\[0\] has dtype torch.int64, expected a floating dtype"),
        ([OUT, OUT.half()], [LSE, LSE], ArgumentTypeError, r"outs\[1\] has dtype torch.float16, expected outs\[0\]'s"),
        ([OUT, OUT[1:]], [LSE, LSE], ArgumentError, r"outs\[1\] has shape \(3, 3\), expected outs\[0\]'s \(4, 3\)"),
        ([OUT, OUT], [LSE], ArgumentError, "got 2 outs and 1 lses, expected one lse for each out"),
        ([OUT], [LSE[:3]], ArgumentError, r"outs have shape \(4, 3\) and lses \(3,\), expected \(\.\.\., D\)"),
        ([OUT], [OUT[..., :1]], ArgumentError, r"lses \(4, 1\), expected"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], ArgumentError, r"outs have shape \(\)"),
        ([OUT], [LSE.to("meta")], ArgumentError, "lses are on meta, expected the cpu of outs"),
        ([OUT, OUT.to("meta")], [LSE, LSE], ArgumentError, r"outs\[1\] is on meta, expected outs\[0\]'s cpu"),
        ([OUT.to_sparse()], [LSE], ArgumentTypeError, r"outs\[0\] is torch.sparse_coo, expected a dense tensor"),
    ],
)
def test_errors_say_what_was_wrong(outs, lses, error, message):
    with pytest.raises(error, match=f"merge: .*{message}"):
        mf.merge(outs, lses)
