"""Why a pair is visible or hidden: the verdict is the dense mask's, and the reasons name the part that decides."""

import html.parser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import columns, masks


@mf.mask
def packed(b, h, q, kv, *, doc, window=256):
    if doc[b, q] != doc[b, kv]:
        return False
    return q - window <= kv <= q


DOC = torch.tensor([[0] * 300 + [1] * 724])


@given(masks(), st.integers(0, 39), st.integers(0, 39), st.integers(0, 1), st.integers(0, 3))
def test_the_verdict_is_that_of_the_dense_mask(mask, q, kv, b, h):
    found = mask.why(q, kv, b=b, h=h)
    dense = mask.dense(40, 40, batch=2, heads=4)
    assert bool(found) is found.visible is bool(dense[b, h, q, kv])
    assert found.reasons and found.pair == (b, h, q, kv)
    assert str(found).startswith(f"{mask}: query {q} {'sees' if found else 'does not see'} key {kv}")


@given(st.data())
def test_the_verdict_of_column_intervals(data):
    mask = data.draw(columns(20, 30, batch=2, heads=4)) & mf.causal()
    dense = mask.dense(20, 30, batch=2, heads=4)
    found = mask.why(9, 11, b=1, h=3, q_len=20, kv_len=30, batch=2, heads=4)
    assert found.visible == dense[1, 3, 9, 11]


def test_the_part_that_hid_it_is_named():
    mask = mf.causal() & mf.document([3, 5])
    assert [reason.mask for reason in mask.why(4, 1).reasons] == ["document(2 documents)"]
    assert [reason.mask for reason in mask.why(1, 4).reasons] == ["causal()", "document(2 documents)"]
    assert {reason.mask for reason in mask.why(4, 3).reasons} == {"causal()", "document(2 documents)"}
    assert str((~mask).why(4, 1)).splitlines() == [
        "~(causal() & document(2 documents)): query 4 sees key 1",
        "  document(2 documents):",
        "    doc[q] == doc[kv]: 1 != 0",
    ]
    either = mf.causal() | mf.global_tokens(1)
    assert [str(reason) for reason in either.why(3, 2).reasons] == ["q >= kv: 3 >= 2"]
    both = mf.causal() ^ mf.global_tokens(1)
    assert [reason.mask for reason in both.why(3, 2).reasons] == ["causal()", *["global_tokens(1)"] * 2]


def test_the_line_it_was_written_on_is_told():
    found = packed.why(310, 290, doc=DOC)
    (reason,) = found.reasons
    assert (reason.source.filename, reason.source.text) == (__file__, "doc[b, q] != doc[b, kv]")
    assert found.unread == ("((q - 256) <= kv) and (kv <= q)",)
    lines = str(found).splitlines()
    assert lines[1].startswith("  doc[b, q] == doc[b, kv]: 1 != 0   [packed (")
    assert lines[1].endswith(f'test_why.py:{reason.source.line}): "doc[b, q] != doc[b, kv]"]')
    assert lines[2] == "  not looked at: ((q - 256) <= kv) and (kv <= q)"
    assert "[" not in str(mf.causal().why(1, 0))  # a preset's line is the library's own


def test_arguments_reach_the_parts_that_take_them():
    joined = packed & mf.causal()
    assert "(q - 5) <= kv: 5 > 3" in str(joined.why(10, 3, doc=DOC, window=5))
    with pytest.raises(mf.ArgumentTypeError, match=r"Mask.why: the mask needs doc"):
        joined.why(10, 3)


def test_the_offset_is_added_to_the_row():
    assert str(mf.causal().why(2, 5, q_offset=4)).splitlines()[1] == "  q >= kv: 6 >= 5"
    assert not mf.causal().why(2, 5, b=1, q_offset=torch.tensor([4, 0]))


def test_column_intervals_speak_of_their_vectors():
    mask = mf.causal_document([3, 5]).to_flashmask(8, 8)
    found = mask.why(4, 1, q_len=8, kv_len=8)
    assert str(found).splitlines()[1:] == ["  q >= lts[kv]: 4 >= 3"]
    with pytest.raises(mf.ArgumentError, match=r"depends on the sizes of a call; pass q_len=\.\.\., kv_len=\.\.\."):
        mask.why(4, 1)


def test_an_unguarded_look_up_out_of_range_is_an_error():
    with pytest.raises(mf.MaskIndexError):
        packed.why(2000, 1, doc=DOC)


def test_many_reasons_are_cut_short():
    mask = mf.mask(lambda b, h, q, kv: any(q == kv + n for n in range(1000)))
    found = mask.why(0, 5)
    assert len(found.reasons) == 1000
    assert len(str(found).splitlines()) < 20 and "and 988 more" in str(found)
    assert len(mask.why(5, 5).unread) == 999


class Tags(html.parser.HTMLParser):
    """Counts tags that are open."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page):
    """The text of a page whose tags must match."""
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags.text


def test_notebooks_show_what_print_does_and_escape_it():
    joined = mf.causal() & mf.document([300, 724])
    shown = {
        joined.why(4, 1): "q >= kv: 4 >= 1",
        joined: "(q >= kv) & (",
        packed: "doc, window=256",
        joined.block_map(1024, 1024): "15 partial",
        mf.equivalent(joined, mf.causal(), 1024, 1024): "query 300, key 0",
        mf.equivalent(joined, joined, 1024, 1024): "yes",
        mf.compile(joined).explain(1024, 1024): "since the tensors are on cpu",
        mf.ColumnIntervals([8] * 8, causal=True): "(q + kv_len - q_len) < kv",
    }
    for value, text in shown.items():
        page = value._repr_html_()
        assert text in read(page)
        assert len(page) < 20_000
    nasty = mf.mask(lambda b, h, q, kv: q < kv)
    nasty.name = "<script>"
    assert "<script>" not in nasty._repr_html_() + nasty.why(0, 0)._repr_html_()
