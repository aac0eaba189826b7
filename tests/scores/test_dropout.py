"""Which pairs dropout keeps: as specified, the same however a call is cut, and as random as independent pairs.

Every statistic is of fixed seeds, so no test can fail by chance: bounds say how unlikely that would be of true
randomness.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskflash.scores import dropout
from maskflash.scores.dropout import drop, keep, kept, philox, row_words, threshold, words
from maskflash.scores.strength import Dropout
from maskflash.testing import dropout_keep

SIDE = 1024
SHARES = [0.001, 0.01, 0.1, 0.3, 0.5, 0.75, 0.9]


def seeded(seed, p=0.1, q_offset=0, kv_offset=0):
    return Dropout(p, torch.tensor([seed]), q_offset, kv_offset)


def deviations(p, seed=1, batch=1, heads=1, side=SIDE):
    """Dropped pairs with mean 0 and variance 1: (batch, heads, side, side)."""
    return ((~keep(seeded(seed, p), batch, heads, side, side)).float() - p) / math.sqrt(p * (1 - p))


def sigmas(products):
    """How many standard deviations the sum of uncorrelated numbers of variance 1 is off 0."""
    return abs(products.double().sum().item()) / math.sqrt(products.numel())


# --------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_is_the_published_one(counter, key, expected):
    found = philox(tuple(torch.tensor([x]) for x in counter), tuple(torch.tensor([x]) for x in key))
    assert [x.item() for x in found] == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, -(2**63)])
def test_words_are_philox_of_positions(seed):
    batch, heads, q_len, kv_len = 2, 3, 4, 5
    q_offset, kv_offset = torch.tensor([7, -3]), 2**33 - 2
    rows, columns = words(seeded(seed, q_offset=q_offset, kv_offset=kv_offset), batch, heads, q_len, kv_len)
    key = tuple(torch.tensor([x]) for x in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    for side, (found, starts) in enumerate([(rows, [7, -3]), (columns, [kv_offset] * 2)]):
        for b, h, i in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
            counter = tuple(torch.tensor([x & 0xFFFFFFFF]) for x in (starts[b] + i, h, b, side))
            assert found[b, h, i].item() & 0xFFFFFFFF == philox(counter, key)[0].item() | 1


def test_a_pair_is_a_product_and_a_comparison():
    rows, columns = words(seeded(3), 2, 2, 33, 65)
    products = rows.long()[..., :, None] * columns.long()[..., None, :] & 0xFFFFFFFF
    flipped = products ^ 0x80000000  # the order of int32
    assert torch.equal(kept(rows, columns, threshold(0.1)), flipped >= round(0.1 * 2**32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 0.5, 1 - 1e-15])
def test_what_is_dropped_is_zeroed_and_nothing_else(dtype, p):
    rows, columns = words(seeded(3), 2, 2, 33, 65)
    x = torch.randn(2, 2, 33, 65, dtype=dtype)
    x[0, 0, :4, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    expected = x.masked_fill(~kept(rows, columns, threshold(p)), 0.0)
    drop(x, rows[..., :, None] * columns[..., None, :], threshold(p))
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_a_product_at_the_threshold_is_kept():
    x = torch.ones(4)
    drop(x, torch.tensor([-(2**31), 6, 7, 8], dtype=torch.int32), 7)
    assert x.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("p", "least"), [(0.0, -(2**31)), (0.5, 0), (0.25, -(2**30)), (1 - 1e-15, 2**31 - 1)])
def test_thresholds_fit_int32(p, least):
    assert threshold(p) == least


def test_nothing_is_dropped_at_0():
    assert dropout_keep(5, 0.0, 1, 2, 64, 64).all()


# ----------------------------------------------------------------------------------- the same however a call is cut


@pytest.mark.parametrize("offset", [0, 1000, -40, 2**32 - 20])
def test_a_part_of_a_call_keeps_what_the_whole_does(offset):
    whole = dropout_keep(7, 0.3, 2, 3, 100, 90, q_offset=offset, kv_offset=offset + 5)
    part = dropout_keep(7, 0.3, 2, 3, 40, 30, q_offset=offset + 33, kv_offset=offset + 57)
    assert torch.equal(part, whole[:, :, 33:73, 52:82])


def test_offsets_of_batch_rows():
    whole = dropout_keep(7, 0.3, 2, 2, 64, 64)
    starts, ends = torch.tensor([3, 20], dtype=torch.int32), torch.tensor([8, 0])
    part = dropout_keep(7, 0.3, 2, 2, 16, 24, q_offset=starts, kv_offset=ends)
    assert torch.equal(part[0], whole[0, :, 3:19, 8:32])
    assert torch.equal(part[1], whole[1, :, 20:36, :24])


def test_more_rows_and_heads_change_none():
    whole, part = dropout_keep(7, 0.3, 3, 4, 32, 32), dropout_keep(7, 0.3, 2, 2, 32, 32)
    assert torch.equal(part, whole[:2, :2])


def test_any_tile_is_a_part():
    drop = seeded(9, 0.2)
    whole, (rows, columns) = keep(drop, 1, 2, 96, 160), words(drop, 1, 2, 96, 160)
    for tile in (16, 33, 64):
        bands = zip(rows.split(tile, 2), whole.split(tile, 2), strict=True)
        assert all(torch.equal(kept(band, columns, threshold(0.2)), expected) for band, expected in bands)


def test_rows_alone_and_columns_alone():
    drop = seeded(9, q_offset=4, kv_offset=torch.tensor([1, 2]))
    rows, columns = words(drop, 2, 3, 10, 20)
    assert torch.equal(row_words(drop, 2, 3, 10), rows)
    assert torch.equal(dropout.column_words(drop, 2, 3, 20), columns)
    assert row_words(drop, 2, 3, 0).shape == (2, 3, 0)


def test_fake_tensors_have_its_shape():
    with FakeTensorMode():
        found = keep(seeded(3, q_offset=torch.zeros(2, dtype=torch.int64)), 2, 3, 10, 20)
    assert (found.shape, found.dtype) == ((2, 3, 10, 20), torch.bool)


def test_compiled_it_is_the_same():
    def run(seed, q_offset):
        return keep(Dropout(0.3, seed, q_offset), 2, 2, 40, 50)

    args = torch.tensor([-3]), torch.tensor([5, 9])
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(*args), run(*args))


# -------------------------------------------------------------------------------------- as random as independent pairs


@pytest.mark.parametrize("p", SHARES)
def test_the_share_is_p(p):
    assert sigmas(deviations(p, batch=2, heads=4)) < 3


@pytest.mark.parametrize("dim", [2, 3], ids=["columns", "rows"])
@pytest.mark.parametrize("p", SHARES)
def test_the_share_of_rows_and_columns_is_binomial(p, dim):
    chi_square = deviations(p, heads=4).double().sum(dim).square() / SIDE
    excess = 2 + (1 / (p * (1 - p)) - 6) / SIDE  # variance of one such square
    assert abs(chi_square.sum().item() - chi_square.numel()) < 4 * math.sqrt(excess * chi_square.numel())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (0, 64), (128, 0), (7, 3)])
def test_neighbours_are_uncorrelated(p, step):
    x = deviations(p, heads=2)
    down, right = step
    shifted = x.roll((-down, -right), (2, 3))
    inside = slice(max(0, -right), SIDE - max(0, right))
    assert sigmas((x * shifted)[:, :, : SIDE - down, inside]) < 4


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_pairs_and_their_mirrors_are_uncorrelated(p):
    x = deviations(p, heads=2)
    assert sigmas((x * x.mT)[:, :, *torch.triu_indices(SIDE, SIDE, 1)]) < 4
    assert sigmas(x.diagonal(dim1=2, dim2=3)) < 4


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_heads_and_batch_rows_are_uncorrelated(p):
    x = deviations(p, batch=4, heads=4).flatten(0, 1).flatten(1)
    between = (x @ x.mT / math.sqrt(x.shape[1])).triu(1)
    assert between.abs().max() < 4.5


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_seeds_are_uncorrelated(p):
    near = [0, 1, 2, 3, 4, 2**16, 2**31, 2**32, 2**32 + 1, 2**62, -1, -2]
    x = torch.cat([deviations(p, seed).flatten(2).flatten(0, 1) for seed in near])
    between = (x @ x.mT / math.sqrt(x.shape[1])).triu(1)
    assert between.abs().max() < 4.5


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_pairs_of_rows_are_uncorrelated(p):
    """All of them, also as a whole: their correlations have variance 1 / SIDE."""
    x = deviations(p)[0, 0]
    for side in (x, x.mT):
        between = (side @ side.mT / math.sqrt(SIDE))[*torch.triu_indices(SIDE, SIDE, 1)]
        kurtosis = 3 + (1 / (p * (1 - p)) - 3) ** 2 / SIDE  # of a sum of SIDE products of two deviations
        assert between.square().mean() == pytest.approx(1, abs=0.02)
        assert between.pow(4).mean() == pytest.approx(kurtosis, rel=0.1)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_rows_and_columns_stand_out_together(p):
    """The largest singular value is that of independent pairs, 2 sqrt(SIDE), plus its Tracy-Widom spread."""
    largest = torch.linalg.matrix_norm(deviations(p)[0, 0], 2).item()
    assert largest / math.sqrt(SIDE) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_corners_of_rectangles_are_uncorrelated(p):
    """Four pairs of two rows and two columns: their words have three degrees of freedom."""
    x = deviations(p, heads=8)
    product = x * x.roll(1, 2) * x.roll(1, 3) * x.roll((1, 1), (2, 3))
    assert sigmas(product[:, :, 1::2, 1::2]) < 4


def poor_mixer(rows, columns, threshold):
    """An xor and a product: the sign of what comes out is the exclusive or of both signs and of something else."""
    return (rows[..., :, None] ^ columns[..., None, :]) * 0x7FEB352D >= threshold


@pytest.mark.parametrize("test", [test_pairs_of_rows_are_uncorrelated, test_no_rows_and_columns_stand_out_together])
def test_a_poor_mixer_is_found(monkeypatch, test):
    monkeypatch.setattr(dropout, "kept", poor_mixer)
    with pytest.raises(AssertionError):
        test(0.5)
