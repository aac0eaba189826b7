"""The interval of rows that a column sees, as a formula: read by people, checked here by evaluating it."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import columns, masks

DOC = torch.arange(50) // 9
ENDS = torch.full((50,), 20, dtype=torch.int32)


def formula(mask, q_len=50, kv_len=50, **sizes):
    return mf.compile(mask).explain(q_len, kv_len, **sizes).to_dict()["rows"]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (mf.causal(), "[j, q_len)"),
        (mf.sliding_window(4, 2), "[j - 2, j + 5)"),
        (lambda b, h, q, kv: abs(q - kv) <= 4, "[j - 4, j + 5)"),
        (lambda b, h, q, kv: 0 <= q - kv < 4, "[j, j + 4)"),
        (lambda b, h, q, kv: -4 < kv - q <= 0, "[j, j + 4)"),
        (lambda b, h, q, kv: not (q < kv or q - 3 > kv), "[j, j + 4)"),
        (lambda b, h, q, kv: kv < 9 and q >= kv, "[j, q_len) where j < 9"),
        (
            lambda b, h, q, kv: q >= kv and DOC[q] == DOC[kv],
            "[max(first(DOC[q] >= DOC[j]), j), first(DOC[q] > DOC[j]))",
        ),
        (mf.ColumnIntervals(ENDS, causal=True), "[j, lts[j])"),
        (mf.ColumnIntervals(ENDS, ute=ENDS - 5), "[ute[j], lts[j])"),
        (mf.prefix_lm(3), None),
        (lambda b, h, q, kv: abs(q - kv) >= 4, None),
        (lambda b, h, q, kv: q != kv, None),
        (mf.dilated_window(4, 2), None),
        (mf.full(), None),
    ],
)
def test_formulas(mask, expected):
    assert formula(mask) == expected


class Numbers:
    """A table of numbers indexed as in a formula; out of range, which "where" excludes, they are 0."""

    def __init__(self, table):
        self.table = table

    def __getitem__(self, index):
        try:
            return int(self.table[index])
        except IndexError:
            return 0


@given(
    st.one_of(masks(), columns(30, 30), st.tuples(masks(), masks()).map(lambda pair: pair[0] & pair[1])),
    st.integers(1, 40),
)
def test_they_say_what_the_mask_says(mask, q_len):
    kv_len = 30
    q_len = kv_len if isinstance(mask, mf.ColumnIntervals) else q_len
    problem = mask.at(q_len, kv_len).tiled((16, 16))
    text = formula(mask, q_len, kv_len)
    assume(text is not None and ";" not in text)
    tables = {name: Numbers(table) for name, table in zip(problem.names, problem.inputs.tables, strict=True)}

    def first(holds):
        return next((q for q in range(q_len) if holds(q)), q_len)

    names = {"q_len": q_len, "b": 0, "h": 0, "first": first, "int64": int, **tables}
    interval, _, where = text.replace("first(", "first(lambda q: ").partition(" where ")
    dense = mask.dense(q_len, kv_len)[0, 0]
    for j in range(kv_len):
        low, high = eval(interval[:-1] + "]", {"j": j, **names})
        rows = [low <= q < high and bool(not where or eval(where, {"j": j, "q": q, **names})) for q in range(q_len)]
        assert dense[:, j].tolist() == rows


def test_an_end_that_two_masks_share_is_told_once():
    told = mf.compile(mf.causal() & mf.sliding_window(512)).explain(1024, 1024).to_dict()["rows"]
    assert told == "[j, j + 513)"
