"""Checkpointing, torch.func, export, autocast, AMP and DDP run, and agree with eager; the rest is refused by name."""

import io
import socket
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import maskflash as mf
from maskflash.testing import Shape, masks, scores, shapes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch's forward mode

HEADS, DIM = 4, 8
WIDTH = HEADS * DIM


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv]


class Layer(nn.Module):
    """Attention inside documents, by maskflash or by SDPA with the dense mask."""

    def __init__(self, dense=False):
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn = None if dense else mf.compile(packed)

    def forward(self, x, doc):
        q, k, v = self.project(x).unflatten(2, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind()
        if self.attn is None:
            seen = packed.dense(x.shape[1], x.shape[1], batch=len(x), doc=doc)
            out = scaled_dot_product_attention(q, k, v, seen)
        else:
            out = self.attn(q, k, v, doc=doc)
        return self.out(out.transpose(1, 2).flatten(2))


def inputs(batch=2, length=50):
    return torch.randn(batch, length, WIDTH), (torch.arange(batch * length) // 17).view(batch, length)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def equal(ours, theirs):
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# Checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = Layer()
    x, doc = inputs()
    expected = gradients(model, model(x, doc).sin().sum())
    x.requires_grad_()  # the reentrant kind differentiates nothing otherwise
    checkpoint(model, x, doc, use_reentrant=reentrant).sin().sum().backward()
    assert equal([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("save", [True, False])
def test_selective_checkpointing_knows_the_op(save):
    """A policy may save what attention returned; then backward does not run it again."""
    runs = []

    def policy(context, op, *args, **kwargs):
        if op != torch.ops.maskflash.forward.default:
            return CheckpointPolicy.PREFER_RECOMPUTE
        runs.append(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.MUST_RECOMPUTE

    model = Layer()
    x, doc = inputs()
    expected = gradients(model, model(x, doc).sin().sum())
    forwards = []
    with Counting(forwards):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        out = checkpoint(model, x, doc, use_reentrant=False, context_fn=contexts)
        assert equal(gradients(model, out.sin().sum()), expected)
    assert runs[0] is False
    assert len(forwards) == (1 if save else 2)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes each time attention is run, below whoever else looks on."""

    def __init__(self, forwards):
        super().__init__()
        self.forwards = forwards

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.maskflash.forward.default:
            self.forwards.append(function)
        return function(*args, **(kwargs or {}))


# torch.func


def test_func_grad_is_autograd_s():
    model = Layer()
    x, doc = inputs()
    expected = gradients(model, model(x, doc).sin().sum())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x, doc)).sin().sum()

    found = torch.func.grad(loss)(dict(model.named_parameters()))
    assert equal(found.values(), expected)


def test_an_outer_transform_differentiates_what_an_inner_one_does_not():
    q, k = torch.randn(2, 1, 2, 9, 4).unbind()

    def outer(attend):
        def value_of_both(y, x):
            value = attend(y, x, x).sin().sum()
            return value, value

        return torch.func.grad(lambda x: torch.func.grad(value_of_both, has_aux=True)(k, x)[1])(q)

    torch.testing.assert_close(outer(mf.attention), outer(scaled_dot_product_attention))


def attend_to_itself(q):
    return mf.attention(q, q, q).sum()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f, q: torch.func.jvp(f, (q,), (q,)), "no forward-mode derivative"),
        (lambda f, q: torch.func.linearize(f, q), "no forward-mode derivative"),
        (lambda f, q: torch.func.grad(lambda q: torch.func.jvp(f, (q,), (q,))[1])(q), "no forward-mode derivative"),
        (lambda f, q: torch.func.jvp(torch.func.grad(f), (q,), (q,)), "no forward-mode derivative"),
        (lambda f, q: torch.func.grad(lambda q: torch.func.grad(f)(q).sum())(q), "no second derivative"),
        (lambda f, q: torch.func.vmap(f)(q[None]), "can't be vmapped"),
        (lambda f, q: torch.func.vmap(torch.func.grad(f))(q[None]), "can't be vmapped"),
        (lambda f, q: torch.func.jacrev(torch.func.grad(f))(q), "second derivative|can't be vmapped"),
    ],
)
def test_other_transforms_are_refused(transform, message):
    with pytest.raises(NotImplementedError, match=f"maskflash: attention.*({message})"):
        transform(attend_to_itself, torch.randn(1, 2, 9, 4))


def test_forward_mode_is_refused():
    q = torch.randn(1, 2, 9, 4)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="attention has no forward-mode derivative; use reverse mode"),
    ):
        mf.attention(torch.autograd.forward_ad.make_dual(q, q), q, q)


def test_a_mixed_second_derivative_is_refused():
    """Of a gradient of torch.func's, by a tensor that plain autograd knows."""
    q, w = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4, requires_grad=True)
    gradient = torch.func.grad(lambda q: mf.attention(q, w, w).sin().sum())(q)
    with pytest.raises(NotImplementedError, match="maskflash: attention has no second derivative"):
        gradient.sum().backward()


# Export


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_runs_also_when_loaded_again(strict):
    model = Layer()
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"x": {1: length}, "doc": {1: length}}
    program = torch.export.export(model, inputs(), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for runnable in (program, torch.export.load(file)):
        for length in (50, 77):
            given = inputs(length=length)
            module = runnable.module()
            found, expected = module(*given), model(*given)
            assert torch.equal(found, expected)
            wanted = [dict(module.named_parameters())[name] for name, _ in model.named_parameters()]
            assert equal(torch.autograd.grad(found.sum(), wanted), gradients(model, expected.sum()))


@pytest.mark.parametrize("strict", [False, True])
def test_captured_tables_are_exported_with_the_model(strict):
    class Captures(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = mf.compile(mf.causal() & mf.document(ids=torch.arange(50) // 17))

        def forward(self, q):
            return self.attn(q, q, q)

    model, q = Captures(), torch.randn(2, HEADS, 50, DIM)
    program = torch.export.export(model, (q,), strict=strict)
    assert torch.equal(program.module()(q), model(q))


# Autocast, AMP


def test_autocast_takes_torch_s_choice_of_dtype():
    q, k, v = Shape(1, 2, 1, 20, 30, 8, 8).tensors(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            mixed = mf.attention(q, k.bfloat16(), v.half())
            assert mixed.dtype == scaled_dot_product_attention(q, k, v, enable_gqa=True).dtype == dtype
            assert mf.attention(*(x.double() for x in (q, k, v))).dtype == torch.float64
        assert torch.equal(mf.attention(q, k, v).to(dtype).isfinite(), torch.ones_like(q, dtype=torch.bool))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = mf.attention(q, k, v)
    assert torch.equal(low, mf.attention(*(x.bfloat16() for x in (q, k, v))))
    (gradient,) = torch.autograd.grad(low.sum(), q)
    assert gradient.dtype == torch.float32


@settings(max_examples=30)
@given(mask=masks(), score=st.none() | scores(), shape=shapes(), p=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 9))
def test_autocast_casts_q_k_and_v_alone(mask, score, shape, p, seed):
    """What is computed of them is the same to the last bit, whichever way the call goes."""
    low = [x.detach().bfloat16() for x in shape.tensors(torch.float32, seed=seed)]
    found = []
    for cast in (True, False):
        inputs = [x.float().requires_grad_() if cast else x.clone().requires_grad_() for x in low]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out, lse = mf.attention(*inputs, mask, score=score, dropout_p=p, seed=seed, return_lse=True)
            without = mf.attention(*(x.detach() for x in inputs), mask, score=score, dropout_p=p, seed=seed)
        gradients = torch.autograd.grad((out, lse), inputs, (out.detach() + 1, lse.detach().cos()))
        found.append((out, lse, without, *(x.bfloat16() for x in gradients)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_mix_of_dtypes_without_autocast_is_told():
    q = torch.randn(1, 2, 20, 8)
    with pytest.raises(mf.ArgumentTypeError, match=r"k has dtype torch\.bfloat16, expected q's torch\.float32"):
        mf.attention(q, q.bfloat16(), q)


def losses(dense, dtype):
    """Of a few steps of AMP training."""
    torch.manual_seed(1)
    x, doc = inputs()
    model = Layer(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    found = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = model(x, doc)
        assert out.dtype == dtype
        loss = (out.float() - x).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_amp_is_as_good_as_with_a_dense_mask(dtype):
    exact = losses(True, torch.float32)
    ours, theirs = ((losses(dense, dtype) - exact).abs().max() for dense in (False, True))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * exact.max()
    assert exact[-1] < exact[0]


# Two processes


def train(rank, port, queue):
    """One step on half of the batch; the first process sends its gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(Layer())
    torch.manual_seed(2)
    x, doc = inputs(batch=2)
    model(x[rank : rank + 1], doc[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        queue.put([p.grad.numpy() for p in model.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_train_as_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=train, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = queue.get(timeout=600)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    torch.manual_seed(1)
    model = Layer()
    torch.manual_seed(2)
    expected = gradients(model, model(*inputs(batch=2)).square().mean())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs)
