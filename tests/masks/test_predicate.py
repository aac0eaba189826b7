"""Masks: what they show, how they combine, what they remember of a trace."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.functions import written as module
from maskflash.masks import sight
from maskflash.testing import masks

LENGTHS = st.integers(0, 40)


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv]


def test_dense_is_the_predicate_of_every_pair():
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    dense = packed.dense(4, 4, batch=2, heads=3, doc=ids)
    assert dense.shape == (2, 3, 4, 4)
    assert dense.dtype == torch.bool
    for b, h, q, kv in itertools.product(range(2), range(3), range(4), range(4)):
        assert dense[b, h, q, kv] == (q >= kv and ids[b, q] == ids[b, kv])


def test_dense_in_bands_is_the_same(monkeypatch):
    whole = packed.dense(50, 50, batch=2, doc=torch.arange(100).view(2, 50) // 7)
    monkeypatch.setattr(sight, "_PAIRS_AT_ONCE", 300)
    assert torch.equal(packed.dense(50, 50, batch=2, doc=torch.arange(100).view(2, 50) // 7), whole)


@given(masks(), masks(), LENGTHS, LENGTHS)
def test_connectives_are_set_operations(x, y, q_len, kv_len):
    def dense(mask):
        return mask.dense(q_len, kv_len, batch=2, heads=2)

    assert torch.equal(dense(x & y), dense(x) & dense(y))
    assert torch.equal(dense(x | y), dense(x) | dense(y))
    assert torch.equal(dense(x ^ y), dense(x) ^ dense(y))
    assert torch.equal(dense(~x), ~dense(x))


@given(masks())
def test_a_mask_is_a_predicate(mask):
    def caller(b, h, q, kv):
        return mask(b, h, q, kv)

    assert torch.equal(mf.mask(caller).dense(20, 20, batch=2, heads=2), mask.dense(20, 20, batch=2, heads=2))


def test_joined_masks_share_arguments_of_one_name():
    @mf.mask
    def windowed(b, h, q, kv, *, doc, window=2):
        return q - kv < window and doc[b, kv] >= 0

    joined = packed & windowed
    assert joined.keywords == ("doc", "window")
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    expected = packed.dense(5, 5, doc=ids) & windowed.dense(5, 5, doc=ids)
    assert torch.equal(joined.dense(5, 5, doc=ids), expected)
    assert torch.equal(joined.dense(5, 5, doc=ids, window=9), packed.dense(5, 5, doc=ids))
    assert len(joined.traced({"doc": ids, "window": 2}).tables) == 1


def test_a_default_serves_only_where_every_part_has_one():
    @mf.mask
    def strict(b, h, q, kv, *, window):
        return q - kv < window

    @mf.mask
    def lenient(b, h, q, kv, *, window=3):
        return kv - q < window

    with pytest.raises(mf.ArgumentTypeError, match="needs window"):
        (strict & lenient).dense(4, 4)
    assert (lenient & lenient).dense(4, 4).shape == (1, 1, 4, 4)


def test_a_mask_is_traced_once_for_arguments_of_one_kind(monkeypatch):
    traces = []
    original = module.trace
    monkeypatch.setattr(module, "trace", lambda *args: traces.append(1) or original(*args))

    @mf.mask
    def windowed(b, h, q, kv, *, doc, window):
        return q - kv < window and doc[q] == doc[kv]

    for length, window in ((4, 0), (8, 1), (16, 5), (4, -3)):
        windowed.block_map(length, length, doc=torch.zeros(length, dtype=torch.int32), window=window)
    assert len(traces) == 1
    windowed.dense(4, 4, doc=torch.zeros(4), window=1)  # another dtype is another expression
    assert len(traces) == 2


def test_what_a_trace_depends_on_is_traced_again():
    @mf.mask
    def strided(b, h, q, kv, *, stride, tail):
        return (q - kv) % stride == 0 if kv < tail.shape[0] else True

    for stride, length in ((2, 3), (3, 3), (3, 5), (2, 3)):
        found = strided.dense(7, 7, stride=stride, tail=torch.zeros(length))[0, 0]
        for q, kv in itertools.product(range(7), range(7)):
            assert found[q, kv] == ((q - kv) % stride == 0 if kv < length else True)


def test_what_a_predicate_captures_is_read_when_the_mask_is_used():
    table, window = torch.tensor([3, 3, 3, 3]), 2
    mask = mf.mask(lambda b, h, q, kv: q - kv < window and table[q] == 3)
    assert mask.row(3, 4) == [(2, 4)]
    window = 1
    assert mask.row(3, 4) == [(3, 4)]
    table[3] = 0
    assert mask.row(3, 4) == []


def test_names():
    mask = ~(mf.causal() & mf.sliding_window(3)) | mf.document([1, 2]) ^ packed
    assert repr(mask) == "~(causal() & sliding_window(3)) | (document(2 documents) ^ packed)"


@pytest.mark.parametrize("use", [lambda m: m and m, lambda m: not m, lambda m: 1 if m else 2])
def test_a_mask_has_no_truth_value(use):
    with pytest.raises(mf.ArgumentTypeError, match=r"combine masks with & \| \^ ~"):
        use(mf.causal())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: packed.dense(4, 4), mf.ArgumentTypeError, "Mask.dense: the mask needs doc; pass it by name: doc=..."),
        (lambda: packed.dense(4, 4, doc=[[1]]), mf.ArgumentTypeError, r"doc is \[\[1\]\], .*torch.as_tensor\(doc\)"),
        (lambda: packed.dense(4, 4, docs=1), mf.ArgumentTypeError, "unexpected argument 'docs'.*are: doc"),
        (lambda: mf.causal().dense(-1, 4), mf.ArgumentError, "q_len is -1, expected at least 0"),
        (lambda: mf.causal().dense(4, 4.0), mf.ArgumentTypeError, "kv_len is 4.0, expected an int"),
        (lambda: mf.causal().dense(4, True), mf.ArgumentTypeError, "kv_len is True, expected an int"),
        (lambda: mf.causal().dense(4, torch.tensor(4)), mf.ArgumentTypeError, "kv_len is a Tensor.*item"),
        (lambda: mf.causal().dense(4, 4, batch=-2), mf.ArgumentError, "batch is -2"),
        (lambda: mf.causal().block_map(4, 4, block_size=0), mf.ArgumentError, "block_size is 0, expected at least 1"),
        (
            lambda: mf.causal().block_map(4, 4, block_size=(1, 2, 3)),
            mf.ArgumentError,
            r"\(1, 2, 3\), expected an int or",
        ),
        (lambda: mf.causal().dense(4, 4, q_offset=1.5), mf.ArgumentTypeError, "q_offset is 1.5, expected an int"),
        (lambda: mf.causal().dense(4, 4, q_offset=torch.tensor([1.0])), mf.ArgumentTypeError, "an integer dtype"),
        (
            lambda: mf.causal().dense(4, 4, q_offset=torch.tensor([1, 2])),
            mf.ArgumentError,
            r"shape \(2,\), expected \(1,\)",
        ),
        (lambda: mf.mask(lambda b, h, q: True), mf.ArgumentError, r"takes \(b, h, q, kv\), got \(b, h, q\)"),
    ],
)
def test_wrong_arguments_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_masks_join_predicates():
    """Mask functions written for FlexAttention join masks as they are, on either side."""

    def even(b, h, q, kv):
        return kv % 2 == 0

    for joined, expected in (
        (mf.causal() & even, lambda b, h, q, kv: q >= kv and kv % 2 == 0),
        (even | mf.causal(), lambda b, h, q, kv: q >= kv or kv % 2 == 0),
        (mf.causal() ^ even, lambda b, h, q, kv: (q >= kv) != (kv % 2 == 0)),
        (even & mf.causal() & even, lambda b, h, q, kv: q >= kv and kv % 2 == 0),
    ):
        assert mf.equivalent(joined, expected, 40, 40)
    assert repr(even & mf.causal()) == "even & causal()"
    for other in (3, torch.ones(2, 2), None):
        with pytest.raises(TypeError):
            mf.causal() & other


@pytest.mark.parametrize("suffix", ["", "_idx"])
def test_indices_that_stand_at_other_places_are_told(suffix):
    right = ("b", "h", f"q{suffix}", f"kv{suffix}")
    for names in itertools.permutations(right):
        predicate = eval(f"lambda {', '.join(names)}: q{suffix} >= kv{suffix}")
        if names == right:
            assert bool(mf.equivalent(predicate, mf.causal(), 8, 8))
            continue
        with pytest.raises(mf.ArgumentError, match=r"takes \(b, h, q, kv\), got .*: arguments go by place"):
            mf.mask(predicate)
    with pytest.raises(mf.ArgumentError, match=r"got \(score, b, h, kv, q\), where kv would be q"):
        mf.score(lambda score, b, h, kv, q: score - (q - kv))
    assert bool(mf.equivalent(lambda _, __, i, j: i >= j, mf.causal(), 8, 8))  # other names say nothing


class Window(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.arange(8))

    def forward(self, b, h, q, kv, *, n=2):
        return 0 <= self.place[q] - kv <= n


def test_a_module_is_a_mask_by_its_forward():
    assert bool(mf.equivalent(Window(), mf.sliding_window(2), 8, 8))
    assert torch.equal(mf.mask(Window()).dense(8, 8, n=4), mf.sliding_window(4).dense(8, 8))
    with pytest.raises(mf.ArgumentError, match=r"^Linear: a mask predicate takes \(b, h, q, kv\), got \(input\)"):
        mf.compile(torch.nn.Linear(2, 2))
