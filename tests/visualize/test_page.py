"""The explorer's file holds the map, exactly and alone, whatever a mask is called, in a few kilobytes."""

import base64
import json
import re
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash import visualize
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.testing import masks
from maskflash.visualize.page import pack
from maskflash.visualize.style import COLOURS

MAX = 40
MILLION = 1 << 20
PACKED = mf.causal() & mf.document([300, 500, 224])
FEW = mf.causal() & mf.document([20, 30, 14])


def unpack(text):
    """The numbers of a packed text, as a page's script finds them."""
    differences = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4")
    return differences.cumsum(dtype=np.int32)


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_packed_numbers_come_back(numbers):
    assert unpack(pack(numbers)).tolist() == numbers


@settings(max_examples=40)
@given(masks(MAX), st.integers(0, MAX), st.integers(0, MAX), st.integers(1, 12))
def test_the_page_holds_the_runs_of_the_map(mask, q_len, kv_len, block):
    block_map = mask.block_map(q_len, kv_len, batch=2, heads=4, block_size=(block, block + 1))
    page = visualize.explorer(mask, q_len, kv_len, batch=2, heads=4, block_size=(block, block + 1))
    data = data_of(page)
    for name, text in data["runs"].items():
        assert unpack(text).tolist() == getattr(block_map.rows, name).tolist(), name
    assert (data["q_len"], data["kv_len"], tuple(data["shape"])) == (q_len, kv_len, block_map.shape)
    assert sum(data["decided"].values()) == sum(block_map.counts.values())
    alone = data_of(visualize.explorer(block_map))
    assert alone["runs"] == data["runs"]
    assert (alone["decided"], alone["documents"], alone["vectors"]) == (None, [], None)


def test_a_million_tokens_are_small():
    mask = mf.causal() & mf.document([4096] * 100 + [1000] * 600 + [MILLION - 4096 * 100 - 600_000])
    vectors = mf.causal() & mf.sliding_window(4096)
    for shown in (mask, vectors, vectors.to_flashmask(MILLION, MILLION)):
        assert len(visualize.explorer(shown, MILLION, MILLION).encode()) < 1 << 20  # a megabyte; five are allowed


def test_nothing_is_named_that_could_be_fetched():
    page = visualize.explorer(PACKED, 1024, 1024)
    assert re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"'> ]*)""", page) == ["data:,"]
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|importScripts", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a\"b'&amp;<!--"]
)
def test_names_are_text(name):
    page = visualize.explorer(FEW, 64, 64, title=name)
    before = visualize.explorer(FEW, 64, 64, title="x")
    for tag in ("<script", "</script", "<img", "<!--"):
        assert page.count(tag) == before.count(tag), tag
    table = {name: torch.arange(64)}
    named = mf.mask(lambda b, h, q, kv: table[name][q] == table[name][kv])
    assert "</script><script>" not in visualize.explorer(named, 64, 64)


def test_the_colours_are_those_of_the_pictures():
    data = data_of(visualize.explorer(FEW, 64, 64))
    assert data["colours"]["kinds"] == [COLOURS[kind] for kind in (0, 1, 2)]


def test_it_is_written_where_it_should_be(tmp_path):
    path = tmp_path / "page.html"
    page = visualize.explorer(PACKED, 1024, 1024, path=path, title="größer")
    assert path.read_text(encoding="utf-8") == page
    assert "größer" in page


def test_matplotlib_is_not_needed(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "4 full, 18 partial, 42 skip" in visualize.explorer(PACKED, 1024, 1024)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: visualize.explorer(PACKED), ArgumentError, "is a mask, so q_len and kv_len are needed"),
        (lambda: visualize.explorer(PACKED, 8), ArgumentError, "is a mask, so q_len and kv_len are needed"),
        (lambda: visualize.explorer(3), ArgumentTypeError, "got a int, expected a Mask or a BlockMap"),
        (lambda: visualize.explorer(PACKED, -1, 8), ArgumentError, "explorer: q_len is -1, expected at least 0"),
        (lambda: visualize.explorer(PACKED, 8, 8, block_size=0), ArgumentError, "explorer: block_size is 0"),
        (lambda: visualize.explorer(FEW, 64, 64, path="/nowhere/at/all.html"), ArgumentError, "choose another"),
    ],
)
def test_what_cannot_be_explored_is_an_error(call, kind, said):
    with pytest.raises(kind) as caught:
        call()
    assert said in str(caught.value)
