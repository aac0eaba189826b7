"""Random attention problems for the kernels: a strategy of Case, the two sides to compare, and machines to run as."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.seen import DECIDERS, Seen
from maskflash.backends.cpu import costs as cpu_costs
from maskflash.backends.cpu import run as cpu
from maskflash.backends.reference import reference
from maskflash.scores.strength import Strength

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "BSHD", "reversed", "last_strided", "padded", "expanded_heads", "expanded_tokens"]


@dataclass(frozen=True)
class Machine:
    """A kind of CPU: what torch says of its vectors, and of its products of bfloat16."""

    capability: str
    products: str = ""

    def __str__(self):
        return f"{self.capability}-{self.products}" if self.products else self.capability

    @property
    def dtypes(self):
        """What to try on it: machines that compute bfloat16 natively differ in that alone."""
        return [torch.bfloat16] if self.products else DTYPES

    def stands_in(self, patch):
        """The planner decides as on this machine, and computes natively wherever that is allowed."""
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: self.capability)
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: self.products == "AMX")
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: self.products == "BF16")
        for name in ("_NATIVE_AMX", "_NATIVE_AVX512"):
            costs = getattr(cpu_costs, name)
            rates = tuple(1e6 * rate for rate in costs.rates)  # all of its costs: calls are cut as they would be
            cheap = replace(costs, call=costs.call / 1e6, column=costs.column / 1e6, rates=rates)
            patch.setattr(cpu_costs, name, cheap)


MACHINES = [
    Machine("AVX2"),
    Machine("AVX512"),
    Machine("AVX512", "BF16"),
    Machine("AVX2", "BF16"),  # ATEN_CPU_CAPABILITY says less than the CPU can do
    Machine("AVX512", "AMX"),
]


@pytest.fixture(params=MACHINES, ids=str)
def machine(request, monkeypatch):
    """Each kind of CPU in turn, whichever runs the tests."""
    request.param.stands_in(monkeypatch)
    return request.param


def tile_kinds(mask, block_size):
    """Every tile's kind by brute force: (B, H, nQ, nKV) int8."""
    (q_len, kv_len), (bq, bkv) = mask.shape[2:], block_size

    def any_in_tile(x):
        x = torch.nn.functional.pad(x, (0, -kv_len % bkv, 0, -q_len % bq))  # with False
        tiles = x.reshape(*x.shape[:2], -(-q_len // bq), bq, -(-kv_len // bkv), bkv)
        return tiles.any(5).any(3)

    return torch.where(any_in_tile(mask), torch.where(any_in_tile(~mask), 1, 2), 0).to(torch.int8)


def plan_of_pairs(block_map, visible):
    """The plan of a mask of which only tiles and pairs are known."""
    facts = SimpleNamespace(problem=SimpleNamespace(visible=visible), rows=None)
    return cpu.plan(Seen(facts, block_map, dict.fromkeys(DECIDERS, 0)))


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One attention problem: mask (Bm, Hm, Sq, Skv) bool, Bm and Hm 1 or those of q."""

    mask: torch.Tensor
    block_size: tuple[int, int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None
    scale: float

    def __repr__(self):
        strided = {name: (tuple(getattr(self, name).shape), getattr(self, name).stride()) for name in "qkv"}
        visible = "".join("".join(".#"[x] for x in row) + "\n" for row in self.mask[0, 0].tolist())
        return (
            f"Case({self.q.dtype}, mask {tuple(self.mask.shape)}, blocks {self.block_size}, {strided}, dlse "
            f"{self.dlse is not None}, scale {self.scale})\n" + visible * (self.mask[0, 0].numel() < 4000)
        )

    def with_tensors(self, **tensors):
        return replace(self, **tensors)

    def plan(self):
        block_map = BlockMap.from_kinds(tile_kinds(self.mask, self.block_size), *self.mask.shape[2:], self.block_size)
        return plan_of_pairs(block_map, lambda b, h, q, kv: self.mask[b, h, q, kv])

    def run(self, plan=None):
        """out, lse, dq, dk, dv of the kernel under test."""
        plan = plan or self.plan()
        with torch.no_grad():
            out, lse = cpu.forward(plan, self.q, self.k, self.v, Strength(self.scale))
            *grads, _, _ = cpu.backward(
                plan, self.dout, self.dlse, self.q, self.k, self.v, out, lse, Strength(self.scale)
            )
        return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    def is_native(self, plan):
        """Whether forward is computed in a half type."""
        work = plan.work(*self.q.shape[:2], max(self.q.shape[3], self.v.shape[3]))
        return self.q.dtype.itemsize == 2 and plan.schedule("forward", self.q.dtype, work).native

    def dense(self, dtype):
        """The same by `reference` and autograd, computed in `dtype`."""
        q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in (self.q, self.k, self.v))
        out, lse = reference(q, k, v, self.mask, self.scale)
        seen = self.mask.any(-1)
        # An empty row's lse is -inf, a constant: its gradient is zero whatever dlse holds.
        dlse = torch.zeros_like(lse) if self.dlse is None else self.dlse.to(dtype).masked_fill(~seen, 0)
        dout = self.dout.to(dtype).masked_fill(~seen[..., None], 0)
        grads = torch.autograd.grad((out, lse.masked_fill(~seen, 0)), (q, k, v), (dout, dlse))
        return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    def rounding(self):
        """What one rounding unit makes of each result: that of the largest sum of absolute terms behind it.

        A gradient may be a difference that is exactly zero, of terms that are not: its own size says nothing. A unit
        of a score or of the lse is one of a factor of the probability; a unit of the stored out is one of delta's.
        """
        group = self.q.shape[1] // self.k.shape[1]
        eps = torch.finfo(torch.float64 if self.q.dtype == torch.float64 else torch.float32).eps
        q, dout = (x.double().masked_fill(~self.seen[..., None], 0) for x in (self.q, self.dout))
        k, v = (x.double().masked_fill(~self.used[..., None], 0) for x in (self.k, self.v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        p = (q @ k.mT * self.scale).masked_fill(~self.mask, -torch.inf).softmax(-1).nan_to_num(0)
        q, k, v, dout = q.abs(), k.abs(), v.abs(), dout.abs()
        delta = (dout * (p @ v)).sum(-1, keepdim=True)
        scores = (q @ k.mT * self.scale).masked_fill(~self.mask, 0)
        dp = eps * p * (1 + scores.amax(-1, keepdim=True)) if scores.numel() else p
        ds = dp * (dout @ v.mT + delta) + p * delta * torch.finfo(self.q.dtype).eps
        if self.dlse is not None:
            ds = ds + dp * self.dlse.masked_fill(~self.seen, 0).double().abs()[..., None]
        units = {"out": dp @ v, "lse": eps * scores, "dq": ds @ k * self.scale}
        for name, x in (("dk", ds.mT @ q * self.scale), ("dv", dp.mT @ dout)):
            units[name] = x.unflatten(1, (-1, group)).sum(2)
        return {name: x.max().item() if x.numel() else 0.0 for name, x in units.items()}

    @property
    def seen(self):
        """Which query rows see anything: (B, Hq, Sq)."""
        return self.mask.any(-1).expand(self.q.shape[:3])

    @property
    def used(self):
        """Which key rows some query row sees: (B, Hkv, Skv)."""
        batch, heads, kv_heads = *self.q.shape[:2], self.k.shape[1]
        return self.mask.any(-2).expand(batch, heads, -1).unflatten(1, (kv_heads, -1)).any(2)


def laid_out(x, layout):
    """The values of x (or for the expanded layouts, some of them) in memory of another layout."""
    if layout == "BSHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "reversed":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "last_strided":
        return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    if layout == "padded":
        return torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3 : 3 + x.shape[3]]
    if layout == "expanded_heads":
        return x[:1, :1].expand(x.shape)
    if layout == "expanded_tokens":
        return x[:, :, :1].expand(x.shape)
    return x


@st.composite
def planes(draw, q_len, kv_len):
    """One (b, h) of a mask, (Sq, Skv) bool: the families that masks in use are made of."""
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    family = draw(st.sampled_from(["full", "bits", "cells", "causal", "window", "documents", "dilated", "nothing"]))
    if family == "full":
        return torch.ones(q_len, kv_len, dtype=torch.bool)
    if family == "bits":
        return torch.rand(q_len, kv_len, generator=generator) < draw(st.sampled_from([0.01, 0.3, 0.95]))
    if family == "cells":
        side = draw(st.sampled_from([5, 16, 32, 64]))
        cells = torch.rand(q_len // side + 1, kv_len // side + 1, generator=generator) < 0.4
        return cells[q // side, kv // side]
    if family == "causal":
        return q + draw(st.integers(-kv_len, kv_len)) >= kv
    if family == "window":
        left, right, shift = draw(st.integers(-3, 90)), draw(st.integers(0, 90)), draw(st.integers(-60, 60))
        return (q + shift - kv <= left) & (kv - q - shift <= right)
    if family == "documents":
        mean = draw(st.sampled_from([3, 20, 70]))
        starts = torch.rand(max(q_len, kv_len), generator=generator) < 1 / mean
        ids = starts.cumsum(0)
        same = ids[q] == ids[kv]
        return same & (q >= kv) if draw(st.booleans()) else same
    if family == "dilated":
        return ((q - kv) % draw(st.integers(2, 9)) == 0) & ((q - kv).abs() <= draw(st.integers(0, 200)))
    return torch.zeros(q_len, kv_len, dtype=torch.bool)


@st.composite
def masks(draw, shape):
    """A mask of the shape (Bm, Hm, Sq, Skv): per plane one family, or two combined, with some rows emptied."""
    batch, heads, q_len, kv_len = shape
    slices = []
    for _ in range(batch * heads):
        plane = draw(planes(q_len, kv_len))
        combine = draw(st.sampled_from([None, None, torch.logical_and, torch.logical_or, torch.logical_xor]))
        if combine:
            plane = combine(plane, draw(planes(q_len, kv_len)))
        empty = draw(st.sampled_from([None, None, 2, 7, 31]))
        if empty:
            plane = plane & (torch.arange(q_len) % empty != empty - 1)[:, None]
        slices.append(plane)
    return torch.stack(slices).reshape(shape)


@st.composite
def attention_cases(draw, dtypes=DTYPES, max_len=260):
    """Every shape, dtype, layout and mask that the CPU kernel must take."""
    lengths = st.one_of(st.integers(0, 3), st.integers(1, max_len))
    q_len, kv_len = draw(lengths), draw(lengths)
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * group
    dim, v_dim = draw(st.sampled_from([(8, 8), (16, 16), (1, 1), (5, 12), (24, 8), (64, 64), (1, 9), (13, 1)]))
    mask = draw(masks((draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), q_len, kv_len)))
    block_size = (draw(st.sampled_from([16, 32, 48, 128])), draw(st.sampled_from([16, 64, 128])))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([1.0, 1.0, 4.0]))

    def tensor(*shape, factor=1.0):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * factor
        return laid_out(x.to(dtype), draw(st.sampled_from(LAYOUTS))) if x.numel() else x.to(dtype)

    q, k = tensor(batch, heads, q_len, dim, factor=size), tensor(batch, kv_heads, kv_len, dim, factor=size)
    v, dout = tensor(batch, kv_heads, kv_len, v_dim), tensor(batch, heads, q_len, v_dim)
    dlse = None
    if draw(st.booleans()):
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        dlse = torch.randn(batch, heads, q_len, generator=generator, dtype=lse_dtype)
    return Case(mask, block_size, q, k, v, dout, dlse, draw(st.sampled_from([1.0, 0.3, dim**-0.5])))


@pytest.fixture(scope="session")
def cases():
    """The strategy `attention_cases`."""
    return attention_cases


@pytest.fixture(scope="session")
def mask_strategy():
    """The strategy `masks` of a shape."""
    return masks


@pytest.fixture(scope="session")
def make_case():
    """Case itself."""
    return Case


@pytest.fixture(scope="session")
def kinds_of():
    """tile_kinds, for tests that build their own maps."""
    return tile_kinds
