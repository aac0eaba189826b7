"""A mask at the lengths of a call answers as the mask's own methods do, and says its lengths once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks

LENGTHS = st.integers(1, 40)


@given(mask=masks(), q_len=LENGTHS, kv_len=LENGTHS, data=st.data())
def test_its_answers_are_the_mask_s(mask, q_len, kv_len, data):
    offset = st.integers(-5, 9) | st.lists(st.integers(-5, 9), min_size=2, max_size=2).map(torch.tensor)
    given = {"batch": 2, "heads": 4, "q_offset": data.draw(offset), "kv_offset": data.draw(offset)}
    try:
        expected = mask.dense(q_len, kv_len, **given)
    except mf.MaskIndexError:
        with pytest.raises(mf.MaskIndexError):
            mask.at(q_len, kv_len, **given).dense()
        return
    sight = mask.at(q_len, kv_len, **given)
    b, h, q, kv = (data.draw(st.integers(0, n - 1)) for n in (2, 4, q_len, kv_len))
    assert torch.equal(sight.dense(), expected)
    assert torch.equal(sight.block_map(16).kinds(), mask.block_map(q_len, kv_len, block_size=16, **given).kinds())
    whole = {"q_len": q_len, "kv_len": kv_len, **given}
    assert sight.row(q, b=b, h=h) == mask.row(q, b=b, h=h, **whole)
    assert sight.column(kv, b=b, h=h) == mask.column(kv, b=b, h=h, **whole)
    assert str(sight.why(q, kv, b=b, h=h)) == str(mask.why(q, kv, b=b, h=h, **whole))
    assert bool(sight.why(q, kv, b=b, h=h)) == bool(expected[b, h, q, kv])
    flex = sight.to_block_mask(16)
    indices = torch.meshgrid(*map(torch.arange, expected.shape), indexing="ij")
    assert torch.equal(flex.mask_mod(*indices).expand_as(expected), expected)
    assert torch.equal(flex.kv_indices, mask.to_block_mask(q_len, kv_len, block_size=16, **given).kv_indices)


def test_vectors_and_arguments():
    packed = mf.mask(lambda b, h, q, kv, *, doc: q >= kv and doc[b, q] == doc[b, kv])
    doc = torch.arange(40).view(2, 20) // 7
    sight = packed.at(20, 20, batch=2, doc=doc)
    vectors = sight.to_flashmask(causal=True)
    assert torch.equal(vectors.lts, packed.to_flashmask(20, 20, batch=2, causal=True, doc=doc).lts)
    assert torch.equal(vectors.at(20, 20, batch=2).dense(), sight.dense())
    doc.zero_()  # a tensor is read at each question
    assert torch.equal(sight.dense()[0, 0], mf.causal().dense(20, 20)[0, 0])
    assert repr(sight) == "<lambda> at 20 x 20"


@pytest.mark.parametrize("offset", [7, torch.tensor([3, -2]), torch.tensor([5])])
def test_an_offset_of_columns_is_handed_on(offset):
    problem = mf.causal().at(8, 9, batch=2, q_offset=1, kv_offset=offset).problem
    expected = offset if isinstance(offset, int) else offset.expand(2)
    assert problem.q_offset == 1
    assert torch.equal(torch.as_tensor(problem.kv_offset), torch.as_tensor(expected))
    assert mf.causal().at(8, 9, kv_offset=2).why(0, 0).visible is False  # query 0 and key 2
    assert mf.causal().at(8, 9, q_offset=2, kv_offset=2).why(0, 0).visible is True


VECTORS = mf.ColumnIntervals(torch.full((9,), 8))


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: mf.causal().at(-1, 9), mf.ArgumentError, "Mask.at: q_len is -1, expected at least 0"),
        (
            lambda: mf.causal().at(8, 9, kv_offset=1.5),
            mf.ArgumentTypeError,
            "Mask.at: kv_offset is 1.5, expected an int",
        ),
        (
            lambda: mf.causal().at(8, 9, kv_offset=torch.tensor([1, 2])),
            mf.ArgumentError,
            r"kv_offset has shape \(2,\), expected \(1,\)",
        ),
        (
            lambda: mf.causal().at(8, 9, kv_offset=torch.tensor([2**61])),
            mf.ArgumentError,
            "an entry of kv_offset is 2305843009213693952, expected at most",
        ),
        (lambda: VECTORS.at(8, 9, kv_offset=1), mf.ArgumentError, "kv_offset is 1, expected 0: column intervals count"),
        (lambda: mf.causal().at(8, 9).row(8), mf.ArgumentError, "Mask.at: q is 8, expected less than q_len, 8"),
        (lambda: mf.causal().at(8, 9).column(0, h=1), mf.ArgumentError, "h is 1, expected less than heads, 1"),
        (lambda: mf.causal().at(8, 9).why(0, 9), mf.ArgumentError, "kv is 9, expected less than kv_len, 9"),
        (lambda: mf.causal().at(8, 9).block_map(0), mf.ArgumentError, "Mask.at: block_size is 0, expected at least 1"),
        (lambda: mf.causal().at(0, 9).to_block_mask(), mf.ArgumentError, "q_len is 0, expected at least 1"),
        (lambda: mf.causal().at(8, 9, doc=1), mf.ArgumentTypeError, "Mask.at: unexpected argument 'doc'"),
    ],
)
def test_wrong_arguments_are_told(ask, error, message):
    with pytest.raises(error, match=message):
        ask()
