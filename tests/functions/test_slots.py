"""The slots of a mask are those of its trace, found again for arguments of the same kinds."""

import pytest
import torch

import maskflash as mf
from maskflash.functions import slots
from maskflash.functions.slots import expression


@mf.mask
def general(b, h, q, kv, *, doc, size=4, flag=True):
    return q // size == kv // size if flag else doc[q] == doc[kv] and q < doc.shape[0]


DOC = torch.arange(12) // 5


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("doc", [DOC, DOC[:7], DOC.int(), DOC.float()])
def test_slots_say_what_the_trace_says(doc, size, flag):
    values = {"doc": doc, "size": size, "flag": flag}
    found, traced = general.slots(values)[0], general.traced(values)
    assert found.text == traced.expr.text
    assert found.params == traced.params
    assert found.names == traced.names
    assert found is general.slots({**values, "doc": doc.clone()})[0]
    params, tables = found.filled(values, doc.device)
    assert (tuple(params), len(tables)) == (traced.bind(values).params, len(traced.bind(values).tables))


def test_only_what_the_trace_depends_on_tells_slots_apart():
    @mf.mask
    def windowed(b, h, q, kv, *, doc, window):
        return doc[q] == doc[kv] and q - kv < window

    first = windowed.slots({"doc": DOC, "window": 3})[0]
    assert first is windowed.slots({"doc": DOC[:4], "window": 9})[0]
    assert first is not windowed.slots({"doc": DOC.int(), "window": 3})[0]


def test_a_dependency_that_only_some_values_show_is_found():
    @mf.mask
    def branching(b, h, q, kv, *, depth, size):
        blocks = range(depth.shape[0])
        return q // size == kv if len(blocks) > 3 else q >= kv

    values = {"depth": torch.zeros(2), "size": 5}
    one = branching.slots(values)[0]
    many = branching.slots({**values, "depth": torch.zeros(6)})[0]
    other = branching.slots({"depth": torch.zeros(6), "size": 7})[0]
    assert len({one.text, many.text, other.text}) == 3
    assert branching.slots(values)[0].text == one.text


def test_an_error_names_the_true_shape():
    @mf.mask
    def wrong(b, h, q, kv, *, doc):
        return doc[q, kv]

    with pytest.raises((mf.MaskTraceError, mf.MaskIndexError)):
        wrong.slots({"doc": DOC})


def test_an_expression_is_found_by_its_text_with_its_lines(monkeypatch):
    table = torch.zeros(3)
    found = mf.mask(lambda b, h, q, kv: table[q] == 0).slots({})[0]
    assert expression(found.text) is found.expr
    assert any(source and source.filename == __file__ for source in found.expr.sources)
    slots._expressions.clear()
    assert expression(found.text) == found.expr
    monkeypatch.setattr(slots, "_MOST_EXPRESSIONS", 3)
    for window in range(5):
        expression(f"const={window}:int64~();ne:bool~(0,0)")
    assert len(slots._expressions) == 3
