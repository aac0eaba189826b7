"""The score functions that people use, each in its own words: traced, of its class, and as near to dense as rounding.

The numbers are those of a survey of attention libraries, papers and models; what is no score function says why.
"""

import math

import pytest
import torch

import maskflash as mf
from maskflash.scores.form import form_of
from maskflash.scores.lifting import lift
from maskflash.scores.score import ROLES
from maskflash.testing import Shape, assert_matches_dense
from maskflash.trace.trace import trace
from tests.scores.pairs import pair_by_pair, traced

N = 24  # tokens
SHAPE = Shape(2, 4, 2, N, N, 8, 8)
FEW = (2, 4, 5, 6)
DRAW = torch.Generator().manual_seed(3)
INF = float("inf")


def learned(*shape):
    return torch.randn(shape, generator=DRAW).requires_grad_()


def positive(*shape):
    return (torch.rand(shape, generator=DRAW) + 0.3).requires_grad_()


def integers(most, *shape):
    return torch.randint(0, most, shape, generator=DRAW)


PER_HEAD, GAIN, RATE = learned(4), positive(4), positive(4)
PER_TOKEN, OTHER, SCALAR = learned(N), learned(N), positive()
BY_BATCH, BY_KEY, WEIGHT = learned(2), learned(2, N), positive(2, N)
ROWS, PAIRS, ALL = learned(2, 4, N), learned(4, N, N), learned(2, 4, N, N)
DISTANCES, HEAD_DISTANCES, CLIPPED = learned(2 * N - 1), learned(4, 2 * N - 1), learned(11)
BUCKETS, SMALL = learned(32, 4), learned(7)
BY_ROW, BY_COLUMN, NEAR = learned(2, 4, N, 2 * N - 1), learned(2, 4, N, 2 * N - 1), learned(2, 4, N, 6)
HIGH, WIDE, SEGMENTS, EDGES = learned(2, 4, N, 4), learned(2, 4, N, 6), learned(3, 3, 4), learned(4, 3, 5)
BY_RELATION, MIXTURE = learned(4, 7), learned(5, 4)
ORDER, RELATION, WINDOW = torch.randperm(N, generator=DRAW), integers(7, 2, N, N), integers(7, N, N)
KIND, DOCUMENT, PATH = integers(3, 2, N), (integers(2, 2, N).cumsum(1) // 4), integers(5, 2, N, N, 3)
X, Y, TIME = integers(9, 2, N), integers(9, 2, N), integers(4, 2, N).cumsum(1)
FAR, MEANS = torch.rand(2, N, N, generator=DRAW) * 4, torch.linspace(0, 4, 5)
KEPT, SHIFTED = torch.rand(2, 4, N, generator=DRAW) < 0.6, torch.where(integers(2, 3, N, N) > 0, 0.0, -100.0)
HIDDEN, LAST = (learned(4), learned(4)), learned(4)


def t5_bucket(distance):
    near, far = distance.abs(), 8 + (torch.log(distance.abs() / 8) / math.log(128 / 8) * 8).long()
    return (distance > 0) * 16 + torch.where(near < 8, near, torch.minimum(far, torch.full_like(far, 15)))


def fire(score, b, h, q, kv):
    x = torch.log1p(SCALAR * abs(q - kv)) / torch.log1p(SCALAR * max(q, 8))
    total = 0.0
    for i in range(4):
        total = total + LAST[i] * torch.relu(HIDDEN[0][i] * x + HIDDEN[1][i])
    return score + total * PER_HEAD[h]


def inside_an_extent(score, b, h, q, kv):
    if 0 <= q - kv < 6:
        return score + NEAR[b, h, q, q - kv]
    return score


def gaussians(score, b, h, q, kv):
    found = 0.0
    for i in range(5):
        found = found + MIXTURE[i, h] * torch.exp(-((FAR[b, q, kv] - MEANS[i]) ** 2) / 2)
    return score + found


def by_window(score, b, h, q, kv):
    return torch.where((DOCUMENT[b, q] == DOCUMENT[b, kv]) & (q - kv < 9), score, -INF)


FUNCTIONS = [
    (1, "additive", lambda score, b, h, q, kv: score + 2.0 ** (-8.0 * (h + 1) / 4) * (kv - q)),
    (1, "additive", lambda score, b, h, q, kv: score + PER_HEAD[h] * (kv - q)),
    (2, "additive", lambda score, b, h, q, kv: score - PER_HEAD[h] * abs(q - kv)),
    (3, "general", lambda score, b, h, q, kv: 3.0 * torch.tanh(score / 3.0)),
    (5, "additive", lambda score, b, h, q, kv: score + BUCKETS[t5_bucket(kv - q), h]),
    (6, "additive", lambda score, b, h, q, kv: score + DISTANCES[q - kv + N - 1]),
    (6, "additive", lambda score, b, h, q, kv: score + HEAD_DISTANCES[h, q - kv + N - 1]),
    (7, "additive", lambda score, b, h, q, kv: score + CLIPPED[torch.clamp(q - kv + 5, 0, 10)]),
    (8, "additive", lambda score, b, h, q, kv: score + PAIRS[h, q, kv]),
    (9, "additive", lambda score, b, h, q, kv: score + BY_KEY[b, kv]),
    (10, "additive", lambda score, b, h, q, kv: score + PER_TOKEN[q]),
    (11, "additive", lambda score, b, h, q, kv: score + PER_TOKEN[q] + PER_TOKEN[kv]),
    (12, "additive", lambda score, b, h, q, kv: score + PER_TOKEN[ORDER[q]]),
    (12, "additive", lambda score, b, h, q, kv: score + SMALL[RELATION[b, q, kv]]),
    (13, "additive", lambda score, b, h, q, kv: score + BUCKETS[WINDOW[q, kv], h]),
    (14, "additive", lambda score, b, h, q, kv: score + SHIFTED[b % 3, q, kv]),
    (
        15,
        "additive",
        lambda score, b, h, q, kv: (
            score * torch.exp(min(PER_HEAD[h], math.log(100))) + 16 * torch.sigmoid(BUCKETS[WINDOW[q, kv], h])
        ),
    ),
    (16, "folded", lambda score, b, h, q, kv: score * GAIN[h]),
    (17, "folded", lambda score, b, h, q, kv: score * PER_TOKEN[q]),
    (18, "folded", lambda score, b, h, q, kv: score * SCALAR),
    (19, "folded", lambda score, b, h, q, kv: score * (1 + 0.1 * torch.log1p(torch.floor((q + 1) / 8)))),
    (20, "folded", lambda score, b, h, q, kv: score * max(1.0, torch.log(q + 1.0) / math.log(8))),
    (21, "folded", lambda score, b, h, q, kv: score * GAIN[h] * torch.log(q + 1.0)),
    (22, "folded", lambda score, b, h, q, kv: score * (0.1 * 0.7 * math.log(40) + 1) ** 2),
    (24, "folded", lambda score, b, h, q, kv: GAIN[h] * score),
    (25, "additive", lambda score, b, h, q, kv: score - RATE[h] * abs(q - kv) ** 1.5),
    (26, "additive", lambda score, b, h, q, kv: score - GAIN[h] * torch.log1p(RATE[h] * abs(q - kv))),
    (27, "additive", fire),
    (
        28,
        "additive",
        lambda score, b, h, q, kv: score + sum(torch.cos((q - kv) * MEANS[i]) for i in range(5)) / RATE[h],
    ),
    (29, "additive", lambda score, b, h, q, kv: score + SEGMENTS[KIND[b, q], KIND[b, kv], h]),
    (30, "additive", lambda score, b, h, q, kv: score + 0.3 * (DOCUMENT[b, q] - DOCUMENT[b, kv])),
    (
        31,
        "additive",
        lambda score, b, h, q, kv: (
            score
            + (
                DISTANCES[q - kv + N - 1]
                + CLIPPED[(X[b, q] - X[b, kv]).clamp(-5, 5) + 5]
                + CLIPPED[abs(Y[b, q] - Y[b, kv])]
            )
            / math.sqrt(8)
        ),
    ),
    (32, "additive", lambda score, b, h, q, kv: score + HIGH[b, h, q, kv // 6] + WIDE[b, h, q, kv % 6]),
    (33, "additive", lambda score, b, h, q, kv: score + ROWS[b, h, q] * BUCKETS[t5_bucket(kv - q), h]),
    (34, "additive", inside_an_extent),
    (
        35,
        "additive",
        lambda score, b, h, q, kv: score + BY_ROW[b, h, q, kv - q + N - 1] + BY_COLUMN[b, h, kv, q - kv + N - 1],
    ),
    (36, "additive", lambda score, b, h, q, kv: score + BY_ROW[b, h, q, kv - q + N - 1]),
    (37, "additive", lambda score, b, h, q, kv: score + BY_RELATION[h, RELATION[b, q, kv]]),
    (38, "additive", lambda score, b, h, q, kv: score + sum(EDGES[h, i, PATH[b, q, kv, i]] for i in range(3)) / 3),
    (39, "additive", lambda score, b, h, q, kv: score + ALL[b, h, q, kv]),
    (40, "additive", lambda score, b, h, q, kv: score + ROWS[b, h, q] - ROWS[b, h, kv]),
    (41, "additive", lambda score, b, h, q, kv: score + torch.log(WEIGHT[b, kv])),
    (42, "additive", lambda score, b, h, q, kv: torch.where(KEPT[b, h, kv], score + ROWS[b, h, kv], -INF)),
    (43, "additive", lambda score, b, h, q, kv: score + CLIPPED[min(abs(TIME[b, q] - TIME[b, kv]) // 2, 10)]),
    (44, "additive", gaussians),
    (47, "additive", lambda score, b, h, q, kv: score - torch.relu(ALL[b, 0, q, kv])),
    (48, "general", lambda score, b, h, q, kv: torch.log(torch.relu(score) + 1e-2)),
    (50, "general", lambda score, b, h, q, kv: score**2),
    (50, "general", lambda score, b, h, q, kv: torch.sin(torch.cos(score)) + torch.tan(BY_BATCH[b] / 3)),
    (51, "additive", lambda score, b, h, q, kv: score * 0 + 0.1 * (kv - q)),
    (52, "folded", lambda score, b, h, q, kv: torch.where(q >= kv, score, -INF)),
    (52, "folded", by_window),
    (
        55,
        "additive",
        lambda score, b, h, q, kv: (
            score * GAIN[h] + BY_BATCH[b] + PER_TOKEN[q] + OTHER[kv] + CLIPPED[torch.clamp(q - kv, -5, 5) + 5]
        ),
    ),
    (56, "additive", lambda score, b, h, q, kv: score + SCALAR * ((q ^ kv) & 255)),
]
NO_SCORE = {
    4: "number 3, with a derivative of a tanh that is less exact",
    23: "it belongs to q, before the product",
    45: "a product of rows: concatenated to q and k, as the refusal says (test_trace.py)",
    46: "three products of q and k, each with its own mask: mf.merge joins them",
    49: "no softmax",
    53: "sinks=",
    54: "sinks=torch.zeros(heads)",
}
NAMES = [f"{number}-{place}" for place, (number, _, _) in enumerate(FUNCTIONS)]
BOTH = pytest.mark.parametrize(("kind", "function"), [row[1:] for row in FUNCTIONS], ids=NAMES)


def test_all_of_them_are_here():
    assert {number for number, _, _ in FUNCTIONS} | set(NO_SCORE) == set(range(1, 57))
    assert not {number for number, _, _ in FUNCTIONS} & set(NO_SCORE)


@BOTH
def test_values_and_classes(kind, function):
    found = trace(function, role=ROLES[torch.float32])
    assert form_of(lift(found.expr).rest).kind == kind
    near = {"rtol": 1e-6, "atol": 1e-6}  # what doesn't depend on the score may be float32
    with torch.no_grad():
        torch.testing.assert_close(traced(function, FEW), pair_by_pair(function, FEW), **near)


@BOTH
def test_attention_under_a_causal_mask(kind, function):
    assert_matches_dense(mf.causal(), SHAPE, score=function, block_size=16)


@BOTH
def test_attention_in_documents(kind, function):
    mask = mf.document(ids=DOCUMENT)
    assert_matches_dense(mask, SHAPE, score=function, dtype=torch.float64, block_size=16, sinks=PER_HEAD)
