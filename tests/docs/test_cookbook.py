"""Every recipe of docs/cookbook.md shows the pairs that a formula in plain torch does, and runs as dense attention."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from maskflash import presets
from maskflash.testing import Shape, assert_matches_dense

PAGE = (Path(__file__).parents[2] / "docs" / "cookbook.md").read_text(encoding="utf-8")


def by_token(values, lengths):
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(lengths))


def blocks(*lengths):
    """True inside each of the squares along the diagonal."""
    return torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()


def image(token, width):
    return torch.stack((token // width, token % width), -1)


def neighbours(q, kv, height, width, kernel):
    corner = (image(q, width) - kernel // 2).clamp(min=0)
    corner = torch.minimum(corner, torch.tensor([height, width]) - kernel)
    return ((image(kv, width) >= corner) & (image(kv, width) < corner + kernel)).all(-1)


def ancestors(cached, parents):
    """Row by row, what a tree of drafts behind a cache sees."""
    rows = torch.zeros(len(parents), cached + len(parents), dtype=torch.bool)
    rows[:, :cached] = True
    for row, parent in enumerate(parents):
        if parent >= 0:
            rows[row, cached:] = rows[parent, cached:]
        rows[row, cached + row] = True
    return rows


def table(values):
    """A formula that reads what it has as rows and columns."""
    return lambda b, h, q, kv: values[q, kv]


def varlen(b, h, q, kv):
    first, keys = q < 10, kv < 40
    last = torch.where(first, q + 30, q + 32)  # the key at which each query is
    return (first == keys) & (kv <= last)


def shared_questions(b, h, q, kv):
    part = by_token([0, 1, 2, 3, 4, 5], [12, 10, 8, 6, 16, 12])
    question = by_token([0, 0, 0, 0, 4, 4], [12, 10, 8, 6, 16, 12])  # of the document that the part belongs to
    return (q >= kv) & ((part[q] == part[kv]) | (part[kv] == question[q]))


def documents_with_prefixes(b, h, q, kv):
    prefix = by_token([1, 0, 1, 0], [8, 16, 24, 16]).bool()
    return blocks(24, 40)[q, kv] & ((q >= kv) | prefix[kv])


def left_out(b, h, q, kv):
    dropped = by_token([0, 1, 0, 2, 0], [10, 12, 18, 16, 8])
    return (q >= kv) & ((dropped[q] == 0) | (dropped[q] != dropped[kv]))


def windows_and_sinks(b, h, q, kv):
    sinks = by_token([1, 0, 1, 0], [2, 38, 2, 22]).bool()
    return (q >= kv) & blocks(40, 24)[q, kv] & ((q - kv <= 8) | sinks[kv])


def turns(b, h, q, kv):
    thought = by_token([0, 1, 0] * 3 + [0], [8, 6, 6] * 3 + [4]).bool()
    return (q >= kv) & (blocks(20, 20, 20, 4)[q, kv] | ~thought[kv])


def chosen_blocks(b, h, q, kv):
    chosen = torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) < 0.15
    grid = chosen | (torch.arange(8)[:, None] - torch.arange(8)).abs().le(1)
    grid[0], grid[:, 0] = True, True
    return grid.repeat_interleave(8, 0).repeat_interleave(8, 1)[q, kv]


def images():
    """Which pairs are in one of the two images."""
    return torch.block_diag(*[torch.full((n, n), n == 16) for n in (10, 16, 12, 16, 10)]).bool()


def images_in_text(b, h, q, kv):
    return (q >= kv) | images()[q, kv]


def images_under_a_window(b, h, q, kv):
    return ((q >= kv) & (q - kv < 8)) | images()[q, kv]


def modalities(b, h, q, kv):
    kind = by_token([0, 1, 2, 0], [16, 20, 12, 16])
    return (kind[q] == 0) | (kind[q] == kind[kv]) | ((kind[q] == 1) & (kind[kv] == 0))


def causal_video(b, h, q, kv):
    place = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))
    frames = place[q, 0] - place[kv, 0]
    corner = (place[q, 1:] - 1).clamp(0, 1)
    return (frames >= 0) & (frames < 2) & ((place[kv, 1:] >= corner) & (place[kv, 1:] < corner + 3)).all(-1)


def cubes(b, h, q, kv):
    """Eight cubes of eight tokens; along the second axis all are near, along the others none but itself."""
    place = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2))
    return (place[q // 8] == place[kv // 8])[..., [0, 2]].all(-1)


def shifted_windows(b, h, q, kv):
    along = by_token([0, 1, 2], [2, 4, 2])
    return (along[image(q, 8)] == along[image(kv, 8)]).all(-1)


def block_diffusion(b, h, q, kv):
    inside = blocks(8, 8, 8, 8)
    before = torch.ones(4, 4).tril(-1).repeat_interleave(8, 0).repeat_interleave(8, 1).bool()
    noisy, clean = torch.cat((inside, before), 1), torch.cat((torch.zeros_like(inside), before | inside), 1)
    return torch.cat((noisy, clean))[q, kv]


FORMULAS = {
    "full": lambda b, h, q, kv: torch.ones_like(q + kv).bool(),
    "causal": lambda b, h, q, kv: q >= kv,
    "sliding_window": lambda b, h, q, kv: (q - kv <= 12) & (kv - q <= 4),
    "document": table(blocks(20, 30, 14)),
    "causal_document": varlen,
    "prefix_lm": lambda b, h, q, kv: (kv < 20) | (q >= kv),
    "padding": lambda b, h, q, kv: kv < torch.tensor([40, 64])[b],
    "global_tokens": lambda b, h, q, kv: (q < 4) | (kv < 4) | ((q - kv).abs() <= 8),
    "dilated_window": lambda b, h, q, kv: ((q - kv).abs() <= 12) & (q % 4 == kv % 4),
    "natten": lambda b, h, q, kv: neighbours(q, kv, 8, 8, 3),
    "neighborhood": causal_video,
    "sliding_tiles": cubes,
    "chunked": table(blocks(16, 16, 16, 16).tril()),
    "image_blocks": images_in_text,
    "block_diffusion": block_diffusion,
    "share_question": shared_questions,
    "causal_blockwise": lambda b, h, q, kv: (q >= kv) & (blocks(16, 20, 12, 16)[q, kv] | (q >= 48)),
    "prefix_lm_document": documents_with_prefixes,
    "qk_sparse": left_out,
    "random_eviction": lambda b, h, q, kv: (q >= kv) & ((q < 40) | (kv % 3 != 1)),
    "tree": lambda b, h, q, kv: ancestors(24, [-1, 0, 1, 2, 1, 0, 5, 5])[q - 24, kv],
    "Packed documents, new at each call": lambda b, h, q, kv: (q >= kv) & blocks(20, 30, 14)[q, kv],
    "Packed documents with a prefix each": documents_with_prefixes,
    "Documents with windows and sinks": windows_and_sinks,
    "Packed cross-attention": lambda b, h, q, kv: (q < 10) == (kv < 40),
    "Padding on the left": lambda b, h, q, kv: (q >= kv) & (kv >= torch.tensor([24, 0])[b]),
    "Turns that forget": turns,
    "Strided": lambda b, h, q, kv: (q >= kv) & ((q - kv < 8) | ((kv + 1) % 8 == 0)),
    "Blocks from a table": chosen_blocks,
    "Summary tokens": lambda b, h, q, kv: (q >= kv) & (blocks(16, 16, 16, 16)[q, kv] | (kv % 16 == 15)),
    "A window for each head": lambda b, h, q, kv: (q >= kv) & (q - kv <= torch.tensor([4, 12, 24, 64])[h]),
    "Local and global heads by turns": lambda b, h, q, kv: (q >= kv) & ((q - kv <= 8) | (h == 1)),
    "New tokens behind a cache": lambda b, h, q, kv: (q >= kv) & (q - kv <= 40),
    "Images under a window, whole": images_under_a_window,
    "Modalities that see only some others": modalities,
    "Frames of a video, causally": lambda b, h, q, kv: torch.ones(8, 8).tril().triu(-3).bool()[q // 8, kv // 8],
    "An image with registers": lambda b, h, q, kv: (q >= 56) | (kv >= 56) | neighbours(q, kv, 8, 7, 3),
    "Shifted windows": shifted_windows,
}


class Recipe(NamedTuple):
    """What a recipe's mask is where the page shows it: further down the page its names are other things."""

    sizes: tuple[int, int]
    options: dict
    dense: torch.Tensor
    wrong: AssertionError | None  # of what attention under it gives


@pytest.fixture(scope="module")
def recipes(hooks):
    """Heading -> recipe, with lengths and options as the page gives them to its pictures."""
    made = hooks.shown_in(PAGE, "cookbook.md", {"picture": lambda mask, *sizes, **options: (mask, sizes, options)})
    headings = [
        re.findall(r"^### (.*)$", text, re.MULTILINE)[-1] for text in hooks.SHOWN.split(PAGE)[:-1:2]
    ]  # a picture belongs to the heading above it
    return {
        heading: Recipe(sizes, options, mask.dense(*sizes, **options), attended(mask, *sizes, **options))
        for heading, (mask, sizes, options) in zip(headings, made, strict=True)
    }


def attended(mask, q_len, kv_len, **arguments):
    shape = Shape(arguments.pop("batch", 1), heads=arguments.pop("heads", 1), q_len=q_len, kv_len=kv_len)
    try:
        assert_matches_dense(mask, shape, block_size=8, **arguments)
    except AssertionError as wrong:
        return wrong
    return None


def test_every_recipe_has_a_formula_and_a_picture(recipes):
    assert list(recipes) == list(FORMULAS) == re.findall(r"^### (.*)$", PAGE, re.MULTILINE)


def test_every_preset_is_there():
    named = [name for name in presets.__all__ if name not in ("PAPER", "PaperMask", "paper", "vectors")]
    assert set(named) <= set(FORMULAS)


@pytest.mark.parametrize("heading", FORMULAS)
def test_a_recipe_is_its_formula(heading, recipes):
    (q_len, kv_len), options, dense, _ = recipes[heading]
    sizes = {"batch": options.get("batch", 1), "heads": options.get("heads", 1)}
    b, h, q, kv = torch.meshgrid(*[torch.arange(n) for n in (*sizes.values(), q_len, kv_len)], indexing="ij")
    expected = FORMULAS[heading](b, h, q + options.get("q_offset", 0), kv)
    assert torch.equal(dense, expected)
    assert 0 < expected.sum() < expected.numel() or heading == "full"


@pytest.mark.parametrize("heading", FORMULAS)
def test_a_recipe_attends_as_dense_attention(heading, recipes):
    if recipes[heading].wrong is not None:
        raise recipes[heading].wrong
