"""An analysis -> what was decided and why, for people and for tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from maskflash.analysis.closed_form import visible_rows
from maskflash.analysis.problem import Problem
from maskflash.analysis.ways.columns import find_pieces
from maskflash.analysis.ways.separate import obstacle, separate
from maskflash.backends.cpu import run as cpu
from maskflash.engines.engine import Prepared
from maskflash.errors import BackendError, UnsupportedMask
from maskflash.expr.format import format_expr
from maskflash.forms.slices import find_slices
from maskflash.op.analyse import Analysis
from maskflash.op.few_rows import applies
from maskflash.scores.strength import Kernels, Precision, check_wishes

if TYPE_CHECKING:
    from maskflash.backends.triton import run as triton

_WHOLE: Final = {  # who decides all tiles or none
    "pairs": "all pairs, of so few rows",
    "formula": "formulas",
    "intervals": "the rows' intervals",
    "groups": "groups of rows and columns that the mask treats alike",
    "columns": "cutting columns",
    "parts": "conditions one by one, and by pairs where two of them are partial",
}

_KERNELS: Final = {
    "interval": "interval: it reads one interval for each row, and serves all masks that have one",
    "expression": "expression: it computes this mask's own expression in partial tiles",
}


_FORWARD: Final = {
    "forward": "the portable kernel",
    "hopper": "Hopper's own kernel for float16 and bfloat16 up to head dim 256",
    "split": "the kernel of few rows",
}

_BACKWARD: Final = {
    False: "the portable kernels",
    True: "Hopper's own kernels for float16 and bfloat16 up to head dim 128",
}

_PRECISIONS: Final = {
    "full": "in the dtype of q, k and v",
    "tf32x3": "in float32 as three products of TF32",
    "fp8": "in 8 bits",
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Explanation:
    """What became of a mask at given lengths: str() for people, also where it is shown; to_dict() for tools."""

    mask: str
    problem: Problem
    analysis: Analysis
    backend: str
    why: str
    score: dict[str, Any] | None = None
    splits: int = 0
    kernels: Kernels = "auto"
    precision: Precision = "full"

    def __dir__(self) -> list[str]:
        """What users may use."""
        return ["to_dict"]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data.

        `passes` says what the backend runs for each; of few rows on a GPU into how many pieces a row is cut, if
        each head had keys of its own. `slices` says of how many
        the mask would be for MagiAttention: see `Mask.to_slices`; None where it has no such form.
        """
        return {**self._facts(), "slices": self._slices()}

    def _facts(self) -> dict[str, Any]:
        """What is known without asking the mask again."""
        problem, analysis = self.problem, self.analysis
        return {
            "mask": self.mask,
            "visible": format_expr(problem.expr, problem.inputs.params, problem.names),
            "rows": self._rows(),
            "reads": [name for name in ("b", "h", "q", "kv") if name in problem.expr.reads],
            "tables": {
                name: list(table.shape) for name, table in zip(problem.names, problem.inputs.tables, strict=True)
            },
            "q_len": problem.q_len,
            "kv_len": problem.kv_len,
            "block_size": list(problem.block_size),
            "shape": list(problem.shape),
            "tiles": analysis.block_map.counts,
            "sparsity": analysis.block_map.sparsity,
            "decided": analysis.decided,
            "evaluated_for": self._obstacle() if analysis.decided["elements"] else None,
            "backend": self.backend,
            "why": self.why,
            "score": self.score,
            "kernel": _kernel(analysis.plan),
            "forward": self._forward(),
            "backward": self._backward(),
            "nbytes": {"block_map": analysis.block_map.nbytes, "plan": analysis.plan.nbytes},
            "passes": self._passes(),
        }

    def _slices(self) -> int | None:
        try:
            return len(find_slices(self.problem))
        except UnsupportedMask:
            return None

    def _rows(self) -> str | None:
        """The rows that column j sees, where they are an interval with a formula, and start at 0."""
        offsets = self.problem.q_offset, self.problem.kv_offset
        if any(isinstance(offset, Tensor) or offset != 0 for offset in offsets):
            return None
        pieces = find_pieces(self.problem.on_host())
        if pieces is None or any(turn.descending for turn in pieces.turns):
            return None
        separated = separate(self.problem.expr)
        assert separated is not None, "pieces come from what separates"
        return visible_rows(separated, self.problem.inputs.params, self.problem.names)

    def _forward(self) -> dict[str, str] | None:
        """Which of a GPU's kernels runs forward, and in which precision; None elsewhere, unless a call raises."""
        try:
            check_wishes(self.backend, self.kernels, self.precision)
            if self.backend != "triton":
                return None
            from maskflash.backends.triton import kernel_choice

            name, why = kernel_choice.ahead(self.problem, self.kernels, self.precision)
        except BackendError as error:
            return {"kernel": "none", "why": f"since a call raises: {error}"}
        return {"kernel": _FORWARD[name], "why": why, "precision": _PRECISIONS[self.precision]}

    def _backward(self) -> dict[str, str] | None:
        """Which of a GPU's kernels run backward; None elsewhere, and where a call raises."""
        if self.backend != "triton" or (forward := self._forward()) is None or forward["kernel"] == "none":
            return None
        from maskflash.backends.triton import kernel_choice

        try:
            own, why = kernel_choice.backward_ahead(self.problem, self.kernels)
        except BackendError as error:  # of few rows, whose forward has one kernel
            return {"kernel": "none", "why": f"since a call raises: {error}"}
        return {"kernel": _BACKWARD[own], "why": why}

    def _passes(self) -> dict[str, dict[str, int | str]]:
        """What runs in each pass."""
        plan = self.analysis.plan
        passes = _passes(plan)
        if self.backend == "triton":
            from maskflash.backends.triton import run as triton

            if not triton.few.are_few(self.problem.q_len, self.problem.kv_len):
                return passes
            rows = passes.pop("forward, dq")
            own = {"rows, whose mask is evaluated in the kernel": self.problem.q_len}
            told = triton.few.told(self.problem, self.problem.heads, self.splits or None)
            return {"forward": {**own, **told}, "dq": rows, **passes}
        if self.backend != "cpu" or not applies(self.problem, scored=self.score is not None):
            return passes
        few: dict[str, dict[str, int | str]] = {
            "forward": {"rows, evaluated at each call without a plan": self.problem.q_len}
        }
        return {**few, **{name: facts for name, facts in passes.items() if name.startswith("backward")}}

    def _obstacle(self) -> str:
        """What kept the columns from being cut, so that tiles had to be evaluated."""
        expr = self.problem.expr
        position = obstacle(expr)
        if position is None:
            return "rows whose values go up and down, or change too often to cut columns"
        text = format_expr(expr.part(position), self.problem.inputs.params, self.problem.names)
        source = expr.source(position)
        return f"{text}\nin {source}" if source else text

    def __repr__(self) -> str:
        told = {name: text.replace("\n", "\n" + " " * 21) for name, text in self._told().items()}
        return "\n".join([self.mask, *(f"  {name:<18} {text}" for name, text in told.items())])

    def _repr_html_(self) -> str:
        from maskflash.visualize import notebook

        return notebook.of_facts(self.mask, self._told()) + notebook.of_map(self.analysis.block_map)

    def _told(self) -> dict[str, str]:
        """The facts as people read them."""
        facts = self._facts()
        rows, columns = facts["block_size"]
        tiles = ", ".join(f"{count} {kind}" for kind, count in facts["tiles"].items())
        reads = ", ".join(facts["reads"]) or "nothing"
        own = [name for name, letter in (("batch row", "b"), ("head", "h")) if letter in facts["reads"]]
        shared = (
            f"block maps of its own for each {' and '.join(own)}"
            if own
            else "one block map for all batch rows and heads"
        )
        kernel = "kernel of dq, dkdv" if "dq" in facts["passes"] else "kernel"  # forward of few rows has its own
        return {
            "visible": facts["visible"],
            **({"rows of column j": facts["rows"]} if facts["rows"] else {}),
            "reads": f"{reads}: {shared}",
            "tiles": f"{tiles} of {rows} x {columns} tokens ({100 * facts['sparsity']:.1f} % skipped)",
            "decided": _decided(facts["decided"]),
            **({"evaluated for": facts["evaluated_for"]} if facts["evaluated_for"] else {}),
            **_score(self.score),
            "backend": f"{self.backend}, {self.why}",
            **({kernel: _KERNELS[facts["kernel"]]} if facts["kernel"] else {}),
            **({"forward by": ", ".join(facts["forward"].values())} if facts["forward"] else {}),
            **({"backward by": ", ".join(facts["backward"].values())} if facts["backward"] else {}),
            **{name: _sentence(counts) for name, counts in facts["passes"].items()},
        }


def _decided(decided: dict[str, int]) -> str:
    for decider, how in _WHOLE.items():
        if decided[decider]:
            return f"{decided[decider]} tiles by {how}"
    bounds, samples, elements = (decided[kind] for kind in ("bounds", "samples", "elements"))
    return f"{bounds} tiles by bounds, {samples} by samples, {elements} element by element"


def _score(facts: dict[str, Any] | None) -> dict[str, str]:
    """A score function as people read of it."""
    if facts is None:
        return {}
    lifted = {"lifted": f"{facts['lifted']}: as a mask"} if facts["lifted"] else {}
    return {"score": facts["value"], "class": f"{facts['class']}, since {facts['why']}", **lifted}


def _sentence(facts: dict[str, int | str]) -> str:
    """A pass in words: its counts, and on the CPU the dtype that it computes in."""
    return ", ".join(f"{fact:,} {what}" if isinstance(fact, int) else f"in {fact}" for what, fact in facts.items())


def _kernel(plan: cpu.Plan | triton.DevicePlan | Prepared) -> str | None:
    """Which of the GPU's kernels: "interval" or "expression"; None elsewhere."""
    if isinstance(plan, cpu.Plan | Prepared):
        return None
    return "expression" if plan.intervals is None else "interval"


def _passes(plan: cpu.Plan | triton.DevicePlan | Prepared) -> dict[str, dict[str, int | str]]:
    """What each pass of a backend runs: dense calls on the CPU, runs of tiles on a GPU, another library's form."""
    if isinstance(plan, Prepared):
        return {"form": dict(plan.counts)}
    if not isinstance(plan, cpu.Plan):
        walks = {"forward, dq": plan.rows, "dkdv": plan.columns}
        return {
            name: dict(zip(("full tiles", "partial tiles"), work.counts.sum((1, 2)).tolist(), strict=True))
            for name, work in walks.items()
        }
    passes: dict[str, dict[str, int | str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("forward", "backward"):
            facts = plan.describe(name, dtype)
            kind = str(dtype).removeprefix("torch.")
            passes[f"{name} {kind}"] = {
                "dense calls": facts["calls"],
                "masked": facts["masked"],
                "gathered": facts["gathered"],
                "pairs": facts["pairs"],
                "compute": facts["compute"],
            }
    return passes
