"""Programs without our op compute what the op does, within the budget of a plain computation; ONNX's evaluator too."""

import pytest
import torch
from torch import nn

import maskflash as mf
from maskflash.backends.reference import error_budget, reference

DOC = torch.arange(300)[None] // 7
WINDOW = torch.tensor([3, 20])


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv]


def by_head(b, h, q, kv):
    return q - WINDOW[h % 2] <= kv <= q or DOC[0, -1 - kv] == 41  # from the table's end, too


class Layer(nn.Module):
    def __init__(self, mask, **options):
        super().__init__()
        self.attn, self.options = mf.compile(mask), options

    def forward(self, q, k, v):
        return self.attn(q, k, v, return_lse=True, **self.options)


CASES = {
    "causal": Layer(mf.causal()),
    "a float and a number": Layer(lambda b, h, q, kv: (q - kv) * 0.5 < 7),
    "tables": Layer(by_head),
    "an argument": Layer(packed, doc=DOC.expand(2, -1)),
    "an offset": Layer(mf.sliding_window(9), q_offset=5, kv_offset=2),
    "offsets": Layer(mf.causal(), q_offset=torch.tensor([4, -30])),  # rows that see nothing
    "sinks": Layer(mf.causal(), sinks=torch.tensor([0.5, 1.0, -1.0, 3.0])),
}


def plain_program(layer, *tensors):
    length = torch.export.Dim("length", min=2, max=300)
    program = torch.export.export(layer, tensors, dynamic_shapes=[{2: length}] * 3)
    plain = program.run_decompositions(mf.dense_decompositions())
    assert not any("maskflash" in str(node.target) for node in plain.graph.nodes)
    return plain


def tensors(length, dtype=torch.float32):
    torch.manual_seed(length)
    return tuple(torch.randn(2, heads, length, dim).to(dtype) for heads, dim in ((4, 8), (2, 8), (2, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_program_of_torch_s_own_operations_computes_the_same(name, dtype):
    layer = CASES[name]
    plain = plain_program(layer, *tensors(40, dtype)).module()
    mask_args = {name: x for name, x in layer.options.items() if name == "doc"}
    place = {name: x for name, x in layer.options.items() if name.endswith("_offset")}
    sinks = layer.options.get("sinks")
    for length in (40, 77, 2):
        q, k, v = tensors(length, dtype)
        dense = layer.attn.mask.dense(length, length, batch=2, heads=4, **place, **mask_args)
        exact, own = (
            reference(*(x.to(to) for x in (q, k, v)), dense, 8**-0.5, None if sinks is None else sinks.to(to))
            for to in (torch.float64, dtype)
        )
        for found, truth, rough in zip(plain(q, k, v), exact, own, strict=True):
            finite = truth.isfinite()
            assert torch.equal(found.isfinite(), finite)
            error = (found.double() - truth)[finite].abs()
            assert float(error.max()) <= error_budget(rough, truth)


def test_scores_and_dropout_are_refused():
    capped, dropping = Layer(mf.causal()), Layer(mf.causal(), dropout_p=0.5, seed=torch.tensor([3]))
    capped.attn = mf.compile(mf.causal(), score=mf.scores.softcap(5.0))
    for layer in (capped, dropping):
        with pytest.raises(Exception, match=r"dense_decompositions: the program has a call with (a score|dropout)"):
            plain_program(layer, *tensors(9))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_s_own_evaluator_computes_the_same(tmp_path):
    pytest.importorskip("onnxscript", reason="in the extra test: pip install 'maskflash[test]'")
    import onnx
    from onnx.reference import ReferenceEvaluator

    layer = CASES["tables"]
    torch.onnx.export(plain_program(layer, *tensors(40)), dynamo=True, verbose=False).save(tmp_path / "layer.onnx")
    model = onnx.load(tmp_path / "layer.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "pkg.onnxscript.torch_lib", "ai.onnx"}
    given = tensors(77)
    names = [value.name for value in model.graph.input]
    found = ReferenceEvaluator(model).run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
    dense = layer.attn.mask.dense(77, 77, batch=2, heads=4)
    exact, own = (reference(*(x.to(to) for x in given), dense, 8**-0.5) for to in (torch.float64, torch.float32))
    for result, truth, rough in zip(map(torch.from_numpy, found), exact, own, strict=True):
        assert (result.double() - truth).abs().max() <= error_budget(rough, truth)
