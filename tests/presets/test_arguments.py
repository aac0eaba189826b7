"""Presets take what is given as it is meant, on the CPU and outside of modes, or say what is wrong before any work."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import maskflash as mf
from maskflash import presets

NUMBER_PRESETS = {
    "sliding_window": mf.sliding_window,
    "right side": lambda n: mf.sliding_window(1, n),
    "prefix_lm": mf.prefix_lm,
    "padding": mf.padding,
    "global_tokens": mf.global_tokens,
    "window": lambda n: mf.dilated_window(n, 1),
    "dilation": lambda n: mf.dilated_window(1, n),
    "height": lambda n: mf.natten(n, 1, 1, 1),
    "kernel": lambda n: mf.natten(1, 1, n, 1),
    "shape": lambda n: presets.neighborhood((n, 2), 1),
    "kernel_size": lambda n: presets.neighborhood((4, 4), n),
    "stride": lambda n: presets.neighborhood(9, 3, stride=(n,)),
    "cube": lambda n: presets.sliding_tiles((4, 4), (1, n), 1),
    "chunk": presets.chunked,
    "half": lambda n: presets.block_diffusion(n, 2),
    "block": lambda n: presets.block_diffusion(2, n),
    "question": lambda n: presets.share_question([(n, [1])]),
    "paper": lambda n: presets.paper("causal", n),
    "causal_document": lambda n: mf.causal_document([3], left=n),
}
TABLE_PRESETS = {
    "lengths": lambda x: mf.document(lengths=x),
    "by position": mf.document,
    "cu_seqlens": lambda x: mf.document(cu_seqlens=x),
    "kv_lengths": lambda x: mf.document([3], kv_lengths=x),
    "kv_cu_seqlens": lambda x: mf.causal_document([3], kv_cu_seqlens=x),
    "ids": lambda x: mf.document(ids=x),
    "prefixes": lambda x: presets.prefix_lm_document([3], x),
    "blocks": presets.causal_blockwise,
    "segments": presets.qk_sparse,
    "images": presets.image_blocks,
    "ids of images": lambda x: presets.image_blocks(ids=x),
    "evictions": presets.random_eviction,
    "parents": presets.tree,
    "answers": lambda x: presets.share_question([(1, x)]),
    "lts": mf.ColumnIntervals,
}


@pytest.mark.parametrize("make", NUMBER_PRESETS.values(), ids=NUMBER_PRESETS)
@pytest.mark.parametrize("value", [True, np.True_, 1.5, -1, "3", float("nan"), {}, -(2**70), b"3"], ids=repr)
def test_what_is_no_number_of_tokens_is_refused(make, value):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match="expected"):
        make(value)


@pytest.mark.parametrize("make", TABLE_PRESETS.values(), ids=TABLE_PRESETS)
@pytest.mark.parametrize(
    "value",
    [
        *(True, [True, 2], 1.5, [1.5], "12", {}, [None], [2**70], Ellipsis, [[1], [2, "3"]], np.zeros(2)),
        *(torch.zeros(()), torch.zeros(2), torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.tensor([True])),
    ],
    ids=repr,
)
def test_what_is_no_table_of_integers_is_refused(make, value):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match=r"expected|beyond 64 bits"):
        make(value)


@pytest.mark.parametrize("make", [mf.padding, mf.prefix_lm])
def test_negative_lengths_are_refused(make):
    for lengths in ([-1, 10], torch.tensor([3, -2]), np.array([-5])):
        with pytest.raises(mf.ArgumentError, match="expected at least 0"):
            make(lengths)


@pytest.mark.parametrize("number", [np.int32(3), np.int64(3), np.uint8(3), 3])
def test_numpy_integers_are_integers(number):
    assert mf.equivalent(mf.sliding_window(number), mf.sliding_window(3), 9, 9)
    assert mf.equivalent(mf.padding(np.array([number])), mf.padding(3), 9, 9)


@pytest.mark.parametrize("flag", ["no", 1, 0.0, None, torch.tensor(True)])
def test_causal_is_true_or_false(flag):
    with pytest.raises(mf.ArgumentTypeError, match=r"causal is .*, expected True or False"):
        mf.ColumnIntervals(torch.tensor([3, 3, 3]), causal=flag)
    with pytest.raises(mf.ArgumentTypeError, match=r"causal is .*, expected True or False"):
        mf.ColumnIntervals.from_flashmask(torch.zeros(1, 1, 3, 1, dtype=torch.int32), flag)
    if flag is not None:
        with pytest.raises(mf.ArgumentTypeError, match=r"causal is .*, expected True or False"):
            mf.causal().to_flashmask(3, 3, causal=flag)


# What can be mixed up


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0, 1, 17]))
def test_ids_and_starts_by_position_are_never_read_as_lengths(lengths, first):
    """An error when the mask is made, or in a call of as many tokens."""
    ids = [first + number for number, length in enumerate(lengths) for _ in range(length)]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for wrong in (ids, torch.tensor(ids), [ids, ids], starts):
        if sum(lengths) < 2 or (len(lengths) == 1 and wrong is starts):
            continue
        for preset in (mf.document, mf.causal_document):
            with pytest.raises(mf.ArgumentError, match="ids"):
                preset(wrong).dense(sum(lengths), sum(lengths), batch=2 if wrong == [ids, ids] else 1)


def test_by_name_any_lengths_are_lengths():
    assert mf.document(lengths=[0, 1, 1]).dense(2, 2)[0, 0].tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("mask", "sizes", "message"),
    [
        (mf.document([30, 60]), (64, 64), "add up to 90 tokens, expected at most what the call has, 64 queries and 64"),
        (mf.document(cu_seqlens=[0, 30, 90]), (1, 89), "add up to 90 tokens, .*, 1 queries and 89 keys"),
        (mf.causal() & ~mf.document([30, 60]), (64, 64), "add up to 90 tokens"),
        (mf.causal_document([5], kv_lengths=[9]), (4, 9), "of the queries .* add up to 5 tokens, .*, 4 queries"),
        (mf.causal_document([5], kv_lengths=[9]), (5, 8), "of the keys .* add up to 9 tokens, .*, 8 keys"),
        (presets.share_question([(5, [4])]), (8, 8), "add up to 9 tokens"),
        (presets.causal_blockwise([5, 4]), (8, 8), "add up to 9 tokens"),
        (presets.prefix_lm_document([9], [4]), (8, 8), "add up to 9 tokens"),
        (presets.block_diffusion(5, 2), (8, 8), "add up to 10 tokens"),
    ],
    ids=str,
)
def test_documents_that_find_no_room_are_refused_before_any_work(mask, sizes, message):
    q, k = torch.randn(1, 1, sizes[0], 8), torch.randn(1, 1, sizes[1], 8)
    calls = [
        lambda mask: mask.dense(*sizes),
        lambda mask: mask.block_map(*sizes),
        lambda mask: mask.row(0, sizes[1], q_len=sizes[0], batch=1, heads=1),
        lambda mask: mf.compile(mask).explain(*sizes),
        lambda mask: mf.compile(mask).prepare(*sizes),
        lambda mask: mf.attention(q, k, k, mask),
        lambda mask: mf.equivalent(mask, mf.full(), *sizes),
    ]
    for call in calls:
        for same in (mask, pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
            with pytest.raises(mf.ArgumentError, match=message):
                call(same)


def test_an_offset_or_room_in_the_cache_says_that_the_rest_is_to_come():
    mask = mf.causal() & mf.document([30, 60])
    whole = mask.dense(90, 90)[0, 0]
    assert torch.equal(mask.dense(16, 64, q_offset=48)[0, 0], whole[48:64, :64])
    assert torch.equal(mask.dense(16, 64, q_offset=torch.tensor([48]))[0, 0], whole[48:64, :64])
    assert torch.equal(mask.dense(16, 90)[0, 0], whole[:16])
    assert mask.row(20, 64) == [(0, 21)]  # a question about a row needs no lengths


@pytest.mark.parametrize(
    "mask",
    [
        mf.document([[3, 1], [4], [2, 2]]),
        mf.document(ids=torch.zeros(3, 4, dtype=torch.int64)),
        mf.causal_document([[3, 1], [4], [2, 2]]),
        mf.padding([1, 2, 3]),
        mf.prefix_lm([1, 2, 3]),
        presets.random_eviction(torch.full((3, 1, 4), 3)),
    ],
    ids=str,
)
def test_tables_for_other_batches_are_refused(mask):
    for batch in (1, 2, 4):
        with pytest.raises(mf.ArgumentError, match=f"batch is {batch}, expected 3 as in the tables"):
            mask.dense(4, 4, batch=batch)
    assert mask.dense(4, 4, batch=3).shape[0] == 3
    mask.row(2, 4, b=1)


def test_tables_of_one_row_serve_all():
    ids = torch.tensor([[0, 0, 1, 1]])
    for mask in (mf.document(ids=ids), mf.padding(torch.tensor([2])), mf.prefix_lm([2])):
        found = mask.dense(4, 4, batch=3)
        assert torch.equal(found, found[:1].expand_as(found))
    mask = mf.document(ids=ids)
    ids[0, 1] = 1  # by reference
    assert mask.dense(4, 4, batch=2)[1, 0, 0].tolist() == [True, False, False, False]


# Numbers without end


@given(st.integers(2**61, 2**70) | st.just(sys.maxsize), st.integers(0, 9), st.integers(-20, 20))
def test_windows_larger_than_any_distance_have_no_end(huge, small, offset):
    q, kv = torch.arange(9)[:, None] + offset, torch.arange(9)

    def same(mask, expected):
        found = mask.dense(9, 9, q_offset=offset)[0, 0]
        kinds = mask.block_map(9, 9, q_offset=offset, block_size=1).kinds()[0, 0] == 2
        return torch.equal(found, expected.expand_as(found)) and torch.equal(kinds, found)

    every = torch.ones(9, 9, dtype=torch.bool)
    for endless in (huge, None):
        assert same(mf.sliding_window(endless, endless), every)
        assert same(mf.sliding_window(endless, small), kv <= q + small)
        assert same(mf.sliding_window(small, endless), kv >= q - small)
    for mask in (mf.prefix_lm(huge), mf.padding(huge), mf.global_tokens(huge), mf.dilated_window(huge, 1)):
        assert same(mask, every)
    assert same(mf.dilated_window(9, huge), kv == q)
    lengths = mf.causal_document([9], left=huge, right=huge)
    assert torch.equal(lengths.dense(9, 9)[0, 0], every)


@pytest.mark.parametrize("offset", [2**60 + 1, -(2**60) - 1, 2**63 - 1, 2**63, -(2**63), 2**64, 2**70])
def test_offsets_near_the_ends_of_64_bits_are_refused(offset):
    q = torch.randn(1, 1, 64, 8)
    mask, attn = mf.causal(), mf.compile(mf.causal())
    for call in (
        lambda: mask.dense(64, 64, q_offset=offset),
        lambda: mask.block_map(64, 64, q_offset=offset),
        lambda: mask.row(3, 64, q_offset=offset),
        lambda: mask.why(3, 4, q_offset=offset),
        lambda: attn.explain(64, 64, q_offset=offset),
        lambda: attn(q, q, q, q_offset=offset),
    ):
        with pytest.raises(mf.ArgumentError, match=r"q_offset is .*, expected at (least|most)"):
            call()
    if -(2**63) <= offset < 2**63:
        rows = torch.tensor([offset])
        for call in (lambda: mask.block_map(64, 64, q_offset=rows), lambda: attn(q, q, q, q_offset=rows)):
            with pytest.raises(mf.ArgumentError, match=r"an entry of q_offset is .*, expected at"):
                call()


@pytest.mark.parametrize("offset", [2**60, -(2**60), 2**60 - 30])
def test_offsets_up_to_them_are_right(offset):
    seen = mf.causal().dense(64, 64, q_offset=offset)[0, 0]
    assert bool(seen.all()) == (offset > 0) and bool(seen.any()) == (offset > 0)
    kinds = mf.causal().block_map(64, 64, q_offset=offset, block_size=16).kinds()
    assert bool((kinds == (2 if offset > 0 else 0)).all())


@pytest.mark.parametrize("length", [2**31, 2**63, 2**70])
def test_lengths_beyond_32_bits_are_refused(length):
    mask, attn = mf.causal(), mf.compile(mf.causal())
    for call in (
        lambda: mask.dense(length, 1),
        lambda: mask.block_map(1, length),
        lambda: mask.block_map(1, 1, batch=length),
        lambda: mask.row(0, length),
        lambda: mask.column(0, length),
        lambda: mask.row(length, 4),
        lambda: attn.explain(length, length),
        lambda: attn.prepare(length, length),
        lambda: mf.equivalent(mask, mask, length, length),
        lambda: mf.document(lengths=[length]),
        lambda: mf.natten(length, 1, 1, 1),
        lambda: mf.natten(2**20, 2**20, 1, 1),
    ):
        with pytest.raises(mf.ArgumentError, match="expected at most"):
            call()


# Modes


def make_all():
    return [
        mf.causal(),
        mf.document(lengths=[2, 3]),
        mf.document(cu_seqlens=[0, 2, 5]),
        mf.document(ids=[0, 0, 1, 1, 1]),
        mf.document(lengths=[[2, 3], [5]]),
        mf.causal_document([2, 3], kv_lengths=[1, 4]),
        mf.padding([2, 3]),
        mf.prefix_lm([2, 3]),
        mf.natten(2, 2, 1, 1),
        presets.share_question([(2, [1, 2])]),
        presets.causal_blockwise([2, 3]),
        presets.prefix_lm_document([2, 3], [1, 1]),
        presets.qk_sparse([(1, 2)]),
        presets.random_eviction([3, 4, 5, 5, 5]),
        mf.ColumnIntervals([3, 3, 3, 5, 5], causal=True),
        *(presets.paper(name, 5).vectors for name in presets.PAPER),
        *(presets.paper(name, 5).predicate for name in presets.PAPER),
    ]


@pytest.mark.parametrize(
    "mode", [lambda: torch.device("meta"), FakeTensorMode, torch.inference_mode], ids=["meta", "fake", "inference"]
)
def test_masks_are_the_same_whatever_mode_they_are_made_in(mode):
    with mode():
        made = make_all()
    for mask, plain in zip(made, make_all(), strict=True):
        assert torch.equal(mask.dense(5, 5, batch=2), plain.dense(5, 5, batch=2)), mask
        assert mask.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("read", ["lengths", "cu_seqlens"])
def test_numbers_that_are_not_there_are_named(read):
    with pytest.raises(mf.ArgumentError, match=f"document: {read} is on meta, expected numbers"):
        mf.document(**{read: torch.zeros(3, dtype=torch.int64, device="meta")})
    with (
        FakeTensorMode(),
        pytest.raises(mf.ArgumentError, match=f"document: {read} is a fake tensor, expected numbers"),
    ):
        mf.document(**{read: torch.zeros(3, dtype=torch.int64)})


# What stands for a mask


@pytest.mark.parametrize(
    ("wrong", "call"),
    [
        (mf.causal, r"causal\(\)"),
        (mf.natten, r"natten\(height, width, kernel_h, kernel_w\)"),
        (presets.qk_sparse, r"qk_sparse\(segments\)"),
        (mf.ColumnIntervals, r"ColumnIntervals\(lts\)"),
    ],
)
def test_a_preset_without_brackets_is_to_be_called(wrong, call):
    for use in (mf.mask, mf.compile, lambda wrong: mf.causal() & wrong, lambda wrong: wrong | mf.causal()):
        with pytest.raises(mf.ArgumentTypeError, match=f"which makes a mask; call it: {call}"):
            use(wrong)


def test_the_predicate_of_a_preset_is_one():
    for mask in (mf.causal(), mf.natten(2, 2, 1, 1), mf.document([3, 4])):
        assert mf.equivalent(mf.mask(mask.function), mask, 9, 9)


def test_the_name_of_a_preset_is_no_mask():
    for use in (mf.mask, mf.compile, lambda wrong: mf.full() & wrong, lambda wrong: wrong | mf.full()):
        with pytest.raises(mf.ArgumentTypeError, match=r"got the text 'causal'.* called: mf.causal\(\)"):
            use("causal")


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
def test_tensors_of_bool_join():
    seen = torch.rand(6, 6) < 0.5
    triangle = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal((mf.causal() & seen).dense(6, 6)[0, 0], triangle & seen)
    assert torch.equal((seen | mf.causal()).dense(6, 6)[0, 0], triangle | seen)
    assert torch.equal((seen ^ ~mf.causal()).dense(6, 6)[0, 0], seen ^ ~triangle)
    with pytest.raises(mf.ArgumentTypeError, match=r"mask has dtype torch.float32, expected torch.bool"):
        mf.causal() & seen.float()
