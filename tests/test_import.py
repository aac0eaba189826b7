"""`import maskflash` is light: nothing heavy beyond torch is loaded before it is needed."""

import json
import subprocess
import sys

import maskflash
from maskflash.cli import traffic

LATER = [
    *("sympy", "triton", "jinja2", "rich", "hypothesis", "matplotlib", "torch._dynamo", "torch._inductor"),
    *("maskflash.analysis.classify", "maskflash.backends.cpu.run", "maskflash.backends.triton.run"),
]


def loaded_beyond_torch(statement: str) -> list[str]:
    """Those of LATER that `statement` loads in a fresh interpreter, beyond what `import torch` does."""
    program = (
        "import json, sys, torch\nbefore = set(sys.modules)\n"
        f"{statement}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = json.loads(run.stdout)
    return [name for name in LATER if any(found == name or found.startswith(f"{name}.") for found in names)]


def test_import_loads_nothing_heavy():
    assert loaded_beyond_torch("import maskflash") == []


def test_the_check_can_fail():
    assert loaded_beyond_torch("import maskflash, jinja2.sandbox") == ["jinja2"]
    call = "maskflash.compile(maskflash.causal())(*torch.ones(3, 1, 1, 2, 2))"
    assert loaded_beyond_torch(f"import maskflash; {call}") == [
        "maskflash.analysis.classify",
        "maskflash.backends.cpu.run",
    ]


def test_what_dir_shows_is_what_users_may_use():
    public = maskflash, maskflash.presets, maskflash.testing, maskflash.visualize, traffic
    for module in public:
        shown = {name for name in dir(module) if not name.startswith("__")}
        assert shown == set(module.__all__)
        assert all(hasattr(module, name) for name in shown)


def test_public_names_resolve():
    assert len(set(maskflash.__all__)) == len(maskflash.__all__)
    assert [name for name in maskflash.__all__ if not hasattr(maskflash, name)] == []
