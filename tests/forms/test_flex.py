"""Masks as FlexAttention's BlockMask and back: its own lists, tensor by tensor, and the same pairs and results."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention, or_masks

import maskflash as mf
from maskflash.backends.reference import error_budget, reference
from maskflash.testing import masks

LENGTH = st.integers(1, 64)
BLOCK = st.sampled_from([16, (8, 16), (32, 8)])
LISTS = [
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # by inductor
]


def written(dense):
    """A dense mask as one writes it for FlexAttention."""
    return lambda b, h, q, kv: dense[b, h, q, kv]


def flex_of(dense, block_size=128):
    """The BlockMask that FlexAttention itself makes of a dense mask."""
    batch, heads, q_len, kv_len = dense.shape
    return create_block_mask(written(dense), batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size)


def pairs_of(block_mask, batch, heads):
    """The pairs that FlexAttention's kernels let attend, from the lists and mask_mod."""
    q_len, kv_len = block_mask.seq_lengths
    b, h, q, kv = torch.meshgrid(*map(torch.arange, (batch, heads, q_len, kv_len)), indexing="ij")
    rows, columns = block_mask.BLOCK_SIZE
    tiles = []
    for number, indices in (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        tile = torch.zeros(indices.shape, dtype=torch.bool)
        for place in torch.cartesian_prod(*map(torch.arange, number.shape)).view(-1, 3).tolist():
            tile[*place, indices[*place, : number[*place]].long()] = True
        tiles.append(tile.expand(batch, heads, -1, -1)[b, h, q // rows, kv // columns])
    partial, full = tiles
    return full | (partial & block_mask.mask_mod(b, h, q, kv))


@settings(max_examples=150)
@given(masks(), LENGTH, LENGTH, BLOCK, st.integers(-3, 3))
def test_lists_and_function_are_those_of_create_block_mask(mask, q_len, kv_len, block_size, q_offset):
    try:
        dense = mask.dense(q_len, kv_len, batch=2, heads=2, q_offset=q_offset)
    except mf.MaskIndexError:
        assume(False)
    found = mask.to_block_mask(q_len, kv_len, batch=2, heads=2, block_size=block_size, q_offset=q_offset)
    expected = flex_of(dense, block_size)
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    assert found.seq_lengths == expected.seq_lengths
    for name in LISTS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.expand_as(theirs), theirs), name
    assert torch.equal(pairs_of(found, 2, 2), dense)
    made = create_block_mask(found.mask_mod, 2, 2, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size)
    assert torch.equal(made.kv_indices, expected.kv_indices)  # mask_mod can be mapped over, as FlexAttention does


@settings(max_examples=100)
@given(masks(), LENGTH, LENGTH, BLOCK)
def test_a_mask_comes_back(mask, q_len, kv_len, block_size):
    sizes = {"batch": 2, "heads": 2}
    dense = mask.dense(q_len, kv_len, **sizes)
    for flex in (flex_of(dense, block_size), mask.to_block_mask(q_len, kv_len, **sizes, block_size=block_size)):
        found = mf.from_flex(flex)
        assert torch.equal(found.dense(q_len, kv_len, **sizes), dense)
        again = found.to_block_mask(q_len, kv_len, **sizes, block_size=block_size)
        assert torch.equal(pairs_of(again, 2, 2), dense)


@settings(max_examples=150)
@given(st.integers(0, 2**16), masks(), LENGTH, LENGTH, BLOCK, st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_lists_that_say_more_than_the_function_count(seed, mask, q_len, kv_len, block_size, batch, heads):
    """Any lists, not only those of the function."""
    rows, columns = (block_size, block_size) if isinstance(block_size, int) else block_size
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-q_len // rows), -(-kv_len // columns))
    kinds = torch.randint(0, 3, shape, generator=draw)
    lists = []
    for kind in (1, 2):
        chosen = (kinds == kind).int()
        order = chosen.argsort(dim=3, descending=True, stable=True).int()
        lists += [chosen.sum(3, dtype=torch.int32), order * chosen.gather(3, order.long())]  # then zeros, or anything
    dense = mask.dense(q_len, kv_len, batch=2, heads=2)
    flex = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=(rows, columns), mask_mod=written(dense), seq_lengths=(q_len, kv_len)
    )
    found = mf.from_flex(flex)
    assert torch.equal(found.dense(q_len, kv_len, batch=2, heads=2), pairs_of(flex, 2, 2))


def test_lists_for_all_rows_hold_where_the_function_tells_them_apart():
    """FlexAttention looks at the function in partial tiles alone."""
    ends = torch.tensor([[20, 5], [40, 60]])
    flex = create_block_mask(lambda b, h, q, kv: kv < ends[b, h], None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    found = mf.from_flex(flex).dense(64, 64, batch=2, heads=2)
    assert torch.equal(found, pairs_of(flex, 2, 2))
    assert found[..., 0, :].sum(2).tolist() == [[20, 16], [32, 32]]


def test_the_function_reads_tables_as_the_mask_does():
    """Negative indices wrap; what a guard excludes may be out of range, on either side."""
    table, short = torch.arange(40) % 3 == 0, torch.tensor([True, False, True, True])

    @mf.mask
    def mask(b, h, q, kv):
        return (
            table[q - 20] or (4 <= q < 8 and short[kv % 4] and short[q - 4]) or (kv // (q - 3) == 1 if q > 3 else False)
        )

    found = mask.to_block_mask(40, 40, block_size=8)
    assert torch.equal(pairs_of(found, 1, 1), mask.dense(40, 40))
    made = create_block_mask(found.mask_mod, None, None, 40, 40, device="cpu", BLOCK_SIZE=8)
    assert torch.equal(made.kv_indices, found.kv_indices)


def test_a_function_may_be_out_of_range_where_no_tile_is_listed():
    short = torch.arange(16)
    one, first = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    lists = BlockMask.from_kv_blocks(one, first, BLOCK_SIZE=16, mask_mod=lambda b, h, q, kv: short[kv] <= q)
    found = mf.from_flex(lists).dense(32, 32)[0, 0]
    assert found[:, 16:].sum() == 0
    assert torch.equal(found[:, :16], short <= torch.arange(32)[:, None])


def test_lists_that_say_nothing_leave_the_function_alone():
    """Then analysis goes by columns, not by look-ups of tiles."""
    doc = torch.arange(512) // 100
    flex = create_block_mask(lambda b, h, q, kv: (q >= kv) & (doc[q] == doc[kv]), None, None, 512, 512, device="cpu")
    assert str(mf.from_flex(flex).traced({}).expr).count("table1") == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_runs_under_our_block_mask(compiled):
    doc = torch.tensor([[0] * 100 + [1] * 156, [0] * 30 + [1] * 226])

    @mf.mask
    def mask(b, h, q, kv, *, doc):
        return doc[b, q] == doc[b, kv] and (q >= kv or kv < 10)

    q, k, v = (torch.randn(2, 4, 256, 16) for _ in range(3))
    block_mask = mask.to_block_mask(256, 256, batch=2, heads=4, doc=doc)
    attend = torch.compile(flex_attention, fullgraph=True) if compiled else flex_attention
    found = attend(q, k, v, block_mask=block_mask)
    dense = mask.dense(256, 256, batch=2, heads=4, doc=doc)
    exact, _ = reference(q.double(), k.double(), v.double(), dense, 0.25)
    plain, _ = reference(q, k, v, dense, 0.25)
    assert (found - exact).abs().max() <= error_budget(plain, exact)
    assert (mf.attention(q, k, v, mf.from_flex(block_mask)) - exact).abs().max() <= error_budget(plain, exact)


def test_functions_for_flex_attention_are_masks():
    lengths = torch.tensor([40, 64])
    function = or_masks(
        and_masks(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, lambda b, h, q, kv: kv < lengths[b]),
        lambda b, h, q, kv: (kv < 4) & (h == 1),
    )
    q, k, v = (torch.randn(2, 2, 64, 16) for _ in range(3))
    b, h, row, column = torch.meshgrid(*map(torch.arange, (2, 2, 64, 64)), indexing="ij")
    dense = ((row >= column) & (column < lengths[b])) | ((column < 4) & (h == 1))
    assert torch.equal(mf.mask(function).dense(64, 64, batch=2, heads=2), dense)
    out = mf.compile(function)(q, k, v)
    assert torch.equal(out, mf.attention(q, k, v, function))
    exact, _ = reference(q.double(), k.double(), v.double(), dense, 0.25)
    plain, _ = reference(q, k, v, dense, 0.25)
    assert (out - exact).abs().max() <= error_budget(plain, exact)
    mf.testing.assert_matches_dense(function, mf.testing.Shape(batch=2, heads=2, kv_heads=2))
    assert mf.equivalent(function, mf.from_flex(flex_of(dense)), 64, 64, batch=2, heads=2)


def test_a_block_mask_is_for_its_size():
    found = mf.from_flex(create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 64, 64, device="cpu"))
    q = torch.randn(3, 2, 64, 16)
    assert mf.attention(q, q, q, found & mf.causal()).shape == q.shape
    with pytest.raises(
        mf.ArgumentError, match=r"attention: the BlockMask is for .* \(1, 1, 64, 64\), got \(3, 2, 63, 64"
    ):
        mf.attention(q[:, :, :63], q, q, found)
    with pytest.raises(mf.ArgumentError, match="q_offset is 1, expected 0"):
        mf.attention(q, q, q, found, q_offset=1)
    rows = mf.from_flex(create_block_mask(lambda b, h, q, kv: q + b >= kv, 2, None, 64, 64, device="cpu"))
    with pytest.raises(mf.ArgumentError, match=r"\(2, 1, 64, 64\), got \(3, 2"):
        mf.attention(q, q, q, rows)


def test_what_is_no_block_mask_is_refused():
    with pytest.raises(mf.ArgumentTypeError, match="from_flex: block_mask is a function"):
        mf.from_flex(lambda b, h, q, kv: q >= kv)
    one, first = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    with pytest.raises(mf.ArgumentError, match=r"tile \(0, 0, 0, 0\) is in the list of full tiles and in that"):
        mf.from_flex(BlockMask.from_kv_blocks(one, first, one, first))


def test_one_tile_for_all_pairs_however_large():
    """As FlexAttention makes it where there is no block mask."""
    one, first = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    sizes = {"BLOCK_SIZE": 1 << 30, "seq_lengths": (40, 40)}
    flex = BlockMask.from_kv_blocks(one, first, mask_mod=lambda b, h, q, kv: q >= kv, **sizes)
    assert mf.equivalent(mf.from_flex(flex), mf.causal(), 40, 40)
