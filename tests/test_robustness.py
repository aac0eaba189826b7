"""Masks at their limits: large tables, wide and negative numbers, hardly any tokens, and very many operations."""

import linecache
import operator

import pytest
import torch

import maskflash as mf
from maskflash.analysis.runs import FULL
from maskflash.analysis.ways.columns import find_pieces
from maskflash.analysis.ways.coverage import cover
from maskflash.testing import Shape, assert_matches_dense
from maskflash.trace import tracer

WIDE = torch.tensor([-(2**63), -(2**63), -5, -5, 2**63 - 1, 2**63 - 1, 0])
MANY = 10_000


def test_a_table_of_ten_million_entries():
    n = 10_000_000
    ids = torch.arange(n, dtype=torch.int32) // 1000
    mask = mf.causal() & mf.document(ids=ids)
    assert mask.row(n - 1, n) == [(n - 1000, n)]
    assert mask.column(1000, n) == [(1000, 2000)]
    assert "9999 != 0" in str(mask.why(n - 1, 5))
    assert len(mask.fingerprint()) == 32
    late = mask.block_map(512, n, q_offset=n - 512)
    assert late.counts == {"full": 18, "partial": 8, "skip": 312_474}


@pytest.mark.parametrize(
    "predicate",
    [
        lambda b, h, q, kv: WIDE[q % 7] == WIDE[kv % 7],
        lambda b, h, q, kv: WIDE[q % 7] < WIDE[kv % 7],
        lambda b, h, q, kv: WIDE[q % 7] - WIDE[kv % 7] > 0,  # wraps, as in torch
        lambda b, h, q, kv: q * 2**60 < kv * 2**60,
        lambda b, h, q, kv: (q - 20) // 7 == (kv - 25) // 7 or (q - 30) % 5 == -kv % 5,
        lambda b, h, q, kv: WIDE[-1 - q % 7] != -5 and q - 40 < -kv,
    ],
)
@pytest.mark.parametrize("lengths", [(37, 53), (1, 61), (61, 1)])
def test_wide_and_negative_numbers(predicate, lengths):
    assert_matches_dense(predicate, Shape(q_len=lengths[0], kv_len=lengths[1]), block_size=(5, 7))


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: mf.causal(),
        lambda n: mf.causal() & mf.document([n]),
        lambda n: ~mf.causal() | mf.sliding_window(3),
        lambda n: mf.causal().to_flashmask(n, n),
        lambda n: mf.document([n]).to_flashmask(n, n) & mf.global_tokens(1),
    ],
)
def test_no_token_and_one(make, n):
    mask = make(n)
    assert_matches_dense(mask, Shape(q_len=n, kv_len=n))
    dense = mask.dense(n, n)
    assert mf.equivalent(mask, mask, n, n) and mf.implies(mask, mf.full(), n, n)
    assert mf.equivalent(mask.to_flashmask(n, n), mask, n, n)
    assert "tiles" in str(mask.block_map(n, n)) and "tiles" in str(mf.compile(mask).explain(n, n))
    if n:
        sizes = {"q_len": n, "kv_len": n}
        assert bool(mask.why(0, 0, **sizes)) == bool(dense) == bool(mask.row(0, n, q_len=n))


def summed(b, h, q, kv):
    total = q
    for n in range(MANY):
        total = total + kv if n % 2 else total - q
    return total > 0


def any_of(b, h, q, kv):
    return any(q == n and kv == 2 * n for n in range(MANY // 6))


def chosen(b, h, q, kv):
    value = q
    for n in range(MANY // 6):
        value = torch.where(q > kv + n, value, value + 1)
    return value > 3


def looked_up(b, h, q, kv):
    place = q
    for _ in range(MANY // 4):
        place = TABLE[(place + 1) % 100]
    return place > kv


TABLE = torch.arange(100) * 37 % 100


@pytest.mark.parametrize("predicate", [summed, any_of, chosen, looked_up])
def test_ten_thousand_operations_get_an_answer(predicate):
    mask = mf.mask(predicate)
    dense = mask.dense(24, 20)[0, 0]
    expected = [[bool(predicate(0, 0, torch.tensor(q), torch.tensor(kv))) for kv in (0, 19)] for q in (0, 23)]
    assert dense[[0, -1]][:, [0, -1]].tolist() == expected
    tile = mask.block_map(24, 20, block_size=32).kinds()
    assert tile.item() == (2 if dense.all() else 1 if dense.any() else 0)
    assert len((mask & mf.causal()).row(5, 20)) >= 0
    assert mask.why(5, 3).visible == dense[5, 3]
    assert len(str(mask.why(5, 3))) < 10_000 and len(mask._repr_html_()) < 20_000


def test_branches_that_are_recorded_again_and_again_are_told(monkeypatch):
    monkeypatch.setattr(tracer, "MAX_OPERATIONS", 5000)

    def branching(b, h, q, kv):
        for n in range(MANY):
            if q == kv + n:
                return True
        return kv < 0

    with pytest.raises(
        mf.MaskTraceError, match=r'branching .*"(kv \+ n|q == kv \+ n)" is reached after 5,000 operations'
    ):
        mf.mask(branching)


def test_operators_nested_deeper_than_the_stack_are_traced_as_they_run():
    text = f"f = lambda b, h, q, kv: {' + '.join(['q'] * 2000)} > kv * 1999\n"
    linecache.cache["<nested>"] = (len(text), None, [text], "<nested>")
    scope = {}
    exec(compile(text, "<nested>", "exec"), scope)
    assert mf.mask(scope["f"]).row(10, 20) == [(0, 11)]


def test_taking_an_expression_apart_costs_what_its_parts_do():
    copied = []
    expr = mf.mask(any_of).traced({}).expr
    original = type(expr).part

    def counted(self, root):
        found = original(self, root)
        copied.append(len(found.nodes))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(expr), "part", counted)
        from maskflash.analysis.ways.separate import separate

        separate.__wrapped__(expr)
    assert sum(copied) < 4 * len(expr.nodes)


ENDS = [-(2**63), -(2**63) + 1, -7, -1, 0, 3, 11, 2**62, 2**63 - 2, 2**63 - 1]
ROWS = {
    "rows": torch.arange(16),
    "falling": -torch.arange(16),
    "lowest": torch.arange(16) - 2**63,
    "highest": torch.arange(16) + (2**63 - 16),
    "falling from the highest": 2**63 - 1 - torch.arange(16),
    "falling to the lowest": -(2**63) + 15 - torch.arange(16),
    "leaping": torch.tensor([-(2**63), 2**63 - 1]).repeat_interleave(8),
    "plunging": torch.tensor([2**63 - 1, -(2**63)]).repeat_interleave(8),
    "wrapping": torch.arange(16) * 2**60,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne])
@pytest.mark.parametrize("offset", [0, 1, -1])
def test_columns_are_cut_right_at_the_ends_of_64_bits(name, compare, offset):
    rows, columns = ROWS[name], torch.tensor(ENDS)
    mask = mf.mask(lambda b, h, q, kv: compare(rows[q], columns[kv]))
    if name == "rows":
        mask = mf.mask(lambda b, h, q, kv: compare(q, columns[kv]))
    elif offset:
        return
    problem = mask.at(16, 10, q_offset=offset).tiled((1, 1))
    pieces = find_pieces(problem)
    if pieces is not None:
        dense = mask.dense(16, 10, q_offset=offset)
        assert torch.equal(cover(pieces).kinds() == FULL, dense)
    else:
        assert name in ("wrapping", "plunging", "falling to the lowest")
