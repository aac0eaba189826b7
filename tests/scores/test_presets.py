"""Score functions by name are what hand-written formulas, and other libraries' own code, give at every pair."""

import math

import pytest
import torch

import maskflash as mf
from maskflash import scores
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.expr.evaluate import compute
from maskflash.scores.score import ROLES
from maskflash.testing import Shape, assert_matches_dense
from maskflash.trace.trace import trace

B, H, N = 2, 4, 26
SHAPE = Shape(B, H, 2, N, N, 8, 8)
DRAW = torch.Generator().manual_seed(5)
Q, KV = torch.arange(N)[:, None], torch.arange(N)
DISTANCE = (KV - Q).double()


def learned(*shape):
    return torch.randn(shape, generator=DRAW).requires_grad_()


def applied(score, products):
    """A score function at all pairs of a call with given products: the rows of lse with one key at a time."""
    batch, heads, _, kv_len = products.shape
    k, v = torch.ones(batch, heads, kv_len, 1).double(), torch.zeros(batch, heads, kv_len, 1).double()
    found = torch.empty_like(products)
    attn = mf.compile(mf.full(), score=score, scale=1.0)
    for column in range(kv_len):
        q, one = products[..., column, None], slice(column, column + 1)
        found[..., column] = attn(q, k[:, :, one], v[:, :, one], kv_offset=column, return_lse=True)[1]
    return found


S = torch.randn(B, H, N, N, generator=DRAW, dtype=torch.float64) * 3
SLOPES, RATES = learned(H), learned(H)
PER_PAIR = {shape: learned(*shape) for shape in [(N, N), (1, N), (H, N, N), (H, 1, N), (B, 1, N, N), (B, H, N, N)]}
PER_KEY = {shape: learned(*shape) for shape in [(N,), (1,), (B, N), (1, N), (B, H, N), (B, 1, N)]}
RELATIVE = {shape: learned(*shape) for shape in [(2 * N - 1,), (7,), (1,), (H, 7), (H, 2 * N - 1)]}
TABLE = learned(32, H)
FACTORS = {"heads": learned(H), "rows": learned(H, N)}
GATES = torch.nn.functional.logsigmoid(torch.randn(B, H, N, generator=DRAW)).requires_grad_()


def per_key(x):
    return x.double()[:, None, None] if x.ndim == 2 else x.double()[..., None, :]


def relative(x):
    most = x.shape[-1] // 2
    return x.double()[..., (DISTANCE.long().clamp(-most, most) + most)]


def slopes(x):
    return x.double()[:, None, None]


PRESETS = {
    "softcap": (lambda: scores.softcap(2.5), lambda s: 2.5 * torch.tanh(s / 2.5), "general"),
    "alibi": (lambda: scores.alibi(SLOPES), lambda s: s + slopes(SLOPES) * DISTANCE, "additive"),
    "alibi-paper": (
        scores.alibi,
        lambda s: s + slopes(torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])) * DISTANCE,
        "additive",
    ),
    "alibi-symmetric": (
        lambda: scores.alibi(SLOPES, symmetric=True),
        lambda s: s - slopes(SLOPES) * DISTANCE.abs(),
        "additive",
    ),
    "alibi-paper-symmetric": (
        lambda: scores.alibi(symmetric=True),
        lambda s: s - slopes(torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])) * DISTANCE.abs(),
        "additive",
    ),
    "distance_decay": (lambda: scores.distance_decay(RATES), lambda s: s - slopes(RATES) * DISTANCE.abs(), "additive"),
    **{
        f"bias {shape}": (lambda x=x: scores.bias(x), lambda s, x=x: s + x.double(), "additive")
        for shape, x in PER_PAIR.items()
    },
    **{
        f"key_bias {shape}": (lambda x=x: scores.key_bias(x), lambda s, x=x: s + per_key(x), "additive")
        for shape, x in PER_KEY.items()
    },
    **{
        f"relative_table {shape}": (lambda x=x: scores.relative_table(x), lambda s, x=x: s + relative(x), "additive")
        for shape, x in RELATIVE.items()
    },
    "temperature": (lambda: scores.temperature(0.7), lambda s: s * 0.7, "folded"),
    "temperature of heads": (
        lambda: scores.temperature(FACTORS["heads"]),
        lambda s: s * slopes(FACTORS["heads"]),
        "folded",
    ),
    "temperature of rows": (
        lambda: scores.temperature(FACTORS["rows"]),
        lambda s: s * FACTORS["rows"].double()[..., None],
        "folded",
    ),
    "forget_gate": (
        lambda: scores.forget_gate(GATES),
        lambda s: s + (c := GATES.cumsum(-1).double())[..., :, None] - c[..., None, :],
        "additive",
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_formulas(name):
    make, formula, kind = PRESETS[name]
    score = make()
    with torch.no_grad():
        near = {"rtol": 1e-6, "atol": 1e-5}  # tables are float32
        torch.testing.assert_close(applied(score, S), formula(S).expand(S.shape), **near)
    told = mf.compile(mf.causal(), score=score).explain(N, N, batch=B, heads=H).to_dict()["score"]
    assert told["class"] == kind


@pytest.mark.parametrize("name", [*PRESETS, "relative_bias", "relative_bias one way"])
def test_attention(name):
    if name.startswith("relative_bias"):
        score = scores.relative_bias(TABLE, bidirectional=name == "relative_bias", max_distance=20)
    else:
        score = PRESETS[name][0]()
    mask = mf.causal() if len(name) % 2 else mf.document([9, 0, 12, 5])
    assert_matches_dense(mask, SHAPE, score=score, block_size=16)


# ------------------------------------------------------------------------------------- what other libraries compute


@pytest.mark.parametrize("buckets", [32, 20, 8])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("max_distance", [128, 50, 20])
def test_t5_buckets_are_those_of_transformers(buckets, bidirectional, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    far = 2 * max_distance
    distances = torch.arange(-far, far + 1)
    expected = t5.T5Attention._relative_position_bucket(
        distances, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    table = torch.arange(buckets, dtype=torch.float32)[:, None]
    score = scores.relative_bias(table, bidirectional=bidirectional, max_distance=max_distance)
    program = trace(score.function, role=ROLES[torch.float32])
    here = torch.zeros((), dtype=torch.int64)
    pairs = {"b": here, "h": here, "q": here + far, "kv": far + distances, "score": torch.zeros(())}
    found, _ = compute(program.expr, program.bind({}), pairs)
    assert torch.equal(found.long(), expected)


def test_relative_bias_is_that_of_a_t5_layer():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = pytest.importorskip("transformers").T5Config(num_heads=H, d_model=32, d_kv=8)
    layer = t5.T5Attention(config, has_relative_attention_bias=True)
    expected = layer.compute_bias(N, N)[0].double()
    found = applied(scores.relative_bias(layer.relative_attention_bias.weight.detach()), torch.zeros_like(S))
    torch.testing.assert_close(found, expected.expand(S.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 20])
def test_alibis_slopes_are_those_of_transformers(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    products = torch.zeros(1, heads, 2, 2, dtype=torch.float64)
    found = -applied(scores.alibi(), products)[0, :, 1, 0]  # one token back
    of_bloom = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float64).view(heads, 2)[:, 1]
    torch.testing.assert_close(found, of_bloom, rtol=1e-6, atol=0)
    of_mpt = -mpt.build_mpt_alibi_tensor(heads, 2).double().view(heads, 2)[:, 0]
    torch.testing.assert_close(found.sort().values, of_mpt.sort().values, rtol=1e-6, atol=0)
    if heads & (heads - 1) == 0:
        torch.testing.assert_close(found, of_mpt, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------- gradients and errors


def test_gates_are_learned_through_their_sums():
    gates = GATES.detach().clone().requires_grad_()
    q, k, v = SHAPE.tensors(torch.float32)
    mf.attention(q, k, v, mf.causal(), score=scores.forget_gate(gates)).square().sum().backward()
    own = gates.detach().clone().double().requires_grad_()
    c = own.cumsum(-1)
    bias = (c[..., :, None] - c[..., None, :]).masked_fill(KV > Q, -math.inf)
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    out = torch.softmax(q.double() @ k.mT / math.sqrt(8) + bias, -1) @ v
    out.square().sum().backward()
    torch.testing.assert_close(gates.grad.double(), own.grad, rtol=1e-4, atol=1e-5)


def test_tables_stay_where_they_are():
    table = torch.zeros(H)
    score = scores.distance_decay(table)
    q, k, v = SHAPE.tensors(torch.float32)
    attn = mf.compile(mf.causal(), score=score)
    before = attn(q, k, v)
    torch.testing.assert_close(before, mf.attention(q, k, v, mf.causal()))
    table.fill_(1.0)
    assert not torch.allclose(attn(q, k, v), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: scores.softcap(0.0), "cap is 0.0, expected a finite positive number"),
        (lambda: scores.softcap(-1), "expected a finite positive number"),
        (lambda: scores.softcap(float("nan")), "expected a finite positive number"),
        (lambda: scores.softcap(torch.ones(3)), "cap is a Tensor, expected a number"),
        (lambda: scores.softcap(True), "cap is a bool"),
        (lambda: scores.alibi(torch.ones(2, 3)), r"slopes has shape \(2, 3\), expected 1 dimensions"),
        (lambda: scores.alibi([0.5]), r"slopes is \[0.5\], expected a Tensor"),
        (lambda: scores.alibi(torch.arange(4)), "slopes has dtype torch.int64, expected a floating dtype"),
        (lambda: scores.alibi(symmetric=1), "symmetric"),
        (lambda: scores.bias(torch.ones(5)), "expected 2 or 3 or 4 dimensions"),
        (lambda: scores.key_bias(torch.ones(())), "expected 1 or 2 or 3 dimensions"),
        (lambda: scores.relative_table(torch.ones(4, 6)), "6 numbers for each head, expected an odd number"),
        (lambda: scores.relative_bias(torch.ones(2, 4)), "expected more buckets"),
        (lambda: scores.relative_bias(torch.ones(32, 4), max_distance=8), "or a larger distance"),
        (lambda: scores.relative_bias(torch.ones(32, 4), max_distance=0), "max_distance is 0"),
        (lambda: scores.temperature("hot"), "x is a str, expected a number"),
        (lambda: scores.temperature(torch.ones(2, 3, 4)), "expected 1 or 2 dimensions"),
        (lambda: scores.forget_gate(torch.ones(3, 4)), "expected 3 dimensions"),
        (lambda: scores.distance_decay(0.5), "rate is 0.5, expected a Tensor"),
    ],
    ids=range(19),
)
def test_arguments_are_checked(make, words):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=words):
        make()


@pytest.mark.parametrize(
    "score",
    [
        scores.alibi(torch.ones(3)),
        scores.distance_decay(torch.ones(3)),
        scores.bias(torch.ones(3, N, N)),
        scores.bias(torch.ones(3, 1, N, N)),
        scores.key_bias(torch.ones(3, N)),
        scores.relative_table(torch.ones(3, 5)),
        scores.relative_bias(torch.ones(32, 3)),
        scores.temperature(torch.ones(3)),
        scores.forget_gate(torch.ones(B, 3, N)),
    ],
    ids=repr,
)
def test_tables_of_other_sizes_name_both(score):
    with pytest.raises((ArgumentError, mf.MaskIndexError), match=r"\b3\b"):
        mf.attention(*SHAPE.tensors(torch.float32), mf.causal(), score=score)


def test_a_sequence_that_is_longer_than_its_table_is_told():
    with pytest.raises(mf.MaskIndexError, match=f"reads index .*{N - 5}"):
        mf.attention(*SHAPE.tensors(torch.float32), mf.causal(), score=scores.bias(torch.ones(N - 5, N)))
