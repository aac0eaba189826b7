"""What keeps a call from Hopper's own backward. The kernels themselves: tests/ptx."""

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import hopper
from maskflash.backends.triton.launch import copied_rows
from maskflash.backends.triton.render import render, spread
from maskflash.backends.triton.signature import Specialisation, signature
from maskflash.backends.triton.tiles import SHARED_LIMITS, choose, shared_bytes, shrunk


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """A device of compute capability 9.0, which doesn't interpret."""
    monkeypatch.setattr(gpu, "arch", lambda device: 90)
    monkeypatch.setattr(gpu, "interprets", lambda: False)


def reason(length=256, dim=64, v_dim=64, dtype=torch.bfloat16, block_size=(128, 128)):
    q, v = torch.empty(1, 2, length, dim, dtype=dtype), torch.empty(1, 2, length, v_dim, dtype=dtype)
    problem = mf.causal().at(length, length, batch=1, heads=2).tiled(block_size)
    return hopper.why_not(problem, q, v, hopper.BACKWARD)


@pytest.mark.parametrize("block_size", [(128, 128), (256, 128), (128, 384)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 40), (8, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_against_it(block_size, dims, dtype):
    assert reason(block_size=block_size, dim=dims[0], v_dim=dims[1], dtype=dtype) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"dtype": torch.float32}, ["float16 and bfloat16", "got float32"]),
        ({"dim": 136}, ["head dims to 128", "got 136"]),
        ({"v_dim": 256}, ["head dims to 128", "got 256"]),
        ({"block_size": (64, 128)}, ["128 x 128", "(64, 128)"]),
        ({"block_size": (128, 64)}, ["128 x 128", "(128, 64)"]),
    ],
)
def test_what_is_against_it(call, words):
    said = reason(**call)
    assert all(word in said for word in words), said


def test_what_is_against_the_forward_is_against_it(monkeypatch):
    monkeypatch.setattr(gpu, "arch", lambda device: 80)
    assert "8.0" in reason()


@pytest.mark.parametrize(("ours", "portable"), [("hopper_dkdv", "dkdv"), ("hopper_dq", "dq")])
def test_the_text_has_the_same_masks(ours, portable):
    """Steps of both compute what is visible with the same statements."""
    special = Specialisation(mf.mask(lambda b, h, q, kv: (q ^ kv) % 3 == 0).at(64, 64).tiled((128, 128)).expr)
    texts = [render(special, name) for name in (ours, portable)]
    mine, its = ({line.strip() for line in text.splitlines()} for text in texts)
    lines = {line for line in its if line.startswith("x")}
    assert len(lines) > 2
    assert lines <= mine
    names = {parameter.name for line in signature(special, ours) for parameter in line}
    assert {"q_desc", "k_desc", "v_desc", "dout_desc", "STAGES", "REGISTERS"} <= names


def test_numbers_of_columns_go_to_pairs_just_before_they_are_used():
    lines = {
        "columns": ["x1 = kv + 1", "# x2 = a remark", "x2 = tl.load(t0 + x1)", "x3 = x2 * 2"],
        "pairs": ["# x3 in a remark", "x4 = q[:, None] < x2[None, :]", "x5 = x4 & (x2 != 0)[None, :]"],
    }
    assert spread(lines, "columns", "x5 & x3[None, :]") == [
        lines["pairs"][0],
        "x2 = tl.convert_layout(x2, OF_COLUMNS)",
        *lines["pairs"][1:],
        "x3 = tl.convert_layout(x3, OF_COLUMNS)",
    ]


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("pass_name", ["hopper_dkdv", "hopper_dq"])
def test_tiles_fit_and_shrink_to_rings_of_two_slots(pass_name, dim):
    tile = choose(90, pass_name, torch.bfloat16, dim, (128, 128))
    held = "k_desc" if pass_name == "hopper_dkdv" else "q_desc"
    assert (copied_rows(held, pass_name, tile), tile.consumers, tile.options) == (64, 2, {"num_warps": 4})
    assert shared_bytes(90, pass_name, tile, 2, dim) <= SHARED_LIMITS[90]
    while (smaller := shrunk(pass_name, tile, torch.bfloat16)) is not None:
        tile = smaller
    assert tile.stages == 2
