"""What libraries mean by windows and chunks: decoded by each one's own rule, or its own code if it is installed."""

import pickle
from collections import defaultdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, masking_utils
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs

import maskflash as mf
from maskflash.testing import masks

LENGTH = st.integers(0, 12)
SIZE = st.integers(1, 9)


def flash_attn_3(q_len, kv_len, causal=False, window_size=(-1, -1), attention_chunk=0):
    """hopper/flash_api.cpp's treatment of sizes, then hopper/mask.h's limits of columns."""
    left, right = window_size
    if left >= kv_len - 1:
        left = -1
    if right >= q_len - 1:
        right = -1
    if causal:
        right = 0
    local = left >= 0 or right >= 0 or attention_chunk > 0
    left = kv_len - 1 if left < 0 else left
    right = q_len - 1 if right < 0 else right
    if attention_chunk:
        left, right = min(left, attention_chunk - 1), min(right, attention_chunk - 1)
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len if local else 0):
        at = i + kv_len - q_len
        first, end = at - left, at + right + 1
        if attention_chunk:
            chunk = at // attention_chunk * attention_chunk
            first, end = max(first, chunk), min(end, chunk + attention_chunk)
        for j in range(kv_len):
            pairs[i, j] = first <= j < end
    return pairs


def flash_attn_4(q_len, kv_len, causal=False, window_size=(None, None)):
    """flash_attn/cute/interface.py's `_resolve_causal_local_window`, then flash_attn/cute/mask.py."""
    left, right = window_size
    if causal:
        right = 0
    if left is not None and right is not None and left + right < 0:
        left, right = None, None
    if left is not None or right is not None:
        causal = left is None and right == 0
    return banded(q_len, kv_len, kv_len - q_len, left, 0 if causal else right)


def flashinfer_prefill(q_len, kv_len, causal=False, window_left=-1):
    """variants.cuh: kv + q_len + window_left >= kv_len + q; prefill.cuh: not causal where kv + q_len > kv_len + q."""
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool)
    for q in range(q_len):
        for kv in range(kv_len):
            hidden = causal and kv + q_len > kv_len + q
            hidden |= window_left >= 0 and kv + q_len + window_left < kv_len + q
            pairs[q, kv] = not hidden
    return pairs


def banded(q_len, kv_len, shift, left, right):
    pairs = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        for j in range(kv_len):
            at = i + shift
            pairs[i, j] = (left is None or j >= at - left) and (right is None or j <= at + right)
    return pairs


def transformers(q_len, kv_len, sliding_window=None, attention_chunk_size=None, is_causal=True):
    """Transformers' own functions of pairs, as its mask for sdpa evaluates them."""
    function = masking_utils.causal_mask_function if is_causal else masking_utils.bidirectional_mask_function
    if sliding_window is not None and is_causal:
        function = masking_utils.sliding_window_causal_mask_function(sliding_window)
    elif sliding_window is not None:
        function = masking_utils.sliding_window_bidirectional_mask_function(sliding_window)
    elif attention_chunk_size is not None:
        function = masking_utils.chunked_causal_mask_function(attention_chunk_size, torch.zeros(1, dtype=torch.int64))
    if 0 in (q_len, kv_len):
        return torch.zeros(q_len, kv_len, dtype=torch.bool)
    rows = torch.arange(q_len).view(1, 1, -1, 1) + kv_len - q_len
    found = function(torch.zeros(1, 1, 1, 1, dtype=torch.int64), 0, rows, torch.arange(kv_len).view(1, 1, 1, -1))
    if is_causal or sliding_window is not None:
        return found[0, 0]
    return torch.ones(q_len, kv_len, dtype=torch.bool)  # `q >= 0`, which is of all the queries that there are


def vllm(q_len, kv_len, sliding_window=None, attention_chunk_size=None, attn_type="decoder"):
    """Its FlashAttention backend's window, and causal; a chunk is a sequence of its own."""
    causal = attn_type == "decoder"
    if attention_chunk_size is not None:
        pairs = banded(q_len, kv_len, kv_len - q_len, None, 0)
        at, key = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
        return pairs & (at // attention_chunk_size == key // attention_chunk_size)
    left = None if sliding_window is None else sliding_window - 1
    return banded(q_len, kv_len, kv_len - q_len, left, 0 if causal else left)


def paddle(q_len, kv_len, causal=False, window_size=None):
    """flashmask_attention's vectors for a window: rows from LTS on are hidden, and rows before UTE."""
    pairs = banded(q_len, kv_len, kv_len - q_len, None, 0 if causal else None)
    if window_size is not None:
        assert q_len == kv_len
        left, right = window_size if isinstance(window_size, tuple) else (window_size, window_size)
        for j in range(kv_len):
            pairs[min(max(j + left + 1, 0), q_len) :, j] = False
            if not causal:
                pairs[: min(max(j - right, 0), q_len), j] = False
    return pairs


def jax(q_len, kv_len, is_causal=False, local_window_size=None):
    """`_get_causal_mask` and `_get_window_mask`."""
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool)
    if is_causal:
        pairs = pairs.tril()
    if local_window_size is not None:
        pair = isinstance(local_window_size, tuple)
        left, right = local_window_size if pair else (local_window_size, local_window_size)
        q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
        pairs = pairs & (q <= kv + left) & (q >= kv - right)
    return pairs


DECODERS = {
    "flash_attn_3": flash_attn_3,
    "flash_attn_4": flash_attn_4,
    "flashinfer_prefill": flashinfer_prefill,
    "transformers": transformers,
    "vllm": vllm,
    "paddle": paddle,
    "jax": jax,
}


def optional(strategies):
    """Some of the arguments."""
    return st.fixed_dictionaries({}, optional=strategies)


TAKES = {"causal", "window_size"}
SIDES = st.tuples(st.integers(0, 9), st.integers(0, 9))
TAKEN = {
    "flash_attn_3": optional(
        {
            "causal": st.booleans(),
            "window_size": st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
            "attention_chunk": st.integers(0, 9),
        }
    ),
    "flash_attn_4": optional(
        {"causal": st.booleans(), "window_size": st.tuples(*[st.none() | st.integers(-3, 9)] * 2)}
    ),
    "flashinfer_prefill": optional({"causal": st.booleans(), "window_left": st.integers(-1, 9)}),
    "transformers": optional({"attention_chunk_size": SIZE})
    | optional({"sliding_window": SIZE, "is_causal": st.booleans()}),
    "vllm": optional({"attention_chunk_size": SIZE})
    | optional({"sliding_window": SIZE, "attn_type": st.sampled_from(["decoder", "encoder_only"])}),
    "paddle": optional({"causal": st.booleans(), "window_size": SIDES | st.integers(0, 9)}),
    "jax": optional({"is_causal": st.booleans(), "local_window_size": SIDES | st.integers(0, 9)}),
}


def is_for_equal_lengths(library, given):
    encoders = given.get("is_causal") is False or given.get("attn_type") == "encoder_only"
    return ("sliding_window" in given and encoders) or ("window_size" in given and library == "paddle")


@pytest.mark.parametrize("library", TAKEN)
@settings(max_examples=50)
@given(st.data(), LENGTH, LENGTH)
def test_arguments_are_what_the_library_makes_of_them(library, data, q_len, kv_len):
    given = data.draw(TAKEN[library])
    if is_for_equal_lengths(library, given):
        kv_len = q_len
    want = DECODERS[library](q_len, kv_len, **given)
    mask = mf.from_arguments(library, **given)
    for made in (mask, pickle.loads(pickle.dumps(mask))):
        assert torch.equal(made.dense(q_len, kv_len)[0, 0], want)
        found = made.block_map(q_len, kv_len, block_size=4).kinds()[0, 0].tolist()
        tiles = [
            [want[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] for j in range(-(-kv_len // 4))] for i in range(-(-q_len // 4))
        ]
        assert found == [[int(tile.any()) + int(tile.all()) for tile in line] for line in tiles]


@pytest.mark.parametrize("library", TAKEN)
@settings(max_examples=30)
@given(st.data(), LENGTH, LENGTH)
def test_arguments_are_found_again(library, data, q_len, kv_len):
    given = data.draw(TAKEN[library])
    if is_for_equal_lengths(library, given):
        kv_len = q_len
    mask = mf.from_arguments(library, **given)
    try:
        found = mask.as_arguments(library, q_len, kv_len, batch=2)
    except mf.UnsupportedMask:
        # Ends of both sides and a chunk at once, or none but negative ones, are more than is looked for.
        assert library in ("flash_attn_3", "flash_attn_4")
        assert "attention_chunk" in given or min(x or 0 for x in given["window_size"]) < 0
        return
    assert torch.equal(DECODERS[library](q_len, kv_len, **found), mask.dense(q_len, kv_len)[0, 0])


@pytest.mark.parametrize("library", TAKEN)
@settings(max_examples=15)
@given(mask=masks(), q_len=LENGTH, kv_len=LENGTH)
def test_what_is_exported_is_the_mask(library, mask, q_len, kv_len):
    dense = mask.dense(q_len, kv_len, batch=2, heads=2)
    try:
        found = mask.as_arguments(library, q_len, kv_len, batch=2, heads=2)
    except mf.UnsupportedMask as error:
        pair = tuple(int(x) for x in str(error).partition(" = (")[2].partition(")")[0].split(","))
        assert bool(dense[pair]) == str(error).partition(" which the mask ")[2].startswith("shows")
        return
    assert torch.equal(DECODERS[library](q_len, kv_len, **found).expand_as(dense), dense)


# Transformers' own masks of whole models


@pytest.mark.parametrize("given", [{}, {"sliding_window": 5}, {"attention_chunk_size": 5}], ids=str)
def test_it_is_the_mask_that_a_model_of_transformers_gets(given):
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, **given)
    config._attn_implementation = "eager"
    make = {
        "sliding_window": masking_utils.create_sliding_window_causal_mask,
        "attention_chunk_size": masking_utils.create_chunked_causal_mask,
    }.get(next(iter(given), ""), masking_utils.create_causal_mask)
    added = make(config=config, inputs_embeds=torch.zeros(1, 17, 8), attention_mask=None, past_key_values=None)
    mask = mf.from_arguments("transformers", **given)
    assert torch.equal(mask.dense(17, 17), added == 0)


@given(SIZE, st.integers(1, 12), st.integers(0, 12))
def test_transformers_gives_flash_attn_the_same_causal_window(window, q_len, more):
    """And another one where a layer is not causal: a token less on either side."""
    kv_len = q_len + more
    sent = {
        causal: _process_flash_attention_kwargs(
            q_len,
            kv_len,
            is_causal=causal,
            sliding_window=window,
            supports_mapping=defaultdict(bool, window_size=True),
        )
        for causal in (True, False)
    }
    kernels = {
        causal: mf.from_arguments("flash_attn", **{name: sent[causal][name] for name in sent[causal].keys() & TAKES})
        for causal in sent
    }
    named = {causal: mf.from_arguments("transformers", sliding_window=window, is_causal=causal) for causal in sent}
    assert mf.equivalent(kernels[True], named[True], q_len, kv_len)
    if kv_len == q_len:
        assert mf.implies(kernels[False], named[False], q_len, q_len)
        encoder = mf.from_arguments("vllm", sliding_window=window, attn_type="encoder_only")
        assert mf.equivalent(kernels[False], encoder, q_len, q_len)


@given(st.integers(1, 12), st.integers(1, 12))
@example(3, 5)
def test_torchs_is_causal_is_the_top_left(q_len, kv_len):
    v = torch.eye(kv_len)[None, None]
    weights = scaled_dot_product_attention(torch.zeros(1, 1, q_len, 4), torch.zeros(1, 1, kv_len, 4), v, is_causal=True)
    assert torch.equal(mf.from_arguments("sdpa", is_causal=True).dense(q_len, kv_len), weights != 0)
    assert mf.equivalent(
        mf.from_arguments("sdpa", is_causal=True), mf.from_arguments("jax", is_causal=True), q_len, kv_len
    )


def test_chunks_are_counted_from_the_first_key_also_behind_a_cache():
    mask = mf.from_arguments("transformers", attention_chunk_size=4)
    assert torch.equal(mask.dense(3, 10)[0, 0], mf.presets.chunked(4).dense(3, 10, q_offset=7)[0, 0])
    assert mf.presets.chunked(4).as_arguments("flash_attn_3", 3, 10, q_offset=7) == {
        "causal": True,
        "attention_chunk": 4,
    }
    for one in (mask, mask & mf.sliding_window(3)):
        assert mf.equivalent(one, pickle.loads(pickle.dumps(one)), 20, 20)


def test_sizes_of_any_number_are_sizes():
    for sizes in ({"window_size": (2**70, 3)}, {"attention_chunk": 2**70, "causal": True}):
        mask = mf.from_arguments("flash_attn_3", **sizes)
        assert mask.dense(4, 4)[0, 0, 3, 0]
    assert mf.equivalent(mf.from_arguments("transformers", sliding_window=2**70), mf.causal(), 9, 9)


@pytest.mark.parametrize(
    ("library", "given", "says"),
    [
        ("transformers", {"sliding_window": 0}, "sliding_window is 0, expected at least 1"),
        (
            "transformers",
            {"sliding_window": 4, "attention_chunk_size": 4},
            "got sliding_window and attention_chunk_size",
        ),
        ("transformers", {"attention_chunk_size": 4, "is_causal": False}, "is_causal is of layers that aren't causal"),
        ("transformers", {"attention_mask": None}, "it is no part of the mask; here:"),
        ("vllm", {"attn_type": "encoder"}, 'attn_type is \'encoder\', expected "decoder" or "encoder_only"'),
        ("flash_attn_3", {"attention_chunk": -1}, "attention_chunk is -1, expected at least 0"),
        ("flash_attn_4", {"window_size": 4}, r"window_size is 4, expected \(left, right\), None for no end"),
        ("flash_attn_4", {"window_size": (4, 1.5)}, "an entry of window_size is 1.5, expected an int"),
        ("flashinfer_prefill", {"window_left": -2}, "window_left is -2, expected at least -1"),
        ("paddle", {"window_size": (1, 2, 3)}, r"window_size is \(1, 2, 3\), expected an int, or \(left, right\)"),
        ("paddle", {"window_size": -1}, "window_size is -1, expected at least 0"),
        ("jax", {"local_window_size": "3"}, "local_window_size is '3', expected an int"),
    ],
)
def test_what_means_nothing_is_refused(library, given, says):
    with pytest.raises((mf.ArgumentError, mf.ArgumentTypeError), match=says):
        mf.from_arguments(library, **given)


def test_paddles_windows_are_for_as_many_queries_as_keys():
    with pytest.raises(mf.ArgumentError, match=r"is for as many queries as keys, got \(q_len, kv_len\) \(4, 6\)"):
        mf.from_arguments("paddle", causal=True, window_size=2).dense(4, 6)
