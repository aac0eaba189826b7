"""What keeps a call from Hopper's own forward, and how its tensors are mapped. The kernel itself: tests/ptx."""

from types import SimpleNamespace

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import hopper
from maskflash.backends.triton.render import render
from maskflash.backends.triton.signature import Specialisation, signature
from maskflash.backends.triton.tiles import SHARED_LIMITS, candidates, choose, shared_bytes, shrunk


@pytest.fixture
def h100(monkeypatch):
    """A device of compute capability 9.0, which doesn't interpret."""
    monkeypatch.setattr(gpu, "arch", lambda device: 90)
    monkeypatch.setattr(gpu, "interprets", lambda: False)


def reason(length=256, dim=64, v_dim=64, dtype=torch.bfloat16, block_size=(128, 128)):
    q, v = torch.empty(1, 2, length, dim, dtype=dtype), torch.empty(1, 2, length, v_dim, dtype=dtype)
    problem = mf.causal().at(q.shape[2], length, batch=1, heads=2).tiled(block_size)
    return hopper.why_not(problem, q, v, hopper.FORWARD)


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64), (256, 192)])
@pytest.mark.parametrize("dims", [(64, 64), (256, 40), (8, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_against_it(h100, block_size, dims, dtype):
    assert reason(block_size=block_size, dim=dims[0], v_dim=dims[1], dtype=dtype) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"dtype": torch.float32}, ["float16 and bfloat16", "got float32"]),
        ({"dim": 264}, ["head dims to 256", "got 264"]),
        ({"v_dim": 320}, ["head dims to 256", "got 320"]),
        ({"block_size": (64, 128)}, ["128 x 64", "(64, 128)"]),
        ({"block_size": (128, 32)}, ["128 x 64", "(128, 32)"]),
    ],
)
def test_what_is_against_it(h100, call, words):
    said = reason(**call)
    assert all(word in said for word in words), said


def test_other_devices(h100, monkeypatch):
    for arch, words in ((80, "8.0"), (100, "10.0"), ("gfx942", "gfx942")):
        monkeypatch.setattr(gpu, "arch", lambda device, arch=arch: arch)
        assert words in reason()


def test_the_interpreter(h100, monkeypatch):
    monkeypatch.setattr(gpu, "interprets", lambda: True)
    assert "interpreter" in reason()


def test_a_triton_without_gluon(h100, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(gpu, "importlib", SimpleNamespace(import_module=missing))
    monkeypatch.setattr(gpu, "library", lambda: SimpleNamespace(__version__="3.4.0"))
    said = reason()
    assert "Gluon" in said
    assert "3.4.0" in said


def test_what_is_expanded_is_copied():
    x, y = torch.randn(1, 2, 5, 8), torch.randn(2, 2, 5, 8)
    found = hopper.mapped(k=x.expand(3, -1, -1, -1), v=y)
    assert found["v_desc"] is y
    assert found["k_desc"].is_contiguous()
    assert torch.equal(found["k_desc"], x.expand(3, -1, -1, -1))


def test_the_text_has_the_same_masks():
    """Steps of the portable kernel and of Hopper's own compute what is visible with the same statements."""
    special = Specialisation(mf.mask(lambda b, h, q, kv: (q ^ kv) % 3 == 0).at(64, 64).tiled((128, 64)).expr)
    ours, portable = (render(special, name) for name in ("hopper", "forward"))
    lines = [line.strip() for line in portable.splitlines() if line.strip().startswith(("visible = ", "x"))]
    assert len(lines) > 3
    assert set(lines) <= {line.strip() for line in ours.splitlines()}
    names = {parameter.name for line in signature(special, "hopper") for parameter in line}
    assert {"q_desc", "k_desc", "v_desc", "out_desc", "STAGES", "REGISTERS"} <= names


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("columns", [64, 128])
def test_tiles_fit_and_shrink_to_rings_of_two_slots(dim, columns):
    tile = choose(90, "hopper", torch.bfloat16, dim, (128, columns))
    assert (tile.block_m, tile.consumers, tile.options) == (128, 2, {"num_warps": 4})
    assert tile.block_n <= columns
    assert shared_bytes(90, "hopper", tile, 2, dim) <= SHARED_LIMITS[90]
    while (smaller := shrunk("hopper", tile, torch.bfloat16)) is not None:
        assert shared_bytes(90, "hopper", smaller, 2, dim) < shared_bytes(90, "hopper", tile, 2, dim)
        tile = smaller
    assert tile.stages == 2  # with one, consumers and producer wait for one another
    assert all(near.stages >= 2 for near in candidates(tile, torch.bfloat16))
