"""A module imports only from lower layers, or from earlier in its own folder: read from the source's AST."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maskflash"

# Lowest layer first. A folder's table lists its modules, earliest first; others may import none of it.
LAYERS = [
    *("errors", "names", "modes", "arguments", "later", "html", "identity", "transfer", "expr", "blocks"),
    *("masks", "presets", "codegen", "kernels", "compiler", "explain", "checking", "plans", "op", "flops"),
    *("sharding", "compiled", "api", "flashmask", "traffic", "visualize", "integrations", "testing", "demo"),
    *("doctor", "cli"),
]
ORDER = {
    "expr": [
        *("nodes", "format", "evaluate", "reasons", "intervals", "ranges", "bounds", "simplify", "separate"),
        *("closed_form", "cuts", "paths"),
        *("tracer", "symbols", "branches", "torch_calls", "rewrite", "lower", "trace", "combine"),
    ],
    "blocks": [
        *(
            "runs",
            "block_map",
            "problem",
            "formula",
            "pieces",
            "groups",
            "hulls",
            "spans",
            "coverage",
            "meets",
            "tiles",
        ),
        *("parts", "classify", "changes"),
    ],
    "masks": [
        *(
            "tables",
            "slots",
            "traces",
            "reach",
            "captures",
            "fingerprint",
            "call",
            "lines",
            "base",
            "combination",
            "mask",
            "dense",
            "columns",
        ),
        *("convert", "compare", "why", "flex"),
    ],
    "presets": ["documents", "basic", "packed", "sparse", "vectors", "flashmask"],
    "kernels": [
        "reference",
        "cpu_costs",
        "cpu_calls",
        "cpu_regular",
        "cpu_irregular",
        "cpu_layers",
        "cpu_plan",
        "cpu_threads",
        "cpu",
        "triton_work",
        "triton_device",
        "triton_plan",
        "triton_layout",
        "triton_launch",
        "triton",
    ],
    "codegen": ["emit", "render", "tuning", "module_cache", "tuned"],
    "integrations": ["closures", "transformers"],
    "visualize": ["cells", "style", "vectors", "figures", "deciders", "marks", "page"],
    "cli": ["expression", "masks", "terminal", "show", "explain", "bench", "doctor", "parser"],
    "demo": ["documents", "workload", "checks", "measure", "report", "drawings", "job"],
}
STRANGERS = ["reference", "cpu", "triton"]  # backends: they never import one another
FACADE = LAYERS.index("api") + 0.5  # `import maskflash`: for what is above the op, such as the demo
TRITON_AT_HOME = ["kernels/triton_device.py"]
LATE = {  # what a method of every mask returns, and how an expression is shown
    *(("masks/base.py", name) for name in ("combination", "mask", "dense", "columns", "convert", "why", "flex")),
    ("expr/nodes.py", "format"),
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
    folder, _, module = path.removesuffix(".py").rpartition("/")
    parts = name.split(".")
    if name == "relative":
        return "imports are absolute"
    if parts[0] == "triton" and path not in TRITON_AT_HOME:
        return "triton is imported only by kernels/triton_device.py and generated code"
    if parts[0] != "maskflash" or path in ("__init__.py", "__main__.py"):
        return None
    layer = folder or module
    if layer not in LAYERS:
        return f"{layer} has no place in LAYERS"
    target = parts[1] if len(parts) > 1 else ""
    rank = LAYERS.index(target) if target in LAYERS else FACADE
    if rank > LAYERS.index(layer):
        return f"{layer} is a lower layer"
    if target != layer or module == "__init__":
        return None
    order, other = ORDER.get(folder, []), parts[2] if len(parts) > 2 else "__init__"
    if module in STRANGERS and other in STRANGERS:
        return "backends never import one another"
    if (path, other) in LATE:
        return None
    early = module in order and other in order and order.index(other) < order.index(module)
    return None if early else f"{other} is not declared before {module} in {folder}"


MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_a_module_imports_only_what_is_below_it(path):
    found = {name: problem(path, name) for name in imports((PACKAGE / path).read_text(encoding="utf-8"))}
    assert {name: reason for name, reason in found.items() if reason} == {}


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("expr/trace.py", "from maskflash.blocks import classify", "lower layer"),
        ("expr/trace.py", "import maskflash as mf", "lower layer"),
        ("errors.py", "from maskflash.expr.nodes import Node", "lower layer"),
        ("expr/nodes.py", "def f():\n    from maskflash.expr.trace import trace", "not declared before"),
        ("expr/trace.py", "from maskflash.expr import Expr", "not declared before"),
        ("expr/trace.py", "from . import nodes", "absolute"),
        ("kernels/cpu.py", "from maskflash.kernels.reference import reference", "never import one another"),
        ("kernels/triton.py", "from maskflash.kernels import cpu", "never import one another"),
        ("kernels/cpu.py", "import triton.language as tl", "triton"),
        ("utils.py", "import maskflash.errors", "no place"),
    ],
)
def test_the_check_can_fail(path, source, reason):
    problems = [problem(path, name) for name in imports(source)]
    assert any(reason in (text or "") for text in problems), problems


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("expr/trace.py", "from maskflash.expr.nodes import Node\nimport torch"),
        ("compiler.py", "from maskflash.kernels import cpu"),
        ("kernels/triton_device.py", "import triton"),
        ("demo/job.py", "import maskflash as mf\nfrom maskflash.demo import checks"),
        ("__init__.py", "from maskflash.op import attention"),
    ],
)
def test_the_check_lets_good_imports_pass(path, source):
    assert [problem(path, name) for name in imports(source)] == [None] * len(imports(source))
