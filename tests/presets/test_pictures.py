"""Every preset looks like the picture in its docstring, and can be had from where users look for it."""

import re

import pytest
import torch

import maskflash as mf
from maskflash.presets import basic, blocks, grids, packed, sparse, trees

PICTURED = {
    "full": mf.full(),
    "causal": mf.causal(),
    "sliding_window": mf.sliding_window(2, 1),
    "document": mf.document([3, 1, 2]),
    "prefix_lm": mf.prefix_lm(3),
    "padding": mf.padding([4]),
    "global_tokens": mf.global_tokens(1),
    "dilated_window": mf.dilated_window(2, 2),
    "natten": mf.natten(3, 3, 2, 2),
    "share_question": mf.presets.share_question([(2, [1, 1]), (1, [1])]),
    "causal_document": mf.causal_document([2, 3], kv_lengths=[5, 4]),
    "causal_blockwise": mf.presets.causal_blockwise([2, 2, 2]),
    "prefix_lm_document": mf.presets.prefix_lm_document([4, 2], [2, 1]),
    "qk_sparse": mf.presets.qk_sparse([(1, 2), (4, 2)]),
    "tree": mf.presets.tree([-1, 0, 0, 1, 2, 2]),
    "chunked": mf.presets.chunked(4),
    "image_blocks": mf.presets.image_blocks([(1, 3)]),
    "block_diffusion": mf.presets.block_diffusion(4, 2),
    "neighborhood": mf.presets.neighborhood(8, 2, dilation=2),
    "sliding_tiles": mf.presets.sliding_tiles((4, 2), cube=(1, 2), kernel_size=(2, 1)),
    "random_eviction": mf.presets.random_eviction([4, 6, 3, 6, 6, 6]),
}
PRESETS = [*basic.__all__, *blocks.__all__, *grids.__all__, *packed.__all__, *sparse.__all__, *trees.__all__]


def drawn(name):
    rows = re.findall(r"^ +((?:[■·] ?)+)", getattr(mf.presets, name).__doc__, re.MULTILINE)
    return torch.tensor([[cell == "■" for cell in row.split()] for row in rows])


@pytest.mark.parametrize("name", PRESETS)
def test_the_picture_is_the_mask(name):
    assert torch.equal(PICTURED[name].dense(*drawn(name).shape)[0, 0], drawn(name))


def test_presets_are_public():
    assert set(PRESETS) <= set(mf.presets.__all__)
    assert all(getattr(mf, name) is getattr(mf.presets, name) for name in basic.__all__)
    assert [name for name in mf.presets.__all__ if not hasattr(mf.presets, name)] == []
