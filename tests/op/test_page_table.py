"""Page tables: FlashInfer's form there and back, tokens written to their slots, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf

TABLE = mf.PageTable([[7, 2, -1], [7, 0, 5]], [6, 9], 4)


@st.composite
def tables(draw):
    """Requests of any lengths, with anything past their last page."""
    page_size, lengths = draw(st.integers(1, 9)), draw(st.lists(st.integers(0, 30), max_size=4))
    wide = max([0, *(-(-n // page_size) for n in lengths)]) + draw(st.integers(0, 2))
    number = st.integers(-1, 99)
    rows = [draw(st.lists(number, min_size=wide, max_size=wide)) for _ in lengths]
    table = torch.tensor(rows, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(len(lengths), wide)
    return mf.PageTable(table, torch.tensor(lengths, dtype=torch.int64), page_size)


@given(pages=tables())
def test_csr_and_back(pages):
    indptr, indices, last = pages.to_csr()
    assert {x.dtype for x in (indptr, indices, last)} == {torch.int32}
    again, at = [], 0
    for r, length in enumerate(pages.lengths.tolist()):  # by the form's definition
        count = -(-length // pages.page_size)
        assert indices[at : at + count].tolist() == pages.block_table[r, :count].tolist()
        assert last[r] == (length - (count - 1) * pages.page_size if count else 0)
        again.append(at)
        at += count
    assert indptr.tolist() == [*again, at] and len(indices) == at
    back = mf.PageTable.from_csr(indptr, indices, last, pages.page_size)
    assert torch.equal(back.lengths, pages.lengths.int())
    assert all(torch.equal(x, y) for x, y in zip(back.to_csr(), (indptr, indices, last), strict=True))


def test_an_empty_request_may_have_a_whole_last_page():
    pages = mf.PageTable.from_csr([0, 0, 1], [3], [4, 4], 4)
    assert pages.lengths.tolist() == [0, 4]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@given(pages=tables(), data=st.data())
def test_tokens_go_to_their_slots(layout, pages, data):
    lengths = pages.lengths.tolist()
    order = torch.randperm(pages.block_table.numel())  # no page is shared, which two requests would write to
    pages.block_table = order.view(pages.block_table.shape)
    counts = [data.draw(st.integers(0, n)) for n in lengths]
    starts = torch.tensor([0, *counts]).cumsum(0)
    k = torch.randn(sum(counts), 2, 3)
    v = torch.randn(sum(counts), 2, 5)
    pools = [torch.zeros(order.numel(), pages.page_size, 2, d) for d in (3, 5)]
    wanted = [x.clone() for x in pools]
    for r, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for i in range(count):
            token = length - count + i
            for x, pool in zip((k, v), wanted, strict=True):
                pool[pages.block_table[r, token // pages.page_size], token % pages.page_size] = x[starts[r] + i]
    turned = [x.transpose(1, 2).contiguous() if layout == "HND" else x for x in pools]
    pages.append(*turned, k, v, cu_seqlens=starts, layout=layout)
    found = [x.transpose(1, 2) if layout == "HND" else x for x in turned]
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_lengths_are_the_tensor_that_was_given():
    lengths = torch.tensor([6, 9])
    pages = mf.PageTable(TABLE.block_table, lengths, 4)
    pages.lengths += 1
    assert lengths.tolist() == [7, 10] and pages.to_csr()[2].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"block_table": torch.zeros(2, 3)}, mf.ArgumentTypeError, r"block_table has dtype torch\.float32"),
        ({"block_table": torch.zeros(2, 3).short()}, mf.ArgumentTypeError, "expected int32 or int64"),
        ({"block_table": torch.zeros(3).int()}, mf.ArgumentError, r"block_table has shape \(3,\), expected a 2-d"),
        ({"lengths": torch.zeros(2)}, mf.ArgumentTypeError, r"lengths has dtype torch\.float32"),
        ({"lengths": torch.zeros(3).int()}, mf.ArgumentError, "lengths has 3 requests and block_table 2"),
        ({"lengths": torch.zeros(2, device="meta").int()}, mf.ArgumentError, "lengths is on meta"),
        ({"page_size": 0}, mf.ArgumentError, "page_size is 0, expected at least 1"),
    ],
)
def test_bad_tables(given, kind, message):
    right = {"block_table": TABLE.block_table, "lengths": TABLE.lengths, "page_size": 4}
    with pytest.raises(kind, match=message):
        mf.PageTable(**{**right, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"indptr": [1, 2, 3]}, "indptr is"),
        ({"indptr": [0, 2, 1]}, "don't fall"),
        ({"indptr": [0, 1, 2]}, "end with the 3 of indices"),
        ({"indptr": []}, "indptr is"),
        ({"last_page_len": [1]}, "last_page_len has 1 requests and indptr 2"),
        ({"last_page_len": [5, 1]}, "last_page_len is 5 for request 0, expected 1 to 4"),
        ({"last_page_len": [0, 1]}, "last_page_len is 0 for request 0, expected 1 to 4"),
        ({"indptr": [0, 0, 3], "last_page_len": [2, 1]}, "last_page_len is 2 for request 0, expected 0 or 4"),
    ],
)
def test_bad_csr(given, message):
    right = {"indptr": [0, 2, 3], "indices": [4, 5, 6], "last_page_len": [1, 4], "page_size": 4}
    with pytest.raises(mf.ArgumentError, match=message):
        mf.PageTable.from_csr(**{**right, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": torch.zeros(2, 1, 7, 8)}, "k has 7 tokens for request 0, whose length is 6"),
        ({"v": torch.zeros(2, 1, 3, 8)}, r"v holds \(6, 1, 8\).*expected \(4, 1, 8\)"),
        ({"k": torch.zeros(2, 1, 2, 8).double()}, r"k holds .* of torch\.float64"),
        ({"k_pages": torch.zeros(7, 4, 1, 8), "k": torch.zeros(2, 1, 6, 8), "v": torch.zeros(2, 1, 6, 8)}, "is 7 for"),
        ({"k_pages": torch.zeros(8, 3, 1, 8)}, "k_pages has shape"),
    ],
)
def test_bad_tokens_write_nothing(given, message):
    right = {
        **{"k_pages": torch.zeros(8, 4, 1, 8), "v_pages": torch.zeros(8, 4, 1, 8)},
        **{"k": torch.ones(2, 1, 2, 8), "v": torch.ones(2, 1, 2, 8)},
    }
    right |= given
    with pytest.raises(mf.ArgumentError, match=message):
        TABLE.append(**right)
    assert not right["k_pages"].any() and not right["v_pages"].any()
