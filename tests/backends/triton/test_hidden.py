"""Which rows and columns nobody sees, against brute force; and that what they hold reaches nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis.classify import classify
from maskflash.backends.triton import walks as triton_work
from maskflash.backends.triton.walks import seen
from maskflash.testing import Shape, masks


@pytest.mark.parametrize("many", [0, 1 << 19])
@settings(max_examples=100)
@given(masks(), st.integers(1, 64), st.integers(1, 64), st.sampled_from([(16, 16), (16, 32), (32, 16)]))
def test_seen_is_brute_force_over_visited_tiles(many, mask, q_len, kv_len, block_size):
    dense = mask.dense(q_len, kv_len, batch=2, heads=4)
    problem = mask.at(q_len, kv_len, batch=2, heads=4).tiled(block_size)
    analysed = classify(problem)
    block_map = analysed.block_map
    visited = (block_map.kinds() != 0).repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)
    visited = visited[:, :, :q_len, :kv_len]
    dense = dense[: visited.shape[0], : visited.shape[1]]
    for rows, across in ((True, 3), (False, 2)):
        expected = dense.any(across) | ~visited.any(across)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_work, "_MANY_PAIRS", many)
            found = seen(analysed, rows=rows)
        assert expected.all() if found is None else torch.equal(found, expected)


@pytest.mark.parametrize("group", [1, 2])
def test_what_hidden_tokens_hold_reaches_nothing(group):
    mask = mf.causal() & mf.document([70, 30])  # of 130: the last 30 see nothing and are seen by nobody
    tensors = [x.detach() for x in Shape(1, 2, 2 // group, 130, 130, 16, 16).tensors(torch.float32)]
    hidden = torch.arange(130) >= 100

    def results(fill):
        inputs = [torch.where(hidden[:, None], fill, x).requires_grad_() for x in tensors]
        out, lse = mf.attention(*inputs, mask, backend="triton", return_lse=True)
        dout, dlse = torch.where(hidden[:, None], fill, torch.ones_like(out)), torch.where(hidden, fill, 1.0)
        return out, lse, *torch.autograd.grad((out, lse), inputs, (dout, dlse.expand_as(lse)))

    for clean, dirty in zip(results(0.0), results(float("nan")), strict=True):
        assert torch.equal(clean, dirty)
