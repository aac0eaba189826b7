"""A call, pair by pair -> all its results by plain operations in any dtype, and the terms that they are sums of.

Tests hold every backend against this: in float64 it is the truth, in the call's own dtype what a plain implementation
gets. The terms say how far rounding may lead where a small result is the difference of large terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskflash.backends.reference import reference
from maskflash.expr.evaluate import Inputs, compute, compute_several
from maskflash.expr.nodes import Expr
from maskflash.scores.strength import BoundScore


@dataclass(frozen=True, slots=True, eq=False)
class DenseCall:
    """One call of attention and what arrives at its results.

    Attributes:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Skv, D).
        v: (B, Hkv, Skv, Dv).
        mask: (B, Hq, Sq, Skv) bool.
        scale: factor of the scores.
        dout: (B, Hq, Sq, Dv), gradient of out.
        dlse: (B, Hq, Sq), gradient of lse.
        sinks: (Hq,); None for none.
        score: its whole program; None for none.
        learned: floating tensors that the score's tables are, or are views of: they get gradients.
        kept: (B, Hq, Sq, Skv), what dropout multiplies weights by; None for 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    scale: float
    dout: Tensor
    dlse: Tensor
    sinks: Tensor | None = None
    score: BoundScore | None = None
    learned: tuple[Tensor, ...] = ()
    kept: Tensor | None = None

    def results(self, dtype: torch.dtype, *, backwards: bool = False) -> dict[str, Tensor]:
        """out, lse, and gradients by the names of what they are of, computed in a dtype.

        `backwards` sums over keys in reverse, so that float64, too, has an error of its own.
        """
        named = {"q": self.q, "k": self.k, "v": self.v, "sinks": self.sinks}
        own = {name: x.detach().to(dtype).requires_grad_() for name, x in named.items() if x is not None}
        order = [2] if backwards else []
        dense, kept = (None if x is None else x.flip([3] if backwards else []) for x in (self.mask, self.kept))
        assert dense is not None, "there is a mask"
        score = None if self.score is None else self._scorer(self.score, dtype, backwards)
        out, lse = reference(
            own["q"],
            own["k"].flip(order),
            own["v"].flip(order),
            dense,
            self.scale,
            own.get("sinks"),
            score,
            None if kept is None else kept.to(dtype),
        )
        wanted = {f"d{name}": x for name, x in own.items()} | {f"dtable{n}": x for n, x in enumerate(self.learned)}
        arriving = self.dout.to(dtype), self.dlse.to(lse.dtype)
        found = torch.autograd.grad((out, lse), tuple(wanted.values()), arriving, allow_unused=True)
        given = zip(wanted, found, wanted.values(), strict=True)
        gradients = {name: torch.zeros_like(x) if gradient is None else gradient for name, gradient, x in given}
        return {"out": out.detach(), "lse": lse.detach(), **gradients}

    def _scorer(self, score: BoundScore, dtype: torch.dtype, backwards: bool) -> Callable[[Tensor], Tensor]:
        """The score's program, in one dtype throughout; a plain computation's as it is, if it is of this dtype."""
        expr, inputs, pairs = score.expr, score.inputs, self._pairs(score)
        if not (backwards and expr.nodes[-1].dtype == dtype):
            expr, inputs = _retyped(expr, dtype), _in_dtype(inputs, dtype)
        if backwards:
            pairs["kv"] = pairs["kv"].flip(-1)
        return lambda products: compute(expr, inputs, {**pairs, "score": products})[0].expand(products.shape)

    def _pairs(self, score: BoundScore) -> dict[str, Tensor]:
        """Indices of all pairs, that broadcast."""
        batch, heads, q_len, kv_len = self.mask.shape
        b, h, q, kv = (torch.arange(size, device=self.q.device) for size in (batch, heads, q_len, kv_len))
        rows, columns = (
            x.reshape(-1, 1, 1, 1) if isinstance(x, Tensor) else x for x in (score.q_offset, score.kv_offset)
        )
        return {"b": b[:, None, None, None], "h": h[:, None, None], "q": q[:, None] + rows, "kv": kv + columns}

    def terms(self, exact: dict[str, Tensor]) -> dict[str, float]:
        """For each result the largest root of summed squares of the terms that an element is computed from.

        Errors in a score and in the lse are errors in the exponent, so a probability weighs one more by their terms.

        Source: the probabilistic error bound of sums, Higham and Mary, A New Approach to Probabilistic Rounding Error
        Analysis, 2019.
        """
        group = self.q.shape[1] // self.k.shape[1]
        q, k, v, dout, dlse = (x.detach().double() for x in (self.q, self.k, self.v, self.dout, self.dlse))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out, lse = (exact[name].double() for name in ("out", "lse"))
        products = q @ k.mT * self.scale
        value, slope, partials = self._derived(products)
        visible = self.mask & (value != -torch.inf)
        lse = lse.masked_fill(lse.isinf(), 0.0)
        p = (value - lse[..., None]).masked_fill(~visible, -torch.inf).exp().nan_to_num(0.0)
        value, slope = (x.masked_fill(~visible, 0.0).square() for x in (value, slope))
        shares = [] if self.sinks is None else [(self.sinks.detach().double()[:, None] - lse).exp()]
        q, k, v, p, dout, dlse, out, lse = (x.square() for x in (q, k, v, p, dout, dlse, out, lse))
        scores = q @ k.mT * self.scale**2
        scored = slope * scores + (0.0 if self.score is None else value)
        p = p * (1 + scored + lse[..., None])
        kept = 1.0 if self.kept is None else self.kept.double().square()
        delta = (dout * out).sum(-1) + dlse
        dvalue = p * (kept * (dout @ v.mT) + delta[..., None])
        ds = dvalue * slope * self.scale**2
        found = {"out": p * kept @ v, "lse": scored, "dq": ds @ k, "dk": ds.mT @ q, "dv": (p * kept).mT @ dout}
        for share in shares:
            sink = self.sinks.detach().double() if self.sinks is not None else share
            sink = sink.masked_fill(sink.isinf(), 0.0).square()[:, None]
            found["dsinks"] = (share.square() * (1 + sink + lse) * delta).sum((0, 2))
        for n, table in enumerate(self.learned):
            found[f"dtable{n}"] = self._of_table(table, dvalue, partials)
        return {name: float(x.max()) ** 0.5 if x.numel() else 0.0 for name, x in found.items()}

    def _derived(self, products: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, tuple[Tensor, ...], Tensor]]]:
        """The value of each pair, its slope, and for each look-up the table, its indices and its derivative."""
        if self.score is None:
            return products, torch.ones_like(products), []
        with torch.no_grad():
            expr, inputs = _retyped(self.score.expr, torch.float64), _in_dtype(self.score.inputs, torch.float64)
            derivatives = replace(self.score, expr=expr).derivatives
            roots = [derivatives.value, *([] if derivatives.slope is None else [derivatives.slope])]
            lookups = [(expr.nodes[place], root) for place, root in derivatives.lookups]
            roots += [n for node, root in lookups for n in (root, *node.args)]
            pairs = {**self._pairs(self.score), "score": products}
            found, _ = compute_several(derivatives.expr, inputs, pairs, roots)
        value = found.pop(0).expand(products.shape)
        slope = torch.zeros_like(products) if derivatives.slope is None else found.pop(0).expand(products.shape)
        partials = []
        for node, _ in lookups:
            derivative, *indices = (found.pop(0) for _ in range(1 + len(node.args)))
            partials.append((self.score.inputs.tables[node.slot], tuple(indices), derivative))
        return value, slope, partials

    def _of_table(
        self, table: Tensor, dvalue: Tensor, partials: list[tuple[Tensor, tuple[Tensor, ...], Tensor]]
    ) -> Tensor:
        """The summed squares of the terms of a table's gradient, at most: those of all its look-ups together."""
        total = dvalue.new_zeros(())
        for looked_up, indices, derivative in partials:
            if looked_up is not table and looked_up.untyped_storage().data_ptr() != table.untyped_storage().data_ptr():
                continue
            terms = (dvalue * derivative.square().nan_to_num(0.0)).expand(dvalue.shape)
            sums = torch.zeros(looked_up.shape, dtype=torch.float64, device=dvalue.device)
            if indices:
                inside = [
                    (torch.where(x < 0, x + size, x).clamp(0, max(size - 1, 0))).expand(terms.shape)
                    for x, size in zip(indices, looked_up.shape, strict=True)
                ]
                sums.index_put_(tuple(inside), terms, accumulate=True)
            else:
                sums = terms.sum()
            total = total + (sums.max() if sums.numel() else 0.0)
        return total


def _retyped(expr: Expr, dtype: torch.dtype) -> Expr:
    """A program whose real numbers all have one dtype."""
    nodes = (
        replace(node, dtype=dtype) if node.dtype.is_floating_point and not node.weak else node for node in expr.nodes
    )
    return Expr(tuple(nodes), expr.sources)


def _in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(inputs.params, tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs.tables))
