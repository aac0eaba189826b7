"""The tiles that rows walk hold all that they see, each once; where comparisons tell, they hold nothing else."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton.few import special_of
from maskflash.backends.triton.spans import emit_few
from maskflash.testing import masks

BLOCK = 4


def fill(shape, value, dtype):
    return torch.full(shape, value, dtype=dtype)


# Triton's functions in torch, as far as statements before a loop call them.
TL = SimpleNamespace(
    where=lambda condition, x, y: torch.where(torch.as_tensor(condition), *map(torch.as_tensor, (x, y))),
    min=lambda x, axis: x.amin(axis),
    max=lambda x, axis: x.amax(axis),
    minimum=lambda x, y: torch.minimum(*map(torch.as_tensor, (x, y))),
    maximum=lambda x, y: torch.maximum(*map(torch.as_tensor, (x, y))),
    cdiv=lambda x, y: -(-x // y),
    full=fill,
    abs=torch.abs,
    int1=torch.bool,
    **{name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64", "uint8", "float32", "float64")},
)


def is_plain(mask):
    """Whether a mask reads no table, and does not divide, which Triton and torch do otherwise."""
    problem = mask.at(1, 1).tiled((16, 16))
    return not problem.inputs.tables and {"floordiv", "mod"}.isdisjoint(node.op for node in problem.expr.nodes)


def walked(mask, q_len, kv_len, q_offset=0, kv_offset=0, rows=None):
    """The tiles, in order, that one head's rows walk."""
    problem = mask.at(q_len, kv_len, q_offset=q_offset, kv_offset=kv_offset).tiled((16, 16))
    special = special_of(problem, 16, 16, None)
    found = emit_few(problem.expr, special.tables, narrow=special.narrow, negative_kv=special.negative_kv)
    integer = torch.int32 if special.narrow else torch.int64
    there = torch.arange(q_len if rows is None else rows)  # of the tile: some may be past the last
    names = {
        "tl": TL,
        "b": torch.tensor(0, dtype=integer),
        "h": torch.zeros(len(there), dtype=integer),
        "q": there.to(integer) + q_offset,
        "within": there < q_len,
        "kv_first": torch.tensor(kv_offset, dtype=integer),
        "kv_len": kv_len,
        "BLOCK_N": BLOCK,
        **{f"p{slot}": torch.tensor(value) for slot, value in enumerate(problem.expr.coded(problem.inputs.params))},
    }
    assert not problem.inputs.tables
    for line in [*found.lines["once"], *found.lines["rows"], *found.walk]:
        exec(line, names)
    return [int(eval(found.at, names, {"step": torch.tensor(step)})) for step in range(int(names["total"]))]


def tiles_of(mask, q_len, kv_len, **offsets):
    """The tiles that some row sees."""
    some = mask.dense(q_len, kv_len, **offsets)[0, 0].any(0)
    return sorted({int(column) // BLOCK for column in some.nonzero()[:, 0]})


@pytest.mark.parametrize(
    "mask",
    [
        mf.causal(),
        mf.sliding_window(9),
        mf.sliding_window(3, 5),
        mf.causal() & mf.global_tokens(6),
        mf.causal() & (mf.global_tokens(2) | mf.sliding_window(5)),
        mf.prefix_lm(13),
        mf.mask(lambda b, h, q, kv: abs(q - kv) <= 6),
        mf.mask(lambda b, h, q, kv: abs(kv - q) < 6),
        mf.mask(lambda b, h, q, kv: kv == q or kv == 3),
        mf.mask(lambda b, h, q, kv: kv < 5 or 20 <= kv < 23 or kv - q > -2),
        mf.mask(lambda b, h, q, kv: kv <= q if q > 31 else kv < 3),
        mf.mask(lambda b, h, q, kv: q - kv < 0 and q < 0),
        mf.mask(lambda b, h, q, kv: 2 * q - kv - q >= 3),
    ],
    ids=lambda mask: str(mask.name),
)
@pytest.mark.parametrize("q_offset", [0, 30, 39])
def test_comparisons_tell_all(mask, q_offset):
    for kv_len in (40, 41):
        found = walked(mask, 1, kv_len, q_offset, rows=4)
        assert sorted(found) == tiles_of(mask, 1, kv_len, q_offset=q_offset)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 5), st.integers(1, 40), st.integers(-9, 40), st.sampled_from([0, 0, -3, 7]))
def test_what_is_seen_is_walked_once(data, q_len, kv_len, q_offset, kv_offset):
    mask = data.draw(masks(max_len=80).filter(is_plain))
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    found = walked(mask, q_len, kv_len, **offsets)
    assert len(set(found)) == len(found)
    assert set(found) >= set(tiles_of(mask, q_len, kv_len, **offsets))
    assert all(0 <= tile < -(-kv_len // BLOCK) for tile in found)


@pytest.mark.parametrize("far", [2**63 - 1, -(2**63), 2**62, 2**55, 2**31])
def test_sums_that_may_wrap_are_not_rearranged(far):
    for mask in (
        mf.mask(lambda b, h, q, kv: q - kv <= far),
        mf.mask(lambda b, h, q, kv: kv + far > q),
        mf.mask(lambda b, h, q, kv: abs(kv - q) < far),
    ):
        assert set(walked(mask, 2, 30, 10)) >= set(tiles_of(mask, 2, 30, q_offset=10))
    assert set(walked(mf.causal(), 1, 30, kv_offset=2**59)) >= set(tiles_of(mf.causal(), 1, 30, kv_offset=2**59))
