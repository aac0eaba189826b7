"""Models of Transformers with maskflash's attention: the same logits, losses, gradients and tokens; no dense mask."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache, masking_utils

import maskflash as mf
from maskflash.backends.reference import error_budget
from maskflash.integrations import closures
from maskflash.integrations import transformers as integration
from maskflash.op import analyse, cache

NAME = integration.register()
TOKENS, BATCH, WINDOW, VOCABULARY = 150, 2, 20, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # wide enough for logits that differ
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
LAYERS = ["sliding_attention", "full_attention"]
MODELS = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": WINDOW, "layer_types": LAYERS, "query_pre_attn_scalar": 20},
    "Mistral": {"head_dim": 8, "sliding_window": WINDOW},
}
CASES = ["causal", "padded left", "padded right", "packed"]
CACHES = ["dynamic cache", "static cache"]
DOCUMENTS = ([70, 1, 50, 29], [30, 120])


def make(name, dtype=torch.float32, **changes):
    """A small model with weights drawn from one seed."""
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **MODELS.get(name, {}), **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


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


def assert_within_budget(found, exact, *plain):
    """As near to the truth as twice the worst of plain implementations; eager's float64 is none: its softmax is not."""
    for name, truth in exact.items():
        budget = max(error_budget(results[name], truth) for results in plain)
        error = (found[name].double() - truth).abs().max().item()
        assert error <= budget, f"{name}: error {error:.3g} exceeds its budget of {budget:.3g}"


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


def test_what_maskflash_does_not_compute_is_refused_by_name():
    ids = torch.randint(1, VOCABULARY, (1, 8))
    refused = {
        "softcap": make("Gemma2", head_dim=16),
        "dropout": make("Llama", attention_dropout=0.1).train(),
    }
    for name, model in refused.items():
        model.set_attn_implementation(NAME)
        with pytest.raises(mf.ArgumentError, match=f"Attention asks for {name}, which"):
            model(ids)
    model = make("Llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(mf.ArgumentError, match="LlamaAttention asks for output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(mf.ArgumentTypeError, match=r"mask of torch.float32, expected torch.bool.* pass mask == 0"):
        model(ids, attention_mask=torch.zeros(1, 1, 8, 8))
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(mf.ArgumentTypeError, match=r"a tensor of 2 dimensions.* padding as \(batch, tokens\)"):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, torch.ones(1, 4))
    with pytest.raises(mf.ArgumentTypeError, match=r"has a list as attention_mask"):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, [1])


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


@pytest.mark.parametrize("name", ["position_bias", "sinks", "indices", "cache", "something_new"])
def test_any_other_wish_is_refused_by_name(name):
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(mf.ArgumentError, match=f"Linear asks for {name}"):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, None, **{name: torch.ones(())})


def test_without_a_mask_a_layer_says_whether_it_is_causal():
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    layer = nn.Linear(1, 1)
    for is_causal in (True, False):
        layer.is_causal = is_causal
        expected = mf.attention(q, k, v, mf.causal() if is_causal else None).transpose(1, 2)
        for way in (None, is_causal):
            assert torch.equal(integration.attention_forward(layer, q, k, v, None, is_causal=way)[0], expected)
    last = integration.attention_forward(layer, q[:, :, -1:], k, v, None, is_causal=True)[0]
    assert torch.equal(last, mf.attention(q[:, :, -1:], k, v).transpose(1, 2))
    with pytest.raises(mf.ArgumentError, match="2 queries with 4 keys"):
        integration.attention_forward(layer, q[:, :, :2], k, v, None, is_causal=True)


def test_a_mask_for_other_lengths_is_refused():
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(mf.ArgumentError, match="4 queries, 4 keys and batch 1, but its mask was made for 4, 6 and 1"):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, integration.layer_mask(1, 4, 6))


def test_a_layer_mask_holds_no_pairs():
    mask = integration.layer_mask(1, 1 << 20, 1 << 20)
    assert mask.contiguous() is mask
    assert mask.detach() is mask
    with pytest.raises(mf.ArgumentError, match=r"aten.slice.* holds no pairs"):
        mask[:, :, :, :8]
    with pytest.raises(mf.ArgumentError, match=r"aten.add.* holds no pairs"):  # not an operand of another type
        torch.zeros(()) + mask
    assert "offsets=(0, 0)" in repr(mask)


def test_names_that_transformers_takes_for_flash_attention_are_refused():
    with pytest.raises(mf.ArgumentError, match='without "flash"'):
        integration.register("maskflash")
    for name in ("sdpa", "eager", "flex_attention", "paged|mf", "kernels/mine", "my_sdpa"):
        with pytest.raises(mf.ArgumentError, match=f"name is '{re.escape(name)}', expected one without"):
            integration.register(name)
    for name in ("", " "):
        with pytest.raises(mf.ArgumentError, match="expected one that is not empty; leave it out"):
            integration.register(name)
    for name in (None, 3, b"mf"):
        with pytest.raises(mf.ArgumentTypeError, match="expected a str; leave it out for 'mf'"):
            integration.register(name)
    assert integration.register("mf_again") == integration.register("mf_again") == "mf_again"
    model = make("Llama", attn_implementation="mf_again")
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, VOCABULARY)


def test_the_name_of_somebody_else_s_attention_is_refused(monkeypatch):
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "theirs", lambda *args, **kw: None)
    with pytest.raises(mf.ArgumentError, match="'theirs', which is registered for another attention"):
        integration.register("theirs")


@pytest.mark.parametrize("documents", [[9], [3, 1, 5], [4, 4, 1]], ids=str)
def test_boundaries_of_flash_attention_are_taken_beside_positions_that_say_the_same(documents):
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": list(range(1, n + 1))} for n in documents])
    model = make("Llama")
    model.set_attn_implementation(NAME)
    boundaries = {name: batch.pop(name) for name in list(batch) if name.startswith(("cu_seq", "max_length"))}
    assert len(boundaries) == 4
    expected = model(**batch, use_cache=False)
    assert torch.equal(model(**batch, **boundaries, use_cache=False).logits, expected.logits)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(expected.logits, model(**batch, use_cache=False).logits)


def test_boundaries_that_the_mask_does_not_have_are_refused():
    model, ids = make("Llama"), torch.ones(1, 8, dtype=torch.long)
    model.set_attn_implementation(NAME)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "use_cache": False}
    model(ids, position_ids=positions, **given)
    others = ({}, {"position_ids": positions.roll(1)}, {"position_ids": positions, "attention_mask": torch.ones(1, 8)})
    for other in others:  # with an attention_mask, Transformers looks for no documents
        with pytest.raises(mf.ArgumentError, match="whose documents are not those of its mask; give the position_ids"):
            model(ids, **other, **given)


def test_boundaries_count_all_rows_of_a_batch():
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    assert integration._boundaries(documents, 2, 4) == [0, 2, 4, 8]
    assert integration._boundaries(None, 3, 4) == [0, 4, 8, 12]
    assert integration._boundaries(None, 3, 0) == [0]


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
