"""pyproject.toml's lower bounds of what results depend on -> constraints.txt, in place of the versions pinned there."""

import re
import tomllib
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
NAMES = ("torch", "triton", "numpy")
LEFT_OPEN = ("setuptools",)  # each torch says which it takes


def bounded(project: dict[str, Any]) -> list[str]:
    """What a project asks for: its dependencies, and those of its extra triton."""
    return [*project["dependencies"], *project["optional-dependencies"]["triton"]]


def lowest(constraints: str, dependencies: list[str]) -> str:
    """The text of constraints.txt with lower bounds: torch>=2.11 becomes torch==2.11.*."""
    bounds = [found for text in dependencies if (found := re.match(r"([\w-]+)>=(\d+\.\d+)", text))]
    pins = [f"{name}=={version}.*" for name, version in (found.groups() for found in bounds) if name in NAMES]
    kept = [line for line in constraints.splitlines() if line.partition("==")[0] not in (*NAMES, *LEFT_OPEN)]
    return "\n".join([*kept, *pins, ""])


if __name__ == "__main__":
    path = CHECKOUT / "constraints.txt"
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    path.write_text(lowest(path.read_text(encoding="utf-8"), bounded(project)), encoding="utf-8")
