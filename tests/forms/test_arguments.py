"""Arguments of kernels with fixed masks: decoded here by each library's own rules, and compared with every pair."""

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
from tests.forms.decoders import DECODERS, flash_attn, flash_attn_varlen, torch_varlen, xformers

LENGTH = st.integers(0, 12)
VARLEN = ("flash_attn_varlen", "torch_varlen")
LIBRARIES = ("flash_attn", *VARLEN, "sdpa", "xformers")


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
