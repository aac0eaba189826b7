"""Drafts see the cache, their ancestors and themselves: against walks from each draft to its root."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import maskflash as mf
from maskflash import presets
from maskflash.testing import Shape, assert_matches_dense


@st.composite
def forests(draw, most=9):
    """Parents in any order: each draft of a shuffled line has one of those before it, or none."""
    n = draw(st.integers(0, most))
    line = draw(st.permutations(range(n)))
    parents = [-1] * n
    for place, draft in enumerate(line):
        parent = draw(st.integers(-1, place - 1))
        parents[draft] = line[parent] if parent >= 0 else -1
    return parents


def expected(parents, cached, kv_len):
    """Row by row, by the definition."""
    visible = torch.zeros(len(parents), kv_len, dtype=torch.bool)
    for row in range(len(parents)):
        visible[row, :cached] = True
        draft = row
        while draft >= 0:
            if cached + draft < kv_len:
                visible[row, cached + draft] = True
            draft = parents[draft]
    return visible


def depth(parents, draft):
    return 0 if parents[draft] < 0 else 1 + depth(parents, parents[draft])


@given(forests(), st.integers(0, 20), st.integers(0, 4))
def test_a_draft_sees_the_cache_and_its_line(parents, cached, room):
    n = len(parents)
    mask, kv_len = presets.tree(parents), n + cached + room
    if not cached:
        kv_len = n
    found = mask.dense(n, kv_len, q_offset=cached)[0, 0]
    assert torch.equal(found, expected(parents, cached, kv_len))
    assert mask.depths.tolist() == [depth(parents, draft) for draft in range(n)]
    if cached <= kv_len:  # the same with keys counted from the first draft
        assert torch.equal(mask.dense(n, kv_len, kv_offset=-cached)[0, 0], found)


@given(st.data(), st.sampled_from([torch.int32, torch.int64, torch.int8]))
def test_each_batch_row_has_its_tree_and_its_cache(data, dtype):
    n = data.draw(st.integers(1, 6))
    rows = [data.draw(forests(n).filter(lambda x: len(x) == n)) for _ in range(3)]
    cached = data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    mask = presets.tree(torch.tensor(rows, dtype=dtype))
    wanted = torch.stack([expected(row, length, n + 9) for row, length in zip(rows, cached, strict=True)])
    assert torch.equal(mask.dense(n, n + 9, batch=3, q_offset=torch.tensor(cached))[:, 0], wanted)
    one = presets.tree(torch.tensor(rows[:1]))
    wanted = torch.stack([expected(rows[0], length, n + 9) for length in cached])
    assert torch.equal(one.dense(n, n + 9, batch=3, q_offset=torch.tensor(cached))[:, 0], wanted)
    assert torch.equal(one.dense(n, n + 9, batch=3, q_offset=torch.tensor(4))[2, 0], expected(rows[0], 4, n + 9))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_trees_wider_and_deeper_than_a_word_of_bits(n):
    generator = torch.Generator().manual_seed(n)
    chain = [*range(1, n), -1]  # backwards, so deep as can be
    bush = [-1, *(int(torch.randint(place, (), generator=generator)) for place in range(1, n))]
    mask, kv_len = presets.tree([chain, bush]), n + 270  # of which 200 are room that nobody sees
    wanted = torch.stack([expected(chain, 70, kv_len), expected(bush, 70, kv_len)])
    assert torch.equal(mask.dense(n, kv_len, batch=2, q_offset=70)[:, 0], wanted)
    assert_matches_dense(presets.tree(bush), Shape(q_len=n, kv_len=kv_len, heads=2), q_offset=70)


def attended(mask, q, k, v, cached):
    visible = mask.dense(q.shape[2], k.shape[2], batch=len(q), q_offset=cached)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


@pytest.mark.parametrize("compiled", [False, True])
def test_writes_to_parents_are_seen_by_the_next_call(compiled):
    parents, cached = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]]), torch.tensor([5, 3])
    mask = presets.tree(parents)
    attn = mf.compile(mask)

    def step(q, k, v, q_offset):
        return attn(q, k, v, q_offset=q_offset)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    q, k, v = torch.randn(2, 2, 4, 8), *torch.randn(2, 2, 2, 10, 8)
    before = run(q, k, v, cached)
    torch.testing.assert_close(before, attended(presets.tree(parents.clone()), q, k, v, cached))
    with torch._dynamo.config.patch(error_on_recompile=True):
        parents[1] = torch.tensor([1, -1, 1, 0])
        cached += 1
        after = run(q, k, v, cached)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, attended(presets.tree(parents.clone()), q, k, v, cached))
        parents[0, 0] = 3
        with pytest.raises(mf.ArgumentError, match=r"has a cycle, .*0 -> 3 -> .*of batch row 0"):
            run(q, k, v, cached)


@pytest.mark.parametrize("through", [lambda x: x.numpy(), torch.Tensor.detach], ids=["numpy", "view"])
def test_writes_that_torch_may_not_see_are_seen(through):
    parents = torch.tensor([-1, 0, 0])
    attn = mf.compile(presets.tree(parents))
    q = torch.randn(1, 1, 3, 8)
    before = attn(q, q, q)
    through(parents)[2] = -1
    assert not torch.equal(attn(q, q, q)[:, :, 2], before[:, :, 2])


def test_tensors_of_inference_mode_are_compared_by_content():
    with torch.inference_mode():
        parents = torch.tensor([-1, 0, 0])
        mask = presets.tree(parents)
        parents[2] = 1
    assert mask.dense(3, 3)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_gradients_of_a_call_outlive_the_next_step():
    parents = torch.tensor([-1, 0, 0])
    attn = mf.compile(presets.tree(parents))
    q = torch.randn(1, 1, 3, 8, dtype=torch.float64, requires_grad=True)
    out = attn(q, q.detach(), q.detach())
    wanted = torch.autograd.grad(out.sum(), q, retain_graph=True)
    parents[1] = -1
    attn(q.detach(), q.detach(), q.detach())
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], wanted[0])


def test_it_combines_and_is_copied():
    parents = torch.tensor([-1, 0, 0, 1])
    mask = presets.tree(parents) & mf.sliding_window(2)
    wanted = mf.sliding_window(2).dense(4, 9, q_offset=5)[0, 0] & expected(parents.tolist(), 5, 9)
    for one in (mask, pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert torch.equal(one.dense(4, 9, q_offset=5)[0, 0], wanted)
    parents[3] = 2
    assert not torch.equal(mask.dense(4, 9, q_offset=5)[0, 0], wanted)
    assert mf.equivalent(presets.tree([-1, 0, 1, 2]), mf.causal(), 4, 9, q_offset=5)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([0], "has a cycle, 0 -> 0, expected that every draft's line ends at a root"),
        ([1, 2, 0, -1], "has a cycle, "),
        ([[-1, 0], [1, 0]], "of batch row 1"),
        ([*range(1, 30), 0], r"(\d+ -> ){7}\.\.\. -> \d+"),
        ([-1, 2], "holds 2 at draft 1, expected -1 for a root, or a draft from 0 to 1"),
        ([[-1, 0], [-2, 0]], "holds -2 at draft 0 of batch row 1"),
        (torch.zeros(0, 3, dtype=torch.int64), "expected a batch of at least 1"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), "holds no data"),
        (torch.zeros(1 << 16, dtype=torch.int64), "65,536 drafts, expected at most 32,768"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), "expected a 1-d or 2-d tensor"),
    ],
)
def test_parents_that_are_no_tree_are_refused(parents, message):
    with pytest.raises(mf.ArgumentError, match=f"^tree: .*{message}"):
        presets.tree(parents)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "call", "message"),
    [
        (2, 3, {}, "q_len is 2, expected 3, a query for each draft of the tree"),
        (3, 8, {}, "expected a q_offset that says how many keys are cached: q_offset=5"),
        (3, 8, {"batch": 3, "q_offset": 5}, "batch is 3, expected 2"),
    ],
)
def test_calls_that_do_not_fit_are_refused(q_len, kv_len, call, message):
    mask = presets.tree([[-1, 0, 0], [-1, 0, 1]])
    with pytest.raises(mf.ArgumentError, match=message):
        mask.dense(q_len, kv_len, **{"batch": 2, **call})


def test_a_predicate_may_not_call_it():
    inner = presets.tree([-1, 0])
    with pytest.raises(mf.MaskflashError, match="combine the masks"):
        mf.mask(lambda b, h, q, kv: inner(b, h, q, kv))


def test_fake_tensors_have_their_shape():
    with FakeTensorMode():
        parents = torch.zeros(2, 3, dtype=torch.int64)
        assert torch.ops.maskflash.ancestors(parents).shape == (2, 3, 1)
        assert torch.ops.maskflash.ancestors(parents[0]).shape == (3, 1)


def test_the_op_is_as_torch_wants_it():
    torch.library.opcheck(torch.ops.maskflash.ancestors.default, (torch.tensor([[-1, 0], [-1, -1]]),))


@pytest.mark.parametrize("batched", [False, True])
def test_kernels_decide_pairs_by_bits(batched):
    bush = [-1, 0, 0, 1, *range(2, 68)]
    mask = presets.tree([bush, [-1, *range(69)]] if batched else bush)
    shape = Shape(batch=2, q_len=70, kv_len=110, heads=2, head_dim=16)
    assert_matches_dense(mask, shape, backend="triton", block_size=64, q_offset=torch.tensor([33, 40]))


def test_exported_programs_find_ancestors_by_themselves():
    class Verify(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("parents", torch.tensor([-1, 0, 0]))
            self.attn = mf.compile(presets.tree(self.parents))

        def forward(self, q, k, cached):
            return self.attn(q, k, k, q_offset=cached)

    module, q, k, cached = Verify(), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 9, 8), torch.tensor([5])
    program = torch.export.export(module, (q, k, cached))
    assert torch.equal(program.module()(q, k, cached), module(q, k, cached))
    assert torch.ops.maskflash.ancestors.default in {node.target for node in program.graph.nodes}
