"""The tools for testing can fail: a wrong tile, result or gradient is found, and the strategies reach far."""

import pytest
import torch
from hypothesis import find

import maskflash as mf
from maskflash.analysis.block_map import BlockMap
from maskflash.backends.cpu import run as cpu
from maskflash.scores.strength import Gradients
from maskflash.testing import Shape, assert_matches_dense, masks, shapes

MASK, SHAPE = mf.causal() & mf.document([70, 50]), Shape(2, 4, 2, 128, 128, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_right_passes(dtype):
    assert_matches_dense(MASK, SHAPE, dtype=dtype, block_size=32)


@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_is_named(monkeypatch, name, dtype):
    honest = cpu.forward

    def wrong(*args):
        results = list(honest(*args))
        results[name == "lse"][0, 1, 17] *= 1 + 50 * torch.finfo(dtype).eps
        return tuple(results)

    monkeypatch.setattr(cpu, "forward", wrong)
    with pytest.raises(AssertionError, match=f"{name}: error .* exceeds its budget"):
        assert_matches_dense(MASK, SHAPE, dtype=dtype, block_size=32)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_wrong_gradient_is_named(monkeypatch, place):
    honest = cpu.backward

    def wrong(*args):
        gradients = list(honest(*args))
        gradients[place][1, 0, 3] *= 1.0001
        return Gradients(*gradients)

    monkeypatch.setattr(cpu, "backward", wrong)
    with pytest.raises(AssertionError, match=f"d{'qkv'[place]}: error .* exceeds its budget"):
        assert_matches_dense(MASK, SHAPE, block_size=32)


def test_a_wrong_tile_is_named(monkeypatch):
    honest = BlockMap.kinds

    def wrong(self):
        kinds = honest(self)
        kinds[0, 0, 1, 0] = 1
        return kinds

    monkeypatch.setattr(BlockMap, "kinds", wrong)
    with pytest.raises(AssertionError, match=r"tile \(1, 0\) of batch row 0, head 0 is partial, expected full"):
        assert_matches_dense(MASK, SHAPE, block_size=32)


def test_a_row_that_sees_nothing_is_checked(monkeypatch):
    honest = cpu.forward

    def wrong(*args):
        out, lse = honest(*args)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    monkeypatch.setattr(cpu, "forward", wrong)
    with pytest.raises(AssertionError, match="lse: rows that see nothing"):
        assert_matches_dense(MASK, SHAPE, block_size=32)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda mask: "b" in mask.traced({}).expr.reads and "h" in mask.traced({}).expr.reads,
        lambda mask: len(mask.traced({}).tables) > 1,
        lambda mask: mask.name.startswith("~"),
        lambda mask: not mask.dense(8, 8).any(),
        lambda mask: mask.dense(8, 8).all(),
    ],
)
def test_masks_reach_far(wanted):
    find(masks(), wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda shape: shape.q_len == 0 < shape.kv_len,
        lambda shape: shape.kv_len == 0 < shape.q_len,
        lambda shape: 1 < shape.kv_heads < shape.heads,
        lambda shape: shape.head_dim < shape.v_head_dim,
    ],
)
def test_shapes_reach_far(wanted):
    find(shapes(), wanted)
