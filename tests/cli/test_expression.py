"""The text of a mask means the mask it says, and nothing else is understood; errors point at their place."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import maskflash as mf
from maskflash import presets
from maskflash.cli.expression import PRESETS, MaskSyntaxError, parse

N = 24


def same(a, b, n=N):
    return torch.equal(a.dense(n, n, batch=2), b.dense(n, n, batch=2))


@pytest.mark.parametrize(
    ("text", "mask", "tokens"),
    [
        ("causal", mf.causal(), None),
        ("full()", mf.full(), None),
        ("causal & document(10, 9, 5)", mf.causal() & mf.document([10, 9, 5]), 24),
        ("document([10, 9, 5])", mf.document([10, 9, 5]), 24),
        ("document(lengths=(10, 9, 5))", mf.document([10, 9, 5]), 24),
        ("document(24)", mf.document([24]), 24),
        ("document([[10, 14], [20, 4]])", mf.document([[10, 14], [20, 4]]), 24),
        ("document(cu_seqlens=[0, 4, 24])", mf.document([4, 20]), 24),
        ("document(ids=[0, 1] * 12)", mf.document(ids=torch.arange(24) % 2), 24),
        ("document([6] * 4)", mf.document([6, 6, 6, 6]), 24),
        ("sliding_window(3, right=2)", mf.sliding_window(3, 2), None),
        ("padding(7)", mf.padding(7), None),
        ("padding(7, 20)", mf.padding([7, 20]), None),
        ("natten(4, 6, kernel_h=3, kernel_w=3)", mf.natten(4, 6, 3, 3), 24),
        ("natten(height=4, width=6, kernel_h=3, kernel_w=3)", mf.natten(4, 6, 3, 3), 24),
        ("causal_blockwise(8, 8, 8)", presets.causal_blockwise([8, 8, 8]), 24),
        ("prefix_lm_document([10, 14], prefixes=[2, 3])", presets.prefix_lm_document([10, 14], [2, 3]), 24),
        ("share_question([(4, [5, 6]), (3, [6])])", presets.share_question([(4, [5, 6]), (3, [6])]), 24),
        ("tree([-1, 0] * 12)", presets.tree([-1, 0] * 12), 24),
        ("qk_sparse([(1, 4), (8, 6)])", presets.qk_sparse([(1, 4), (8, 6)]), None),
        (f"random_eviction({list(range(1, 25))})", presets.random_eviction(list(range(1, 25))), 24),
        ("paper('share_question', 24, seed=3)", presets.paper("share_question", 24, 3).predicate, 24),
        ("~causal", ~mf.causal(), None),
        ("  causal\n & full ", mf.causal(), None),
        ("document(3, 5) | document(24)", mf.document([24]), 24),
        # Python's precedence: ~ before & before ^ before |
        (
            "~causal & prefix_lm(5) ^ padding(9) | global_tokens(2)",
            ((~mf.causal() & mf.prefix_lm(5)) ^ mf.padding(9)) | mf.global_tokens(2),
            None,
        ),
        (
            "~(causal & (prefix_lm(5) ^ padding(9)))",
            ~(mf.causal() & (mf.prefix_lm(5) ^ mf.padding(9))),
            None,
        ),
    ],
)
def test_a_text_is_the_mask_it_says(text, mask, tokens):
    written = parse(text)
    assert same(written.mask, mask)
    assert written.tokens == tokens


def test_every_preset_has_a_text():
    missing = {*presets.__all__} - {*PRESETS} - {"PAPER", "PaperMask", "vectors"}
    assert missing == set()


LEAVES = st.sampled_from(["causal", "full()", "sliding_window(2, 3)", "prefix_lm(5)", "document(7, 17)", "padding(11)"])
TEXTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("&|^"), inner),
        st.builds("~{}".format, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=40)
@given(TEXTS)
def test_any_combination_means_what_python_would_say(text):
    # These texts are made here, of these names alone: only a test may evaluate one.
    names = {name: getattr(mf, name) for name in ("full", "sliding_window", "prefix_lm", "padding")}
    truth = eval(text, names | {"causal": mf.causal(), "document": lambda *lengths: mf.document(list(lengths))})
    assert same(parse(text).mask, truth)


@pytest.mark.parametrize(
    ("text", "pointed", "said"),
    [
        ("causal & documents(300)", "documents", "did you mean document?"),
        ("causal & nothing_like_it", "nothing_like_it", "there are block_diffusion, causal, causal_blockwise"),
        ("causal and full", "causal and full", "not by and, or, not"),
        ("full & (not causal)", "not causal", "not by and, or, not"),
        ("causal & 3", "3", "expected a mask"),
        ("causal + full", "causal + full", "expected a mask"),
        ("causal & document(causal)", "causal", "expected a number, a list or text, got causal"),
        ("sliding_window(2 + 2)", "2 + 2", "expected a number"),
        ("causal & sliding_window()", "sliding_window()", "left"),
        ("causal & sliding_window(-1)", "sliding_window(-1)", "left is -1, expected at least 0"),
        ("sliding_window(1.5)", "sliding_window(1.5)", "left is 1.5, expected an int"),
        ("full & document()", "document()", "expected exactly one of lengths"),
        ("full & natten(2, 2, 3, 3)", "natten(2, 2, 3, 3)", "at most the image's"),
        ("causal & causal(1)", "causal(1)", "causal() takes 0 positional arguments"),
        ("paper('nobody', 64)", "paper('nobody', 64)", "expected one of full, causal"),
        ("paper('full')", "paper('full')", "paper() missing"),
        ("document(**causal)", "causal", "** is not understood"),
        ("document(*[3])", "*[3]", "expected a number"),
        ("document([1] * 99999999)", "[1] * 99999999", "expected at most"),
        ("causal & ", "", "can't be read"),
        ("", "", "can't be read"),
        ("causal) & (full", ")", "unmatched"),
        ("causal & document(3", "(3", "never closed"),
        ("document(2000000000)", "2000000000", "this number is too large, expected at most 16,777,216"),
        (
            "document([9999999] * 9999)",
            "document([9999999] * 9999)",
            "this speaks of 99,989,990,001 tokens, expected at",
        ),
        ("natten(9999, 9999, 3, 3)", "natten(9999, 9999, 3, 3)", "this speaks of 99,980,001 tokens"),
        ("document('é') & documents(1)", "document('é')", "lengths"),
        ("paper('é', 3) if causal else full", "paper('é', 3) if causal else full", "expected a mask"),
    ],
)
def test_errors_point_at_their_place(text, pointed, said):
    with pytest.raises(MaskSyntaxError) as caught:
        parse(text)
    first, line, pointer = str(caught.value).split("\n")
    assert said in first
    start = pointer.index("^")
    assert first.startswith(f"column {start - 1}: ")
    if pointed and "never closed" not in said:
        assert line[start : start + pointer.count("^")] == pointed


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "causal.__class__",
        "causal().mask",
        "(lambda: causal)()",
        "[causal for _ in full]",
        "causal if full else full",
        "(x := causal)",
        "f'{causal}'",
        "document(f'{1}')",
        "document(len([1]))",
        "document([1][0])",
        "document(2 ** 9999999)",
        "document({1: 2})",
        "PRESETS['causal']",
        "mf.causal",
        "import os",
        "causal; full",
        "causal\0",
        "...",
        "b'causal'",
    ],
)
def test_nothing_else_is_understood(text):
    with pytest.raises(MaskSyntaxError):
        parse(text)


@pytest.mark.parametrize(
    "text", ["~" * 20000 + "causal", "(" * 20000 + "causal" + ")" * 20000, "causal" + " & full" * 5000]
)
def test_what_is_nested_too_deeply_is_an_error(text):
    with pytest.raises(MaskSyntaxError):
        parse(text)


def test_bytes_and_characters_are_told_apart():
    with pytest.raises(MaskSyntaxError) as caught:
        parse("paper('ééé', 64) & nobody")
    # The first operand is read first, and is wrong too: its name is no paper's.
    assert "column 1:" in str(caught.value)
    with pytest.raises(MaskSyntaxError) as caught:
        parse("document('é', nobody)")
    _, line, pointer = str(caught.value).split("\n")
    assert line[pointer.index("^") : pointer.rindex("^") + 1] == "nobody"
