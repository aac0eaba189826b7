"""All that a user may import, used with its types written out: mypy and pyright find nothing here in strict mode."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import maskflash as mf
from maskflash import parallel, presets, scores, testing, visualize


def predicate(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *, doc: Tensor) -> bool | Tensor:
    return q >= kv and doc[b, q] == doc[b, kv]


def softer(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score * 0.5 - (q - kv)


def masks(lengths: Tensor, ids: Tensor) -> list[mf.Mask]:
    tree: mf.Mask = presets.tree(ids)
    paper: presets.PaperMask = presets.paper(presets.PAPER[0], 1024)
    prefixes: mf.PrefixTree = mf.prefix_tree([[1, 2, 3], [1, 2, 4]])
    return [
        *(mf.mask(predicate), mf.causal(), mf.full(), mf.sliding_window(256), mf.sliding_window(None, right=8)),
        *(mf.document(lengths), mf.document(ids=ids), mf.document(lengths=[3, 5]), mf.document(cu_seqlens=lengths)),
        *(mf.causal_document([3, 5], left=2), mf.prefix_lm(16), mf.padding(lengths), mf.global_tokens(4)),
        *(mf.dilated_window(64, 2), mf.natten(8, 8, 3, 3), presets.neighborhood((4, 8, 8), 3, is_causal=True)),
        *(presets.sliding_tiles((4, 8, 8), (2, 4, 4), 3), presets.chunked(128), presets.image_blocks([(0, 16)])),
        *(presets.block_diffusion(64, 8), presets.share_question([(3, [2, 2])]), presets.causal_blockwise([3, 5, 2])),
        *(presets.prefix_lm_document([8, 8], [2, 3]), presets.qk_sparse([(2, 5)]), presets.random_eviction(ids)),
        *(tree, paper.predicate, prefixes.mask, (mf.causal() & predicate) | ~mf.full() ^ mf.causal()),
    ]


def score_functions(x: Tensor) -> mf.Score:
    parts: list[mf.Score] = [
        *(scores.softcap(20.0), scores.alibi(), scores.alibi(x, symmetric=True), scores.bias(x), scores.key_bias(x)),
        *(scores.relative_bias(x), scores.relative_table(x), scores.temperature(0.7), scores.forget_gate(x)),
        *(scores.distance_decay(x), mf.score(softer)),
    ]
    return mf.score(parts)


def calls(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    attn: mf.Attention = mf.compile(predicate, score=softer, scale=0.5, block_size=(64, 128), backend="cpu")
    out: Tensor = attn(q, k, v, doc=starts, dropout_p=0.1, seed=3)
    out, lse = attn(q, k, v, sinks=starts, q_offset=4, return_lse=True)
    out = mf.attention(q, k, v, mf.causal(), score=scores.softcap(20.0))
    out, lse = mf.attention(q, k, v, return_lse=True)
    out = mf.varlen_attention(q, k, v, mf.causal(), starts, starts)
    out = mf.flashmask_attention(q, k, v, starts, causal=True)
    pages: mf.PageTable = mf.PageTable(starts, starts, page_size=16)
    pages.append(k, v, k, v)
    out = attn.paged(q, k, v, pages)
    out, lse = mf.merge([out, out], [lse, lse])
    attn.warm(1024, 1024, head_dim=64)
    attn.prepare(1024, 1024)
    attn.invalidate()
    mf.invalidate()
    replaced: dict[Any, Callable[..., Any]] = mf.dense_decompositions()
    explanation: mf.Explanation = attn.explain(1024, 1024)
    text: str = attn.source(q, k, v) + str(explanation)
    return out if text and replaced else lse


def questions(mask: mf.Mask, other: mf.Mask) -> bool:
    sight: mf.Sight = mask.at(64, 64, batch=2)
    why: mf.Why = sight.why(5, 3)
    same: mf.Comparison = mf.equivalent(mask, other, 64, 64)
    inside: mf.Comparison = mf.implies(mask, other, 64, 64)
    relation: mf.Relation = mf.compare(mask, other, 64, 64)
    block_map: mf.BlockMap = mask.block_map(64, 64, block_size=16)
    full: int = block_map.counts["full"]
    row: list[tuple[int, int]] = mask.row(5, 64) + mask.column(5, 64)
    dense: Tensor = mask.dense(64, 64)
    name: str = mask.fingerprint()
    return all((why, same, inside, relation, full, row, dense.any(), name))


def forms(mask: mf.Mask) -> list[mf.Mask]:
    columns: mf.ColumnIntervals = mask.to_flashmask(64, 64)
    intervals: mf.RowIntervals = mask.to_row_intervals(64, 64)
    slices: mf.Slices = mask.to_slices(64, 64)
    blocks: mf.BlockSparse = mask.to_block_sparse(64, 64)
    rows: mf.BlockRows = mask.to_block_rows(64, 64)
    packed: mf.PackedMask = mask.to_packed_mask(64, 64)
    prefixes: mf.PrefixRanges = mask.to_prefix_ranges(64, 64)
    cute: mf.CuteMask = mask.to_cute(64, 64)
    assert cute.text
    return [
        columns.to("cpu"),
        mf.ColumnIntervals.from_flashmask(columns.startend_row_indices, causal=columns.causal),
        mf.from_row_intervals(intervals),
        mf.from_slices(slices.q_ranges, slices.k_ranges, slices.types),
        mf.from_block_sparse(blocks.forward, mask, 64, 64),
        mf.from_block_rows(rows.indptr, rows.indices, rows.M, rows.N, (rows.R, rows.C), packed_mask=rows.packed_mask),
        mf.from_packed_mask(packed.packed, 64, 64),
        mf.from_prefix_ranges(prefixes.mm_prefix_range, prefixes.sliding_window),
        mf.from_flex(mask.to_block_mask(64, 64)),
        mf.from_arguments("flash_attn", causal=True, window_size=(128, 0)),
    ]


def shards(mask: mf.Mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    links = parallel.Links(flops=4e14, bandwidth=4e11)
    plan: parallel.ShardPlan = parallel.plan(mask, 65_536, 8, heads=16, links=links)
    layer: parallel.PlannedLayer = plan.layers[0]
    forward: parallel.PlannedPass = layer.forward
    tried: tuple[parallel.Candidate, ...] = plan.tried
    assert sum(forward.seconds) <= plan.seconds and tried
    attn: parallel.ShardedAttention = parallel.compile(mask, plan)
    out: Tensor = attn(plan.shard(q, 0), plan.shard(k, 0), plan.shard(v, 0))
    return plan.unshard([out] * plan.world_size)


def tests(mask: mf.Mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = testing.Shape(batch=2, heads=4)
    testing.assert_matches_dense(mask, shape, dtype=torch.bfloat16)
    drawn: SearchStrategy[mf.Mask] = testing.masks()
    columns: SearchStrategy[mf.ColumnIntervals] = testing.columns(64, 64)
    functions: SearchStrategy[mf.Score] = testing.scores()
    sizes: SearchStrategy[testing.Shape] = testing.shapes()
    assert drawn and columns and functions and sizes
    kept: Tensor = testing.dropout_keep(3, 0.1, 2, 4, 64, 64)
    out, _ = testing.reference(q, k, v, mask.dense(64, 64), 0.125, kept=kept)
    budget: float = testing.error_budget(out, out.double())
    return out + budget


def pictures(mask: mf.Mask, plan: parallel.ShardPlan) -> tuple[Axes, Figure, str]:
    ax: Axes = visualize.draw_mask(mask, 64, 64)
    visualize.draw_tiles(mask.block_map(64, 64), ax=ax)
    visualize.draw_intervals(mask.to_flashmask(64, 64), 64, ax=ax)
    visualize.draw_row_intervals(mask.to_row_intervals(64, 64), ax=ax)
    visualize.draw_slices(mask.to_slices(64, 64), 64, 64, ax=ax)
    visualize.draw_score(mask, scores.alibi(), 64, 64, heads=8, head=2, ax=ax)
    figure: Figure = visualize.draw_shards(plan, mask)
    figure = visualize.side_by_side({"causal": mask}, 64, 64)
    return ax, figure, visualize.explorer(mask, 64, 64)


def errors(mask: mf.Mask) -> str:
    try:
        mask.dense(64, 64)
    except (mf.ArgumentError, mf.ArgumentTypeError, mf.MaskTraceError, mf.MaskIndexError) as error:
        return str(error)
    except (mf.UnsupportedMask, mf.BackendError) as error:
        return str(error)
    except mf.MaskflashError as error:
        return str(error)
    kind: type[Warning] = mf.DenseMaskWarning
    return kind.__name__
