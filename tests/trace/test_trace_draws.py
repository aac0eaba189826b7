"""Predicates that change from run to run, and random numbers, are refused before anything is drawn."""

import functools
import inspect
import itertools
import random
import secrets
from random import choice

import numpy as np
import pytest
import torch

from maskflash.errors import MaskTraceError
from maskflash.trace import torch_calls
from maskflash.trace.trace import trace
from tests.trace.refusals import refuse

DOC = torch.tensor([0, 0, 1, 1, 2])
HERE = __file__


def test_predicates_that_change():
    calls = itertools.count()

    def counts(b, h, q, kv):
        if next(calls) % 2:
            return q > kv
        if q == 3 and kv > 2 and DOC[q] > 1:
            return True
        return kv > 3

    refuse(counts, "takes other branches when it is run again", "no random numbers, counters")


class Coin:
    def __init__(self):
        self.generator = random.Random(0)

    def __call__(self):
        return self.generator.random() < 0.5


COIN = Coin()
UNIFORM = functools.partial(random.uniform, 0, 1)
LEGACY = np.random.RandomState(0)
GENERATOR = np.random.default_rng(0)
DICE = torch.Generator()
CHANCE = torch.tensor(0.5)


def states():
    generators = (COIN.generator.getstate(), LEGACY.get_state(), GENERATOR.bit_generator.state)
    own = (*generators, DICE.get_state().tolist())
    return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist(), own))


@pytest.mark.parametrize(
    ("predicate", "function", "code"),
    [
        (lambda b, h, q, kv: q >= kv and random.random() < 0.5, "Random.random", "random.random()"),
        (lambda b, h, q, kv: choice([q, kv]) > 3, "Random.choice", "choice([q, kv])"),
        (lambda b, h, q, kv: UNIFORM() * kv > q, "Random.uniform", "UNIFORM()"),
        (lambda b, h, q, kv: any(COIN.generator.randint(0, 1) for _ in (1, 2)) and q > kv, "Random.randint", None),
        (lambda b, h, q, kv: q > kv and secrets.SystemRandom().random() < 0.5, "SystemRandom.random", None),
        (lambda b, h, q, kv: np.random.rand() < 0.5 if q > kv else True, "RandomState.rand", "np.random.rand()"),
        (lambda b, h, q, kv: q > LEGACY.randint(9), "RandomState.randint", "LEGACY.randint(9)"),
        (lambda b, h, q, kv: GENERATOR.random() < 0.5 or q > kv, "Generator.random", "GENERATOR.random()"),
        (lambda b, h, q, kv: q > kv and torch.rand(()) < 0.5, "torch.rand", "torch.rand(())"),
        (lambda b, h, q, kv: torch.rand(9)[kv] < 0.5, "torch.rand", "torch.rand(9)"),
        (lambda b, h, q, kv: torch.rand((), generator=DICE) > kv, "torch.rand", "torch.rand((), generator=DICE)"),
        (lambda b, h, q, kv: torch.randint(0, 9, ()) > kv, "torch.randint", "torch.randint(0, 9, ())"),
        (lambda b, h, q, kv: torch.rand_like(q / 2) > 0.5, "torch.rand_like", "torch.rand_like(q / 2)"),
        (lambda b, h, q, kv: CHANCE.bernoulli() > 0 and q > kv, "torch.bernoulli", "CHANCE.bernoulli()"),
    ],
)
def test_random_numbers_are_refused_before_they_are_drawn(predicate, function, code):
    before = states()
    fix = ("would be frozen", "Draw a tensor once, outside the predicate", "then `keep[kv]`")
    refuse(predicate, f"draws random numbers (`{function}`)", *fix, code=code)
    assert states() == before


def test_helpers_that_draw_are_named_where_they_do():
    with pytest.raises(MaskTraceError) as caught:
        trace(lambda b, h, q, kv: q > kv and COIN())
    line = inspect.getsourcelines(Coin.__call__)[1] + 1
    assert f'({HERE}:{line}): "self.generator.random()" draws random numbers' in str(caught.value)


def test_torch_functions_that_draw_without_a_tensor_are_known():
    """Others compute with tensors, and so are refused at any rate."""
    for name, _, overload in (it.removeprefix("aten::").partition(".") for it in torch._C._dispatch_get_all_op_names()):
        if hasattr(torch, name) and not name.startswith("_"):
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
            takes = any("Tensor" in str(argument.type) for argument in op._schema.arguments if not argument.kwarg_only)
            if torch.Tag.nondeterministic_seeded in op.tags and not takes:
                assert name in torch_calls._RANDOM


def test_what_was_drawn_outside_is_a_table():
    keep, bound = torch.rand(9) < 0.5, random.random()
    before = states()
    with torch.inference_mode(), torch.random.fork_rng():
        assert trace(lambda b, h, q, kv: q >= kv and keep[kv] and q * bound < 9).tables == (keep,)
    trace(lambda b, h, q, kv: q >= kv if bound < 2 else random.random() < kv)
    assert states() == before
