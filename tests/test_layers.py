"""A module imports only from what stands before it, or before a folder that it is in, in ORDER: read from the AST."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maskflash"

# What each folder holds, lowest first; "" is the package. A module may import what stands before it, and before each
# folder that it is in. Others may import none of it.
ORDER = {
    "": [
        *("errors", "ground", "expr", "trace", "analysis", "functions", "masks", "presets"),
        *("forms", "scores", "backends", "engines", "op"),
        "api",
        *("parallel", "flashmask", "visualize", "integrations", "testing", "demo", "doctor", "cli", "examples"),
    ],
    "ground": [
        "names",
        "units",
        "modes",
        "arguments",
        "eight_bits",
        "qkv",
        "identity",
        "transfer",
        "copies",
        "stretch",
        "pool",
        "overlaps",
    ],
    "expr": [
        "intervals",
        "ops",
        "nodes",
        "format",
        "evaluate",
        "reasons",
        "ranges",
        "bounds",
        "simplify",
        "derivative",
        "sequences",
    ],
    "trace": [
        *("frames", "premises", "paths", "sources", "tracer", "symbols", "branches", "torch_calls", "rewrite"),
        *("hooks", "builtin_calls", "lower", "trace", "combine"),
    ],
    "analysis": [
        *("runs", "block_map", "intervals", "problem", "ways", "facts", "seen", "rows", "closed_form", "classify"),
        "changes",
    ],
    "analysis/ways": [
        *("pairs", "separate", "cuts", "lines", "columns", "groups", "ends", "coverage", "meets", "tiles", "parts"),
    ],
    "functions": ["slots", "traces", "reach", "captures", "fingerprint", "sizes", "function", "derived", "written"],
    "masks": [
        *(
            "lines",
            "sight",
            "exports",
            "mask",
            "combination",
            "predicate",
            "dense",
            "columns",
            "sequences",
            "requests",
            "compare",
            "why",
        ),
    ],
    "presets": ["documents", "grids", "basic", "blocks", "packed", "sparse", "trees", "prefix_trees"],
    "forms": [
        *("modifiers", "flashmask", "row_intervals", "headless", "row_mask", "slices", "windows", "sequences"),
        *("kernels", "xformers", "conventions", "arguments", "tiled", "flex", "block_sparse", "packed_mask"),
        *("block_rows", "prefix_ranges", "cute"),
    ],
    "scores": [
        "form",
        "strength",
        "dropout",
        "seeds",
        "lifting",
        "score",
        "sequences",
        "requests",
        "presets",
        "reads",
        "told",
    ],
    "engines": ["engine", "flex", "cudnn", "fa4", "magi", "flashinfer", "named"],
    "backends": ["merge", "sinks", "reference", "dense", "incoherence", "cpu", "triton"],
    "backends/cpu": [
        *("costs", "calls", "cover", "strips", "layers", "matrices", "schedules", "plan", "threads", "views"),
        *(
            "work",
            "softmax",
            "programs",
            "values",
            "biases",
            "sums",
            "limits",
            "tile",
            "engine",
            "scored",
            "few",
            "paged",
            "run",
        ),
    ],
    "backends/triton": [
        *("signature", "score_kind", "emit", "spans", "emit_score", "emit_shown", "render", "tiles", "modules"),
        *("device", "tile_choice", "walks", "layout", "intervals", "plan", "launch", "few", "hopper"),
        *("fp8", "kernel_choice", "learned", "run"),
    ],
    "op": [
        "spec",
        "analyse",
        "checking",
        "places",
        "cache",
        "few_rows",
        "explain",
        "later",
        "autograd",
        "decomposed",
        "flops",
        "parts",
        "sharding",
        "asking",
        "ahead",
        "inside",
        "varlen",
        "page_scales",
        "page_table",
        "paged",
        "attention",
        "eager",
    ],
    "parallel": [
        *("links", "distance", "ranges", "tiled", "alike", "needs", "routes", "price", "candidates", "swaps", "search"),
        *("shard_plan", "report", "planning"),
        *("peers", "exchange", "agree", "attention", "heads", "sharded_attention", "eager"),
    ],
    "flashmask": ["paper", "call"],
    "examples": ["train_packed", "train_transformers", "train_on_ranks"],
    "testing": ["shape", "keep", "dense", "strategies"],
    "integrations": ["closures", "layers", "layer_mask", "shards", "transformers"],
    "visualize": [
        *("cells", "notebook", "style", "vectors", "forms", "shards", "figures", "effects", "scores"),
        *("deciders", "marks", "page"),
    ],
    "cli": [
        "parser",
        "traffic",
        "expression",
        "masks",
        "terminal",
        "show",
        "compare",
        "explain",
        "export",
        "shard",
        "bench",
        "warm",
        "doctor",
    ],
    "demo": ["documents", "workload", "checks", "measure", "report", "drawings", "job"],
}
STRANGERS = ["reference", "cpu", "triton"]  # backends: they never import one another
TRITON_AT_HOME = ["backends/triton/device.py"]
LATE = {  # what methods of masks return, how expressions and plans are shown, and the paper's twelve masks
    *(
        (f"masks/{asked}.py", f"masks/{name}")
        for asked in ("sight", "mask")
        for name in ("mask", "combination", "predicate", "dense", "columns", "why")
    ),
    *((f"masks/{path}.py", f"forms/{name}") for path in ("sight", "exports") for name in ORDER["forms"]),
    ("masks/exports.py", "masks/columns"),
    ("expr/nodes.py", "expr/format"),
    ("parallel/shard_plan.py", "parallel/report"),
    ("presets/__init__.py", "flashmask/paper"),
    *(
        (f"{path}.py", "visualize/notebook")  # what notebooks show
        for path in ("analysis/block_map", "masks/mask", "masks/why", "masks/compare", "op/explain")
    ),
}


def imports(source: str) -> list[str]:
    """Absolute names that a module imports, anywhere in it; `from a import b` counts as a and as a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names] if not node.level else ["relative"]
    return found


def problem(path: str, name: str) -> str | None:
    """Why the module at `path` (relative to the package) may not import `name`; None where it may."""
    if name == "relative":
        return "imports are absolute"
    first, *rest = name.split(".")
    if first == "triton" and path not in TRITON_AT_HOME:
        return "triton is imported only by backends/triton/device.py and generated code"
    if first != "maskflash" or path in ("__init__.py", "__main__.py"):
        return None
    here = path.removesuffix(".py").removesuffix("/__init__").split("/")
    for depth, part in enumerate(here):
        if part not in ORDER.get("/".join(here[:depth]), []):
            return f"{part} has no place in the list of {'/'.join(here[:depth]) or 'the package'}"
    there = rest if rest[:1] and rest[0] in ORDER[""] else ["api"]  # the package's own names are those of the API
    if any(path == late and "/".join(there[:2]) == other for late, other in LATE):
        return None
    shared = 0
    while shared < min(len(here), len(there)) and here[shared] == there[shared]:
        shared += 1
    folder = "/".join(here[:shared])
    if shared in (len(here), len(there)) and path.endswith("/__init__.py"):
        return None  # a folder's own names
    order = ORDER.get(folder, [])
    mine, other = ("/".join(parts[shared : shared + 1]) for parts in (here, there))
    if folder == "backends" and mine in STRANGERS and other in STRANGERS:
        return "backends never import one another"
    early = other in order and order.index(other) < order.index(mine)
    return None if early else f"{other or folder} is not declared before {mine} in {folder or 'the package'}"


MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_a_module_imports_only_what_is_below_it(path):
    found = {name: problem(path, name) for name in imports((PACKAGE / path).read_text(encoding="utf-8"))}
    assert {name: reason for name, reason in found.items() if reason} == {}


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("trace/trace.py", "from maskflash.analysis import classify", "not declared before"),
        ("trace/trace.py", "import maskflash as mf", "not declared before"),
        ("errors.py", "from maskflash.expr.nodes import Node", "not declared before"),
        ("expr/nodes.py", "def f():\n    from maskflash.trace.trace import trace", "not declared before"),
        ("expr/nodes.py", "from maskflash.expr.bounds import bounds", "not declared before"),
        ("expr/bounds.py", "from maskflash.expr import Expr", "not declared before"),
        ("expr/nodes.py", "from . import nodes", "absolute"),
        ("analysis/problem.py", "from maskflash.analysis.ways.tiles import Tiles", "not declared before"),
        ("analysis/ways/tiles.py", "from maskflash.analysis.classify import classify", "not declared before"),
        ("analysis/ways/cuts.py", "from maskflash.analysis.ways.tiles import Tiles", "not declared before"),
        ("backends/cpu/run.py", "from maskflash.backends.reference import reference", "never import one another"),
        ("backends/triton/run.py", "from maskflash.backends.cpu import run", "never import one another"),
        ("backends/cpu/run.py", "import triton.language as tl", "triton"),
        ("utils.py", "import maskflash.errors", "no place"),
        ("expr/new.py", "import maskflash.errors", "no place"),
    ],
)
def test_the_check_can_fail(path, source, reason):
    problems = [problem(path, name) for name in imports(source)]
    assert any(reason in (text or "") for text in problems), problems


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trace/trace.py", "from maskflash.expr.nodes import Node\nimport torch"),
        ("op/analyse.py", "from maskflash.backends.cpu import run"),
        ("analysis/classify.py", "from maskflash.analysis.ways.tiles import Tiles"),
        ("analysis/ways/tiles.py", "from maskflash.analysis.problem import Problem"),
        ("backends/triton/device.py", "import triton"),
        ("demo/job.py", "import maskflash as mf\nfrom maskflash.demo import checks"),
        ("__init__.py", "from maskflash.op.attention import Attention"),
    ],
)
def test_the_check_lets_good_imports_pass(path, source):
    assert [problem(path, name) for name in imports(source)] == [None] * len(imports(source))
