"""On a GPU: what the interpreter can't show. bfloat16, long sequences, streams, CUDA graphs, nothing compiled twice."""

import gc
import os
import warnings

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import kernel_choice, modules, tile_choice
from maskflash.backends.triton.tiles import HOPPER_BACKWARD_DIM
from maskflash.op import cache
from maskflash.testing import Shape, assert_matches_dense

pytestmark = pytest.mark.skipif(
    os.environ.get("MASKFLASH_TEST_DEVICE") != "cuda", reason="runs on a GPU, with MASKFLASH_TEST_DEVICE=cuda"
)

MASKS = {
    "full": mf.full(),
    "causal": mf.causal(),
    "window": mf.sliding_window(200, 30),
    "documents": mf.causal() & mf.document([300, 1, 555, 190]),
    "per head": mf.mask(lambda b, h, q, kv: q - kv < 64 * (h + 1) and kv <= q + b),
    "prefix": mf.prefix_lm(333),
    "natten": mf.natten(32, 33, 7, 5),
}


SHAPES = [
    Shape(2, 4, 2, 1056, 1056, 128, 128),
    Shape(1, 8, 1, 1000, 1111, 64, 64),
    Shape(1, 2, 2, 515, 700, 80, 48),
    Shape(1, 2, 1, 300, 300, 256, 256),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Each mask in each dtype and each dtype in each shape, once: a device's minutes are for other things.
PAIRED = [
    (name, dtype, SHAPES[(number + shift) % len(SHAPES)])
    for shift, dtype in enumerate(DTYPES)
    for number, name in enumerate(MASKS)
]
LAYOUTS = [("lts",), ("lts", "lte"), ("lts", "ute"), ("lts", "lte", "uts", "ute")]


@pytest.mark.parametrize(("name", "dtype", "shape"), PAIRED, ids=str)
def test_masks_dtypes_and_shapes_match_dense_float64(name, dtype, shape):
    assert_matches_dense(MASKS[name], shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(("name", "dtype", "shape"), [case for case in PAIRED if case[1] != torch.float32], ids=str)
def test_hopper_s_own_kernels_match_dense_float64(monkeypatch, name, dtype, shape):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("is for compute capability 9.0")
    monkeypatch.setenv(kernel_choice.VARIABLE, "hopper")
    chosen = {"choose": [], "choose_backward": []}
    for which, found in chosen.items():
        choose = getattr(kernel_choice, which)
        monkeypatch.setattr(kernel_choice, which, lambda *call, f=found, c=choose: f.append(c(*call)) or f[-1])
    assert_matches_dense(MASKS[name], shape, dtype=dtype, device="cuda")
    assert {choice.pass_name for choice in chosen["choose"]} == {"hopper"}
    served = max(shape.head_dim, shape.v_head_dim) <= HOPPER_BACKWARD_DIM
    assert {choice.own for choice in chosen["choose_backward"]} == {served}


@pytest.mark.parametrize(
    ("names", "causal", "dtype"),
    [
        (names, causal, torch.bfloat16 if (number + causal) % 2 else torch.float32)
        for number, names in enumerate(LAYOUTS)
        for causal in (False, True)
    ],
)
def test_column_intervals_match_dense_float64(names, causal, dtype):
    draw = torch.Generator().manual_seed(len(names))
    vectors = {name: torch.randint(0, 1000, (2, 2, 1111), generator=draw, dtype=torch.int32).cuda() for name in names}
    mask = mf.ColumnIntervals(**vectors, causal=causal)
    assert_matches_dense(mask, Shape(2, 4, 2, 1000, 1111, 128, 128), dtype=dtype, device="cuda")


def tensors(length=1024, dtype=torch.bfloat16, device="cuda"):
    return (x.requires_grad_() for x in torch.randn(3, 2, 4, length, 64, device=device, dtype=dtype).unbind())


def test_same_inputs_same_bits():
    q, k, v = tensors()
    attn = mf.compile(MASKS["documents"])
    first, second = (torch.autograd.grad(attn(q, k, v).sin().sum(), (q, k, v)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nothing_is_compiled_for_another_length_window_or_document():
    def compiled():
        return sum(
            len(kernels)
            for module in modules._modules.values()
            for kernel in vars(module).values()
            if hasattr(kernel, "device_caches")
            for kernels, *_ in kernel.device_caches.values()
        )

    def run(length, window, lengths):
        q, k, v = tensors(length)
        mf.attention(q, k, v, mf.sliding_window(window) & mf.document(lengths)).sum().backward()

    run(1024, 100, [500, 524])
    before = compiled()
    assert before > 0
    run(1000, 1, [3, 4])
    run(640, 0, [640])
    assert compiled() == before


def step(attn, q, k, v, dout):
    out = attn(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def fresh(length):
    """A mask that no plan knows, with blind rows, so that all of a plan is made."""
    return mf.causal() & mf.document([length // 3, length // 2]) & mf.sliding_window(length // 5)


def test_streams_that_wait_for_nobody():
    """Plans made on one stream are read on another at once; the kernels' own inputs are ready."""
    for length in (1000, 1016, 1024):
        q, k, v = tensors(length)
        dout = torch.randn_like(q)
        torch.cuda.synchronize()
        attn, found = mf.compile(fresh(length)), []
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                found.append(step(attn, q, k, v, dout))
        torch.cuda.synchronize()
        assert same(*found)
        assert same(found[0], step(attn, q, k, v, dout))


@pytest.fixture
def waits():
    """What torch notes of the waits of a call, `torch.cuda.set_sync_debug_mode` having asked for it."""

    def of(call):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in noted)

    assert of(lambda: torch.ones(3, device="cuda").sum().item()) == 1
    return of


def test_an_analysis_waits_for_its_tables_once_or_not_at_all(waits, monkeypatch):
    def asked(*args):
        raise AssertionError("the host waited")

    for thing in (torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(thing, "synchronize", asked)
    length = 1008
    q, k, v = tensors(length)
    dout = torch.randn_like(q)
    ids = (torch.arange(length) // 301).repeat(2, 1)
    mine, weight, offset = ids.cuda(), torch.rand(7).cuda(), torch.tensor([0, -3]).cuda()

    @mf.mask
    def packed(b, h, q, kv, *, doc, weight):
        return q >= kv and doc[b, q] == doc[b, kv] and weight[h] < 2

    masks = {  # with waits of the first step
        "no table": (mf.sliding_window(77), {}, 0),
        "captured on the CPU": (fresh(length), {}, 0),
        "on the GPU": (packed, {"doc": mine, "weight": weight}, 1),
        "offset too": (packed, {"doc": mine, "weight": weight, "q_offset": offset}, 1),
    }
    for name, (mask, mask_args, most) in masks.items():
        attn = mf.compile(mask)

        def run(attn=attn, mask_args=mask_args):
            torch.autograd.grad(attn(q, k, v, **mask_args), (q, k, v), dout)

        assert (name, waits(run)) == (name, most)
        assert (name, waits(run)) == (name, 0)


def test_a_mask_that_has_not_run_is_refused_in_a_capture():
    q, k, v = tensors(1000)
    ids = (torch.arange(1000) // 333).cuda()
    run = mf.compile(lambda b, h, q, kv: ids[q] == ids[kv])
    for attn in (run, mf.compile(fresh(1000) & mf.sliding_window(41))):
        with (
            pytest.raises(mf.BackendError, match="CUDA graph is being captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            attn(q, k, v)
    mf.attention(q, k, v, mf.causal())  # the device is as it was


def test_a_dtype_that_has_not_run_is_refused_in_a_capture_unless_it_was_warmed():
    attn = mf.compile(MASKS["window"])
    attn(*(x.detach() for x in tensors(1000, torch.bfloat16)))  # the plan is known
    q, k, v = (x.detach() for x in tensors(1000, torch.float16))
    with pytest.raises(mf.BackendError, match="a kernel of this call"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attn(q, k, v)
    attn.warm(1000, 1000, batch=2, heads=4, head_dim=64, dtype=torch.float16, backward=False, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    graph.replay()
    assert torch.equal(out, attn(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_inside_a_vector(dtype):
    q, k, v = tensors(500, dtype)

    def off(x):
        return torch.cat((x.new_zeros(1), x.detach().flatten()))[1:].view(x.shape).requires_grad_()

    attn, dout = mf.compile(MASKS["documents"]), torch.randn_like(q)
    assert same(step(attn, *map(off, (q, k, v)), off(dout).detach()), step(attn, q, k, v, dout))


def test_a_captured_step_replays_and_outlives_its_plan():
    q, k, v = tensors()
    dout = torch.randn_like(q)
    attn = mf.compile(fresh(1024))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(attn, q, k, v, dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(attn, q, k, v, dout)
    cache._entries.clear()
    gc.collect()
    for length in range(512, 640, 16):  # others take the memory that is free
        mf.attention(*tensors(length), fresh(length))
    with torch.no_grad():
        for x in (q, k, v, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert same(captured, step(attn, q, k, v, dout))


def recorded(run):
    """A graph of a call that has run before, and what the call returns."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


@pytest.mark.parametrize("splits", ["auto", 1, 7])
@pytest.mark.parametrize("name", ["causal", "window", "sinks and window", "by request"])
def test_a_captured_step_over_pages_replays_with_other_lengths(name, splits):
    """Lengths, table, starts and the mask's own table are written in place; up to what the table holds."""
    own = torch.tensor([9, 700, 30, 1], device="cuda")
    mask, given = {
        "causal": (mf.causal(), {}),
        "window": (mf.sliding_window(200), {}),
        "sinks and window": (mf.causal() & (mf.global_tokens(4) | mf.sliding_window(300)), {}),
        "by request": (mf.mask(lambda b, h, q, kv, *, own: own[b] <= kv + 100 <= q + 100), {"own": own}),
    }[name]
    table = torch.randperm(4 * 128 + 5, device="cuda")[: 4 * 128].view(4, 128).int()
    pages = mf.PageTable(table, torch.tensor([2048, 900, 40, 17], device="cuda"), 16)
    pools = torch.randn(2, 4 * 128 + 5, 16, 2, 128, device="cuda", dtype=torch.bfloat16).unbind()
    q, starts = (
        torch.randn(4, 8, 128, device="cuda", dtype=torch.bfloat16),
        torch.tensor([0, 1, 2, 3, 4], device="cuda"),
    )
    attn = mf.compile(mask, splits=splits)

    def run():
        packed = attn.paged(q, *pools, pages, cu_seqlens_q=starts, return_lse=True, **given)
        return *packed, *attn.paged(q[:, :, None], *pools, pages, return_lse=True, **given)

    graph, found = recorded(run)
    for lengths, ends in (([1, 2, 3, 4], [0, 1, 2, 3, 4]), ([2048, 2047, 1, 800], [0, 3, 3, 4, 4])):
        pages.lengths.copy_(torch.tensor([max(n, 3) for n in lengths]))
        starts.copy_(torch.tensor(ends))
        table.copy_(table[torch.randperm(4, device="cuda")])
        own.add_(1)
        graph.replay()
        assert same(found, run())
        told = mf.compile(mask, splits=splits, check=True)  # reads all of it on the host, and gathers
        for ours, theirs in zip(
            found[2:], told.paged(q[:, :, None], *pools, pages, return_lse=True, **given), strict=True
        ):
            torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2, equal_nan=True)


def test_a_captured_step_replays_at_another_place():
    q, k, v = (x.detach() for x in Shape(2, 8, 2, 1, 4096, 128, 128).tensors(torch.bfloat16, device="cuda"))
    offset, lengths = torch.tensor([4095, 7], device="cuda"), torch.tensor([5000, 4000], device="cuda")
    attn = mf.compile(lambda b, h, q, kv, *, lengths: q - 900 <= kv <= q and kv < lengths[b])
    graph, found = recorded(lambda: attn(q, k, v, q_offset=offset, lengths=lengths, return_lse=True))
    for moved in (1, 100, 2000):
        offset.copy_((offset + moved) % 4096)
        lengths.sub_(moved)
        graph.replay()
        assert same(found, attn(q, k, v, q_offset=offset, lengths=lengths, return_lse=True))


def test_steps_wait_for_nothing():
    q, k, v = (x.detach() for x in Shape(2, 8, 2, 1, 4096, 64, 64).tensors(torch.bfloat16, device="cuda"))
    attn = mf.compile(mf.sliding_window(500))
    attn(q, k, v, q_offset=4095)
    assert waits(lambda: attn(q, k[:, :, :4000], v[:, :, :4000], q_offset=3999)) == 0
    offset = torch.tensor([5, 3000], device="cuda")
    attn(q, k, v, q_offset=offset)
    assert waits(lambda: attn(q, k, v, q_offset=offset + 1)) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one():
    assert_matches_dense(MASKS["documents"], Shape(1, 2, 1, 300, 300, 64, 64), dtype=torch.float16, device="cuda:1")


def test_measured_tiles_give_the_same_attention(monkeypatch, tmp_path):
    monkeypatch.setenv(modules.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tile_choice, "_known", {})
    q, k, v = tensors()
    dout = torch.randn_like(q)
    mask = mf.causal() & mf.document([600, 424])
    listed = step(mf.compile(mask), q, k, v, dout)
    measured = step(mf.compile(mask, tune=True), q, k, v, dout)
    for x, y in zip(measured, listed, strict=True):
        assert (x - y).float().norm() < 2**-7 * y.float().norm()
    assert len(list((tmp_path / "tiles").iterdir())) == 3


def test_tf32_only_if_torch_is_told():
    q, k, v = (x.detach() for x in tensors(300, torch.float32))
    exact = mf.attention(q, k, v, mf.causal())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        coarse = mf.attention(q, k, v, mf.causal())
    finally:
        torch.set_float32_matmul_precision(before)
    error = float((coarse - exact).norm() / exact.norm())
    assert 1e-6 < error < 3e-3
    assert torch.equal(exact, mf.attention(q, k, v, mf.causal()))


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("documents", torch.bfloat16, Shape(2, 4, 2, 333, 515, 80, 40)),
        ("per head", torch.bfloat16, Shape(1, 8, 1, 129, 257, 64, 128)),
        ("natten", torch.float32, Shape(2, 4, 2, 333, 515, 80, 40)),
    ],
    ids=str,
)
def test_beyond_the_memory_of_a_call_lies_nothing_it_reads(dtype, name, shape):
    """q, k and v inside larger ones of NaN. `make gpu-test` also runs it under a checker that sees what is written."""

    def framed(x):
        frame = torch.full((*x.shape[:2], x.shape[2] + 16, x.shape[3] + 16), torch.nan, dtype=dtype, device="cuda")
        inside = frame[:, :, 8:-8, 8:-8]
        return inside.copy_(x.detach()).requires_grad_()

    inputs = shape.tensors(dtype, device="cuda")
    dout = torch.randn(*inputs[0].shape[:3], shape.v_head_dim, device="cuda", dtype=dtype)
    attn = mf.compile(MASKS[name])
    offset = torch.tensor([3, 7], device="cuda")[: shape.batch]

    def results(q, k, v):
        out, lse = attn(q, k, v, q_offset=offset, return_lse=True)
        return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, torch.ones_like(lse)))

    assert same(results(*map(framed, inputs)), results(*inputs))


def test_offsets_beyond_31_bits():
    q, k, v = (
        torch.randn(3, 1, 1, 2**17 + 100, 128, device="cuda", dtype=torch.float16).expand(3, 1, 150, -1, -1).unbind()
    )
    q = q.contiguous()  # over 2**31 elements
    rows = slice(2**17, None)
    out = mf.attention(q, k, v, mf.sliding_window(300))
    expected = mf.attention(q[:, 149:, rows], k[:, 149:], v[:, 149:], mf.sliding_window(300), q_offset=2**17)
    torch.testing.assert_close(out[:, 149:, rows], expected)
