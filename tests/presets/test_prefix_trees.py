"""Packed trees of sequences: against tries made token by token, and against a model's unpacked batch."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import maskflash as mf

SEQUENCES = st.lists(st.lists(st.integers(-2, 2), max_size=7), max_size=6)


def prefixes(sequences):
    """Every prefix that some sequence has, in order: what the tree's tokens stand for."""
    return sorted({tuple(x[: n + 1]) for x in sequences for n in range(len(x))})


@given(SEQUENCES)
def test_each_token_stands_for_a_prefix(sequences):
    tree, nodes = mf.prefix_tree(sequences), prefixes(sequences)
    assert len(tree) == len(nodes)
    assert tree.tokens.tolist() == [node[-1] for node in nodes]
    assert tree.positions.tolist() == [len(node) - 1 for node in nodes]
    assert tree.parents.tolist() == [nodes.index(node[:-1]) if len(node) > 1 else -1 for node in nodes]
    assert tree.counts.tolist() == [sum(tuple(x[: len(node)]) == node for x in sequences) for node in nodes]
    assert (tree.total, tree.saved) == (sum(map(len, sequences)), sum(map(len, sequences)) - len(nodes))


@given(SEQUENCES, st.integers(0, 3))
def test_a_token_sees_its_path(sequences, padding):
    tree, nodes = mf.prefix_tree(sequences), prefixes(sequences)
    n = len(nodes) + padding
    expected = torch.zeros(n, n, dtype=torch.bool)
    for q, node in enumerate(nodes):
        for kv, other in enumerate(nodes):
            expected[q, kv] = node[: len(other)] == other
    assert torch.equal(tree.mask.dense(n, n)[0, 0], expected)
    assert torch.equal(tree.mask.block_map(n, n, block_size=2).kinds(), map_of(expected, 2).kinds())
    end = torch.nn.functional.pad(tree.end, (0, padding))
    same = mf.mask(lambda b, h, q, kv, *, end: kv <= q < end[kv])
    assert torch.equal(same.dense(n, n, end=end)[0, 0], expected)


def map_of(visible, block):
    return mf.mask(lambda b, h, q, kv: visible[q, kv]).block_map(*visible.shape, block_size=block)


@given(SEQUENCES)
def test_values_come_back_to_their_sequences(sequences):
    tree = mf.prefix_tree([torch.tensor(x, dtype=torch.int32) for x in sequences])
    assert [x.tolist() for x in tree.unpack(tree.tokens)] == sequences
    assert [x.tolist() for x in tree.unpack(tree.positions[None], dim=1)] == [[[*range(len(x))]] for x in sequences]
    ones = [torch.ones(len(x), dtype=torch.int64) for x in sequences]
    if ones:
        assert torch.equal(tree.add_up(ones), tree.counts)


@given(SEQUENCES)
def test_adding_up_is_the_transpose_of_unpacking(sequences):
    tree = mf.prefix_tree(sequences)
    packed = torch.randn(len(tree), 2, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(len(x), 2, dtype=torch.float64, requires_grad=True) for x in sequences]
    unpacked = sum(((w * x).sum() for w, x in zip(weights, tree.unpack(packed), strict=True)), packed.sum() * 0)
    (gradient,) = torch.autograd.grad(unpacked, packed)
    if weights:
        added = tree.add_up(weights)
        torch.testing.assert_close(gradient, added)
        back = torch.autograd.grad((added * packed.detach()).sum(), weights)
        assert all(torch.equal(x, y) for x, y in zip(back, tree.unpack(packed.detach()), strict=True))


@given(SEQUENCES)
def test_predictions_are_those_of_the_batch(sequences):
    tree = mf.prefix_tree(sequences)
    found = {}
    for q, target, weight in zip(tree.queries.tolist(), tree.targets.tolist(), tree.weights.tolist(), strict=True):
        assert (q, target) not in found
        found[q, target] = weight
    wanted = {}
    for path, tokens in zip(tree.unpack(torch.arange(len(tree))), sequences, strict=True):
        for q, target in zip(path.tolist(), tokens[1:], strict=False):
            wanted[q, target] = wanted.get((q, target), 0) + 1
    assert found == wanted


class Model(nn.Module):
    """Learned positions, two layers of attention, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.places, self.head = nn.Embedding(5, 8), nn.Embedding(9, 8), nn.Linear(8, 5)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.double()

    def forward(self, tokens, positions, attend):
        x = self.embedding(tokens) + self.places(positions)
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + attend(q, k, v).transpose(1, 2).flatten(2).tanh()
        return self.head(x)


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=5))
def test_loss_and_gradients_are_those_of_the_batch(sequences):
    torch.manual_seed(len(sequences))
    model, tree = Model(), mf.prefix_tree(sequences)
    weights = [torch.randn(len(x), dtype=torch.float64) for x in sequences]
    loss, plain = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for tokens, weight in zip(map(torch.tensor, sequences), weights, strict=True):  # dense, one by one
        positions = torch.arange(len(tokens))
        causal = positions[:, None] >= positions
        logits = model(
            tokens[None],
            positions[None],
            lambda q, k, v, causal=causal: nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal),
        )
        losses = nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
        loss, plain = loss + (weight[1:] * losses).sum(), plain + losses.sum()
    logits = model(tree.tokens[None], tree.positions[None], mf.compile(tree.mask))
    losses = nn.functional.cross_entropy(logits[0, tree.queries], tree.targets, reduction="none")
    packed = (tree.add_up(weights)[tree.predicted] * losses).sum()
    torch.testing.assert_close((tree.weights * losses).sum(), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed, loss, rtol=1e-10, atol=1e-12)
    if packed.requires_grad and loss.requires_grad:
        parameters = list(model.parameters())
        for found, wanted in zip(*(torch.autograd.grad(x, parameters) for x in (packed, loss)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)


def test_order_of_sequences_does_not_matter_to_the_packed_one():
    sequences = [[3, 1], [3, 1, 4], [2], [3, 1, 4], []]
    one, other = mf.prefix_tree(sequences), mf.prefix_tree(sequences[::-1])
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.end, other.end)
    assert [x.tolist() for x in other.unpack(other.tokens)] == sequences[::-1]


def test_numbers_of_any_size_sort_as_numbers():
    big = [2**63 - 1, -(2**63), 256, 255, -1, 0]
    tree = mf.prefix_tree([[x] for x in big])
    assert tree.tokens.tolist() == sorted(big)


def test_long_sequences_are_packed_and_analysed_at_the_cost_of_their_boundary():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1000, (4096,), generator=generator)
    rollouts = [torch.cat([prompt, torch.randint(1000, (3000 + n,), generator=generator)]) for n in range(8)]
    tree = mf.prefix_tree(rollouts)
    assert tree.saved == 7 * 4096
    found = tree.mask.block_map(len(tree), len(tree))
    assert mf.equivalent(tree.mask, mf.ColumnIntervals(tree.end, causal=True), len(tree), len(tree))
    assert found.counts["partial"] < 6 * len(tree) // 128


def test_a_window_is_a_condition_on_positions():
    tree = mf.prefix_tree([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7]])
    positions = tree.positions
    mask = tree.mask & (lambda b, h, q, kv: positions[q] - positions[kv] <= 1)
    for row, path in ((3, [2, 3]), (5, [4, 5]), (6, [4, 6]), (4, [1, 4])):
        assert mask.dense(7, 7)[0, 0, row].nonzero().flatten().tolist() == path


def test_it_is_moved_copied_and_pickled():
    tree = mf.prefix_tree([[1, 2], [1, 3]])
    wanted = tree.mask.dense(3, 3)
    for one in (tree.to("cpu"), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert torch.equal(one.mask.dense(3, 3), wanted)
        assert one.lengths == (2, 2)
    assert repr(tree) == "PrefixTree(2 sequences, 4 tokens packed as 3, 1 saved)"


@pytest.mark.parametrize(
    ("sequences", "kind", "message"),
    [
        ("abc", mf.ArgumentTypeError, "sequences is a str, expected a list of token lists"),
        (torch.zeros(2, 3, dtype=torch.int64), mf.ArgumentTypeError, "of a padded tensor pass"),
        ([[1, 2], 3], mf.ArgumentError, r"sequences\[1\] has shape \(\), expected a 1-d tensor"),
        ([[1, 2], [[3]]], mf.ArgumentError, r"sequences\[1\] has shape \(1, 1\)"),
        ([[1.5]], mf.ArgumentTypeError, r"sequences\[0\] has dtype torch.float32, expected an integer"),
        ([["a"]], mf.ArgumentTypeError, r"sequences\[0\] is .*, expected integers"),
        ([torch.zeros(2, dtype=torch.int64, device="meta")], mf.ArgumentError, r"sequences\[0\] holds no data"),
    ],
)
def test_what_holds_no_tokens_is_refused(sequences, kind, message):
    with pytest.raises(kind, match=f"^prefix_tree: .*{message}"):
        mf.prefix_tree(sequences)


def test_values_that_do_not_fit_are_refused():
    tree = mf.prefix_tree([[1, 2], [1, 3]])
    for packed, dim, message in (
        (torch.zeros(4), 0, "expected 3 entries in dimension 0"),
        (torch.zeros(1, 3), 0, "say which with dim="),
        (torch.zeros(3), 1, "dim is 1, expected at most 0"),
    ):
        with pytest.raises(mf.ArgumentError, match=message):
            tree.unpack(packed, dim)
    with pytest.raises(mf.ArgumentTypeError, match="packed is a list"):
        tree.unpack([1, 2, 3])
    for values, message in (
        ([torch.zeros(2)], "got 1 values, expected 2"),
        ([torch.zeros(2), torch.zeros(3)], r"values\[1\] has shape \(3,\), expected \(2, ...\)"),
        ([torch.zeros(2), torch.zeros(())], r"values\[1\] has shape \(\)"),
    ):
        with pytest.raises(mf.ArgumentError, match=message):
            tree.add_up(values)
    with pytest.raises(mf.ArgumentTypeError, match="values is a Tensor, expected a list"):
        tree.add_up(torch.zeros(2, 2))
    with pytest.raises(mf.ArgumentTypeError, match=r"values\[0\] is a list"):
        tree.add_up([[1.0, 2.0], torch.zeros(2)])
