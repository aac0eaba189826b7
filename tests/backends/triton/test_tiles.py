"""The table of tiles: every case has a row, and what `choose` gives divides the blocks and fits the device."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from maskflash.backends.triton.tiles import ROWS, SHARED_LIMITS, Tile, candidates, choose, shared_bytes, shrunk
from maskflash.errors import BackendError

PASSES = ("forward", "split", "dkdv", "dq")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def test_every_family_pass_width_and_head_dim_has_one_row():
    found = [(row.arch, row.pass_name, row.bits, row.head_dim) for row in ROWS]
    assert len(found) == len(set(found))
    wanted = {*product((80, 86, 90, 100, "gfx942", "gfx950"), PASSES, (16, 32), (64, 128, 256))}
    wanted |= {*product(("gfx1201",), PASSES, (16,), (64, 128))}
    wanted |= {*product((90,), ("hopper",), (16,), (64, 128, 256))}
    wanted |= {*product((90,), ("hopper_dkdv", "hopper_dq"), (16,), (64, 128))}
    wanted |= {*product((86, 90, 100), ("forward",), (8,), (64, 128, 256))}
    more = set(found) - wanted
    assert len(found) - len(more) == len(wanted)
    assert {head_dim for *_, head_dim in more} == {120}  # what is masked within 128


def test_a_head_dim_between_takes_the_next_row_and_the_memory_of_its_power_of_two():
    assert choose(80, "dq", torch.float16, 72, (128, 128)) == Tile(32, 64, 4, 2)
    assert choose(80, "dq", torch.float16, 64, (128, 128)) == Tile(128, 32, 4, 3)
    assert choose(80, "dq", torch.float16, 192, (128, 128)) == choose(80, "dq", torch.float16, 256, (128, 128))
    assert shared_bytes(80, "dq", Tile(64, 64, 4, 2), 2, 80) == shared_bytes(80, "dq", Tile(64, 64, 4, 2), 2, 128)


def test_every_row_says_where_it_comes_from():
    assert {row.source for row in ROWS} == {"static gate"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.pass_name}-{row.bits}-{row.head_dim}")
def test_a_row_serves_its_own_case_unchanged(row):
    dtype = {8: torch.float8_e4m3fn, 16: torch.bfloat16, 32: torch.float32}[row.bits]
    assert choose(row.arch, row.pass_name, dtype, row.head_dim, (128, 128)) == row.tile


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        *((80, 80), (86, 86), (87, 86), (89, 86), (90, 90), (103, 100), (120, 86)),
        *(("gfx942", "gfx942"), ("gfx1200", "gfx1201")),
    ],
)
def test_a_family_serves_its_relatives(arch, family):
    for pass_name in PASSES:
        mine, its = (choose(n, pass_name, torch.float16, 128, (128, 128)) for n in (arch, family))
        assert mine == its


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("block_size", [(128, 128), (64, 128), (16, 48), (96, 256), (1024, 16)])
def test_a_tile_divides_the_blocks(block_size, head_dim):
    for arch, pass_name, dtype in product((80, 86, 90, 100, "gfx942"), PASSES, DTYPES):
        tile = choose(arch, pass_name, dtype, head_dim, block_size)
        assert block_size[0] % tile.block_m == 0
        assert block_size[1] % tile.block_n == 0
        assert min(tile.block_m, tile.block_n) >= 16


@pytest.mark.parametrize("limit", [48 * 1024, 64 * 1024, 99 * 1024, 163 * 1024, None])
def test_a_tile_fits_the_shared_memory(limit):
    for arch, pass_name, dtype, dim in product((80, 86, 90, 100, "gfx950"), PASSES, DTYPES, (64, 128, 256)):
        tile = choose(arch, pass_name, dtype, dim, (128, 128), limit)
        smallest = shrunk(pass_name, tile, dtype) is None
        assert smallest or shared_bytes(arch, pass_name, tile, dtype.itemsize, dim) <= (limit or SHARED_LIMITS[arch])


def test_less_shared_memory_gives_a_smaller_tile():
    large, small = (choose(90, "forward", torch.bfloat16, 128, (128, 128), limit) for limit in (None, 101_376))
    assert shared_bytes(90, "forward", small, 2, 128) <= 101_376 < shared_bytes(90, "forward", large, 2, 128)


def test_a_limit_that_nothing_fits_still_gives_the_smallest_tile():
    assert choose(80, "dkdv", torch.float32, 256, (128, 128), 1024) == Tile(16, 16, 4, 1)


def test_shrinking_ends_at_the_smallest_tile():
    tile, steps = Tile(128, 128, 8, 3), 0
    while (smaller := shrunk("dq", tile, torch.bfloat16)) is not None:
        assert smaller.block_m * smaller.block_n * smaller.stages < tile.block_m * tile.block_n * tile.stages
        tile, steps = smaller, steps + 1
    assert (tile.block_m, tile.block_n, tile.stages) == (16, 16, 1)
    assert steps == 8


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_look_ups_of_pairs_take_shorter_steps_and_count_as_shared_memory(arch):
    for pass_name, dim in product(PASSES, (64, 128)):
        plain, biased = (choose(arch, pass_name, torch.bfloat16, dim, (128, 128), None, n) for n in (0, 1))
        walked = "block_m" if pass_name == "dkdv" else "block_n"
        steps = getattr(plain, walked)
        assert biased == replace(plain, **{walked: steps // 2 if steps > 32 else steps})
        tiles = 4 * biased.block_m * biased.block_n * (biased.stages - 1)
        sizes = [shared_bytes(arch, pass_name, biased, 2, dim, n) for n in (0, 1, 2)]
        assert [n - sizes[0] for n in sizes] == [0, tiles, 2 * tiles]
    assert choose(arch, "dtables", torch.bfloat16, 64, (128, 128)) == choose(arch, "dq", torch.bfloat16, 64, (128, 128))


@pytest.mark.parametrize("pass_name", PASSES)
def test_steps_shrink_before_stages_and_what_a_program_holds_comes_last(pass_name):
    tiles = [Tile(64, 64, 4, 3)]
    while (smaller := shrunk(pass_name, tiles[-1], torch.bfloat16)) is not None:
        tiles.append(smaller)
    order = ("block_n", "block_m") if pass_name == "dkdv" else ("block_m", "block_n")
    sizes = [(*(getattr(tile, side) for side in order), tile.stages) for tile in tiles]
    assert sizes == [(64, 64, 3), (64, 32, 3), (64, 32, 2), (64, 32, 1), (32, 32, 1), (32, 16, 1), (16, 16, 1)]


def test_what_the_compiler_is_told():
    assert Tile(64, 32, 4, 2).options == {"num_warps": 4, "num_stages": 2}
    assert Tile(64, 32, 4, 2, registers=128).options == {"num_warps": 4, "num_stages": 2, "maxnreg": 128}


def test_shared_memory_follows_the_formula():
    # Forward holds q (64 rows) and 2 stages of k and v (32 rows each); P is 64 x 32; all of D = 128 in 2 bytes.
    tile = Tile(64, 32, 4, 2)
    assert shared_bytes(90, "forward", tile, 2, 128) == 2 * (64 * 128 + 2 * 2 * 32 * 128 + 64 * 32) + 12288
    # Before Hopper there is a buffer less.
    assert shared_bytes(80, "forward", tile, 2, 128) == 2 * (64 * 128 + 2 * 32 * 128 + 64 * 32) + 12288
    # On AMD's GPUs q (64 rows) and the buffers of k and v (64 rows together) take turns.
    assert shared_bytes("gfx942", "forward", tile, 2, 128) == 2 * (64 * 128 + 64 * 32) + 12288
    # dK/dV holds k and v (32 rows each); unpipelined it has q, dO and one of them transposed (64 rows each).
    tile = Tile(64, 32, 4, 1)
    assert shared_bytes(90, "dkdv", tile, 4, 64) == 4 * (2 * 32 * 64 + 3 * 64 * 64 + 2 * 64 * 32) + 12288


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "block_size", "message"),
    [
        (75, torch.float16, 64, (128, 128), r"compute capability 8\.0 or later, got 7\.5"),
        (90, torch.float64, 64, (128, 128), r"16- and 32-bit types and head dims to 256 here, got float64, 64"),
        (90, torch.float16, 512, (128, 128), r"head dims to 256 here, got float16, 512"),
        (90, torch.float16, 64, (128, 40), r"multiples of 16, got 40"),
        ("gfx1200", torch.float16, 192, (128, 128), r"16-bit types and head dims to 128 here, got float16, 192"),
        ("gfx1201", torch.float32, 64, (128, 128), r"16-bit types and head dims to 128 here, got float32, 64"),
        ("gfx90a", torch.float16, 64, (128, 128), r"serves AMD's gfx942, gfx950, gfx1200, gfx1201, got gfx90a"),
    ],
)
def test_what_no_row_serves_is_an_error(arch, dtype, dim, block_size, message):
    with pytest.raises(BackendError, match=message):
        choose(arch, "forward", dtype, dim, block_size)


@pytest.mark.parametrize("tile", dict.fromkeys(row.tile for row in ROWS), ids=str)
def test_candidates_are_the_tile_and_what_differs_in_one_thing(tile):
    found = list(candidates(tile, torch.bfloat16))
    assert found[0] == tile
    assert len(set(found)) == len(found) > (1 if tile.consumers else 3)
    for other in found[1:]:
        assert sum(getattr(other, name) != getattr(tile, name) for name in Tile.__slots__) == 1
        assert {other.block_m, other.block_n} <= {16, 32, 64, 128}
        assert other.warps in (4, 8) or other.warps == tile.warps == 4 * (tile.consumers + 1)
        assert other.stages >= 1


@pytest.mark.parametrize("row", [row for row in ROWS if row.bits == 8], ids=lambda row: f"{row.arch}-{row.head_dim}")
def test_tiles_of_8_bits_have_64_rows_and_32_keys_at_least(row):
    for block_size, limit in product(product((64, 128, 192), (32, 64, 128)), (None, 1 << 15)):
        tile = choose(row.arch, "forward", torch.float8_e4m3fn, row.head_dim, block_size, limit)
        assert tile.block_m >= 64
        found = [*candidates(tile, torch.float8_e4m3fn)]
        while tile is not None:
            found.append(tile)
            tile = shrunk("forward", tile, torch.float8_e4m3fn)
        assert all(one.block_m >= 64 and one.block_n >= 32 for one in found)
        assert (found[-1].block_m, found[-1].block_n, found[-1].stages) == (64, 32, 1)
