"""Masks -> the sizes of their forms: what an engine has to read of FlashMask's twelve masks, and of prefix trees."""

import torch

import maskflash as mf


def prefix_tree(children, own):
    """A tree's mask and its tokens: nodes of `own` tokens, depth first; a token sees what leads to it, itself included.

    children[n] is how many nodes are below each of level n.
    """
    last = []

    def grow(level):
        first = len(last)
        last.extend([0] * own)
        for _ in range(children[level] if level < len(children) else 0):
            grow(level + 1)
        last[first : first + own] = [len(last) - 1] * own

    grow(0)
    table = torch.tensor(last)
    return mf.mask(lambda b, h, q, kv: (kv <= q) & (q <= table[kv])), len(last)


def named(tokens):
    """Masks and their lengths by name."""
    found = {name: (mf.presets.paper(name, tokens).predicate, tokens) for name in mf.presets.PAPER}
    found["prefix tree, 1 + 4 nodes"] = prefix_tree((4,), tokens // 5)
    found["prefix tree, 1 + 3 + 9 + 27 nodes"] = prefix_tree((3, 3, 3), tokens // 40)
    return found


def counts(tokens):
    """name -> slices, row intervals, cuDNN's endpoints of a row, and tiles of 128 x 128 that are full and partial."""
    rows = {}
    for name, (mask, length) in named(tokens).items():
        intervals, tiles = mask.to_row_intervals(length, length), mask.block_map(length, length).counts
        rows[name] = {
            "slices": len(mask.to_slices(length, length)),
            "intervals": len(intervals.start),
            "endpoints of a row": intervals.to_cudnn().shape[1],
            "full tiles": tiles["full"],
            "partial tiles": tiles["partial"],
        }
    return rows


def table(tokens=8192):
    """The counts as a table in Markdown."""
    found = counts(tokens)
    names = ["mask", *next(iter(found.values()))]
    lines = [names, ["---"] * len(names), *([name, *(f"{n:,}" for n in row.values())] for name, row in found.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
