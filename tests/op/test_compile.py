"""torch.compile takes the op whole, and again for new lengths, documents, windows and offsets as rarely as it can."""

import random

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import maskflash as mf
from maskflash.functions import function
from maskflash.op import cache

HEADS, DIM = 4, 16


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv]


@mf.mask
def windowed(b, h, q, kv, *, window):
    return 0 <= q - kv < window


@mf.mask
def tiled(b, h, q, kv, *, doc, size):
    return q // size == kv // size and doc[kv] < doc.shape[0]


class Attend(nn.Module):
    """A layer of a model with an op of its own."""

    def __init__(self, mask):
        super().__init__()
        self.project = nn.Linear(HEADS * DIM, 2 * HEADS * DIM)  # four heads of queries, two of keys and values
        self.attn = mf.compile(mask)

    def forward(self, x, **mask_args):
        heads = self.project(x).unflatten(2, (2 * HEADS, DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, HEADS // 2, HEADS // 2], dim=1)
        out, lse = self.attn(q, k, v, return_lse=True, **mask_args)
        return out.transpose(1, 2).flatten(2) + lse.mT.mean(2, keepdim=True)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(length, batch=1):
    return torch.randn(batch, length, HEADS * DIM)


def documents(length, size, batch=1):
    return (torch.arange(batch * length) // size).view(batch, length)


def compiled(model, **options):
    """A model compiled without graph breaks, and what counts its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def check(model, fast, x, **mask_args):
    """Outputs and gradients of the compiled model are eager's, bit by bit."""
    found, expected = fast(x, **mask_args), model(x, **mask_args)
    assert torch.equal(found, expected)
    wanted = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_no_more_recompiles_on_new_lengths_than_torch_s_own():
    model = Attend(mf.causal())
    fast, counter = compiled(model)
    for length in (64, 80, 96, 33):
        check(model, fast, tokens(length))
    assert counter.frame_count == 2  # the second length made the dimension dynamic


def test_no_recompile_at_all_with_dynamic_lengths():
    model = Attend(packed)
    fast, counter = compiled(model, dynamic=True)
    for length in (60, 80, 2, 300):  # not 64, which torch would take for the width
        check(model, fast, tokens(length, 2), doc=documents(length, 7, 2))
    assert counter.frame_count == 1


def test_new_documents_are_inputs():
    model = Attend(packed)
    fast, counter = compiled(model)
    for size in (5, 17, 64):
        check(model, fast, tokens(64), doc=documents(64, size))
    ids = documents(64, 9)
    check(model, fast, tokens(64), doc=ids)
    ids[0, 20:] += 1
    check(model, fast, tokens(64), doc=ids)
    assert counter.frame_count == 1


def test_a_captured_table_may_be_written_to():
    ids = documents(64, 9)[0]
    model = Attend(mf.causal() & mf.document(ids=ids))
    fast, counter = compiled(model)
    check(model, fast, tokens(64))
    ids.copy_(documents(64, 13)[0])
    check(model, fast, tokens(64))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("dynamic", "compilations"), [(None, 2), (True, 1)])
def test_a_window_that_is_an_int_is_torch_s_to_specialise(dynamic, compilations):
    model = Attend(windowed)
    fast, counter = compiled(model, dynamic=dynamic)
    for window in (5, 9, 23):
        check(model, fast, tokens(64), window=window)
    assert counter.frame_count == compilations


def test_a_window_that_is_a_tensor_is_an_input():
    model = Attend(windowed)
    fast, counter = compiled(model)
    for window in (5, 0, 1, 23):
        check(model, fast, tokens(64), window=torch.tensor(window))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("make", "compilations"), [(int, 2), (lambda n: torch.tensor([n]), 1)])
def test_offsets(make, compilations):
    model = Attend(mf.causal())
    fast, counter = compiled(model)
    for offset in (3, 9, 17):
        check(model, fast, tokens(64), q_offset=make(offset))
    assert counter.frame_count == compilations


def test_a_value_that_the_structure_depends_on_means_a_recompile():
    model = Attend(tiled)
    fast, counter = compiled(model)
    for size in (8, 16, 8):
        check(model, fast, tokens(64), doc=torch.arange(64), size=size)
    assert counter.frame_count == 2


def test_layers_of_one_structure_share_what_was_compiled():
    ids = [documents(64, size)[0] for size in (5, 9, 30)]
    layers = [Attend(mf.causal() & mf.document(ids=own)) for own in ids] + [Attend(mf.causal() & mf.full())]
    counter = CompileCounterWithBackend("aot_eager")
    x = tokens(64)
    for layer in layers:
        eager = layer(x)
        layer.compile(backend=counter, fullgraph=True)
        assert torch.equal(layer(x), eager)
    assert counter.frame_count == 2  # one for the documents, one for the last


def test_layers_share_a_mask_with_arguments():
    layers = [Attend(packed) for _ in range(3)]
    counter = CompileCounterWithBackend("aot_eager")
    x, ids = tokens(64), documents(64, 11)
    for layer in layers:
        eager = layer(x, doc=ids)
        layer.compile(backend=counter, fullgraph=True)
        assert torch.equal(layer(x, doc=ids), eager)
    assert counter.frame_count == 1


def test_kinds_of_arguments_are_told_apart():
    model = Attend(packed)
    model(tokens(8), doc=documents(8, 3).float())  # known, but not what follows
    fast, counter = compiled(model)
    for kind in (torch.int64, torch.int32, torch.float32):
        check(model, fast, tokens(64), doc=documents(64, 9).to(kind))
    assert counter.frame_count == 3


def test_a_mask_is_analysed_once_for_all_calls_of_a_graph(monkeypatch):
    found = []
    original = cache.analyse
    monkeypatch.setattr(cache, "analyse", lambda problem, backend: found.append(problem) or original(problem, backend))
    model = Attend(packed)
    fast, _ = compiled(model)
    ids = documents(50, 9)
    for _ in range(3):
        fast(tokens(50), doc=ids).sum().backward()
    assert len(found) == 1


def test_column_intervals_and_the_functional_form():
    vectors = (mf.causal() & mf.document([20, 44])).to_flashmask(64, 64)
    joined = mf.sliding_window(9) | mf.prefix_lm(4)

    def model(q):
        q = mf.attention(q, q, q, vectors)
        q = mf.attention(q, q, q, packed, doc=documents(64, 9), scale=0.3)
        return mf.attention(mf.attention(q, q, q, joined), q, q)

    fast, counter = compiled(model)
    q = torch.randn(1, HEADS, 64, DIM)
    assert torch.equal(fast(q), model(q))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of inductor's own
def test_inductor_runs_it():
    model = Attend(packed)
    fast = torch.compile(model, fullgraph=True)
    x, ids = tokens(64), documents(64, 9)
    found, expected = fast(x, doc=ids), model(x, doc=ids)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(y.sum(), model.project.weight) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_autocast_inside_and_outside_of_what_is_compiled():
    model = Attend(mf.causal())

    def inside(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    x = tokens(64)
    expected = inside(x)
    assert torch.equal(compiled(inside)[0](x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(model)[0](x), expected)


def test_a_look_up_out_of_range_names_the_line():
    table = torch.zeros(5)
    fast, _ = compiled(Attend(lambda b, h, q, kv: table[q] == 0))
    with pytest.raises(mf.MaskIndexError, match=r"test_compile.py:\d+.*table\[q\].*reads index 5"):
        fast(tokens(64))


def test_wrong_arguments_are_told():
    attn = mf.compile(mf.causal())
    q = torch.randn(2, HEADS, 64, DIM)
    with pytest.raises(Exception, match="attention: k has batch 1, expected q's 2"):
        compiled(lambda q: attn(q, q[:1], q))[0](q)
    with pytest.raises(mf.ArgumentError, match="attention: k has batch 1, expected q's 2"):
        torch.compile(lambda q: attn(q, q[:1], q), backend="eager")(q)


def test_a_mask_made_inside_breaks_the_graph_and_says_so():
    def model(q):
        return mf.attention(q, q, q, lambda b, h, row, column: row >= column)

    q = torch.randn(1, HEADS, 64, DIM)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside of what is compiled"):
        compiled(model)[0](q)
    assert torch.equal(torch.compile(model, backend="eager")(q), model(q))


NEAR, FAR, CAUSAL = mf.sliding_window(9), mf.dilated_window(90, 3), mf.causal()
SCORES = (mf.scores.softcap(20.0), mf.scores.alibi(torch.tensor([0.5, 0.25, 0.1, 0.0])))


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, doc: mf.attention(q, q, q, packed, score=SCORES[0], doc=doc),
        lambda q, doc: mf.attention(q, q, q, packed, score=SCORES, doc=doc),
        lambda q, doc: mf.attention(q, q, q, packed & NEAR | FAR ^ packed, score=SCORES[1], doc=doc),
        lambda q, doc: mf.compile(NEAR & packed, score=SCORES[0])(q, q, q, doc=doc),
    ],
    ids=["score", "scores", "masks", "op"],
)
def test_what_is_joined_in_a_graph_is_compiled_once(attend):
    """A mask and a score function, several of these, two masks: what is made of them is the same in each call."""
    fast, counter = compiled(attend)
    for documents_of in (7, 7, 30, 200):
        q, doc = torch.randn(1, HEADS, 128, DIM), documents(128, documents_of)
        assert torch.equal(fast(q, doc), attend(q, doc))
    assert counter.frame_count == 1


def test_a_mask_turned_around_breaks_a_graph_and_is_compiled_once():
    """Dynamo knows `~` of numbers alone."""
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda q: mf.attention(q, q, q, CAUSAL & ~NEAR | NEAR), backend=counter)
    for _ in range(4):
        q = torch.randn(1, HEADS, 128, DIM)
        torch.testing.assert_close(fast(q), mf.attention(q, q, q, CAUSAL | NEAR))
    assert counter.frame_count == 1


KINDS = (
    *("causal", "document", "window", "inverse", "joined", "joined to one that stays"),
    *("columns", "dense", "predicate", "structure"),
)


def fresh_masks(step):
    """Masks as a training step may make them: of many structures, each with other contents than the step before."""
    table = torch.arange(100) // (7 + step)
    ends = torch.randint(1, 100, (100,), dtype=torch.int32).cummax(0)[0]
    return {
        "causal": mf.causal(),
        "document": mf.document(lengths=[10 + step, 90 - step]),
        "window": mf.sliding_window(3 + step),
        "inverse": ~mf.sliding_window(3 + step),
        "joined": mf.causal() & mf.document(lengths=[10 + step, 90 - step]),
        "joined to one that stays": CAUSAL & mf.document(lengths=[10 + step, 90 - step]) | NEAR,
        "columns": mf.ColumnIntervals(ends, causal=True),
        "dense": CAUSAL & (torch.rand(1, 1, 1, 100) < 0.5),
        "predicate": mf.mask(lambda b, h, q, kv: table[q] == table[kv]),
        "structure": mf.mask(lambda b, h, q, kv: q // (4 + step) >= kv // 8),
    }


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
@pytest.mark.parametrize("score", [None, SCORES[0]], ids=["", "score"])
@pytest.mark.parametrize("name", KINDS)
def test_masks_of_each_step_are_compiled_once(name, score):
    """A mask that is new in each step, of one structure, runs in the graph of the first one; of numbers, the second."""
    fast, counter = compiled(lambda q, mask: mf.attention(q, q, q, mask, score=score))
    for step in range(4):
        q, mask = torch.randn(1, HEADS, 100, DIM), fresh_masks(step)[name]
        assert torch.equal(fast(q, mask), mf.attention(q, q, q, mask, score=score))
    assert counter.frame_count <= {"window": 2, "inverse": 2, "structure": 4}.get(name, 1)


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
def test_a_graph_looks_again_at_what_it_is_given():
    """Another mask or another score function is never taken for the one that a graph was made with."""
    fast, counter = compiled(lambda q, mask, score: mf.attention(q, q, q, mask & NEAR, score=score))
    counts, draw = [], random.Random(0)
    with torch._dynamo.config.patch(recompile_limit=100, accumulated_recompile_limit=200):
        for step in range(3):
            masks = list(fresh_masks(step).values())
            draw.shuffle(masks)
            for mask in masks:
                q, score = torch.randn(1, HEADS, 100, DIM), SCORES[draw.randrange(2)]
                assert torch.equal(fast(q, mask, score), mf.attention(q, q, q, mask & NEAR, score=score))
            counts.append(counter.frame_count)
    assert counts[-1] < 2 * len(SCORES) * len(masks)


def test_a_function_keeps_few_of_what_graphs_make_of_it(monkeypatch):
    monkeypatch.setattr(function, "_MOST_MADE", 4)
    mask, scores = mf.causal(), [mf.scores.softcap(float(n)) for n in (2, 3, 5, 7)]
    fast = torch.compile(lambda q, score: mf.attention(q, q, q, mask, score=score), backend="eager")
    q = torch.randn(1, HEADS, 16, DIM)
    with torch._dynamo.config.patch(recompile_limit=20):
        for score in (*scores, scores[0]):
            assert torch.equal(fast(q, score), mf.attention(q, q, q, mask, score=score))
    assert sum(name.startswith("made_left") for name in vars(mask)) == 4  # two for each of two score functions
