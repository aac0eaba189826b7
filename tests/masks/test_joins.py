"""Masks joined in loops: any number of joins, of any kind, at a cost that grows with them."""

import copy
import functools
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.reference import reference
from maskflash.expr.nodes import Builder

OPS = {"|": operator.or_, "&": operator.and_, "^": operator.xor}
MANY = 1000


def step(mask, n, other):
    """One of every kind of join, by turns."""
    return [lambda: mask | other, lambda: ~mask & other, lambda: other ^ mask, lambda: ~(mask | ~other)][n % 4]()


JOINS = {
    **{op: lambda mask, n, other, join=join: join(mask, other) for op, join in OPS.items()},
    "| from the right": lambda mask, n, other: other | mask,
    "by turns": step,
}


def diagonal(distance):
    return mf.mask(lambda b, h, q, kv: q - kv == distance)


def joined(how, n=MANY):
    leaves = [diagonal(distance) for distance in range(n)]
    mask = leaves[0]
    distance = torch.arange(40)[:, None] - torch.arange(40)
    dense = distance == 0
    for place, leaf in enumerate(leaves[1:]):
        mask = JOINS[how](mask, place, leaf)
        dense = JOINS[how](dense, place, distance == place + 1)
    return mask, dense


@pytest.fixture(scope="module", params=JOINS)
def many(request):
    return joined(request.param)


def test_every_pair_is_right(many):
    mask, dense = many
    assert torch.equal(mask.dense(40, 40)[0, 0], dense)
    assert torch.equal(mask.block_map(40, 40, block_size=8).kinds()[0, 0] > 0, dense.view(5, 8, 5, 8).any(3).any(1))
    row = [any(start <= kv < stop for start, stop in mask.row(17, 40)) for kv in range(40)]
    column = [any(start <= q < stop for start, stop in mask.column(17, 40)) for q in range(40)]
    assert row == dense[17].tolist() and column == dense[:, 17].tolist()


def test_every_question_has_an_answer(many):
    mask, dense = many
    for q, kv in ((5, 3), (3, 5)):
        why = mask.why(q, kv)
        assert bool(why) == bool(dense[q, kv]) and why.reasons
        assert len(str(why)) < 5000
    assert len(repr(mask)) < 1100 and "masks" in repr(mask)
    assert mf.compile(mask).explain(40, 40).to_dict()["q_len"] == 40
    assert mf.equivalent(mask, mask, 40, 40)
    assert not mf.equivalent(mask, ~mask, 40, 40)
    assert mf.implies(mask & mf.causal(), mf.causal(), 40, 40)
    assert mask._repr_html_()
    assert int(mask.to_block_mask(40, 40).kv_num_blocks.sum()) <= 1


def test_copies_are_the_same_mask(many):
    mask, dense = many
    for copied in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert copied.fingerprint() == mask.fingerprint()
        assert repr(copied) == repr(mask)
        assert torch.equal(copied.dense(40, 40)[0, 0], dense)


def test_attention_and_its_gradients(many):
    mask, dense = many
    q, k, v = (torch.randn(1, 1, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = mf.attention(q, k, v, mask)
    truth = reference(q, k, v, dense, 8**-0.5)[0]
    torch.testing.assert_close(out, truth)
    for found, expected in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, truth)), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_predicate_may_call_it(many):
    mask, dense = many
    outer = mf.mask(lambda b, h, q, kv: mask(b, h, q, kv) and q >= kv)
    assert torch.equal(outer.dense(40, 40)[0, 0], dense.tril())
    pairs = torch.arange(40)
    assert torch.equal(mask(0, 0, pairs[:, None], pairs).expand(40, 40), dense)


def test_a_mask_negated_five_thousand_times():
    mask = mf.causal()
    for _ in range(5000):
        mask = ~mask
    assert mask.row(3, 9) == [(0, 4)]
    assert pickle.loads(pickle.dumps(mask)).fingerprint() == mf.causal().fingerprint()
    assert mask.why(3, 5).reasons[0].text == "q >= kv"


def test_vectors_of_many_spans():
    spans = [mf.mask(span(2 * n, 2 * n + 1)) for n in range(MANY)]
    vectors = functools.reduce(operator.or_, spans).to_flashmask(8, 64)
    assert torch.equal(vectors.dense(8, 64)[0, 0], (torch.arange(64) % 2 == 0).expand(8, 64))


def span(start, stop):
    return lambda b, h, q, kv: (start <= kv) & (kv < stop)


def test_a_thousand_tables_have_names_of_their_own():
    tables = [torch.full((4,), n) for n in range(MANY)]
    mask = functools.reduce(operator.or_, (mf.mask(look_up(doc)) for doc in tables))
    names = mask.traced({}).names
    assert names[:3] == ("doc", "doc_2", "doc_3") and len(set(names)) == MANY
    assert mask.row(1, 4) == [(0, 4)]


def look_up(doc):
    return lambda b, h, q, kv: doc[q] == doc[kv]


def test_the_work_grows_as_the_masks_do(monkeypatch):
    added = []
    add = Builder.add
    monkeypatch.setattr(Builder, "add", lambda self, *args, **kwargs: added.append(1) or add(self, *args, **kwargs))
    counts = []
    for n in (200, 400):
        mask = joined("by turns", n)[0]
        added.clear()
        mask.row(3, 40)
        counts.append(len(added))
    assert counts[1] < 2.1 * counts[0]


def test_names_of_chains_have_no_brackets_and_long_ones_are_counted():
    chain = mf.full() | mf.causal() | mf.mask(look_up(torch.zeros(4)))
    assert repr(chain) == "full() | causal() | <lambda>"
    assert repr(mf.causal() & (mf.full() & mf.causal())) == "causal() & full() & causal()"
    assert repr(mf.full() | mf.causal() & mf.full()) == "full() | (causal() & full())"
    assert repr(~(mf.full() ^ mf.causal()) & mf.full()) == "~(full() ^ causal()) & full()"
    wide = functools.reduce(operator.or_, [mf.causal()] * MANY)
    assert "joined masks | causal()" in repr(wide) and len(repr(wide)) <= 1000


LEAVES = [mf.causal(), mf.sliding_window(3), mf.prefix_lm(4), mf.mask(lambda b, h, q, kv: (q + kv) % 3 == 0)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["bitand", "bitor", "bitxor", "not"]), st.integers(0), st.integers(0))))
def test_joins_of_joins_are_the_pairs_joins(steps):
    """Each step joins any two of what there is, so that masks are shared too."""
    masks, planes = list(LEAVES), [leaf.dense(12, 12)[0, 0] for leaf in LEAVES]
    for op, *operands in steps:
        x, y = (operand % len(masks) for operand in operands)
        join = {"bitand": operator.and_, "bitor": operator.or_, "bitxor": operator.xor}.get(op)
        masks.append(join(masks[x], masks[y]) if join else ~masks[x])
        planes.append(join(planes[x], planes[y]) if join else ~planes[x])
    copied = pickle.loads(pickle.dumps(masks[-1]))
    assert torch.equal(masks[-1].dense(12, 12)[0, 0], planes[-1])
    assert torch.equal(copied.dense(12, 12)[0, 0], planes[-1])
    assert bool(masks[-1].why(5, 7)) == bool(planes[-1][5, 7])


def test_a_mask_that_is_joined_with_itself_is_taken_once():
    mask = mf.mask(lambda b, h, q, kv: q - kv < 5)
    for _ in range(40):
        mask = mask | mask
    assert mask.row(9, 12) == [(5, 12)]
    assert "joined masks" in repr(mask) and len(repr(mask)) <= 1000


def test_what_is_out_of_range_in_any_mask_is_an_error():
    short = torch.zeros(3)
    masks = [diagonal(n) for n in range(300)]
    masks[150] = mf.mask(lambda b, h, q, kv: short[kv] == 0)
    with pytest.raises(mf.MaskIndexError):
        functools.reduce(operator.or_, masks).row(3, 9)
