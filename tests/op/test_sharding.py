"""DTensors split over the batch or the heads: each rank computes its part, under the mask of the whole."""

import socket
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
distributed = pytest.importorskip("torch.distributed.tensor")
DTensor, Shard, Replicate, Partial = (getattr(distributed, n) for n in ("DTensor", "Shard", "Replicate", "Partial"))

doc = torch.arange(30).expand(4, -1) // torch.tensor([[7], [9], [30], [1]])
heads = torch.tensor([3, 0, 8, 1])
by_row = mf.mask(lambda b, h, q, kv: (q >= kv) & (doc[b, q] == doc[b, kv]))
by_head = mf.mask(lambda b, h, q, kv: (q - kv <= heads[h]) & (kv <= q))
by_both = mf.mask(lambda b, h, q, kv: (kv % (h + 1) == 0) | (doc[b, q] < doc[b, kv]))


@mf.mask
def packed(b, h, q, kv, *, ids):
    return q >= kv and ids[b, q] == ids[b, kv]


@pytest.fixture
def world():
    """Processes that are only this one, as any of their ranks: what is sent never arrives."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank, *shape):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        size = torch.Size(shape).numel()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        _clear_sharding_prop_cache()  # meshes are equal whichever rank they are seen from
        return distributed.init_device_mesh("cpu", shape)

    yield become
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def tensors(batch=4, kv_heads=2, tokens=30):
    shapes = (batch, 4, tokens, 8), (batch, kv_heads, tokens, 8), (batch, kv_heads, tokens, 12)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)]


def held(x, mesh, placements):
    """What the mesh's rank of a tensor holds."""
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = x.chunk(mesh.size(dim), placement.dim)
            at = mesh.get_local_rank(dim)
            x = parts[at] if at < len(parts) else x.narrow(placement.dim, 0, 0)
    return x


def spread(x, mesh, placements):
    """A whole tensor as a DTensor, by slicing."""
    local = held(x, mesh, placements).clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def trained(tensors, mask, **given):
    """out, lse and gradients."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    out, lse = mf.attention(q, k, v, mask, return_lse=True, **given)
    (out.square().sum() + lse.exp().sum()).backward()
    return [out, lse, q.grad, k.grad, v.grad]


def assert_parts_equal_the_whole(world, shape, placements, mask, batch=4, **given):
    whole = trained(tensors(batch), mask, **given)
    for rank in range(torch.Size(shape).numel()):
        mesh = world(rank, *shape)
        parts = trained([spread(x, mesh, placements) for x in tensors(batch)], mask, **given)
        for part, expected in zip(parts, whole, strict=True):
            assert part.shape == expected.shape
            torch.testing.assert_close(part.to_local().detach(), held(expected, mesh, placements).detach())


@pytest.mark.parametrize("mask", [None, by_row, by_head, by_both], ids=["full", "by row", "by head", "by both"])
@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((2,), [Shard(0)]),
        ((2,), [Shard(1)]),
        ((3,), [Shard(0)]),
        ((2,), [Replicate()]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Shard(0), Shard(0)]),
    ],
    ids=["batch", "heads", "batch unevenly", "replicated", "both", "batch twice"],
)
def test_each_rank_computes_its_part_of_the_whole(world, shape, placements, mask):
    assert_parts_equal_the_whole(world, shape, placements, mask)


def test_a_rank_without_rows_computes_nothing(world):
    assert_parts_equal_the_whole(world, (3,), [Shard(0)], by_row, batch=2)


def test_offsets_and_tables_as_arguments_are_those_of_the_rank_s_rows(world):
    given = {"q_offset": torch.tensor([0, 3, 9, 1]), "ids": torch.arange(60).expand(4, -1) // doc[:, -1:].add(5)}
    assert_parts_equal_the_whole(world, (2,), [Shard(0)], packed, **given)
    mesh = world(1, 2)
    parts = [spread(x, mesh, [Shard(0)]) for x in tensors()]
    replicated = {name: spread(x, mesh, [Replicate()]) for name, x in given.items()}
    expected = mf.attention(*tensors(), packed, **given)
    assert torch.equal(mf.attention(*parts, packed, **replicated).to_local(), expected[2:])
    assert torch.equal(mf.attention(*tensors(), packed, **replicated), expected)


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)], [Replicate()]], ids=["batch", "heads", "replicated"])
def test_sinks_are_those_of_the_rank_s_heads(world, placements):
    """Their gradient is of the rank's rows, to be summed over the ranks that share the batch."""
    sinks, on_heads = torch.linspace(-1, 2, 4), placements == [Shard(1)]
    whole = [x.requires_grad_() for x in (*tensors(), sinks)]
    expected, lse = mf.attention(*whole[:3], by_both, sinks=whole[3], return_lse=True)
    for rank in range(2):
        mesh = world(rank, 2)
        laid_out = [Shard(0)] if on_heads else [Replicate()]
        parts = [spread(x.detach(), mesh, placements) for x in whole[:3]]
        out, part_lse = mf.attention(*parts, by_both, sinks=spread(sinks.detach(), mesh, laid_out), return_lse=True)
        torch.testing.assert_close(out.to_local(), held(expected, mesh, placements).detach())
        torch.testing.assert_close(part_lse.to_local(), held(lse, mesh, placements).detach())
        if placements == [Shard(0)]:  # needs a sum over ranks, and what is sent here never arrives
            continue
        given = [x.requires_grad_() for x in (*parts, spread(sinks.detach(), mesh, laid_out))]
        mf.attention(*given[:3], by_both, sinks=given[3]).square().sum().to_local().backward()
        truth = torch.autograd.grad(expected.square().sum(), whole[3], retain_graph=True)[0]
        torch.testing.assert_close(given[3].grad.to_local(), held(truth, mesh, laid_out))


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)], [Replicate()]], ids=["batch", "heads", "replicated"])
def test_scores_and_dropout_are_those_of_the_whole_call_s_pairs(world, placements):
    """What a table learns on a rank is a part, to be summed over the ranks."""
    table = torch.randn(4, 4, 30, requires_grad=True)

    def biased(score, b, h, q, kv):
        return score + table[b, h, kv] * (q - kv)

    whole = [x.requires_grad_() for x in tensors()]
    given = {"score": biased, "dropout_p": 0.4, "seed": 5}
    expected = mf.attention(*whole, by_both, **given)
    truth = torch.autograd.grad(expected.square().sum(), table)[0]
    for rank in range(2):
        mesh = world(rank, 2)
        parts = [spread(x.detach(), mesh, placements).requires_grad_() for x in whole]
        out = mf.attention(*parts, by_both, **given)
        torch.testing.assert_close(out.to_local(), held(expected, mesh, placements).detach())
        replicated = spread(table.detach(), mesh, [Replicate()])
        fixed = mf.attention(*parts, by_both, **{**given, "score": mf.scores.bias(replicated[:, :, None])})
        plain = mf.attention(*whole, by_both, **{**given, "score": mf.scores.bias(table.detach()[:, :, None])})
        torch.testing.assert_close(fixed.to_local(), held(plain, mesh, placements).detach())
        if placements != [Replicate()]:  # needs a sum over ranks, and what is sent here never arrives
            continue
        out.square().sum().to_local().backward()
        torch.testing.assert_close(table.grad, truth)
        table.grad = None


@given(mask=mf.testing.masks(), shape=mf.testing.shapes(), b=st.integers(0, 3), h=st.integers(0, 3))
@settings(max_examples=30)
def test_a_shifted_mask_is_the_mask_of_shifted_indices(mask, shape, b, h):
    from maskflash.analysis.problem import Problem
    from maskflash.expr.evaluate import Inputs
    from maskflash.functions.slots import expression
    from maskflash.op.parts import shifted

    slots, values = mask.slots({})
    params, tables = slots.filled(values, torch.device("cpu"))
    text = shifted(slots.text, ("b", "h"), len(params))
    at = [torch.arange(n).view([-1 if i == dim else 1 for i in range(4)]) for dim, n in enumerate((4, 4, 9, 9))]
    small = Problem(expression(slots.text), Inputs(tuple(params), tuple(tables)), q_len=9, kv_len=9, batch=4, heads=4)
    moved = Problem(expression(text), Inputs((*params, b, h), tuple(tables)), q_len=9, kv_len=9, batch=4, heads=4)
    inside = at[0][: 4 - b], at[1][:, : 4 - h], *at[2:]
    try:
        expected = small.visible(inside[0] + b, inside[1] + h, *inside[2:])
    except mf.MaskIndexError:
        return
    assert torch.equal(moved.visible(*inside).expand(4 - b, 4 - h, 9, 9), expected.expand(4 - b, 4 - h, 9, 9))


def test_what_can_t_be_split_is_refused_by_name(world):
    mesh = world(0, 2)
    q, k, v = tensors()
    whole = [spread(x, mesh, [Replicate()]) for x in (q, k, v)]
    for dim, along in ((2, "tokens"), (3, "head dim")):
        with pytest.raises(mf.ArgumentError, match=rf"q is a DTensor split along {along}.* q.redistribute"):
            mf.attention(spread(q, mesh, [Shard(dim)]), *whole[1:], by_row)
        with pytest.raises(mf.ArgumentError, match=rf"k is a DTensor split along {along}.* k.redistribute"):
            mf.attention(whole[0], spread(k, mesh, [Shard(dim)]), whole[2], by_row)
    with pytest.raises(mf.ArgumentError, match=r"along tokens.*, or attend on shards of a plan: maskflash.parallel"):
        mf.attention(spread(q, mesh, [Shard(2)]), *whole[1:], by_row)
    with pytest.raises(mf.ArgumentTypeError, match="k is a Tensor, expected a DTensor as the others are"):
        mf.attention(whole[0], k, whole[2], by_row)
    with pytest.raises(mf.ArgumentTypeError, match="q is a Tensor, expected a DTensor as the others are"):
        mf.attention(q, *whole[1:], by_row)
    one_key_head = tensors(kv_heads=1)
    with pytest.raises(mf.ArgumentError, match="1 key heads can't be shared out over 2 ranks"):
        placements = [[Shard(1)], [Replicate()], [Replicate()]]
        mf.attention(*(spread(x, mesh, p) for x, p in zip(one_key_head, placements, strict=True)), by_row)
    other = distributed.DeviceMesh("cpu", [1, 0])
    with pytest.raises(mf.ArgumentError, match=r"v is on DeviceMesh.*expected q's"):
        mf.attention(*whole[:2], spread(v, other, [Replicate()]), by_row)


def test_under_torch_compile_it_is_the_same(world):
    mesh = world(1, 2)
    attn = mf.compile(by_both)
    parts = [spread(x, mesh, [Shard(0)]) for x in tensors()]
    fast = torch.compile(lambda q, k, v: attn(q, k, v), backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(*parts).to_local(), attn(*parts).to_local())


def test_importing_maskflash_does_not_import_dtensor():
    program = (
        "import sys, torch, maskflash\nassert 'torch.distributed.tensor' not in sys.modules\n"
        "import torch.distributed.tensor\nassert 'maskflash.op.sharding' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Two processes


def rank_of_two(rank, port, queue):
    """Layouts that differ between q, k and v, and a sum that is still due: something has to be sent."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = distributed.init_device_mesh("cpu", (2,))
    q, k, v = tensors()
    q, k = distributed.distribute_tensor(q, mesh, [Shard(0)]), distributed.distribute_tensor(k, mesh, [Shard(1)])
    v = DTensor.from_local(v / 2, mesh, [Partial()], run_check=False)
    ids = distributed.distribute_tensor(doc.clone(), mesh, [Shard(0)])
    found = [x.full_tensor().detach().numpy() for x in trained((q, k, v), packed, ids=ids)]
    if rank == 0:
        queue.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=rank_of_two, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = queue.get(timeout=600)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for ours, expected in zip(found, trained(tensors(), packed, ids=doc), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), expected.detach())
