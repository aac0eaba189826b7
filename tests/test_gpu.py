"""On a GPU: what the interpreter can't show. bfloat16, long sequences, streams, CUDA graphs, nothing compiled twice."""

import os

import pytest
import torch

import maskflash as mf
from maskflash.codegen import module_cache
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


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 4, 2, 1056, 1056, 128, 128),
        Shape(1, 8, 1, 1000, 1111, 64, 64),
        Shape(1, 2, 2, 515, 700, 80, 48),
        Shape(1, 2, 1, 300, 300, 256, 256),
    ],
    ids=str,
)
def test_masks_dtypes_and_shapes_match_dense_float64(name, dtype, shape):
    assert_matches_dense(MASKS[name], shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("names", [("lts",), ("lts", "lte"), ("lts", "ute"), ("lts", "lte", "uts", "ute")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
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
            for module in module_cache._modules.values()
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


def test_another_stream_and_a_cuda_graph():
    q, k, v = (x.detach() for x in tensors())
    attn = mf.compile(MASKS["documents"])
    expected = attn(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = attn(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attn(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, attn(q, k, v))


def test_offsets_beyond_31_bits():
    q, k, v = (
        torch.randn(3, 1, 1, 2**17 + 100, 128, device="cuda", dtype=torch.float16).expand(3, 1, 150, -1, -1).unbind()
    )
    q = q.contiguous()  # over 2**31 elements
    rows = slice(2**17, None)
    out = mf.attention(q, k, v, mf.sliding_window(300))
    expected = mf.attention(q[:, 149:, rows], k[:, 149:], v[:, 149:], mf.sliding_window(300), q_offset=2**17)
    torch.testing.assert_close(out[:, 149:, rows], expected)
