"""Seeds are those that callers give, or drawn where torch's own tools find them; anything else is refused."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.scores.seeds import probability, seed_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0, 0.0, 0.5, np.float32(0.25), np.int64(0)])
def test_probabilities(p):
    assert (probability("attention", p), type(probability("attention", p))) == (p, float)


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (1.0, ArgumentError, "attention: dropout_p is 1.0, expected at least 0 and less than 1"),
        (-0.1, ArgumentError, "dropout_p is -0.1"),
        (float("nan"), ArgumentError, "dropout_p is nan"),
        (True, ArgumentTypeError, "dropout_p is a bool, expected a number"),
        ("half", ArgumentTypeError, "dropout_p is a str, expected a number"),
        (torch.tensor(0.5), ArgumentTypeError, r"dropout_p is a Tensor, expected a number; use `.item\(\)`"),
    ],
)
def test_what_is_no_probability(p, error, message):
    with pytest.raises(error, match=message):
        probability("attention", p)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, 0),
        (-1, -1),
        (2**64 - 1, -1),
        (2**63, -(2**63)),
        (-(2**63), -(2**63)),
        (np.uint64(2**63 + 1), 1 - 2**63),
        (torch.tensor(7), 7),
        (torch.tensor([[7]]), 7),
    ],
)
def test_given_seeds(seed, expected):
    found = seed_of("attention", seed, None, CPU)
    assert (found.tolist(), found.dtype) == ([expected], torch.int64)


def test_a_given_tensor_is_not_copied():
    seed = torch.tensor([3])
    assert seed_of("attention", seed, None, CPU).data_ptr() == seed.data_ptr()


@pytest.mark.parametrize(
    ("seed", "generator", "error", "message"),
    [
        (True, None, ArgumentTypeError, "attention: seed is True, expected an int"),
        (1.5, None, ArgumentTypeError, "attention: seed is 1.5, expected an int"),
        (2**64, None, ArgumentError, "seed is an integer of 65 bits, expected one from"),
        (-(2**63) - 1, None, ArgumentError, "seed is an integer of 64 bits, expected one from"),
        (torch.tensor([1], dtype=torch.int32), None, ArgumentTypeError, "seed has dtype torch.int32, expected"),
        (torch.tensor([1, 2]), None, ArgumentError, r"seed has shape \(2,\), expected \(1,\); pass an int"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), None, ArgumentError, "seed is on meta"),
        (1, torch.Generator(), ArgumentError, "seed and generator are both given"),
        (None, 5, ArgumentTypeError, "generator is 5, expected a Generator; such as"),
    ],
)
def test_what_is_no_seed(seed, generator, error, message):
    with pytest.raises(error, match=message):
        seed_of("attention", seed, generator, CPU)


def test_draws_are_those_of_manual_seed():
    drawn = [seed_of("attention", None, None, CPU).item() for _ in range(2)]
    torch.manual_seed(0)  # as every test starts
    assert [seed_of("attention", None, None, CPU).item() for _ in range(2)] == drawn
    assert drawn[0] != drawn[1]


def test_draws_of_a_generator_leave_the_default_one():
    state = torch.get_rng_state()
    drawn = [seed_of("attention", None, torch.Generator().manual_seed(5), CPU).item() for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_given_seed_draws_nothing():
    state = torch.get_rng_state()
    seed_of("attention", 5, None, CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_draws_the_same():
    drawn = []

    def layer(x):
        drawn.append(seed_of("attention", None, None, CPU).item())
        return x.sin()

    checkpoint(layer, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("seed", [None, 5, torch.tensor([5])], ids=["drawn", "int", "tensor"])
def test_draws_are_in_a_compiled_graph(seed):
    def draw(x, seed):
        return x + seed_of("attention", seed, None, CPU)

    run = torch.compile(draw, backend="aot_eager", fullgraph=True)
    x = torch.zeros(1, dtype=torch.int64)
    found = [run(x, seed).item() for _ in range(2)]
    assert (found[0] == found[1]) == (seed is not None)
