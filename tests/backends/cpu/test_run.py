"""CPU attention equals dense float64 attention within the error budget, for every mask, shape, dtype and layout."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from maskflash.backends.cpu import run as cpu
from maskflash.backends.cpu import threads as cpu_threads
from maskflash.backends.reference import error_budget

EXPONENTIALS = 2**-13  # relative error of the kernel's own in half types: its polynomial of degree 3 is off by 1.07e-4


def assert_within_budget(case, plan=None):
    """Each result against float64, allowed twice a plain dense computation's own error plus a rounding unit or two."""
    plan, dtype = plan or case.plan(), case.q.dtype
    got = case.run(plan)
    exact, plain, rounding = case.dense(torch.float64), case.dense(dtype), case.rounding()
    if dtype.itemsize == 2:
        plain["lse"] = case.dense(torch.float32)["lse"]  # the kernel's lse is float32, so it is held to that
    for name, result in got.items():
        assert result.shape == exact[name].shape
        assert result.dtype == plain[name].dtype
        finite = exact[name].isfinite()
        assert torch.equal(result[~finite].double(), exact[name][~finite])
        if finite.any():
            budget = error_budget(plain[name], exact[name]) + 2 * rounding[name]
            budget += EXPONENTIALS if name == "lse" and case.is_native(plan) else 0.0
            error = (result - exact[name])[finite].abs().max().item()
            assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"
    return got


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_results_are_within_the_error_budget_of_float64(cases, machine, data):
    assert_within_budget(data.draw(cases(machine.dtypes)))


def test_exponentials_of_half_types_are_good_to_13_bits():
    # A row sees scores 0 and 63 times -x, for x from 0 to log 2 as two half numbers: all that a polynomial is made for.
    x = torch.linspace(0, 0.7, 4096, dtype=torch.float64)
    high = x.bfloat16()
    q = torch.stack((high, (x - high).bfloat16()), dim=1)[None, None]
    k = torch.full((1, 1, 64, 2), -1.0, dtype=torch.bfloat16)
    k[:, :, 0] = 0
    lse = cpu._kernel(q, k, k, 0.0, False, scale=1.0)[1]
    exact = (q.double() @ k.double().mT).logsumexp(-1)
    assert (lse - exact).abs().max() <= EXPONENTIALS


@pytest.fixture
def side_by_side(monkeypatch):
    """However little there is to do, and with more threads than a test's few calls keep busy."""
    monkeypatch.setattr(cpu_threads, "_WORTH_THREADS", 0)
    monkeypatch.setattr(cpu_threads, "_MAX_WAIT", float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_calls_side_by_side_are_within_the_error_budget_and_the_same_every_time(cases, machine, side_by_side, data):
    case = data.draw(cases(machine.dtypes))
    plan = case.plan()
    results = assert_within_budget(case, plan)
    for name, again in case.run(plan).items():
        assert torch.equal(results[name], again), name


def long_mask(name, q_len, kv_len):
    """Masks long enough to be cut into several calls, of every kind of call."""
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
    ids = torch.tensor([40, 3, 600, 1, 1, 90, 400, 5000]).repeat_interleave(
        torch.tensor([40, 3, 600, 1, 1, 90, 400, 5000])
    )
    generator = torch.Generator().manual_seed(7)
    evicted = torch.where(kv % 2 == 0, 5000, torch.randint(400, 1100, (kv_len,), generator=generator))
    return {
        "causal": q >= kv,
        "bottom_right": q + kv_len - q_len >= kv,
        "anticausal": q <= kv,
        "window": (q - kv < 100) & (q - kv >= 0),
        "two_sided_window": (q - kv).abs() < 150,
        "causal_documents": (q >= kv) & (ids[q] == ids[kv]),
        "documents": ids[q] == ids[kv],
        "prefix": (q >= kv) | (kv < 70),
        "sinks": ((q - kv < 64) | (kv < 4)) & (q >= kv),
        "global": (kv < 16) | (q < 16) | ((q - kv).abs() <= 130),
        "shared_prefixes": (q >= kv) & (ids[q] == ids[kv]) & ((kv % 300 < 110) | (q // 70 == kv // 70)),
        "evicted": (q >= kv) & (q < evicted),
        "dilated": (q - kv < 300) & (q >= kv) & ((q - kv) % 7 == 0),
    }[name]


LONG = ["causal", "bottom_right", "anticausal", "window", "two_sided_window", "causal_documents", "documents", "prefix"]
MERGED = ["sinks", "global", "shared_prefixes", "evicted"]  # rows are in several calls


@pytest.fixture(scope="session")
def long_case(make_case):
    """Builds a Case of a long mask."""

    def build(name, q_len=1100, kv_len=1100, dtype=torch.float32, dlse=True):
        q, dout = (torch.randn(1, 2, q_len, 8).to(dtype) for _ in range(2))
        k, v = (torch.randn(1, 1, kv_len, 8).to(dtype) for _ in range(2))
        mask = long_mask(name, q_len, kv_len)[None, None]
        return make_case(mask, (64, 64), q, k, v, dout, torch.randn(1, 2, q_len) if dlse else None, 0.4)

    return build


@pytest.mark.parametrize("name", [*LONG, *MERGED, "dilated"])
def test_long_masks_are_within_the_error_budget(long_case, machine, side_by_side, name):
    case = long_case(name, dtype=machine.dtypes[0])
    plan = case.plan()
    assert case.is_native(plan) is (bool(machine.products) and name not in MERGED)
    assert_within_budget(case, plan)


@pytest.mark.parametrize("name", [*LONG, *MERGED, "dilated"])
def test_long_masks_with_more_columns_than_rows_are_within_the_error_budget(long_case, side_by_side, name):
    assert_within_budget(long_case(name, 700, 1201))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_nobody_sees_may_hold_anything(cases, machine, data):
    case = data.draw(cases(machine.dtypes, max_len=150))
    junk = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    rows, columns = ~case.seen, ~case.used
    dirty = case.with_tensors(
        q=case.q.masked_fill(rows[..., None], junk),
        dout=case.dout.masked_fill(rows[..., None], junk),
        k=case.k.masked_fill(columns[..., None], junk),
        v=case.v.masked_fill(columns[..., None], junk),
        dlse=None if case.dlse is None else case.dlse.masked_fill(rows, junk),
    )
    # The same layouts as the clean side, so that nothing but the values differs.
    clean = case.with_tensors(**{n: getattr(dirty, n).nan_to_num(0, 0, 0) for n in ("q", "k", "v", "dout")})
    clean = clean.with_tensors(dlse=None if case.dlse is None else dirty.dlse.nan_to_num(0, 0, 0))
    plan = case.plan()
    for (name, got), want in zip(dirty.run(plan).items(), clean.run(plan).values(), strict=True):
        assert torch.equal(got, want), name
        assert not got.isnan().any(), name


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_that_see_nothing_give_zero_and_no_gradient(cases, machine, data):
    case = data.draw(cases(machine.dtypes, max_len=150))
    got = case.run()
    assert (got["out"][~case.seen] == 0).all()
    assert (got["lse"][~case.seen] == -torch.inf).all()
    assert (got["dq"][~case.seen] == 0).all()
    assert (got["dk"][~case.used] == 0).all()
    assert (got["dv"][~case.used] == 0).all()


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_same_inputs_give_the_same_bits(cases, machine, data):
    case = data.draw(cases(machine.dtypes, max_len=150))
    plan = case.plan()
    case.run(plan)  # a used plan has schedules and shared masks that a new one has not
    for (name, first), second in zip(case.run(plan).items(), case.run().values(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("layout", ["q", "k", "v", "dout"])
def test_a_tensor_may_be_expanded_over_its_tokens(long_case, layout):
    # Rows at distance zero: the kernel's products refuse them, so they are copied.
    case = long_case("causal_documents")
    x = getattr(case, layout)
    assert_within_budget(case.with_tensors(**{layout: x[:, :, :1].expand(x.shape)}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_stay_finite(long_case, machine, dtype):
    if dtype not in machine.dtypes:
        pytest.skip("as on machines that compute nothing natively")
    case = long_case("causal", dtype=dtype, dlse=False)
    # 8 x 120 x 120 is beyond float16's 65,504
    q, k = (torch.full_like(x, 120.0) * torch.randn((*x.shape[:3], 1)).sign().to(dtype) for x in (case.q, case.k))
    case = case.with_tensors(q=q, k=k, scale=1.0)
    got = case.run()
    exact = case.dense(torch.float64)
    assert all(result.isfinite().all() for result in got.values())
    # A float32 lse of 115,200 is a unit of 0.008 away from exact, and that is a factor of the probabilities.
    unit = torch.finfo(dtype).eps + 115_200 * torch.finfo(torch.float32).eps
    for name in ("out", "lse", "dv"):
        assert (got[name] - exact[name]).abs().max() <= unit * exact[name].abs().max(), name


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (1, 1, 0, 0)])
def test_empty_batches_and_sequences(make_case, shape):
    batch, heads, q_len, kv_len = shape
    q, k, v = (
        torch.randn(batch, heads, q_len, 4),
        torch.randn(batch, heads, kv_len, 4),
        torch.randn(batch, heads, kv_len, 3),
    )
    dout, dlse = torch.randn(batch, heads, q_len, 3), torch.randn(batch, heads, q_len)
    got = make_case(torch.ones(1, 1, q_len, kv_len, dtype=torch.bool), (16, 16), q, k, v, dout, dlse, 1.0).run()
    assert got["out"].shape == (batch, heads, q_len, 3)
    assert (got["lse"] == -torch.inf).all()
    assert [got[n].shape for n in ("dq", "dk", "dv")] == [q.shape, k.shape, v.shape]
    assert not any(got[n].any() for n in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("name", MERGED)
def test_results_of_half_types_are_rounded_once_where_calls_are_merged(long_case, machine, name):
    case = long_case(name, dtype=torch.bfloat16, dlse=False)
    plan = case.plan()
    assert plan.schedule("forward", torch.bfloat16, 16).merges
    exact, got = case.dense(torch.float64)["out"], case.run(plan)["out"]
    assert ((got - exact).abs() <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-5).all()


def test_gradients_of_half_types_are_rounded_once(long_case, machine):
    # The first 70 columns are in every call: their sums would be rounded once per call.
    case = long_case("prefix", 2000, 2000, dtype=torch.bfloat16, dlse=False)
    plan = case.plan()
    assert plan.describe("backward", torch.bfloat16, 16)["calls"] > 4
    exact, got = case.dense(torch.float64)["dv"], case.run(plan)["dv"]
    allowed = 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-5
    if case.is_native(plan):  # an error of lse is a factor of the probabilities
        allowed += EXPONENTIALS * case.with_tensors(dout=case.dout.abs()).dense(torch.float64)["dv"]
    assert ((got - exact).abs() <= allowed).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(50_000, 16), (16, 50_000)])
def test_gradients_of_half_types_are_good_however_many_terms_they_sum(make_case, machine, q_len, kv_len):
    # One call is hundreds of the kernel's blocks: gradients rounded after each of them would be off by a tenth.
    q, dout = torch.randn(1, 1, q_len, 8), torch.randn(1, 1, q_len, 8) + 1
    k, v = torch.randn(2, 1, 1, kv_len, 8) + 1
    tensors = (x.bfloat16() for x in (q, k, v, dout))
    assert_within_budget(make_case(torch.ones(1, 1, q_len, kv_len, dtype=torch.bool), (128, 128), *tensors, None, 0.4))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_sliding_windows_over_batches_and_heads(make_case, heads, kv_heads, per_batch, per_head):
    # Windows are computed many blocks at once, over whichever dimensions the mask leaves.
    planes = torch.stack([long_mask(name, 900, 900) for name in ("window", "two_sided_window")])
    mask = planes.repeat(4, 1, 1)[: (2 if per_batch else 1) * (heads if per_head else 1)]
    mask = mask.reshape(2 if per_batch else 1, heads if per_head else 1, 900, 900)
    q, dout = (torch.randn(2, 900, heads, 8).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, 900, 8) for _ in range(2))
    case = make_case(mask, (64, 64), q, k, v, dout, torch.randn(2, heads, 900), 0.4)
    plan = case.plan()
    assert any(getattr(call.rows, "count", 1) > 2 for call in plan.schedule("backward", torch.float32, 64).all_calls())
    assert_within_budget(case, plan)


@pytest.mark.parametrize(
    ("documents", "threads", "worth", "beside"),
    [
        ([400] * 4, 2, 0, 4),
        ([400] * 3, 2, 0, 2),  # the third would be waited for: it is made on all cores
        ([1500, 300, 300], 2, 0, 0),  # most of the work is one document
        ([400] * 4, 1, 0, 0),
        ([400] * 4, 2, 1 << 60, 0),
    ],
)
def test_documents_are_made_side_by_side_where_no_thread_waits_long(monkeypatch, documents, threads, worth, beside):
    jobs = []
    monkeypatch.setattr(cpu.WORKERS, "side_by_side", lambda given: jobs.extend(given) or [job() for job in given])
    monkeypatch.setattr(cpu_threads, "_WORTH_THREADS", worth)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q = torch.randn(1, 2, sum(documents), 8)
    out = mf.compile(mf.causal() & mf.document(documents))(q, q, q)
    assert len(jobs) == beside
    alone = [scaled_dot_product_attention(x, x, x, is_causal=True) for x in q.split(documents, 2)]
    torch.testing.assert_close(out, torch.cat(alone, 2))
