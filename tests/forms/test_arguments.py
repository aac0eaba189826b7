"""Arguments of kernels with fixed masks: decoded here by each library's own rules, and compared with every pair."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import CausalBias, CausalVariant, causal_lower_right, causal_upper_left
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, masks

LENGTH = st.integers(0, 12)
VARLEN = ("flash_attn_varlen", "torch_varlen")
LIBRARIES = ("flash_attn", *VARLEN, "sdpa", "xformers")


def flash(rows, columns, causal, window, longest):
    """What flash-attention's kernels show of one sequence: flash_api.cpp's treatment of the window, then its mask."""
    left, right = window
    if causal:
        right = 0
    if left >= longest:
        left = -1
    if right >= longest:
        right = -1
    if left >= 0 and right < 0:
        right = longest
    pairs = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            at = i + columns - rows
            pairs[i, j] = (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
    return pairs


def placed(rows, columns, blocks):
    """Blocks of pairs where they begin, in a batch row of all tokens."""
    pairs = torch.zeros(rows, columns, dtype=torch.bool)
    for row, column, block in blocks:
        pairs[row : row + block.shape[0], column : column + block.shape[1]] = block
    return pairs


def flash_attn(sizes, causal=False, window_size=(-1, -1)):
    batch, q_len, kv_len = sizes
    return flash(q_len, kv_len, causal, window_size, kv_len).expand(batch, -1, -1)


def flash_attn_varlen(
    sizes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=(-1, -1), seqused=None
):
    batch, q_len, kv_len = sizes
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert len(q) == len(k)
    assert (q[0], k[0], q[-1], k[-1]) == (0, 0, batch * q_len, batch * kv_len)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    blocks = []
    for n in range(len(q) - 1):
        rows, columns = q[n + 1] - q[n], k[n + 1] - k[n]
        assert 0 <= rows <= max_seqlen_q
        assert 0 <= columns <= max_seqlen_k
        kept = columns if seqused is None else seqused[n]
        blocks.append((q[n], k[n], flash(rows, kept, causal, window_size, max_seqlen_k)))
    whole = placed(batch * q_len, batch * kv_len, blocks)
    parts = [whole[b * q_len : (b + 1) * q_len, b * kv_len : (b + 1) * kv_len] for b in range(batch)]
    assert sum(int(part.sum()) for part in parts) == int(whole.sum()), "no sequence crosses batch rows"
    return torch.stack(parts)


def torch_varlen(sizes, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, -1), seqused_k=None):
    causal = window_size == (-1, 0)
    return flash_attn_varlen(sizes, cu_seq_q, cu_seq_k, max_q, max_k, causal, window_size, seqused_k)


def sdpa(sizes, is_causal=False, attn_mask=None):
    batch, q_len, kv_len = sizes
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool) if attn_mask is None else attn_mask._materialize()
    return (pairs.tril() if is_causal else pairs).expand(batch, -1, -1)


def corner(rows, columns, shift, left=math.inf, right=math.inf):
    pairs = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            pairs[i, j] = i + shift - left <= j <= i + shift + right
    return pairs


def xformers(sizes, attn_bias, **args):
    """`materialize` of the class, and what it refuses when it is made."""
    batch, q_len, kv_len = sizes
    top_left = attn_bias in (
        *("LowerTriangularMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalLocalAttentionMask"),
    )
    left, right = args.get("window_left", math.inf), args.get("window_right", math.inf)
    if "window_size" in args:
        left, right = args["window_size"] - 1, 0
    elif attn_bias and ("Causal" in attn_bias or "LowerTriangular" in attn_bias):
        right = 0
    assert left >= 0
    assert right >= 0

    def block(rows, columns):
        return corner(rows, columns, 0 if top_left else columns - rows, left, right)

    if "q_seqlen" not in args:
        return block(q_len, kv_len).expand(batch, -1, -1)
    q, k = args["q_seqlen"], args["kv_seqlen"]
    assert len(q) == len(k) > 0
    if "kv_padding" in args:
        assert all(n <= args["kv_padding"] for n in k)
        starts = [n * args["kv_padding"] for n in range(len(k) + 1)]
    elif "kv_seqstarts" in args:
        starts = args["kv_seqstarts"]
        assert len(starts) == len(k) + 1
    else:
        starts = [sum(k[:n]) for n in range(len(k) + 1)]
    assert sum(q) == batch * q_len
    assert starts[-1] == batch * kv_len
    if attn_bias in ("BlockDiagonalCausalFromBottomRightMask", "BlockDiagonalCausalLocalAttentionFromBottomRightMask"):
        assert all(keys >= queries for queries, keys in zip(q, k, strict=True))
    if attn_bias == "BlockDiagonalCausalLocalAttentionMask":
        assert all(queries - args["window_size"] < keys for queries, keys in zip(q, k, strict=True))
    whole = placed(batch * q_len, batch * kv_len, [(sum(q[:n]), starts[n], block(q[n], k[n])) for n in range(len(q))])
    return torch.stack([whole[b * q_len : (b + 1) * q_len, b * kv_len : (b + 1) * kv_len] for b in range(batch)])


DECODERS = {
    "flash_attn": flash_attn,
    "flash_attn_varlen": flash_attn_varlen,
    "torch_varlen": torch_varlen,
    "sdpa": sdpa,
    "xformers": xformers,
}


def check(library, mask, q_len, kv_len, batch=1, heads=1, **call):
    """Arguments are the mask; None where there are none, and then the pair that is named is one that tells."""
    sizes = {"batch": batch, "heads": heads}
    dense = mask.dense(q_len, kv_len, **sizes, **call)
    try:
        found = mask.as_arguments(library, q_len, kv_len, **sizes, **call)
    except mf.UnsupportedMask as error:
        text = str(error)
        pair = tuple(int(x) for x in text.partition(" = (")[2].partition(")")[0].split(","))
        assert bool(dense[pair]) == text.partition(" which the mask ")[2].startswith("shows")
        return None
    assert torch.equal(DECODERS[library]((batch, q_len, kv_len), **found)[:, None].expand_as(dense), dense)
    back = mf.from_arguments(library, **found)
    if call:  # with offsets, which arguments know nothing of
        assert torch.equal(back.dense(q_len, kv_len, **sizes), dense)
    else:
        assert mf.equivalent(mask, back, q_len, kv_len, **sizes)
    return found


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=25)
@given(mask=masks(), q_len=LENGTH, kv_len=LENGTH, last=LENGTH)
def test_what_is_exported_is_the_mask(library, mask, q_len, kv_len, last):
    check(library, mask, q_len, kv_len, batch=2, heads=2, q_offset=max(last - q_len, 0))


@st.composite
def lengths(draw, most=6):
    """Sequences of queries and of keys."""
    n = draw(st.integers(1, 5))
    return [draw(st.lists(st.integers(0, most), min_size=n, max_size=n)) for _ in "qk"]


def starts(numbers):
    return torch.tensor([0, *numbers]).cumsum(0).int()


WINDOW = st.tuples(st.integers(-1, 7), st.integers(-1, 7))


@settings(max_examples=80)
@given(LENGTH, LENGTH, st.booleans(), WINDOW)
@example(3, 1, False, (0, 1))  # as many keys to the right as there are: none, but not beside a size to the left
def test_whatever_flash_attn_takes_is_found_again(q_len, kv_len, causal, window_size):
    mask = mf.from_arguments("flash_attn", causal=causal, window_size=window_size)
    want = flash_attn((2, q_len, kv_len), causal, window_size)
    assert torch.equal(mask.dense(q_len, kv_len, batch=2)[:, 0], want)
    assert check("flash_attn", mask, q_len, kv_len, batch=2) is not None


@settings(max_examples=50)
@given(lengths(), st.booleans(), WINDOW, st.integers(0, 3), st.sampled_from(VARLEN))
@example([[0, 4], [0, 2]], False, (0, -1), 1, "flash_attn_varlen")  # all of whose ends are in sight of all queries
@example([[3], [1]], False, (0, 1), 1, "torch_varlen")
def test_whatever_varlen_takes_is_found_again(sequences, causal, window_size, room, library):
    q, k = sequences
    cu = {"cu_seqlens_q": starts(q), "cu_seqlens_k": starts(k)}
    given = {**cu, "max_seqlen_q": max(q) + room, "max_seqlen_k": max(k) + room}
    given |= {"causal": causal, "window_size": window_size}
    mask = mf.from_arguments("flash_attn_varlen", **given)
    assert torch.equal(mask.dense(sum(q), sum(k))[0], flash_attn_varlen((1, sum(q), sum(k)), **given))
    assert check(library, mask, sum(q), sum(k)) is not None


@settings(max_examples=25)
@given(lengths(), WINDOW, st.data())
def test_keys_in_use_end_sequences(sequences, window_size, data):
    q, k = sequences
    used = [data.draw(st.integers(0, n)) for n in k]
    given = {"cu_seq_q": starts(q), "cu_seq_k": starts(k), "max_q": max(q), "max_k": max(k)}
    given |= {"window_size": window_size, "seqused_k": used}
    mask = mf.from_arguments("torch_varlen", **given)
    assert torch.equal(mask.dense(sum(q), sum(k))[0], torch_varlen((1, sum(q), sum(k)), **given))


XFORMERS = {
    "LowerTriangularMask": (),
    "LowerTriangularFromBottomRightMask": (),
    "LowerTriangularFromBottomRightLocalAttentionMask": ("window_size",),
    "LocalAttentionFromBottomRightMask": ("window_left", "window_right"),
    "BlockDiagonalMask": (),
    "BlockDiagonalCausalMask": (),
    "BlockDiagonalCausalFromBottomRightMask": (),
    "BlockDiagonalCausalLocalAttentionMask": ("window_size",),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": ("window_size",),
    "BlockDiagonalPaddedKeysMask": (),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": ("window_size",),
    "BlockDiagonalLocalAttentionPaddedKeysMask": ("window_left", "window_right"),
    "BlockDiagonalGappyKeysMask": (),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": (),
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": ("window_left", "window_right"),
}


@st.composite
def biases(draw, name):
    """Arguments of a class's constructor that it takes, and the lengths that they are for."""
    given = {window: draw(st.integers(window == "window_size", 6)) for window in XFORMERS[name]}
    if not name.startswith("BlockDiagonal"):
        return given, (draw(LENGTH), draw(LENGTH))
    q, k = draw(lengths())
    if name in ("BlockDiagonalCausalFromBottomRightMask", "BlockDiagonalCausalLocalAttentionFromBottomRightMask"):
        k = [max(pair) for pair in zip(q, k, strict=True)]
    if name == "BlockDiagonalCausalLocalAttentionMask":
        k = [max(keys, queries - given["window_size"] + 1) for queries, keys in zip(q, k, strict=True)]
    total = sum(k)
    if "Padded" in name:
        given["kv_padding"] = max(k) + draw(st.integers(0, 3))
        total = len(k) * given["kv_padding"]
    if "Gappy" in name:
        gaps = [draw(st.integers(0, 2)) for _ in range(len(k) + 1)]
        given["kv_seqstarts"] = [sum(k[:n]) + sum(gaps[: n + 1]) for n in range(len(k) + 1)]
        total = given["kv_seqstarts"][-1]
    return {**given, "q_seqlen": q, "kv_seqlen": k}, (sum(q), total)


def as_object(name, given):
    """What xFormers makes of a constructor's arguments, as far as the fields go."""
    made = type(name, (), {})()
    if "q_seqlen" in given:
        made.q_seqinfo = SimpleNamespace(seqstart_py=starts(given["q_seqlen"]).tolist())
        made.k_seqinfo = SimpleNamespace(seqstart_py=starts(given["kv_seqlen"]).tolist(), seqlen_py=given["kv_seqlen"])
    if "kv_padding" in given:
        made.k_seqinfo.padding = given["kv_padding"]
        made.k_seqinfo.seqstart_py = [n * given["kv_padding"] for n in range(len(given["kv_seqlen"]) + 1)]
    if "kv_seqstarts" in given:
        made.k_seqinfo.seqstart_py = given["kv_seqstarts"]
    made.__dict__ |= {"_window_size" if x == "window_size" else x: given[x] for x in XFORMERS[name]}
    return made


@pytest.mark.parametrize("name", XFORMERS)
@settings(max_examples=10)
@given(data=st.data())
def test_every_class_of_xformers_is_a_mask_and_is_found_again(name, data):
    given, (q_len, kv_len) = data.draw(biases(name))
    want = xformers((1, q_len, kv_len), name, **given)
    told = {"attn_bias": as_object(name, given)} if data.draw(st.booleans()) else {"attn_bias": name, **given}
    read = mf.from_arguments("xformers", **told)
    assert torch.equal(read.dense(q_len, kv_len)[0], want)
    assert check("xformers", read, q_len, kv_len) is not None


@pytest.mark.parametrize(
    ("mask", "batch", "name"),
    [
        (mf.full(), 2, None),
        (mf.causal(), 2, "LowerTriangularMask"),
        (mf.sliding_window(3), 2, "LowerTriangularFromBottomRightLocalAttentionMask"),
        (mf.sliding_window(3, 2), 2, "LocalAttentionFromBottomRightMask"),
        (mf.document([5, 11]), 1, "BlockDiagonalMask"),
        (mf.causal_document([5, 7]), 1, "BlockDiagonalCausalMask"),
        (mf.causal_document([5, 11], left=2), 1, "BlockDiagonalCausalLocalAttentionMask"),
        (mf.padding([9, 16]), 2, "BlockDiagonalPaddedKeysMask"),
        (mf.document([[9], [16]]), 2, "BlockDiagonalMask"),
    ],
)
def test_the_plainest_class_is_taken(mask, batch, name):
    assert check("xformers", mask, 16, 16, batch=batch)["attn_bias"] == name


def test_documents_with_more_keys_than_queries_are_aligned_to_the_bottom_right():
    mask = mf.causal_document([2, 3], kv_lengths=[5, 4])
    assert check("xformers", mask, 5, 9)["attn_bias"] == "BlockDiagonalCausalFromBottomRightMask"
    packed = check("flash_attn_varlen", mask, 5, 9)
    assert packed["cu_seqlens_q"].tolist() == [0, 2, 5]
    assert packed["cu_seqlens_k"].tolist() == [0, 5, 9]
    assert {**packed, "cu_seqlens_q": 0, "cu_seqlens_k": 0} == {
        **{"cu_seqlens_q": 0, "cu_seqlens_k": 0, "max_seqlen_q": 3, "max_seqlen_k": 5, "causal": True}
    }


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len", "want"),
    [
        (mf.full(), 8, 8, {"causal": False}),
        (mf.causal(), 8, 8, {"causal": True}),
        (mf.mask(lambda b, h, q, kv: ~(q < kv)), 8, 8, {"causal": True}),
        (mf.causal() & mf.sliding_window(7), 8, 8, {"causal": True}),
        (mf.sliding_window(3), 8, 8, {"causal": True, "window_size": (3, 0)}),
        (mf.sliding_window(None, 3), 8, 8, {"causal": False, "window_size": (-1, 3)}),
        (mf.sliding_window(3, None), 8, 8, {"causal": False, "window_size": (3, -1)}),
        (mf.causal(), 1, 1, {"causal": False}),
        (mf.sliding_window(0), 8, 8, {"causal": True, "window_size": (0, 0)}),
    ],
)
def test_arguments_are_the_plainest(mask, q_len, kv_len, want):
    assert check("flash_attn", mask, q_len, kv_len, batch=2, heads=2) == want


def test_alignment_is_each_librarys_own():
    last = {"q_offset": 3}  # five queries that end with the eight keys
    assert check("flash_attn", mf.causal(), 5, 8, **last) == {"causal": True}
    bias = check("sdpa", mf.causal(), 5, 8, **last)["attn_mask"]
    assert isinstance(bias, CausalBias)
    assert bias.variant == CausalVariant.LOWER_RIGHT
    assert check("sdpa", mf.causal(), 5, 8) == {"is_causal": True}
    assert check("flash_attn", mf.causal(), 5, 8) is None
    assert check("sdpa", mf.causal(), 8, 5, q_offset=-3) is None  # whose first rows torch makes NaN
    assert check("flash_attn", mf.causal(), 8, 5, q_offset=-3) == {"causal": True}


@pytest.mark.parametrize("lengths", [[10, 6], [16, 1], [0, 16]])
def test_a_padded_batch_is_sequences(lengths):
    mask = mf.causal() & mf.document([[n] for n in lengths])
    found = check("flash_attn_varlen", mask, 16, 16, batch=2)
    ends = [end for n, length in enumerate(lengths) for end in (16 * n + length, 16 * n + 16)]
    assert set(ends) <= set(found["cu_seqlens_q"].tolist())


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len", "q_offset"),
    [(mf.full(), 8, 5, 0), (mf.causal(), 8, 5, 0), (mf.causal(), 5, 8, 0), (mf.causal(), 5, 8, 3)],
)
def test_torchs_own_attention_says_the_same(mask, q_len, kv_len, q_offset):
    found = mask.as_arguments("sdpa", q_len, kv_len, q_offset=q_offset)
    q, k, v = torch.randn(2, 4, q_len, 8), torch.randn(2, 4, kv_len, 8), torch.randn(2, 4, kv_len, 8)
    ours = mf.attention(q, k, v, mask, q_offset=q_offset)
    theirs = scaled_dot_product_attention(q, k, v, **found)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mf.attention(q, k, v, mf.from_arguments("sdpa", **found)), theirs, rtol=1e-5, atol=1e-5)


def test_torchs_varlen_takes_what_it_is_given():
    # Its kernel runs on GPUs only; its own function runs on meta, and checks names and types.
    found = mf.causal_document([5, 11], left=4).as_arguments("torch_varlen", 16, 16)
    assert found["window_size"] == (4, 0)
    x = torch.randn(16, 4, 8, device="meta")
    found |= {name: found[name].to("meta") for name in ("cu_seq_q", "cu_seq_k")}
    assert varlen_attn(x, x, x, **found).shape == (16, 4, 8)


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_torchs_biases_are_masks_of_their_size(make):
    mask = mf.from_arguments("sdpa", attn_mask=make(4, 6))
    assert torch.equal(mask.dense(4, 6)[0, 0], make(4, 6)._materialize())
    with pytest.raises(mf.ArgumentError, match=r"is for \(q_len, kv_len\) \(4, 6\), got \(5, 6\)"):
        mask.dense(5, 6)


@pytest.mark.filterwarnings("ignore:.*got a dense mask")
def test_a_boolean_tensor_is_itself():
    pairs = torch.rand(1, 2, 4, 6) > 0.5
    mask = mf.from_arguments("sdpa", attn_mask=pairs)
    assert torch.equal(mask.dense(4, 6, heads=2), pairs)


def test_imports_are_masks_as_others():
    packed = mf.from_arguments("flash_attn_varlen", cu_seqlens_q=[0, 9, 40], cu_seqlens_k=[0, 20, 40], causal=True)
    window = mf.from_arguments("flash_attn", window_size=(7, -1))
    mask = packed & window | mf.global_tokens(1)
    want = packed.dense(40, 40) & window.dense(40, 40) | mf.global_tokens(1).dense(40, 40)
    for made in (mask, pickle.loads(pickle.dumps(mask))):
        assert torch.equal(made.dense(40, 40), want)
    assert_matches_dense(mask, Shape(1, 2, 1, 40, 40, 8, 8), block_size=16)
    assert_matches_dense(packed, Shape(2, 2, 1, 20, 20, 8, 8), block_size=16)  # the same tokens in two batch rows
    for one in (packed, window):
        with pytest.raises(mf.ArgumentTypeError, match="a predicate can't call it"):
            one(0, 0, 0, 0)
        with pytest.raises(mf.ArgumentError, match="q_offset is 1, expected 0"):
            one.dense(40, 40, q_offset=1)


def test_heads_and_batch_rows_that_differ_have_none():
    by_head = mf.mask(lambda b, h, q, kv: q >= kv + h)
    with pytest.raises(mf.UnsupportedMask, match=r"show pair \(b, h, q, kv\) = \(0, 1, 0, 0\), which the mask hides"):
        by_head.as_arguments("flash_attn", 8, 8, heads=2)
    by_row = mf.mask(lambda b, h, q, kv: q >= kv + b)
    with pytest.raises(mf.UnsupportedMask, match=r"\(1, 0, 0, 0\), which the mask hides; flash_attn_varlen"):
        by_row.as_arguments("flash_attn", 8, 8, batch=2)
    assert check("flash_attn_varlen", by_row, 8, 8, batch=2) is not None


@pytest.mark.parametrize(
    ("library", "given", "says"),
    [
        ("flash", {}, 'library is \'flash\', expected "flash_attn", "flash_attn_varlen"'),
        (
            "flash_attn",
            {"softcap": 30.0},
            r"'softcap' of flash_attn; it is no part of the mask; here: score=mf.scores.s",
        ),
        ("flash_attn", {"alibi_slopes": None}, r"here: score=mf.scores.alibi\(slopes, symmetric=True\)"),
        ("flash_attn", {"dropout_p": 0.1}, r"here: it is an argument of each call"),
        ("flash_attn", {"softmax_scale": 0.1}, r"here: scale="),
        ("flash_attn", {"cu_seqlens_q": [0, 4]}, "it is one of flash_attn_varlen"),
        ("flash_attn", {"windows": 4}, "its mask is in causal, window_size"),
        ("flash_attn", {"window_size": 4}, r"window_size is 4, expected \(left, right\), -1 for no end"),
        ("flash_attn", {"window_size": (4, -2)}, "an entry of window_size is -2, expected at least -1"),
        ("flash_attn", {"causal": 1}, "causal is 1, expected True or False"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 4]}, "flash_attn_varlen needs cu_seqlens_k"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 2, 4]}, "cu_seqlens_q 1, cu_seqlens_k 2"),
        ("flash_attn_varlen", {"cu_seqlens_q": [1, 4], "cu_seqlens_k": [0, 4]}, r"begins with \[1, 4\], expected 0"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 4, 2], "cu_seqlens_k": [0, 4, 4]}, r"begins with \[0, 4, 2\]"),
        ("flash_attn_varlen", {"cu_seqlens_q": [0, 2**40], "cu_seqlens_k": [0, 4]}, "expected at most 2,147,483,647"),
        (
            "flash_attn_varlen",
            {"cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 4], "max_seqlen_k": 3},
            "max_seqlen_k is 3, expected at least 4, the longest of cu_seqlens_k",
        ),
        (
            "torch_varlen",
            {"cu_seq_q": [0, 4], "cu_seq_k": [0, 4], "seqused_k": [5]},
            r"seqused_k\[0\] is 5, expected at",
        ),
        ("torch_varlen", {"cu_seq_q": [0, 4], "cu_seq_k": [0, 4], "seqused_k": [-5]}, "seqused_k holds -5"),
        ("torch_varlen", {"cu_seq_q": [0, 4], "cu_seq_k": [0, 4], "block_table": 0}, "there are no paged caches"),
        ("sdpa", {"is_causal": True, "attn_mask": torch.ones(4, 4).bool()}, "of which sdpa takes one"),
        ("sdpa", {"attn_mask": torch.ones(4, 4)}, "expected torch.bool"),
        ("sdpa", {"attn_mask": 3}, "attn_mask is 3, expected a Tensor"),
        ("xformers", {}, "xformers needs attn_bias"),
        ("xformers", {"attn_bias": None, "q_seqlen": [4]}, "attn_bias=None takes no other arguments, got q_seqlen"),
        ("xformers", {"attn_bias": "LowerTriangular"}, "expected None or a class of xFormers' biases"),
        ("xformers", {"attn_bias": "PagedBlockDiagonalPaddedKeysMask"}, "no paged caches yet"),
        ("xformers", {"attn_bias": "LowerTriangularMaskWithTensorBias"}, r"score=mf.scores.bias\(x\)"),
        ("xformers", {"attn_bias": "BlockDiagonalMask", "q_seqlen": [4]}, "takes q_seqlen, kv_seqlen, got q_seqlen"),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalCausalFromBottomRightMask", "q_seqlen": [4], "kv_seqlen": [3]},
            "4 queries and 3 keys in sequence 0, expected no fewer keys than queries",
        ),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalPaddedKeysMask", "q_seqlen": [4], "kv_seqlen": [4], "kv_padding": 3},
            "kv_padding is 3, expected at least 4, the longest of kv_seqlen",
        ),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalGappyKeysMask", "q_seqlen": [4], "kv_seqlen": [4], "kv_seqstarts": [0]},
            "kv_seqstarts has 1 entries, expected 2",
        ),
        (
            "xformers",
            {"attn_bias": "BlockDiagonalGappyKeysMask", "q_seqlen": [4], "kv_seqlen": [4], "kv_seqstarts": [1, 4]},
            "kv_seqlen goes beyond the total of kv_seqstarts, 4 keys",
        ),
        (
            "xformers",
            {"attn_bias": "LowerTriangularFromBottomRightLocalAttentionMask", "window_size": 0},
            "window_size is 0, expected at least 1",
        ),
    ],
)
def test_what_means_nothing_is_refused(library, given, says):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match=says):
        mf.from_arguments(library, **given)


def test_calls_of_other_lengths_are_refused():
    packed = mf.from_arguments("flash_attn_varlen", cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 20])
    with pytest.raises(mf.ArgumentError, match=r"batch \* q_len is 8, expected 9, the queries of flash_attn_varlen"):
        packed.dense(8, 20)
    with pytest.raises(mf.ArgumentError, match=r"batch \* kv_len is 8, expected at least 20"):
        packed.dense(9, 8)
    assert not packed.dense(9, 21)[..., 20].any()
    with pytest.raises(mf.ArgumentError, match=r"the batch rows have 4,194,304,000 tokens"):
        mf.full().as_arguments("sdpa", 2**20, 4, batch=4000)
