"""Hulls are what rows see, whether formulas or the pieces of the problem turned over tell."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash import compiler, plans
from maskflash.blocks import hulls as module
from maskflash.blocks.hulls import find_hulls
from maskflash.testing import Shape, affine_masks, assert_matches_dense, masks

CPU = torch.device("cpu")


def problem_of(mask, q_len, kv_len, q_offset=0):
    return mask.problem("test", q_len, kv_len, 2, 2, (16, 16), q_offset, CPU, {})


def check(mask, q_len, kv_len, offset=0):
    problem = problem_of(mask, q_len, kv_len, offset)
    found = find_hulls(problem)
    assume(found is not None)
    batch, heads = problem.shape[:2]
    dense = mask.dense(q_len, kv_len, batch=2, heads=2, q_offset=offset)[:batch, :heads]
    sees = dense.any(-1)
    first = dense.int().argmax(-1)
    stop = kv_len - dense.flip(-1).int().argmax(-1)
    assert torch.equal(found.count, dense.sum(-1))
    assert torch.equal(found.start[sees], first[sees]) and torch.equal(found.stop[sees], stop[sees])
    assert bool((found.stop <= found.start)[~sees].all())


@settings(max_examples=200)
@given(masks(), st.integers(1, 64), st.integers(1, 64), st.sampled_from([16, 200, 1 << 18]))
def test_they_are_what_rows_see(mask, q_len, kv_len, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECES_AT_ONCE", at_once)  # so that seams are tested too
        check(mask, q_len, kv_len)


@given(affine_masks(), st.integers(1, 64), st.integers(1, 64), st.integers(0, 40))
def test_formulas_know_offsets(mask, q_len, kv_len, offset):
    check(mask, q_len, kv_len, offset)


def test_what_tells_and_what_does_not():
    ids = torch.tensor([1, 1, 0, 2])
    assert find_hulls(problem_of(mf.document([30, 10]), 40, 40)) is not None
    assert find_hulls(problem_of(mf.document(ids=ids), 4, 4)) is None  # ids don't ascend
    assert find_hulls(problem_of(mf.document([30, 10]), 4, 40, q_offset=36)) is None
    assert find_hulls(problem_of(mf.natten(6, 6, 3, 3), 36, 36)) is None


def test_an_analysis_evaluates_no_pair_that_hulls_tell(monkeypatch):
    """A long packed batch is planned without a look at its partial tiles."""
    from maskflash.blocks.problem import Problem
    from maskflash.compiler import analyse

    pairs = []
    visible = Problem.visible

    def counted(self, b, h, q, kv):
        bits = visible(self, b, h, q, kv)
        pairs.append(bits.numel())
        return bits

    monkeypatch.setattr(Problem, "visible", counted)
    mask = mf.causal() & mf.document([1000] * 8 + [192])
    problem = mask.problem("test", 8192, 8192, 1, 1, (128, 128), 0, CPU, {})
    partial = analyse(problem, "cpu").classified.block_map.counts["partial"]
    assert sum(pairs) < partial * 128**2 / 8


@settings(max_examples=60)
@given(st.one_of(masks(max_len=200), affine_masks(max_len=200)), st.integers(1, 200), st.integers(1, 200))
def test_attention_by_hulls_is_the_dense_one(mask, q_len, kv_len):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_MANY_PAIRS", -1)
        shape = Shape(batch=2, heads=2, q_len=q_len, kv_len=kv_len, head_dim=16)
        plans.invalidate({mask.traced({}).expr.text})
        assert_matches_dense(mask, shape, block_size=32)
