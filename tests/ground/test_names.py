"""Names of arguments, and masks of other libraries: what is ours, and what to write here instead."""

import inspect
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask

import maskflash as mf
from maskflash.ground.names import MASKS, OWN, PEERS

Q, K, V = torch.randn(3, 2, 4, 8, 16).unbind()
IDS = torch.arange(8) // 3


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[q] == doc[kv]


@pytest.mark.parametrize("name", OWN)
def test_no_mask_may_take_an_argument_of_ours(name):
    scope = {}
    positional = [f"_{index}" for index in "bhqk"]
    exec(f"def f({', '.join(positional)}, *, {name}): return True", scope)
    with pytest.raises(mf.ArgumentError, match=f"^f: its argument '{name}' would never .* such as mask_{name}$"):
        mf.mask(scope["f"])
    with pytest.raises(mf.ArgumentError, match=f"its argument '{name}'"):
        mf.attention(Q, K, V, scope["f"])


def test_all_arguments_of_ours_are_kept_from_masks():
    attn = mf.compile(mf.causal())
    calls = [mf.attention, mf.compile, attn.__call__, attn.source, attn.explain, attn.prepare]
    calls += [getattr(mf.Mask, name) for name in dir(mf.Mask) if not name.startswith("_")]
    taken = {
        parameter.name
        for call in calls
        if inspect.isfunction(call) or inspect.ismethod(call)
        for parameter in inspect.signature(call).parameters.values()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    calls_of_ours = (mf.Mask.at_call, mf.Mask.bind, mf.Mask.plain, mf.Mask.twin, mf.Mask.pair, mf.Mask.retrace)
    internal = {name for call in calls_of_ours for name in inspect.signature(call).parameters}
    assert taken - internal - {"kinds", "exact", "mask_args"} <= OWN.keys()
    assert {"q_offset", "return_lse", "device", "causal", "tune", "b"} <= taken


@pytest.mark.parametrize("name", [name for name in PEERS if name not in OWN])
def test_names_of_other_libraries_are_answered_by_what_to_write_here(name):
    calls = [
        lambda: mf.attention(Q, K, V, mf.causal(), **{name: 1}),
        lambda: mf.compile(mf.causal())(Q, K, V, **{name: 1}),
        lambda: mf.compile(mf.causal(), **{name: 1}),
    ]
    for call in calls:
        with pytest.raises(mf.ArgumentTypeError, match=re.escape(f"unexpected argument {name!r}; {PEERS[name]}")):
            call()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("is_causal", "the mask is the fourth argument: mf.causal()"),
        ("enable_gqa", "leave it out"),
        ("attn_mask", "the mask is the fourth argument"),
        ("block_mask", "mf.from_flex(block_mask)"),
        ("window_size", "mf.sliding_window(left, right)"),
        ("softmax_scale", "scale="),
        ("startend_row_indices", "mf.ColumnIntervals.from_flashmask(indices, causal)"),
        ("dropout_p", "attn(q, k, v, dropout_p=...)"),
        ("softcap", "score=mf.scores.softcap(cap)"),
        ("score_mod", "a score_mod as it is"),
        ("block_table", "PageTable"),
    ],
)
def test_the_commonest_names_have_their_own_answers(name, answer):
    assert answer in PEERS[name]


def test_our_own_names_in_the_wrong_place_are_told_where_they_belong():
    attn = mf.compile(packed)
    with pytest.raises(mf.ArgumentTypeError, match=r"'scale'; it is an argument of mf.compile and mf.attention"):
        attn(Q, K, V, doc=IDS, scale=0.5)
    with pytest.raises(mf.ArgumentTypeError, match=r"'return_lse'; it is an argument of mf.attention and of the comp"):
        mf.compile(packed, return_lse=True)
    with pytest.raises(mf.ArgumentTypeError, match="'doc'; a mask's own arguments are passed in each call"):
        mf.compile(packed, doc=IDS)
    with pytest.raises(mf.ArgumentTypeError, match="'docs'; the mask's own arguments are: doc"):
        attn(Q, K, V, docs=IDS)


def test_a_mask_may_call_its_arguments_as_other_libraries_do():
    @mf.mask
    def window(b, h, q, kv, *, window_size):
        return 0 <= q - kv < window_size

    assert torch.equal(window.dense(8, 8, window_size=3), mf.sliding_window(2).dense(8, 8))


# What stands for a mask


class LowerTriangularMask(torch.Tensor):
    """Named as xFormers' own."""


@pytest.mark.parametrize(
    "value",
    [
        create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 8, 8, device="cpu"),
        causal_lower_right(8, 8),
        torch.ones(8, 8).as_subclass(LowerTriangularMask),
        mf.causal().block_map(8, 8),
        np.ones((8, 8), dtype=bool),
        [[True] * 8] * 8,
        True,
        0.125,
    ],
    ids=lambda value: type(value).__name__,
)
def test_masks_of_other_libraries_are_answered_by_what_to_write_here(value):
    answer = next(MASKS[kind.__name__] for kind in type(value).__mro__ if kind.__name__ in MASKS)
    for call in (lambda: mf.attention(Q, K, V, value), lambda: mf.compile(value), lambda: mf.mask(value)):
        with pytest.raises(mf.ArgumentTypeError, match=re.escape(f"; write {answer}")):
            call()


@pytest.mark.parametrize(("name", "of"), [("dropout_p", "compile"), ("seed", "compile"), ("score", "attn")])
def test_our_own_names_are_answered_where_they_don_t_belong(name, of):
    calls = {
        "compile": lambda **given: mf.compile(mf.causal(), **given),
        "attn": partial(mf.compile(mf.causal()), Q, K, V),
    }
    with pytest.raises(mf.ArgumentTypeError, match=re.escape(f"unexpected argument {name!r}; {PEERS[name]}")):
        calls[of](**{name: 1})


def test_a_score_function_is_recognised():
    def alibi(score, b, h, q_idx, kv_idx):
        return score + kv_idx - q_idx

    with pytest.raises(mf.ArgumentError, match=r"^alibi: .* A score function is given as `score=`"):
        mf.compile(alibi)


# By position


STARTS = torch.tensor([0, 3, 8])
PACKED = [x[0].transpose(0, 1) for x in (Q, K, V)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: mf.compile(packed)(Q, K, V, IDS),
            "attention: got 4 arguments by position, expected q, k and v; .*doc=",
        ),
        (lambda: mf.compile(mf.causal())(Q, K, V, 0, 0), "attention: got 5 .*, expected q, k and v; .* q_offset="),
        (lambda: mf.attention(Q, K, V, packed, IDS), "attention: got 5 .*, expected q, k, v and mask; .* doc="),
        (lambda: mf.attention(Q, K, V, None, 0.125), "attention: got 5 .*, expected q, k, v and mask; .* scale="),
        (lambda: mf.compile(mf.causal(), mf.scores.alibi()), "compile: got 2 .*, expected mask; .* score="),
        (
            lambda: mf.varlen_attention(*PACKED, None, STARTS, STARTS, 5, 5),
            "varlen_attention: got 8 .*, expected q, k, v, mask, cu_seqlens_q and cu_seqlens_k; .* q_offset=",
        ),
        (
            lambda: mf.compile(packed).varlen(*PACKED, STARTS, STARTS, IDS),
            "Attention.varlen: got 6 .*, expected q, k, v, cu_seqlens_q and cu_seqlens_k; .* doc=",
        ),
        (
            lambda: mf.parallel.compile(packed, mf.parallel.plan(packed, 8, 1, doc=IDS))(Q, K, V, IDS),
            "parallel attention: got 4 .*, expected q, k and v; .* doc=",
        ),
    ],
)
def test_what_goes_by_name_is_told_so_by_position(call, said):
    with pytest.raises(mf.ArgumentTypeError, match=f"^{said}"):
        call()
