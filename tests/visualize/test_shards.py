"""Pictures of plans: rows and strips have the colour of the rank that holds them, bars are what the plan says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.visualize.style import COLOURS

pytest.importorskip("matplotlib", reason="an extra: pip install 'maskflash[plot]'")

from matplotlib import colormaps
from matplotlib.colors import to_rgb

PACKED = mf.causal() & mf.document([100, 150, 50])
SHARDS = (((0, 32), (256, 300)), ((32, 160),), (), ((160, 256),))
BY_HEAD = mf.mask(lambda b, h, q, kv: q >= kv + h)
LIGHT = to_rgb(COLOURS[0])


def plan_of(mask, tokens=300, shards=SHARDS, **sizes):
    return mf.parallel.plan(mask, tokens, len(shards), chunk=32, shards=shards, **sizes)


def image(ax):
    """(rows, columns, 3) of what is drawn, from 0 to 1."""
    (drawn,) = ax.images
    found = np.asarray(drawn.get_array())
    return found[..., :3] / (255 if found.dtype == np.uint8 else 1)


def colour(rank, ranks):
    return colormaps["viridis"](np.linspace(0.05, 0.9, ranks))[rank][:3]


def near(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max(-1) < 0.01


def test_visible_pairs_have_the_colour_of_who_holds_their_row():
    made = mf.visualize.draw_shards(plan_of(PACKED), PACKED)
    drawn, dense = image(made.axes[0]), PACKED.dense(300, 300)[0, 0].numpy()
    assert drawn.shape == (300, 300, 3)
    for rank, ranges in enumerate(SHARDS):
        for start, stop in ranges:
            assert near(drawn[start:stop][dense[start:stop]], colour(rank, 4)).all()
    assert near(drawn[~dense], LIGHT).all()


def test_strips_are_the_shards():
    made = mf.visualize.draw_shards(plan_of(PACKED), PACKED)
    right, below = made.axes[0].child_axes
    for ax in (right, below):
        (drawn,) = ax.images
        for rank, start, stop in ((0, 0, 32), (1, 32, 160), (3, 160, 256), (0, 256, 300)):
            for token in (start + 0.5, stop - 0.5):
                where = (0.5, token) if ax is right else (token, 0.5)
                there = np.asarray(drawn.get_cursor_data(SimpleNamespace(xdata=where[0], ydata=where[1])))
                assert near(there[:3], colour(rank, 4)), (token, rank)
    assert right.get_ylim() == (300, 0) and below.get_xlim() == (0, 300)


def test_bars_are_work_over_the_mean_and_bytes_of_both_passes():
    plan = plan_of(PACKED, heads=4, kv_heads=2)
    _, work, moved = mf.visualize.draw_shards(plan, PACKED).axes
    mean = sum(plan.work) / 4
    assert [bar.get_width() for bar in work.patches] == pytest.approx([x / mean for x in plan.work])
    forward, backward = plan.forward.received, plan.backward.received
    assert [bar.get_width() * 2**20 for bar in moved.patches] == pytest.approx([*forward, *backward])
    assert [bar.get_x() * 2**20 for bar in moved.patches] == pytest.approx([0] * 4 + [*forward])
    assert sum(forward) > 0 and work.get_title() == "work over the mean"


def test_long_sequences_are_drawn_in_cells_and_part_is_paler():
    mask = mf.causal() & mf.document([1200, 800, 2000])
    plan = mf.parallel.plan(mask, 4000, 8, links="infiniband")
    drawn = image(mf.visualize.draw_shards(plan, mask).axes[0])
    assert drawn.shape == (500, 500, 3)  # 8 tokens a side
    held = np.empty(4000, dtype=int)
    for rank in range(8):
        held[plan.positions(rank).numpy()] = rank
    cells = mask.dense(4000, 4000)[0, 0].reshape(500, 8, 500, 8).float().mean((1, 3)).numpy()
    own = np.array([colour(held[8 * row], 8) for row in range(500)])[:, None].repeat(500, 1)
    assert near(drawn[cells == 1], own[cells == 1]).all()
    part = (cells > 0) & (cells < 1)
    assert part.any() and near(drawn[part], (own[part] + 1) / 2).all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_and_one_rank(tokens):
    made = mf.visualize.draw_shards(mf.parallel.plan(mf.causal(), tokens, 1), mf.causal())
    assert [bar.get_width() for bar in made.axes[1].patches] == [1]
    empty = plan_of(~mf.full(), tokens, ((), ((0, tokens),), ()))
    assert [bar.get_width() for bar in mf.visualize.draw_shards(empty, ~mf.full()).axes[1].patches] == [0, 0, 0]


def test_a_mask_gets_its_arguments_and_the_plans_heads():
    shift = mf.mask(lambda b, h, q, kv, *, far: q - kv == far[b, h])
    far = torch.tensor([[0, 7]])
    plan = plan_of(shift, heads=2, far=far)
    drawn = image(mf.visualize.draw_shards(plan, shift, head=1, far=far).axes[0])
    assert not near(drawn[np.arange(7, 300), np.arange(293)], LIGHT).any()
    assert near(drawn[np.arange(300), np.arange(300)], LIGHT).all()


def test_what_cannot_be_drawn_says_so():
    plan = plan_of(PACKED)
    with pytest.raises(ArgumentTypeError, match=r"draw_shards: plan is .*mf.parallel.plan"):
        mf.visualize.draw_shards(PACKED, plan)
    with pytest.raises(ArgumentTypeError, match=r"draw_shards: mask is .*mf.mask"):
        mf.visualize.draw_shards(plan, 3)
    with pytest.raises(ArgumentError, match="head is 2, expected less"):
        mf.visualize.draw_shards(plan_of(BY_HEAD), BY_HEAD, head=2, heads=2)
