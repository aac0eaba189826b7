"""Tensors of any layout become what kernels address: dense rows of whole vectors, the same values, no needless copy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskflash.backends.triton.layout import ALIGNMENT, UNIT, addressed, cut, laid_out, padded, whole, without_hidden

LAYOUTS = {
    "as it is": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda x: torch.stack((x, x), -1)[..., 0],
    "columns first": lambda x: x.mT.contiguous().mT,
    "inside another": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3 : 3 + x.shape[3]],
    "one head for all": lambda x: x[:, :1].expand(x.shape),
    "one token for all": lambda x: x[:, :, :1].expand(x.shape),
    "one number for all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@given(st.sampled_from(list(LAYOUTS)), st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))
def test_whatever_the_layout_rows_are_dense_and_whole_vectors(name, heads, tokens, dim):
    x = LAYOUTS[name](torch.randn(2, heads, tokens, dim))
    (found,) = laid_out(x)
    assert found.shape == (2, heads, tokens, whole(dim))
    assert torch.equal(found[..., :dim], x)
    assert not found[..., dim:].any()
    sizes = found.shape
    assert sizes[3] % UNIT == 0
    steps = [(size, step) for size, step in zip(sizes, found.stride(), strict=True) if size > 1]
    assert found.stride(3) == 1
    assert all(step % UNIT == 0 for _, step in steps[:-1])
    named = {f"x_{dimension}": step // UNIT for dimension, step in zip("bhs", found.stride()[:3], strict=True)}
    assert addressed(x=found) == {"x_ptr": found, **named}
    assert torch.equal(cut(found, dim), x)
    assert cut(found, dim).is_contiguous() or cut(found, dim) is found


@pytest.mark.parametrize("name", ["as it is", "tokens first", "one head for all", "one token for all"])
def test_what_can_be_addressed_is_not_copied(name):
    x = LAYOUTS[name](torch.randn(2, 3, 5, 24))
    assert laid_out(x)[0] is x
    assert cut(x, 24) is x


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 17), st.booleans())
def test_only_what_begins_inside_a_vector_is_moved(dtype, skipped, strided):
    """A part of a packed buffer may begin at any element; `contiguous()` would leave it there."""
    memory = torch.randn(17 + 2 * 3 * 5 * 24).to(dtype)[skipped:]
    x = memory[: 2 * 3 * 5 * 24].view(2, 3, 5, 24)
    x = x.transpose(1, 2) if strided else x
    (found,) = laid_out(x)
    assert found.data_ptr() % ALIGNMENT == 0
    assert torch.equal(found, x)
    assert (found is x) == (x.data_ptr() % ALIGNMENT == 0)


def test_tokens_too_far_apart_for_32_bits_are_brought_together():
    far = torch.empty_strided((1, 1, 2, 8), (0, 0, 2**23, 1), device="meta")
    assert laid_out(far)[0].stride(2) == 8
    near = torch.empty_strided((1, 1, 2, 8), (0, 0, 2**23 - 8, 1), device="meta")
    assert laid_out(near)[0] is near


@pytest.mark.parametrize(("dim", "power"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (192, 256)])
def test_powers_of_two(dim, power):
    assert padded(dim) == power


def test_hidden_tokens_become_zeros_unless_a_head_of_the_group_sees_them():
    x = torch.full((2, 2, 3, 8), torch.nan)
    assert without_hidden(None, x)[0] is x
    seen = torch.tensor([[True, False, False], [False, False, True], [False] * 3, [False] * 3])[None]
    (found,) = without_hidden(seen, x)  # four query heads, two key heads
    assert found[:, 0, [0, 2]].isnan().all()
    assert not found[:, 0, 1].any()
    assert not found[:, 1].any()
