"""Every argument of every public call with values of every kind: a right result, or an error of ours."""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash import testing
from maskflash.cli import traffic
from maskflash.testing import Shape

with warnings.catch_warnings(action="ignore"):  # the layout is a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
VALUES = {
    "None": None,
    "text": "yes",
    "no text": "",
    "bytes": b"yes",
    "float": 3.5,
    "nan": math.nan,
    "inf": math.inf,
    "complex": 1j,
    "True": True,
    "-1": -1,
    "0": 0,
    "1": 1,
    "3": 3,
    "numpy int": np.int64(2),
    "numpy float": np.float32(2.5),
    "array": np.arange(3),
    "tensor": torch.arange(3),
    "tensor of one": torch.tensor(1),
    "tensor of floats": torch.randn(2, 3),
    "tensor on meta": torch.zeros(4, dtype=torch.long, device="meta"),
    "sparse tensor": torch.eye(4).to_sparse(),
    "unsigned tensor": torch.ones(1, dtype=torch.uint64),
    "nested tensor": NESTED,
    "list": [1, 2],
    "pair": (2, 2),
    "dict": {"a": 1},
    "set": {1},
    "object": object(),
    "class": int,
    "function": len,
}
INTS = {"1", "3", "numpy int"}
SIZES = {"0", *INTS}
NUMBERS = {"float", "numpy float", *INTS}
OFFSETS = {"-1", "tensor of one", *SIZES}
BLOCKS = {"list", "pair", *INTS}
NONE = {"None"}
ANYTHING = {"tensor", "tensor of one", "tensor of floats", "True", "nan", "inf", "-1", *NONE, *SIZES, *NUMBERS}
FLAG = {"True"}

X = torch.randn(1, 2, 4, 8)
BY_NAME = mf.mask(lambda b, h, q, kv, *, doc: q >= kv)  # what a function does with a value is its own affair
CAUSAL, ATTN = mf.causal(), mf.compile(mf.causal())
MAP = CAUSAL.block_map(4, 4, block_size=2)
VECTORS = mf.ColumnIntervals(torch.tensor([4, 4, 4, 4]), causal=True)
BLOCKS_OF_CAUSAL = CAUSAL.to_block_sparse(4, 4, block_size=2)
QKV = {"q": (X, set()), "k": (X, set()), "v": (X, set())}
PLAN = mf.parallel.plan(CAUSAL, 4, 2, chunk=1, shards=[[(0, 2)], [(2, 4)]])
ALONE = mf.parallel.plan(CAUSAL, 4, 1)
ON_SHARDS = mf.parallel.compile(CAUSAL, ALONE)
PACKED = {
    **dict.fromkeys("qkv", (torch.randn(4, 2, 8), set())),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (torch.tensor([0, 1, 4]), set())),
}
PAGES = mf.PageTable(torch.tensor([[1], [0]]), torch.tensor([3, 4]), 4)
POOLS = {
    **{name: (torch.randn(2, 4, 2, 8).to(torch.float8_e4m3fn), set()) for name in ("k_pages", "v_pages")},
    "layout": ("NHD", set()),
    **dict.fromkeys(("k_scale", "v_scale"), (0.5, NUMBERS)),
}
SEEDS = {"-1", "tensor of one", *SIZES}
CALL = {
    **{"q_offset": (0, OFFSETS), "kv_offset": (0, OFFSETS), "return_lse": (False, FLAG)},
    **{"dropout_p": (0.5, {"0"}), "seed": (1, SEEDS | NONE), "generator": (None, NONE)},
}
HOW = {
    "score": (None, NONE),
    "scale": (0.5, NUMBERS | NONE),
    "block_size": (2, BLOCKS),
    "backend": ("cpu", set()),
    "deterministic": (True, FLAG),
}
SIZED = {
    "q_len": (4, SIZES),
    "kv_len": (4, SIZES),
    "batch": (1, SIZES),
    "heads": (2, SIZES),
    "q_offset": (0, OFFSETS),
    "device": ("cpu", set()),
}
AT = {"b": (0, {"0"}), "h": (0, {"0", "1"}), "batch": (1, INTS | NONE), "heads": (2, INTS | NONE)}
ROW = {**AT, "q": (1, SIZES), "kv_len": (4, SIZES | NONE), "q_len": (None, NONE | {"3", "numpy int"})}
COLUMN = {**AT, "kv": (1, SIZES), "q_len": (4, SIZES | NONE), "kv_len": (None, NONE | {"3", "numpy int"})}
DRAWN = {"ax": (None, NONE), "batch_row": (0, SIZES), "head": (0, SIZES), "legend": (True, FLAG)}

COMPILED = {"tune": (False, FLAG), "splits": (2, INTS), "kernels": ("portable", set()), "precision": ("full", set())}

# What each call takes: a right value of each argument, and which of VALUES are right as well.
CALLS = {
    mf.attention: {**QKV, "mask": (CAUSAL, NONE), **HOW, **CALL},
    mf.compile: {"mask": (CAUSAL, {"tensor of floats"}), **HOW, **COMPILED},
    ATTN: {**QKV, **CALL},
    mf.varlen_attention: {
        **PACKED,
        "mask": (CAUSAL, NONE),
        **HOW,
        "q_offset": (0, OFFSETS),
        "return_lse": (False, FLAG),
    },
    mf.PageTable: {
        "block_table": (torch.tensor([[1], [0]]), set()),
        "lengths": (torch.tensor([3, 4]), {"list", "pair"}),
        "page_size": (4, INTS),
    },
    mf.PageTable.from_csr: {
        "indptr": (torch.tensor([0, 1]), set()),
        "indices": (torch.tensor([5]), set()),
        "last_page_len": (torch.tensor([1]), set()),
        "page_size": (4, INTS),
    },
    PAGES.to_csr: {},
    PAGES.append: {**POOLS, **dict.fromkeys("kv", (X[:, :, :1].expand(2, 2, 1, 8), set())), "cu_seqlens": (None, NONE)},
    ATTN.paged: {
        **{"q": (X[:, :, :1].expand(2, 2, 1, 8), set()), **POOLS, "pages": (PAGES, set())},
        **{"cu_seqlens_q": (None, NONE), "return_lse": (False, FLAG)},
    },
    ATTN.varlen: {**PACKED, "q_offset": (0, OFFSETS), "return_lse": (False, FLAG)},
    ATTN.source: {**QKV, "q_offset": (0, OFFSETS), "kv_offset": (0, OFFSETS), "pass_name": ("dq", set())},
    ATTN.explain: SIZED,
    ATTN.prepare: SIZED,
    CAUSAL.dense: SIZED,
    CAUSAL.block_map: {**SIZED, "block_size": (2, BLOCKS)},
    CAUSAL.to_flashmask: {**SIZED, "causal": (None, NONE | FLAG)},
    CAUSAL.to_row_intervals: SIZED,
    CAUSAL.as_arguments: {**SIZED, "library": ("flash_attn_varlen", set())},
    CAUSAL.to_block_sparse: {**SIZED, "block_size": (2, BLOCKS)},
    CAUSAL.to_block_rows: {**SIZED, "block_size": (2, BLOCKS)},
    CAUSAL.to_packed_mask: SIZED,
    CAUSAL.to_cute: SIZED,
    CAUSAL.to_prefix_ranges: {
        **{**SIZED, "q_len": (4, {"0"}), "kv_len": (4, set())},
        "q_offset": (0, OFFSETS - {"-1"}),
    },
    CAUSAL.to_slices: SIZED,
    CAUSAL.to_block_mask: {**SIZED, "q_len": (4, INTS), "kv_len": (4, INTS), "block_size": (2, BLOCKS)},
    CAUSAL.row: {**ROW, "q_offset": (0, OFFSETS), "device": ("cpu", set())},
    CAUSAL.column: {**COLUMN, "q_offset": (0, OFFSETS), "device": ("cpu", set())},
    CAUSAL.why: {
        **{**ROW, **COLUMN, "q_len": ROW["q_len"], "kv_len": COLUMN["kv_len"]},
        "q_offset": (0, OFFSETS),
        "device": ("cpu", set()),
    },
    BY_NAME.fingerprint: {"doc": (1, ANYTHING)},
    BY_NAME.dense: {**SIZED, "doc": (1, ANYTHING)},
    mf.mask: {"function": (lambda b, h, q, kv: q >= kv, set())},
    mf.score: {"function": (lambda score, b, h, q, kv: score, set())},
    mf.equivalent: {"a": (CAUSAL, set()), "b": (CAUSAL, set()), **SIZED},
    mf.compare: {"a": (CAUSAL, set()), "b": (CAUSAL, set()), **SIZED},
    mf.implies: {"a": (CAUSAL, set()), "b": (CAUSAL, set()), **SIZED},
    mf.invalidate: {},
    mf.from_arguments: {"library": ("sdpa", set())},
    mf.from_flex: {"block_mask": (CAUSAL.to_block_mask(4, 4), set())},
    mf.from_block_sparse: {
        "tensors": (BLOCKS_OF_CAUSAL.forward, set()),
        "mask_mod": (CAUSAL, set()),
        **dict.fromkeys(("q_len", "kv_len"), (4, {"3"})),
        "block_size": (None, NONE | {"3", "numpy int", "pair"}),
    },
    mf.from_block_rows: {
        "indptr": (torch.tensor([0, 1, 2]), {"array", "tensor"}),
        "indices": (torch.tensor([0, 1]), set()),
        "M": (4, {"3"}),
        "N": (4, set()),
        "block_size": (2, {"numpy int", "pair"}),
        "mask": (None, NONE),
        "packed_mask": (None, NONE),
    },
    mf.from_packed_mask: {
        "packed": (torch.ones(2, dtype=torch.uint8), set()),
        **dict.fromkeys(("q_len", "kv_len"), (4, {"3"})),
        "batch": (1, {"1"}),
    },
    mf.from_prefix_ranges: {
        "mm_prefix_range": (None, NONE),
        "sliding_window": (None, NONE | INTS),
    },
    mf.from_row_intervals: {
        "intervals": (CAUSAL.to_row_intervals(4, 4).to_cudnn(), set()),
        "kv_len": (4, set()),
        "batch": (1, {"1", "numpy int"}),
    },
    mf.from_slices: {
        "q_ranges": (torch.tensor([[0, 4]]), set()),
        "k_ranges": (torch.tensor([[0, 4]]), set()),
        "types": (torch.tensor([1]), NONE),
    },
    mf.BlockMap.from_kinds: {
        "kinds": (torch.ones(1, 1, 2, 2).char(), set()),
        "q_len": (4, {"3"}),
        "kv_len": (4, {"3"}),
        "block_size": (2, {"3", "numpy int", "pair"}),
    },
    MAP.to: {"device": ("cpu", set())},
    VECTORS.to: {"device": ("cpu", set())},
    mf.flashmask_attention: {
        **{name: (X, set()) for name in ("query", "key", "value")},
        "startend_row_indices": (None, NONE),
        "dropout": (0.0, {"0"}),
        "return_softmax_lse": (False, FLAG),
        "training": (True, FLAG),
        "softmax_scale": (None, NUMBERS | NONE),
        "backend": ("cpu", set()),
    },
    Shape: {
        **dict.fromkeys(("batch", "q_len", "kv_len"), (4, SIZES)),
        **dict.fromkeys(("head_dim", "v_head_dim"), (8, INTS)),
        "heads": (4, INTS),
        "kv_heads": (1, {"1", "numpy int"}),
    },
    Shape().tensors: {"dtype": (torch.float32, set()), "seed": (0, SIZES | {"-1"}), "device": ("cpu", set())},
    testing.assert_matches_dense: {
        "mask": (CAUSAL, set()),
        "shape": (Shape(q_len=4, kv_len=4), NONE),
        "dtype": (torch.float32, set()),
        "seed": (0, SIZES | {"-1"}),
        **{name: HOW[name] for name in ("scale", "block_size", "backend")},
        "device": ("cpu", set()),
        "q_offset": (0, OFFSETS),
        "return_lse": (True, FLAG),
    },
    testing.masks: {"max_len": (4, SIZES), "batch": (1, INTS), "heads": (1, INTS)},
    testing.columns: {"q_len": (4, SIZES), "kv_len": (4, SIZES), "batch": (1, INTS), "heads": (1, INTS)},
    testing.scores: {"max_len": (4, SIZES), "batch": (1, INTS), "heads": (1, INTS), "dtype": (torch.float32, set())},
    testing.dropout_keep: {
        **{"seed": (1, SEEDS), "p": (0.5, {"0"}), "batch": (1, INTS), "heads": (1, INTS)},
        **{"q_len": (4, SIZES), "kv_len": (4, SIZES), "q_offset": (0, OFFSETS), "kv_offset": (0, OFFSETS)},
    },
    testing.shapes: {"max_len": (4, SIZES), **dict.fromkeys(("max_batch", "max_heads", "max_head_dim"), (4, INTS))},
    testing.reference: {**QKV, "mask": (torch.ones(1, 1, 4, 4, dtype=torch.bool), set()), "scale": (0.5, NUMBERS)},
    testing.error_budget: {"plain": (X, set()), "exact": (X.double(), set()), "dtype": (None, NONE)},
    mf.visualize.draw_mask: {
        "mask": (CAUSAL, set()),
        **{name: entry for name, entry in SIZED.items() if name != "device"},
        **DRAWN,
    },
    mf.visualize.draw_score: {
        "mask": (CAUSAL, set()),
        "score": (mf.scores.softcap(3.0), set()),
        **{name: entry for name, entry in SIZED.items() if name != "device"},
        **DRAWN,
        **{"batch": (1, INTS), "heads": (2, INTS), "batch_row": (0, {"0"}), "head": (0, {"0", "1"})},
        "at": (1.0, {"0", "-1", *NUMBERS}),
        "block_size": (2, BLOCKS),
    },
    mf.visualize.draw_tiles: {"block_map": (MAP, set()), **DRAWN},
    mf.visualize.draw_intervals: {"columns": (VECTORS, set()), "q_len": (4, SIZES), **DRAWN},
    mf.visualize.draw_slices: {
        "slices": (CAUSAL.to_slices(4, 4), set()),
        **{name: x for name, x in DRAWN.items() if name in ("ax", "legend")},
        **dict.fromkeys(("q_len", "kv_len"), (4, SIZES)),
    },
    mf.visualize.draw_row_intervals: {"intervals": (CAUSAL.to_row_intervals(4, 4), set()), **DRAWN},
    mf.visualize.draw_shards: {
        "plan": (mf.parallel.plan(CAUSAL, 4, 2), set()),
        "mask": (CAUSAL, set()),
        **{name: x for name, x in DRAWN.items() if name in ("batch_row", "head")},
    },
    mf.visualize.side_by_side: {"panels": ({"a": CAUSAL}, set()), "q_len": (4, SIZES), "kv_len": (4, SIZES)},
    mf.visualize.explorer: {
        "shown": (CAUSAL, set()),
        "path": (None, NONE),
        "title": (None, NONE | {"text", "no text"}),
        "score": (mf.scores.softcap(3.0), NONE),
        "at": (1.0, {"0", "-1", *NUMBERS}),
        "block_size": (2, BLOCKS),
        **SIZED,
    },
    mf.parallel.plan: {
        "mask": (CAUSAL, set()),
        **dict.fromkeys(("seq_len", "world_size"), (4, INTS)),
        **{"batch": (1, INTS), "heads": (6, INTS), "kv_heads": (None, INTS | NONE), "head_dim": (8, INTS)},
        **{"dtype": (torch.float32, set()), "chunk": (1, INTS | NONE), "links": (None, NONE), "shards": (None, NONE)},
        "head_ranks": (1, {"1", "numpy int"} | NONE),
    },
    PLAN.tokens: {"rank": (0, {"0", "1"})},
    PLAN.positions: {"rank": (0, {"0", "1"}), "device": ("cpu", set())},
    PLAN.shard: {"x": (X, set()), "rank": (0, {"0", "1"}), "dim": (2, {"numpy int"})},
    PLAN.unshard: {"parts": ([X[:, :, :2], X[:, :, 2:]], set()), "dim": (2, {"1", "numpy int"})},
    mf.parallel.compile: {
        **{"mask": (CAUSAL, {"tensor of floats"}), "plan": (ALONE, set()), "group": (None, NONE)},
        **{name: x for name, x in HOW.items() if name != "deterministic"},
        "stages": (1, INTS | NONE),
    },
    ON_SHARDS: {**QKV, **{name: x for name, x in CALL.items() if "offset" not in name}},
    mf.parallel.ShardPlan.from_dict: {"data": (PLAN.to_dict(), set())},
    mf.dense_decompositions: {},
    mf.merge: {"outs": ((X, X), set()), "lses": ((X[..., 0], X[..., 0]), set())},
    traffic.predict: {
        "block_map": (MAP, set()),
        **dict.fromkeys(("head_dim", "itemsize", "fast_bytes"), (64, INTS)),
        "v_head_dim": (None, INTS | NONE),
    },
}
CASES = [(call, argument) for call, arguments in CALLS.items() for argument in arguments]


@pytest.mark.parametrize(
    ("call", "argument"),
    CASES,
    ids=[f"{getattr(call, '__qualname__', 'Attention')}-{argument}" for call, argument in CASES],
)
@pytest.mark.filterwarnings("ignore:.*got a dense mask")
def test_an_argument_of_any_kind_is_right_or_told(call, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # of the explorer
    given = {name: right for name, (right, _) in CALLS[call].items()}
    call(**given)
    taken = set()
    for name, value in VALUES.items():
        if argument == "path" and isinstance(value, str):
            continue
        try:
            call(**{**given, argument: value})
        except mf.MaskflashError:
            continue
        taken.add(name)
    assert taken == CALLS[call][argument][1]


def test_the_table_has_every_public_function():
    modules = mf, mf.parallel, mf.testing, mf.visualize
    functions = {getattr(module, name) for module in modules for name in module.__all__}
    functions = {function for function in functions if inspect.isfunction(function)}
    presets = {function for function in functions if function.__module__.startswith("maskflash.presets")}
    assert functions - presets <= CALLS.keys()
