"""What torch.compile made of a call reads what a predicate captures, as the call itself does."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import maskflash as mf
from tests.functions.capturing import CHANGES, N


def compiled(model):
    count = []

    def backend(graph, _):
        count.append(graph)
        return graph

    return torch.compile(lambda q, k, v: model.attn(q, k, v), backend=backend, fullgraph=True), count


@pytest.mark.parametrize("change", CHANGES)
def test_compiled_code_reads_the_module_as_it_is(model, change):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    run, graphs = compiled(model)
    assert torch.equal(run(q, k, v), model.attn(q, k, v))
    CHANGES[change](model)
    assert torch.equal(run(q, k, v), model.attn(q, k, v))
    assert len(graphs) <= 2


def test_compiled_code_refuses_arrays_whose_contents_it_can_t_guard():
    torch._dynamo.reset()
    ends = np.array([3, 9])
    attn = mf.compile(lambda b, h, q, kv: ends[0] <= kv < ends[1])
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    with pytest.raises(Exception, match="reads an array that isn't torch's"):
        torch.compile(lambda q, k, v: attn(q, k, v), backend="eager", fullgraph=True)(q, k, v)


def test_another_buffer_is_an_input_of_compiled_code(model):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    run, graphs = compiled(model)
    for n in range(1, 6):
        model.doc = torch.arange(N) // n
        assert torch.equal(run(q, k, v), model.attn(q, k, v))
    assert len(graphs) == 1


NUMBERS = {
    "of a list": (lambda: [1], lambda x: x[0], lambda x, n: x.__setitem__(0, n)),
    "of a dict": (lambda: {"n": 1}, lambda x: x["n"], lambda x, n: x.__setitem__("n", n)),
    "of a deque": (lambda: deque([1]), lambda x: x[0], lambda x, n: x.__setitem__(0, n)),
    "of a tuple": (lambda: SimpleNamespace(n=(1,)), lambda x: x.n[0], lambda x, n: setattr(x, "n", (n,))),
    "that isn't there at first": (SimpleNamespace, lambda x: getattr(x, "n", 1), lambda x, n: setattr(x, "n", n)),
}


@pytest.mark.parametrize("where", NUMBERS)
def test_compiled_code_guards_numbers(where):
    torch._dynamo.reset()
    make, read, change = NUMBERS[where]
    held = make()
    attn = mf.compile(lambda b, h, q, kv: q - kv < read(held) * 2)
    run = torch.compile(lambda q, k, v: attn(q, k, v), backend="eager", fullgraph=True)
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    for n in (1, 4, 5, 6, 7):  # from the second on dynamo takes an int for a symbol
        if n > 1:
            change(held, n)
        assert torch.equal(run(q, k, v), attn(q, k, v))


def test_compiled_code_takes_views_of_the_tensor_that_is_there():
    torch._dynamo.reset()
    held = SimpleNamespace(ids=torch.arange(2 * N).view(2, N) // 5)
    attn = mf.compile(lambda b, h, q, kv: held.ids[1][q] == held.ids[1:, 2:].T[kv % 20, 0])
    run = torch.compile(lambda q, k, v: attn(q, k, v), backend="aot_eager", fullgraph=True)
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    for ids in (held.ids, torch.arange(3 * N)[N:].view(2, N) // 3, torch.arange(2 * N).view(N, 2).T // 3):
        held.ids = ids
        assert torch.equal(run(q, k, v), attn(q, k, v))
