"""FlopCounterMode counts the products of visited tiles: what torch counts for dense attention, times their share."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import maskflash as mf
from maskflash.op import flops
from maskflash.op.spec import Spec

FORWARD, BACKWARD = torch.ops.maskflash.forward, torch.ops.maskflash.backward
doc = torch.arange(300) // 90


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()["Global"]


def tensors(batch=2, heads=4, kv_heads=2, q_len=300, kv_len=300, head_dim=8, v_head_dim=12, **kwargs):
    shapes = (batch, heads, q_len, head_dim), (batch, kv_heads, kv_len, head_dim), (batch, kv_heads, kv_len, v_head_dim)
    return [torch.randn(shape, requires_grad=True, **kwargs) for shape in shapes]


def dense(q, k, v):
    """Torch's own counts, forward and backward."""
    out = (*q.shape[:3], v.shape[3])
    return sdpa_flop_count(q.shape, k.shape, v.shape), sdpa_backward_flop_count(out, q.shape, k.shape, v.shape)


def test_without_a_mask_it_is_torch_s_count_of_dense_attention():
    q, k, v = tensors()
    found = counted(lambda: mf.attention(q, k, v).sum().backward())
    assert (found[FORWARD], found[BACKWARD]) == dense(q, k, v)


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped heads", "as many heads"])  # the latter may be one call
@pytest.mark.parametrize(
    "mask",
    [
        mf.causal(),
        mf.sliding_window(20),
        mf.causal() & mf.document(ids=doc),
        mf.mask(lambda b, h, q, kv: (q >= kv) & (kv // 128 == (b + h) % 3)),
        mf.mask(lambda b, h, q, kv: q < 0),
    ],
    ids=["causal", "window", "documents", "by batch row and head", "nothing"],
)
def test_it_is_the_visited_share_of_that(mask, kv_heads):
    q, k, v = tensors(kv_heads=kv_heads)
    kinds = mask.block_map(300, 300, batch=2, heads=4).kinds()
    visited = (kinds > 0).repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :300, :300]
    share = visited.expand(2, 4, 300, 300).double().mean().item()
    found = counted(lambda: mf.attention(q, k, v, mask).sum().backward())
    assert [found[FORWARD], found[BACKWARD]] == [round(share * total) for total in dense(q, k, v)]


@given(mask=mf.testing.masks(), shape=mf.testing.shapes())
@settings(max_examples=30)
def test_the_visited_pairs_are_those_of_the_tiles(mask, shape):
    found = mask.block_map(shape.q_len, shape.kv_len, batch=shape.batch, heads=shape.heads, block_size=(16, 32))
    rows, columns = found.block_size
    tiles = (found.kinds() > 0).repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    assert flops.visited(found) == tiles[..., : shape.q_len, : shape.kv_len].sum()


def test_counting_changes_no_bits_and_analyses_nothing_anew(monkeypatch):
    from maskflash.op import analyse, cache

    analyses = []
    monkeypatch.setattr(cache, "analyse", lambda *args: analyses.append(args) or analyse.analyse(*args))
    q, k, v = tensors()
    attn, results = mf.compile(mf.causal() & mf.document(ids=doc.clone())), []
    counted(lambda: results.append(attn(q, k, v)))
    counted(lambda: results[0].sum().backward())
    assert torch.equal(results[0], attn(q, k, v))
    assert len(analyses) == 1


def test_tensors_without_data_count_by_the_mask_where_it_has_no_tables():
    half = counted(lambda: mf.attention(*tensors(), mf.causal()))
    on_meta = tensors(device="meta")
    with FakeTensorMode():
        fake = tensors()

        def run():
            mf.attention(*fake, mf.causal())

        assert counted(run) == half
        ids = torch.zeros(300, dtype=torch.long)
        assert counted(lambda: mf.attention(*fake, same_document, ids=ids))[FORWARD] == dense(*fake)[0]
    assert counted(lambda: torch.ops.maskflash.forward(*on_meta, *arguments(mf.causal(), on_meta))) == half


@mf.mask
def same_document(b, h, q, kv, *, ids):
    return ids[q] == ids[kv]


def arguments(mask, tensors):
    """What the op is given for a mask without tables."""
    slots, values = mask.slots({})
    params, _ = slots.filled(values, torch.device("cpu"))
    return Spec.make(slots.text, params, [], 0, 0, None, 1.0, (128, 128), "cpu")


def test_an_exported_program_is_counted():
    class Layer(torch.nn.Module):
        attn = mf.compile(mf.sliding_window(20))

        def forward(self, q, k, v):
            return self.attn(q, k, v)

    q, k, v = tensors()
    program = torch.export.export(Layer(), (q, k, v)).module()
    assert counted(lambda: program(q, k, v)) == counted(lambda: Layer()(q, k, v))


@pytest.mark.parametrize("order", ["maskflash, torch.utils.flop_counter", "torch.utils.flop_counter, maskflash"])
def test_whichever_is_imported_first(order):
    program = (
        f"import torch, {order}\nq = torch.ones(1, 1, 4, 8)\n"
        "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter: maskflash.attention(q, q, q)\n"
        "print(counter.get_total_flops())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 2 * 4 * 4 * 16
