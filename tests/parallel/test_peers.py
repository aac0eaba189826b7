"""Which ranks a process exchanges tokens and heads with, in groups and meshes."""

import pytest
import torch

import maskflash as mf

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
distributed = pytest.importorskip("torch.distributed")
from maskflash.parallel.peers import find_ranks  # noqa: E402


@pytest.fixture
def become():
    """This process as any rank of a group: what is sent never arrives."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank, size):
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield become
    if distributed.is_initialized():
        distributed.destroy_process_group()


def members(peers):
    """Global ranks, in their order."""
    return [distributed.get_global_rank(peers.group, rank) for rank in peers.ranks]


def test_rows_of_a_group_exchange_heads_and_columns_tokens(become):
    for rank in range(6):
        become(rank, 6)
        for group in (None, distributed.group.WORLD, distributed.init_device_mesh("cpu", (6,))):
            found = find_ranks(group, 6, 2)
            assert (found.rank, found.tokens.place, found.heads.place) == (rank, rank // 2, rank % 2)
            assert members(found.heads) == [rank // 2 * 2, rank // 2 * 2 + 1]
            assert members(found.tokens) == [rank % 2, rank % 2 + 2, rank % 2 + 4]
            assert [members(peers) for peers in found.everyone] == [list(range(6))]


def test_a_mesh_of_two_dimensions_brings_its_own_groups_and_its_own_order(become):
    """Ranks are numbered along the mesh, whose groups have sorted theirs."""
    order = [[3, 1], [2, 0], [5, 4]]
    for rank in range(6):
        become(rank, 6)
        mesh = distributed.DeviceMesh("cpu", order)
        found = find_ranks(mesh, 6, 2)
        t, h = mesh.get_coordinate()
        assert order[t][h] == rank and found.rank == t * 2 + h
        assert (found.tokens.place, found.heads.place) == (t, h)
        assert members(found.heads) == order[t] and members(found.tokens) == [row[h] for row in order]
        assert (found.heads.group, found.tokens.group) == (mesh.get_group(1), mesh.get_group(0))


def test_one_rank_needs_no_group():
    found = find_ranks(None, 1)
    x, y = torch.arange(6).reshape(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    assert found.heads.all_to_all(y, x, [3], [3]) is None and torch.equal(x, y)
    assert torch.equal(found.gather(x), x[None])
    with pytest.raises(mf.ArgumentError, match=r"the plan has 2 ranks and .*init_process_group first"):
        find_ranks(None, 2)


def test_groups_that_do_not_fit_the_plan_are_refused(become):
    become(0, 6)
    with pytest.raises(mf.ArgumentError, match="group has 6 ranks, expected the plan's 4; make a plan of world_size=6"):
        find_ranks(None, 4)
    for shape in ((2, 3), (6, 1), (3, 2, 1)):
        with pytest.raises(mf.ArgumentError, match=r"a mesh of .* expected \(6,\) or \(3, 2\), \(tokens, heads\)"):
            find_ranks(distributed.init_device_mesh("cpu", shape), 6, 2)
    with pytest.raises(mf.ArgumentTypeError, match="group is of type list, expected a process group"):
        find_ranks([0, 1], 6)
    others = distributed.new_group([1, 2])
    for outside, ranks in ((others, 2), (distributed.DeviceMesh("cpu", [1, 2]), 2)):
        with pytest.raises(mf.ArgumentError, match="this process is not in group"):
            find_ranks(outside, ranks)
