"""Models of Transformers with maskflash's attention: the same logits, losses, gradients and tokens; no dense mask."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache, masking_utils

import maskflash as mf
from maskflash.integrations import closures
from maskflash.integrations import transformers as integration
from maskflash.op import analyse, cache
from tests.integrations.models import BATCH, LAYERS, MODELS, NAME, TOKENS, VOCABULARY, assert_within_budget, make

CASES = ["causal", "padded left", "padded right", "packed"]
CACHES = ["dynamic cache", "static cache"]
DOCUMENTS = ([70, 1, 50, 29], [30, 120])


def example(case):
    """What a model is given, and which of its tokens are no padding."""
    tokens = torch.randint(1, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    if case == "packed":
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
        return {"input_ids": tokens, "position_ids": positions}, real
    if case == "causal":
        return {"input_ids": tokens}, real
    real[1, slice(0, 37) if case == "padded left" else slice(-37, None)] = False
    positions = (real.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens * real, "attention_mask": real.long(), "position_ids": positions}, real


def trained(model, implementation, case):
    """Logits of real tokens, the loss and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    inputs, real = example(case)
    out = model(**inputs, labels=inputs["input_ids"].masked_fill(~real, -100), use_cache=False)
    out.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": out.logits.detach()[real], "loss": out.loss.detach(), **gradients}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_eager(name, case, monkeypatch):
    seen = []
    monkeypatch.setattr(integration, "attention", lambda *args, **kw: seen.append(args) or mf.attention(*args, **kw))
    model = make(name)
    found, eager, sdpa = (trained(model, implementation, case) for implementation in (NAME, "eager", "sdpa"))
    assert_within_budget(found, trained(make(name, torch.float64), "sdpa", case), eager, sdpa)
    assert [(k.shape[1], mask is not None) for q, k, v, mask in seen] == [(2, True)] * 2  # no key head is repeated


def test_the_comparison_can_fail(monkeypatch):
    monkeypatch.setattr(
        integration, "lifted", lambda *_: closures.lifted(masking_utils.causal_mask_function, masking_utils)
    )
    with pytest.raises(AssertionError, match="logits: error"):
        test_logits_loss_and_gradients_equal_eager("Mistral", "causal", monkeypatch)


def make_cache(kind, model):
    if kind == "dynamic cache":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=TOKENS + 10)


def read_in_pieces(model, implementation, kind, padded):
    """Logits of real tokens, read in pieces of many tokens, some, and one."""
    model.set_attn_implementation(implementation)
    inputs, real = example("padded left" if padded else "causal")
    cache, logits, start = make_cache(kind, model), [], 0
    for stop in (60, 61, 100, 101, 102, TOKENS):
        piece = {"input_ids": inputs["input_ids"][:, start:stop]}
        if padded:
            piece["position_ids"] = inputs["position_ids"][:, start:stop]
            piece["attention_mask"] = inputs["attention_mask"][:, :stop]
        with torch.no_grad():
            logits.append(model(**piece, past_key_values=cache, use_cache=True).logits)
        start = stop
    return {"logits": torch.cat(logits, 1)[real]}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded left"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_with_a_cache_equal_eager(name, kind, padded, monkeypatch):
    offsets = []
    original = integration.attention
    monkeypatch.setattr(
        integration, "attention", lambda *args, **kw: offsets.append(kw["kv_offset"]) or original(*args, **kw)
    )
    model = make(name)
    found, eager, sdpa = (read_in_pieces(model, way, kind, padded) for way in (NAME, "eager", "sdpa"))
    assert_within_budget(found, read_in_pieces(make(name, torch.float64), "sdpa", kind, padded), eager, sdpa)
    assert any(offsets) == (name in ("Gemma3", "Mistral"))  # a window's cache drops columns


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_equal_eager(name, kind):
    model = make(name)
    inputs, _ = example("padded left")
    ways = {"do_sample": False, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    found = {}
    for implementation in (NAME, "eager"):
        model.set_attn_implementation(implementation)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found[implementation] = model.generate(**given, cache_implementation=kind.split()[0], **ways)
    ours, eager = (torch.stack(found[way].logits) for way in (NAME, "eager"))
    first, second = eager.topk(2).values.unbind(-1)
    assert (first - second > 2 * (ours - eager).abs().amax(-1)).all()  # so that no token is a matter of rounding
    assert torch.equal(found[NAME].sequences, found["eager"].sequences)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made; inside maskflash's own ops nothing is seen."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, integration.LayerMask):
                self.elements = max(self.elements, tensor.numel())
        return made


def packed_step(model, implementation, tokens, length):
    """One training step on documents of a length."""
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, VOCABULARY, (1, tokens))
    positions = torch.arange(tokens)[None] % length
    model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()


@pytest.mark.parametrize(("implementation", "dense"), [(NAME, False), ("eager", True), ("sdpa", True)])
def test_packed_training_makes_no_dense_mask(implementation, dense):
    with Largest() as largest:
        packed_step(make("Gemma3"), implementation, 1024, 100)
    assert (largest.elements >= 1024 * 1024) == dense


def peak_growth():
    """Bytes by which the peak grows in a step at 16,384 tokens, run in a process of its own."""
    model = make("Llama")
    packed_step(model, NAME, 256, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed_step(model, NAME, 16384, 100)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux")
def test_the_peak_of_packed_training_is_below_a_dense_mask():
    program = f"import runpy, sys\nprint(runpy.run_path({str(Path(__file__))!r})['peak_growth']())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16384 * 16384  # bytes of a dense mask of bools alone


def test_layers_share_an_analysis_and_documents_need_no_new_trace(monkeypatch):
    analyses, traces = [], []
    monkeypatch.setattr(cache, "analyse", lambda *args: analyses.append(args) or analyse.analyse(*args))
    monkeypatch.setattr(closures, "trace", lambda *args, trace=closures.trace: traces.append(args) or trace(*args))
    closures._mask.cache_clear()
    model = make("Gemma3", num_hidden_layers=6, layer_types=LAYERS * 3)
    for length in (100, 33, 7):
        packed_step(model, NAME, 256, length)
    assert len(analyses) == 3 * len(LAYERS)
    assert len(traces) == len(LAYERS)


@pytest.mark.parametrize("lengths", [(6, 6), (5, 9), (1, 7)], ids=str)
@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (7, 3)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        masking_utils.causal_mask_function,
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_causal_mask_function(3),
        masking_utils.sliding_window_bidirectional_mask_function(2),
        masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 1])),
        masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.arange(32).view(2, 16) // 3 - 1)
        ),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: (q + kv) % 2 == 0),
    ],
    ids=["causal", "bidirectional", "sliding", "sliding both ways", "chunked", "blockwise", "of the user"],
)
def test_every_mask_of_the_library_is_the_same_pair_by_pair(function, padded, offsets, lengths):
    padding = torch.rand(2, 14, generator=torch.Generator().manual_seed(3)) < 0.7 if padded else None
    given = (2, *lengths, *offsets, function, padding)
    found = integration.layer_mask(*given)
    dense = masking_utils.sdpa_mask(*given, allow_is_causal_skip=False)
    assert tuple(found.shape) == (2, 1, *lengths)
    ours = found.mask.at(
        *lengths, batch=2, q_offset=found.offsets[0], kv_offset=found.offsets[1], **found.mask_args
    ).dense()
    assert torch.equal(ours, dense)


def test_an_offset_in_a_tensor_is_read_at_once():
    offset = torch.tensor(3)  # as static caches count, in place
    mask = integration.layer_mask(1, 2, 8, offset)
    offset += 2
    assert mask.offsets == (3, 0)


def test_a_mask_of_transformers_keeps_the_bits_of_numbers_apart():
    """1 and True are equal keys to Python, but not the same mask."""
    one, true = (closures.lifted(masking_utils.sliding_window_overlay(n), masking_utils) for n in (1, True))
    assert one[0] is not true[0]
    again = closures.lifted(masking_utils.sliding_window_overlay(1), masking_utils)
    assert again[0] is one[0]


def test_a_function_of_the_user_is_read_at_each_forward_pass():
    """It may read globals that have changed."""
    space = {"limit": 2}
    exec("def below(b, h, q, kv): return kv < limit", space)
    for limit in (2, 3):
        space["limit"] = limit
        found = integration.layer_mask(1, 4, 4, mask_function=space["below"])
        assert found.mask.dense(4, 4, **found.mask_args).sum() == 4 * limit


def test_sinks_are_trained_as_with_eager():
    model = make("GptOss", head_dim=16, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None)
    ids, found = torch.randint(1, VOCABULARY, (1, 8)), {}
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found[name] = model.model.layers[0].self_attn.sinks.grad.clone()
    assert found["eager"].abs().max() > 0
    torch.testing.assert_close(found[NAME], found["eager"])


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (2, 1, 9, 9), (2, 4, 9, 9)], ids=str)
def test_a_mask_of_all_pairs_is_taken(shape):
    model, ids = make("Llama"), torch.arange(1, 19).view(2, 9)
    dense = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5) | torch.eye(9, dtype=torch.bool)
    results = {}
    for way in (NAME, "sdpa", "eager"):
        model.set_attn_implementation(way)
        given = torch.where(dense, 0.0, -torch.inf) if way == "eager" else dense
        results[way] = {"logits": model(ids, attention_mask=given).logits}
    exact = make("Llama", torch.float64)
    exact.set_attn_implementation("sdpa")
    truth = {"logits": exact(ids, attention_mask=dense).logits}
    assert_within_budget(results[NAME], truth, results["eager"], results["sdpa"])


def test_the_docs_list_what_is_checked():
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    header = next(row for row in rows if row[:2] == ["model", CASES[0]])
    assert header[1:] == [*CASES, *CACHES, "generate()"]
    found = {row[0]: row[1:] for row in rows[rows.index(header) + 2 :][: len(MODELS)]}
    assert list(found) == list(MODELS)
    assert all(cell == "✓" for cells in found.values() for cell in cells)
    assert re.search(r'attn_implementation="mf"', text)
