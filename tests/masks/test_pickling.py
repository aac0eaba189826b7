"""Masks and attention ops survive pickling and deep copies; what can't is told."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.masks.predicate import Predicate, Recorded
from maskflash.testing import columns, masks

DOC = torch.tensor([[0] * 30 + [1] * 34])


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv]


def plain(b, h, q, kv, *, n=3):
    return q - n <= kv


class Window:
    def __init__(self, n):
        self.n = n

    def __call__(self, b, h, q, kv):
        return q - self.n <= kv <= q


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("lengths", torch.tensor([5]))
        self.attn = mf.compile(mf.padding(self.lengths) & mf.causal())


def returned(value):
    return pickle.loads(pickle.dumps(value))


@given(masks(), st.sampled_from([returned, copy.deepcopy, copy.copy]))
def test_every_mask_comes_back_as_it_was(mask, through):
    found = through(mask)
    assert torch.equal(found.dense(40, 40, batch=2, heads=4), mask.dense(40, 40, batch=2, heads=4))
    assert (found.name, found.fingerprint()) == (mask.name, mask.fingerprint())
    assert torch.equal(
        returned(found).block_map(40, 40, block_size=16).kinds(), mask.block_map(40, 40, block_size=16).kinds()
    )


@given(st.data(), st.sampled_from([returned, copy.deepcopy]))
def test_column_intervals_come_back(data, through):
    mask = data.draw(columns(20, 30, batch=2, heads=4)) | mf.causal()
    sizes = {"batch": 2, "heads": 4}
    assert torch.equal(through(mask).dense(20, 30, **sizes), mask.dense(20, 30, **sizes))


def test_a_mask_that_its_module_has_by_name_is_pickled_by_that_name():
    assert returned(packed) is packed
    assert copy.deepcopy(packed) is packed
    joined = returned(packed & mf.causal())
    assert joined.parts[0] is packed
    other = returned(mf.mask(plain))
    assert other.function is plain and other.defaults == {"n": 3}
    assert other.row(5, 9, n=1) == [(4, 9)]


def test_a_mask_of_a_lambda_is_what_was_recorded():
    n = 3
    mask = returned(mf.mask(lambda b, h, q, kv: q - n <= kv <= q))
    assert isinstance(mask, Recorded) and mask.row(9, 20) == [(6, 10)]
    assert "q - 3" in str(mask.why(9, 1)) and mask.why(9, 1).reasons[0].source.filename == __file__
    assert (mask & packed).row(9, 64, doc=DOC) == [(6, 10)]
    with pytest.raises(mf.ArgumentTypeError, match="a function can't call it, since it was pickled without"):
        mf.mask(lambda b, h, q, kv: mask(b, h, q, kv))
    assert isinstance(returned(mf.mask(Window(4))), Recorded)


def test_a_lambda_with_arguments_comes_back_for_the_kinds_it_met():
    mask = mf.mask(lambda b, h, q, kv, *, doc, n=2: doc[q] == doc[kv] and q - n < kv)
    with pytest.raises(mf.ArgumentTypeError, match=r"<lambda>: it can't be pickled .*\(doc, n\).*top level"):
        pickle.dumps(mask)
    assert copy.deepcopy(mask) is mask  # nothing to copy: it captures no tensor
    ids = torch.arange(40) // 9
    expected = mask.dense(40, 40, doc=ids)
    found = returned(mask)
    assert torch.equal(found.dense(40, 40, doc=ids), expected)
    assert torch.equal(found.dense(30, 30, doc=ids + 1, n=2), expected[:, :, :30, :30])
    assert torch.equal(returned(found).dense(40, 40, doc=ids), expected)
    with pytest.raises(mf.ArgumentTypeError, match=r"got doc torch.int32 of 1 dimensions, n int, but it was pickled"):
        found.dense(40, 40, doc=ids.int())


def test_shared_tensors_stay_shared():
    model = Model()
    for other in (copy.deepcopy(model), returned(model)):
        other.lengths[0] = 2
        assert other.attn.mask.row(9, 10) == [(0, 2)]
        assert model.attn.mask.row(9, 10) == [(0, 5)]
    assert list(model.state_dict()) == ["lengths"]
    stored = io.BytesIO()
    torch.save(model.attn, stored)
    stored.seek(0)
    assert torch.load(stored, weights_only=False).mask.row(9, 10) == [(0, 5)]


@pytest.mark.parametrize("called", [False, True])
def test_a_copy_never_shares_a_captured_tensor_unseen(called):
    ids = torch.arange(40) // 9
    mask = mf.mask(lambda b, h, q, kv, *, n: ids[q] == ids[kv] and q - n < kv)
    before = mf.mask(lambda b, h, q, kv: ids[q] == ids[kv] and q - 3 < kv).dense(40, 40)
    if called:
        mask.dense(40, 40, n=3)
    other = copy.deepcopy(mask)
    ids.zero_()
    assert torch.equal(other.dense(40, 40, n=3), before)
    assert not torch.equal(mask.dense(40, 40, n=3), before)


class Owner(torch.nn.Module):
    """Masks that read the module which holds them, in three ways."""

    def __init__(self):
        super().__init__()
        self.register_buffer("doc", torch.arange(40) // 9)
        self.window = 7
        self.of_method = mf.compile(self.visible)
        self.of_lambda = mf.compile(lambda b, h, q, kv: self.visible(b, h, q, kv))
        self.joined = mf.compile(mf.mask(self.visible) & mf.causal())

    def visible(self, b, h, q, kv):
        return self.doc[q] == self.doc[kv] and abs(q - kv) < self.window


@pytest.mark.parametrize("through", [copy.deepcopy, returned])
@pytest.mark.parametrize("which", ["of_method", "joined", "of_lambda"])
def test_the_masks_of_a_copied_module_read_the_copy(through, which):
    if which == "of_lambda" and through is returned:
        pytest.skip("a lambda is pickled as what was recorded of it")
    model = Owner()
    if through is returned:
        model.of_lambda = None
    before = getattr(model, which).mask.dense(40, 40)
    other = through(model)
    mask = getattr(other, which).mask
    assert torch.equal(mask.dense(40, 40), before)
    other.doc, other.window = torch.arange(40) // 3, 2
    assert mask.row(19, 40) == ([(18, 20)] if which == "joined" else [(18, 21)])
    assert torch.equal(getattr(model, which).mask.dense(40, 40), before)


@pytest.mark.parametrize("mask", [mf.causal() & mf.document([20, 44]), packed])
def test_an_op_comes_back(mask):
    mask_args = {"doc": DOC} if mask is packed else {}
    attn = mf.compile(mask, block_size=32, scale=0.5)
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    expected = attn(q, k, v, **mask_args)
    for other in (returned(attn), copy.deepcopy(attn)):
        assert torch.equal(other(q, k, v, **mask_args), expected)
        assert (other.scale, other.block_size) == (0.5, (32, 32))


def test_another_process_reads_it():
    mask = mf.mask(lambda b, h, q, kv: DOC[b, q] == DOC[b, kv]) & mf.sliding_window(5)
    program = "import pickle, sys; m = pickle.loads(sys.stdin.buffer.read()); print(m.fingerprint(), m.row(33, 64))"
    run = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(mask), capture_output=True, check=True)
    assert run.stdout.decode().strip() == f"{mask.fingerprint()} [(30, 34)]"


def test_equal_sources_and_nodes_come_back():
    traced = mf.mask(lambda b, h, q, kv: q / 2 > -0.0 and kv * 1e300 < float("inf")).traced({})
    found = returned(traced.expr)
    assert found == traced.expr and found.sources == traced.expr.sources
    assert isinstance(mf.mask(plain), Predicate)
