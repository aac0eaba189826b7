"""Plans: which calls a mask becomes, what they hold in memory, and for how long."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.seen import DECIDERS, Seen
from maskflash.backends.cpu import costs as cpu_costs
from maskflash.backends.cpu import cover as cpu_cover
from maskflash.backends.cpu import plan as cpu_plan
from maskflash.backends.cpu import run as cpu
from maskflash.backends.cpu import strips as cpu_strips
from maskflash.backends.cpu.calls import Band, Bits, Blocks, Causal, Intervals
from maskflash.scores.strength import Strength

TILE = 128


def causal(q, kv):
    return q >= kv


def window(q, kv):
    return (q >= kv) & (q - kv < 300)


def documents(q, kv):
    return (q >= kv) & (q // 700 == kv // 700)


def sinks(q, kv):
    return (q >= kv) & ((q - kv < 200) | (kv < 4))


def dilated(q, kv):
    return (q >= kv) & ((q - kv) % 3 == 0)


def plan_of_pairs(block_map, visible):
    """The plan of a mask of which only tiles and pairs are known."""
    facts = SimpleNamespace(problem=SimpleNamespace(visible=visible), rows=None)
    return cpu.plan(Seen(facts, block_map, dict.fromkeys(DECIDERS, 0)))


def plan_of(predicate, length):
    """Plan of a banded predicate, its kinds from the tiles' corners so that no length² tensor is needed."""
    n = -(-length // TILE)
    kinds = torch.zeros(1, 1, n, n, dtype=torch.int8)
    for i in range(n):
        q = torch.arange(i * TILE, min((i + 1) * TILE, length))[:, None]
        visible = predicate(q, torch.arange(length)).split(TILE, dim=1)
        kinds[0, 0, i] = torch.tensor([0 if not t.any() else 2 if t.all() else 1 for t in visible])
    block_map = BlockMap.from_kinds(kinds, length, length, (TILE, TILE))
    return plan_of_pairs(block_map, lambda b, h, q, kv: predicate(q, kv))


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operation makes, in bytes."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


def run(plan, length, dtype=torch.float32):
    q, k, v, dout = (torch.randn(1, 1, length, 8, dtype=dtype) for _ in range(4))
    out, lse = cpu.forward(plan, q, k, v, Strength(1.0))
    cpu.backward(plan, dout, None, q, k, v, out, lse, Strength(1.0))


@pytest.mark.parametrize("predicate", [causal, window, documents])
def test_memory_is_linear_in_the_sequence(predicate):
    held, largest = [], []
    for length in (4096, 8192):
        with LargestTensor() as spy:
            plan = plan_of(predicate, length)
            spy.nbytes = 0
            run(plan, length)
        held.append(plan.nbytes)
        largest.append(spy.nbytes)
    assert 0 < held[1] <= 2.2 * held[0]
    assert largest[1] <= 2.2 * largest[0]
    assert largest[1] < 8192 * 8192 * 4 / 4


def test_the_spy_sees_a_dense_mask():
    with LargestTensor() as spy:
        torch.ones(512, 512, dtype=torch.bool).sum()
    assert spy.nbytes == 512 * 512


def test_a_plan_does_not_keep_the_mask_alive():
    def plan_and_watch():
        ids = torch.arange(600) // 70
        block_map = BlockMap.from_kinds(torch.ones(1, 1, 5, 5, dtype=torch.int8), 600, 600, (TILE, TILE))
        return plan_of_pairs(block_map, lambda b, h, q, kv: (ids[q] == ids[kv]) & (kv % 3 > 0)), weakref.ref(ids)

    plan, watch = plan_and_watch()
    gc.collect()
    assert watch() is None
    assert plan.evaluate is None
    run(plan, 600)


def test_bits_too_many_to_keep_are_evaluated_again(monkeypatch):
    block_map = BlockMap.from_kinds(torch.ones(1, 1, 5, 5, dtype=torch.int8), 600, 600, (TILE, TILE))
    mask = torch.rand(600, 600) < 0.2
    q, k, v = (torch.randn(1, 1, 600, 8) for _ in range(3))
    kept = plan_of_pairs(block_map, lambda b, h, q, kv: mask[q, kv])
    assert kept.evaluate is None
    monkeypatch.setattr(cpu_plan, "_MAX_STORED_BITS", 30_000)
    frugal = plan_of_pairs(block_map, lambda b, h, q, kv: mask[q, kv])
    assert frugal.evaluate is not None
    assert frugal.nbytes < kept.nbytes
    for got, want in zip(
        cpu.forward(frugal, q, k, v, Strength(1.0)), cpu.forward(kept, q, k, v, Strength(1.0)), strict=True
    ):
        assert torch.equal(got, want)


HALF = (torch.bfloat16, torch.float16)


def blocks_of(call):
    return call.rows.count if isinstance(call.rows, Blocks) else 1


def masks_of(plan, pass_="forward"):
    return [type(call.mask) for call in plan.schedule(pass_, torch.float32, 512).all_calls()]


def test_each_mask_becomes_the_calls_it_should():
    assert masks_of(plan_of(lambda q, kv: (q >= 0) & (kv >= 0), 1000)) == [type(None)]
    assert masks_of(plan_of(causal, 4096)) == [Causal]
    assert set(masks_of(plan_of(window, 2000))) == {Causal, Band}
    assert set(masks_of(plan_of(lambda q, kv: (q >= kv) & (q // 20 == kv // 20), 2000))) == {Intervals}
    assert set(masks_of(plan_of(sinks, 1000))) == {Causal, type(None), Band}
    assert set(masks_of(plan_of(dilated, 1000))) == {Bits}
    assert masks_of(plan_of(lambda q, kv: (q < 0) & (kv < 0), 500)) == []


def test_columns_that_all_rows_of_a_call_see_have_no_mask():
    def scattered(q, kv):  # every other column; of the first 16 the others too, each by a row in 21
        return (kv % 2 == 0) | ((kv < 16) & ((q + kv // 2) % 21 == 0))

    calls = list(plan_of(scattered, 1024).schedule("forward", torch.float32, 512).all_calls())
    assert {call.mask for call in calls if not call.merges} == {None}
    merged = [call for call in calls if call.merges]
    assert all(isinstance(call.mask, Bits) and call.columns.stop <= 16 for call in merged)
    # The 8 columns are seen from 8 of 21 rows: no other row is in a call with them.
    assert sum(len(call.rows) for call in merged) == sum((q + x) % 21 == 0 for q in range(1024) for x in range(8))


def test_describe_counts_what_a_pass_does():
    about = plan_of(window, 2000).describe("forward", torch.float32)
    assert about["calls"] == about["masked"] > 1
    assert about["gathered"] == 0
    assert about["compute"] == "float32"
    assert sum(min(q + 1, 300) for q in range(2000)) < about["pairs"] < 2000 * 700


def test_low_blocks_are_for_cpus_that_are_fast_at_few_rows(machine):
    for pass_ in ("forward", "backward"):
        calls = plan_of(window, 4096).schedule(pass_, torch.float32, 512).all_calls()
        heights = {len(call.rows) for call in calls if isinstance(call.rows, Blocks)}
        assert (max(heights) < 192) is (machine.capability == "AVX2" and pass_ == "forward")


def test_a_cpu_of_another_kind_gets_the_table_that_avoids_few_rows(monkeypatch):
    for capability in ("DEFAULT", "SVE256"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert cpu_costs.candidates("forward", torch.float32) == (cpu_costs._FLOAT32["AVX512"]["forward"],)


@pytest.mark.parametrize("predicate", [causal, window, documents, sinks])
def test_half_types_are_native_where_a_cpu_has_16_bit_products_and_nothing_is_summed(machine, predicate):
    plan = plan_of(predicate, 2000)
    native = {dtype: plan.describe("forward", dtype)["compute"] != "float32" for dtype in HALF}
    assert native == {torch.bfloat16: bool(machine.products) and predicate is not sinks, torch.float16: False}
    assert {plan.describe("backward", dtype)["compute"] for dtype in HALF} == {"float32"}
    assert all(plan.sole(dtype, 64) is None for dtype in HALF)


def test_a_cpu_without_16_bit_products_computes_no_half_type_natively(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not any(c.native for dtype in HALF for p in ("forward", "backward") for c in cpu_costs.candidates(p, dtype))


def test_cheap_heads_get_fewer_larger_calls():
    plan = plan_of(documents, 4096)
    calls = [plan.describe("forward", torch.float32, work)["calls"] for work in (8, 8192)]
    assert calls[0] < calls[1]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_calls_cover_every_visible_pair_once_and_no_other(mask_strategy, kinds_of, machine, data):
    q_len, kv_len = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    mask = data.draw(mask_strategy((1, 2, q_len, kv_len)))
    block_map = BlockMap.from_kinds(kinds_of(mask, (32, 16)), q_len, kv_len, (32, 16))
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):  # columns that all rows see are then always a call of their own
            free = [replace(costs, call=0, column=0) for costs in cpu_costs.candidates("forward", torch.float32)]
            patch.setattr(cpu_strips, "candidates", lambda pass_, dtype: free)
        plan = plan_of_pairs(block_map, lambda b, h, q, kv: mask[b, h, q, kv])
    works = (("forward", 512), ("backward", 512), ("forward", 4), ("forward", 100_000))
    schedules = [plan.schedule(pass_, dtype, work) for pass_, work in works for dtype in machine.dtypes[:1]]
    for schedule in schedules:
        covered = torch.zeros(mask.shape, dtype=torch.int32)
        for (b, h), call in (
            (unit, call) for unit, of in schedule.chains.items() for chain in of for call in chain.calls
        ):
            visible = torch.ones(len(call.rows), len(call.columns), dtype=torch.bool)
            if isinstance(call.mask, Causal):
                assert len(call.rows) == len(call.columns)
                visible = visible.tril()
            elif call.mask is not None:
                visible = plan.additive(call, torch.float32) == 0
            assert visible.any(1).all(), "a row that sees nothing is in a call"
            assert visible.any(0).all(), "a column that nobody sees is in a call"
            for block in range(blocks_of(call)):
                rows, columns = (pick.tokens() + block * len(call.rows) for pick in (call.rows, call.columns))
                merges = covered[b, h, rows].any(1)
                assert (merges == call.merges).all(), "results are written over, or merged with none"
                covered[b, h, rows[:, None], columns] += visible.int()
        assert torch.equal(covered, mask.int())
        assert schedule.complete is bool(mask.any(-1).all())


def assert_chains_apart(plan, pass_):
    """No two chains write to one row, nor, in backward, to one column."""
    lengths = {"rows": plan.block_map.q_len, "columns": plan.block_map.kv_len}
    for chains in plan.schedule(pass_, torch.float32, 512).chains.values():
        for name in ("rows",) if pass_ == "forward" else ("rows", "columns"):
            writer = torch.full((lengths[name],), -1)
            for n, call in ((n, call) for n, chain in enumerate(chains) for call in chain.calls):
                for block in range(blocks_of(call)):
                    tokens = getattr(call, name).tokens() + block * len(call.rows)
                    assert ((writer[tokens] == -1) | (writer[tokens] == n)).all(), f"{name} of two chains"
                    writer[tokens] = n


@settings(max_examples=60)
@given(data=st.data())
def test_chains_write_to_no_token_in_common(mask_strategy, kinds_of, data):
    q_len, kv_len = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    mask = data.draw(mask_strategy((1, 2, q_len, kv_len)))
    block_map = BlockMap.from_kinds(kinds_of(mask, (32, 16)), q_len, kv_len, (32, 16))
    plan = plan_of_pairs(block_map, lambda b, h, q, kv: mask[b, h, q, kv])
    for pass_ in ("forward", "backward"):
        assert_chains_apart(plan, pass_)


@pytest.mark.parametrize("predicate", [causal, window, documents, sinks, dilated])
def test_chains_of_long_masks_write_to_no_token_in_common_and_to_all(predicate):
    plan = plan_of(predicate, 4096)
    for pass_ in ("forward", "backward"):
        assert_chains_apart(plan, pass_)
        assert plan.schedule(pass_, torch.float32, 512).complete


def test_documents_are_chains_of_their_own():
    plan = plan_of(documents, 4096)
    for pass_ in ("forward", "backward"):
        schedule = plan.schedule(pass_, torch.float32, 512)
        assert len(schedule.chains[0, 0]) >= 4096 // 700
        assert sum(chain.cost for chain in schedule.chains[0, 0]) == pytest.approx(schedule.cost)


def test_the_limit_on_kept_bits_is_for_all_heads_together(monkeypatch):
    monkeypatch.setattr(cpu_plan, "_MAX_STORED_BITS", 50_000)
    mask = torch.rand(3, 600, 600) < 0.2  # 45,000 bytes of bits a head
    block_map = BlockMap.from_kinds(torch.ones(1, 3, 5, 5, dtype=torch.int8), 600, 600, (TILE, TILE))
    plan = plan_of_pairs(block_map, lambda b, h, q, kv: mask[h, q, kv])
    kept = [call.mask.packed for calls in plan.strips.values() for call in calls]
    assert 40_000 < sum(bits.nbytes for bits in kept if bits is not None) <= 50_000


def test_shared_masks_stay_within_their_limit(monkeypatch):
    def heights(plan):
        calls = plan.schedule("forward", torch.float32, 512).all_calls()
        return [len(call.rows) for call in calls if isinstance(call.mask, Band)]

    def prefix(q, kv):
        return (q >= kv) | (kv < 600)

    assert max(heights(plan_of(prefix, 3000))) > 64
    monkeypatch.setattr(cpu_cover, "_MAX_BAND_BYTES", 100_000)
    assert max(heights(plan_of(prefix, 3000))) <= 64
