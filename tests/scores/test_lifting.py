"""What of a score function is -inf whatever the score becomes a mask: the same as written by hand, and as dense."""

import pytest
import torch

import maskflash as mf
from maskflash.scores.lifting import lift
from maskflash.scores.score import ROLES
from maskflash.testing import Shape, assert_matches_dense
from maskflash.trace.trace import trace

N = 70
INF = float("inf")
DOC = torch.arange(N) // 20
T = torch.linspace(-1, 1, N)

# A score function, and the mask that it hides the rest of.
CASES = [
    (lambda score, b, h, q, kv: torch.where(q >= kv, score, -INF), lambda b, h, q, kv: q >= kv),
    (lambda score, b, h, q, kv: torch.where(q < kv, -INF, score + T[q]), lambda b, h, q, kv: q >= kv),
    (lambda score, b, h, q, kv: score if q - 9 <= kv <= q else -INF, lambda b, h, q, kv: q - 9 <= kv <= q),
    (lambda score, b, h, q, kv: score.masked_fill(DOC[q] != DOC[kv], -INF), lambda b, h, q, kv: DOC[q] == DOC[kv]),
    (lambda score, b, h, q, kv: score + (0 if DOC[q] == DOC[kv] else -INF), lambda b, h, q, kv: DOC[q] == DOC[kv]),
    (lambda score, b, h, q, kv: torch.where(q >= kv, 0.0, -INF) + score * T[kv], lambda b, h, q, kv: q >= kv),
    (lambda score, b, h, q, kv: torch.minimum(score, torch.where(q >= kv, INF, -INF)), lambda b, h, q, kv: q >= kv),
    (lambda score, b, h, q, kv: torch.where(q >= kv, score, -INF) * 0.5 - T[q], lambda b, h, q, kv: q >= kv),
    (lambda score, b, h, q, kv: 2.0 * torch.where(q >= kv, score / 3.0, -INF), lambda b, h, q, kv: q >= kv),
    (
        lambda score, b, h, q, kv: torch.where(q >= kv, torch.where(DOC[q] == DOC[kv], score, -INF), -INF),
        lambda b, h, q, kv: q >= kv and DOC[q] == DOC[kv],
    ),
    (
        lambda score, b, h, q, kv: torch.where(q < 20, score, torch.where(kv < 20, -INF, score * 2)),
        lambda b, h, q, kv: q < 20 or kv >= 20,
    ),
    (
        lambda score, b, h, q, kv: (score if q >= kv else -INF) + (T[q] if DOC[q] == DOC[kv] else -INF),
        lambda b, h, q, kv: q >= kv and DOC[q] == DOC[kv],
    ),
    (
        lambda score, b, h, q, kv: torch.where(h == 0, score, torch.where(q >= kv, score, -INF)),
        lambda b, h, q, kv: h == 0 or q >= kv,
    ),
]


@pytest.mark.parametrize(("score", "mask"), CASES, ids=range(len(CASES)))
def test_what_is_hidden_is_the_mask_written_by_hand(score, mask):
    attn = mf.compile(mf.full(), score=score, block_size=16)
    by_hand = mf.mask(mask)
    found = attn.mask.block_map(N, N, heads=2, block_size=16)
    assert found.counts == by_hand.block_map(N, N, heads=2, block_size=16).counts
    assert found.counts["skip"] > 0
    assert torch.equal(attn.mask.dense(N, N, heads=2), by_hand.dense(N, N, heads=2).expand(1, 2, N, N))
    told = attn.explain(N, N, heads=2).to_dict()
    assert told["score"]["lifted"]
    assert "-inf" not in told["score"]["value"]


@pytest.mark.parametrize(("score", "mask"), CASES, ids=range(len(CASES)))
def test_results_are_those_of_the_whole(score, mask):
    assert_matches_dense(mf.sliding_window(30, 40), Shape(1, 2, 1, N, N, 8, 8), score=score, block_size=16)


def test_arguments_and_learned_tables():
    def score(score, b, h, q, kv, *, doc, window, bias):
        return torch.where((doc[b, q] == doc[b, kv]) & (q - kv < window), score + bias[h, kv], -INF)

    doc = torch.stack([torch.arange(N) // 30, torch.arange(N) // 7])
    bias = torch.randn(2, N, requires_grad=True)
    given = {"doc": doc, "window": 12, "bias": bias}
    attn = mf.compile(mf.causal(), score=score, block_size=16)
    by_hand = mf.mask(lambda b, h, q, kv, *, doc, window: doc[b, q] == doc[b, kv] and q - kv < window) & mf.causal()
    explained = attn.explain(N, N, batch=2, heads=2, **given).to_dict()
    expected = mf.compile(by_hand, block_size=16).explain(N, N, batch=2, heads=2, doc=doc, window=12).to_dict()
    assert explained["tiles"] == expected["tiles"]
    assert_matches_dense(mf.causal(), Shape(2, 2, 1, N, N, 8, 8), score=score, block_size=16, **given)


@pytest.mark.parametrize(
    "score",
    [
        lambda score, b, h, q, kv: torch.where(score > 0, score, -INF),  # on the score itself
        lambda score, b, h, q, kv: score if score * T[q] > -0.1 else -INF,
        lambda score, b, h, q, kv: torch.where(torch.tanh(T[q]) > 0, score, -INF),  # another bit on another machine
        lambda score, b, h, q, kv: torch.exp(torch.where(q >= kv, score, -INF)),  # 0, not -inf
        lambda score, b, h, q, kv: torch.maximum(score, torch.where(q >= kv, score, -INF)),
        lambda score, b, h, q, kv: torch.where(q >= kv, score, -INF) * T[q].abs(),  # perhaps times 0
        lambda score, b, h, q, kv: score - torch.where(q >= kv, 0.0, -INF),  # +inf is no mask, and no number
    ],
    ids=range(7),
)
def test_what_is_no_mask_stays_in_the_score(score):
    expr = trace(score, role=ROLES[torch.float32]).expr
    assert lift(expr).mask is None
    assert lift(expr).rest is expr


@pytest.mark.parametrize(
    "score",
    [
        lambda score, b, h, q, kv: torch.where(score > 0, score, -INF),
        lambda score, b, h, q, kv: score if score * T[q] > -0.1 else -INF,
        lambda score, b, h, q, kv: min(score, INF if q % 7 else -INF),
        lambda score, b, h, q, kv: torch.where(torch.tanh(T[q]) > 0, score, -INF),
    ],
    ids=range(4),
)
def test_values_of_minus_infinity_hide_pairs_too(score):
    """Rows that lose all of their pairs so see nothing: out 0, lse -inf, no gradient."""
    assert_matches_dense(mf.causal(), Shape(1, 2, 1, N, N, 8, 8), score=score)


def test_nothing_is_left_of_a_score_that_only_hides():
    def window(score, b, h, q, kv):
        return score if q - 8 <= kv <= q else -INF

    q, k, v = torch.randn(3, 1, 2, N, 8).unbind()
    hidden = mf.attention(q, k, v, score=window, return_lse=True)
    masked = mf.attention(q, k, v, mf.sliding_window(8), return_lse=True)
    for one, other in zip(hidden, masked, strict=True):
        assert torch.equal(one, other)  # the same kernel calls


def test_a_condition_is_looked_up_for_visible_pairs_only():
    """The table is too short for what the mask hides."""
    short = DOC[:50]

    def score(score, b, h, q, kv):
        return torch.where(short[q] == short[kv], score, -INF)

    mask = mf.mask(lambda b, h, q, kv: q < 50 and kv < 50)
    assert_matches_dense(mask, Shape(1, 2, 1, N, N, 8, 8), score=score, block_size=16)
    with pytest.raises(mf.MaskIndexError, match="reads index 50 of a table of shape"):
        mf.attention(*torch.randn(3, 1, 2, N, 8).unbind(), score=score)


def test_several_in_turn_are_lifted_together():
    score = (
        lambda score, b, h, q, kv: score if DOC[q] == DOC[kv] else -INF,
        mf.scores.alibi(torch.tensor([0.5, 0.25])),
    )
    attn = mf.compile(mf.causal(), score=score, block_size=16)
    by_hand = mf.causal() & mf.document(ids=DOC)
    assert attn.mask.block_map(N, N, heads=2, block_size=16).counts == by_hand.block_map(N, N, block_size=16).counts
    assert_matches_dense(mf.causal(), Shape(1, 2, 1, N, N, 8, 8), score=score, block_size=16)
