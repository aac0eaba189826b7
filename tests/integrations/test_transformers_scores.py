"""Models that do something to their scores: soft-caps, position biases, masks of floats. As eager in all gradients."""

import re

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.inkling2.modeling_inkling2 import eager_attention_forward as inkling2_eager

import maskflash as mf
from maskflash.functions import written
from maskflash.integrations import layers
from maskflash.integrations import transformers as integration
from tests.integrations.models import (
    DENSE,
    NAME,
    assert_as_near,
    assert_within_budget,
    dense_forward,
    dropout,
    randomise,
)

VOCABULARY, TOKENS, IMAGE = 64, 20, 60
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 64},
}
CAPPED = {
    **{**SIZES, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 3.0},
    **{"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
VISION = {**{name: SIZES[name] for name in list(SIZES)[1:5]}, "image_size": 32, "patch_size": 8, "projection_dim": 32}
T5 = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0},
}
SOUND = {**SIZES, "conv_dim": [16], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1}
CONFIGS = {
    "Gemma2ForCausalLM": CAPPED,
    "VaultGemmaForCausalLM": CAPPED,
    "PaliGemmaForConditionalGeneration": {
        "text_config": {**CAPPED, "model_type": "gemma2"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        **{"image_token_id": IMAGE, "projection_dim": 32},
    },
    "T5ForConditionalGeneration": T5,
    "MT5ForConditionalGeneration": T5,
    "LayoutLMForMaskedLM": SIZES,
    "SwinModel": {
        "depths": [2],
        "num_heads": [4],
        "embed_dim": 32,
        "window_size": 4,
        "image_size": 32,
        "patch_size": 4,
    },
    "Wav2Vec2ConformerModel": {
        **SOUND,
        **{"position_embeddings_type": "relative", "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4},
        **{"mask_time_prob": 0.0, "conv_depthwise_kernel_size": 3, "layerdrop": 0.0},
    },
    "Wav2Vec2BertModel": {
        **SIZES,
        **{"feature_projection_input_dim": 16, "position_embeddings_type": "relative_key", "layerdrop": 0.0},
        **{"left_max_position_embeddings": 4, "right_max_position_embeddings": 3, "conv_depthwise_kernel_size": 3},
        **{"mask_time_prob": 0.0},
    },
    "ParakeetEncoder": {
        **SIZES,
        **{"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3, "scale_input": False},
        **{"layerdrop": 0.0},
    },
}


def build(name, dtype=torch.float32, **changes):
    """A small model with weights drawn from one seed, in eval."""
    family = re.match("(.*?)(For[A-Z].*|LMHeadModel|Model)?$", name)[1]
    config = getattr(transformers, f"{family}Config")(**{**CONFIGS[name], **changes})
    return randomise(getattr(transformers, name)(config)).to(dtype).eval()


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def read(padded="right"):
    """Token ids, and 1 where they are no padding."""
    ids = torch.randint(3, IMAGE, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, slice(0, 5) if padded == "left" else slice(-5, None)] = 0
    return {"input_ids": ids * real, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}


def with_images():
    given = read()
    given["input_ids"][:, :16] = given["labels"][:, :16] = IMAGE
    return {**given, "pixel_values": drawn(2, 3, 32, 32), "token_type_ids": (given["input_ids"] != IMAGE).long()}


def translated():
    given = read()
    return {**given, "labels": given["input_ids"][:, :7].clamp(min=3)}


def boxes():
    corners = torch.randint(0, 30, (2, TOKENS, 2), generator=torch.Generator().manual_seed(3))
    return {**read(), "bbox": torch.cat([corners, corners + 5], -1)}


def heard():
    real = torch.ones(2, TOKENS, dtype=torch.long)
    real[1, -6:] = 0
    return {"input_features": drawn(2, TOKENS, 16), "attention_mask": real}


GIVEN = {
    "Gemma2ForCausalLM": read,
    "VaultGemmaForCausalLM": lambda: read("left"),
    "PaliGemmaForConditionalGeneration": with_images,
    "T5ForConditionalGeneration": translated,
    "MT5ForConditionalGeneration": translated,
    "LayoutLMForMaskedLM": boxes,
    "SwinModel": lambda: {"pixel_values": drawn(2, 3, 32, 32)},
    "Wav2Vec2ConformerModel": lambda: {"input_values": drawn(2, 40)},
    "Wav2Vec2BertModel": heard,
    "ParakeetEncoder": heard,
}


def trained(model, implementation, given):
    """The first result, and the gradients of all parameters that it depends on."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(**{name: x.to(model.dtype) if x.is_floating_point() else x for name, x in given.items()})
    loss = out.loss if "loss" in out else (out.last_hidden_state * drawn(*out.last_hidden_state.shape)).mean()
    loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
@pytest.mark.parametrize("name", list(GIVEN))  # those so far
def test_losses_and_gradients_equal_eager(name, monkeypatch):
    calls = []
    monkeypatch.setattr(integration, "attention", lambda *args, **kw: calls.append(kw) or mf.attention(*args, **kw))
    model, given = build(name), GIVEN[name]()
    found = trained(model, NAME, given)
    assert len(calls) >= 2
    eager, dense = (trained(model, way, given) for way in ("eager", DENSE))
    assert_as_near(found, trained(build(name, torch.float64), DENSE, given), eager, dense)


def test_the_comparison_can_fail(monkeypatch):
    def other(cap, bias, *rest):
        return layers.score_of(cap and 1.01 * cap, None if bias is None else bias * 1.01, *rest)

    monkeypatch.setattr(integration, "score_of", other)
    for name in ("Gemma2ForCausalLM", "T5ForConditionalGeneration"):
        with pytest.raises(AssertionError, match="error"):
            test_losses_and_gradients_equal_eager(name, monkeypatch)


def dropped(name, monkeypatch, dtype=torch.float32, **changes):
    """A model that is trained, and drops what its config says, with torch's dropout replaced: see `models.dropout`."""
    monkeypatch.setattr(nn.functional, "dropout", dropout)
    return build(name, dtype, **changes).train()


DROPPED = {
    "GPT2LMHeadModel": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "BertForMaskedLM": SIZES,
    "RobertaForMaskedLM": SIZES,
    "T5ForConditionalGeneration": T5,
    "Gemma2ForCausalLM": {**CAPPED, "attention_dropout": 0.2},
}
CONFIGS |= DROPPED
GIVEN |= dict.fromkeys(("GPT2LMHeadModel", "BertForMaskedLM", "RobertaForMaskedLM"), read)


def seeded(model, implementation, given):
    torch.manual_seed(5)
    return trained(model, implementation, given)


@pytest.mark.parametrize("name", DROPPED)
def test_training_with_dropout_equals_eager_with_the_same_pairs_kept(name, monkeypatch):
    """The models' own rates, also of what is dropped outside of attention."""
    given, model = GIVEN[name](), dropped(name, monkeypatch)
    calls = []
    monkeypatch.setattr(integration, "attention", lambda *args, **kw: calls.append(kw) or mf.attention(*args, **kw))
    found = seeded(model, NAME, given)
    assert {call["dropout_p"] for call in calls} == {0.2 if name.startswith("Gemma2") else 0.1}
    eager, dense = (seeded(model, way, given) for way in ("eager", DENSE))
    assert_as_near(found, seeded(dropped(name, monkeypatch, torch.float64), DENSE, given), eager, dense)


def test_the_seed_is_torch_s(monkeypatch):
    given, model = read(), build("GPT2LMHeadModel").train()
    first, again = (seeded(model, NAME, given) for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    torch.manual_seed(6)
    assert not torch.equal(trained(model, NAME, given)["loss"], first["loss"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_recomputation_drops_the_same(name, reentrant):
    """And T5's biases, which then want gradients in each layer, get them."""
    given, model = GIVEN[name](), build(name).train()
    expected = seeded(model, NAME, given)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = seeded(model, NAME, given)
    assert found.keys() == expected.keys()
    if reentrant and name.startswith("T5"):  # whose shared bias then sums its layers' gradients in another order
        torch.testing.assert_close(found, expected)
    else:
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_in_eval_nothing_is_dropped_whatever_a_layer_passes():
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    layer = nn.Linear(1, 1).eval()
    given = {"dropout": 0.5, "is_causal": False}
    plain = mf.attention(q, k, v).transpose(1, 2)
    assert torch.equal(integration.attention_forward(layer, q, k, v, None, **given)[0], plain)
    assert not torch.equal(integration.attention_forward(layer.train(), q, k, v, None, **given)[0], plain)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_position_biases_follow_a_cache(kind):
    model, given = build("T5ForConditionalGeneration"), translated()
    found = {}
    for implementation in (NAME, "eager"):
        model.set_attn_implementation(implementation)
        asked = {name: given[name] for name in ("input_ids", "attention_mask")}
        found[implementation] = model.generate(
            **asked,
            cache_implementation=kind,
            do_sample=False,
            max_new_tokens=8,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(found[NAME].sequences, found["eager"].sequences)
    for ours, eager in zip(found[NAME].logits, found["eager"].logits, strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_bias_counts_the_rows_of_its_call():
    """Behind a cache its first row is that of the query, whatever the mask numbers it."""
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 9, 8), torch.randn(1, 4, 9, 8)
    bias = torch.randn(1, 4, 3, 9)
    mask = integration.layer_mask(1, 3, 9, 6)
    found = integration.attention_forward(nn.Linear(1, 1), q, k, v, mask, position_bias=bias)[0]
    whole = torch.zeros(1, 4, 9, 9)
    whole[:, :, 6:] = bias
    expected = mf.attention(q, k, v, mf.causal(), score=mf.scores.bias(whole), q_offset=6)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(1, 2, 4, 5), mf.ArgumentError, r"position_bias of shape \(1, 2, 4, 5\), expected \(1, 2, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), mf.ArgumentError, r"position_bias of shape \(1, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4), mf.ArgumentError, r"position_bias of shape \(2, 4, 4\)"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.long), mf.ArgumentTypeError, "a tensor of torch.int64 as position_bias"),
        (3.0, mf.ArgumentTypeError, "a float as position_bias, expected a floating tensor"),
    ],
    ids=["columns", "heads", "dimensions", "integers", "a number"],
)
def test_biases_that_do_not_fit_are_refused(bias, error, message):
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(error, match=message):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, None, position_bias=bias)


def test_a_soft_cap_beside_a_bias_is_refused():
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(mf.ArgumentError, match="Linear asks for softcap and position_bias, which don't say which"):
        integration.attention_forward(
            nn.Linear(1, 1), q, k, v, None, position_bias=torch.zeros(1, 2, 4, 4), softcap=3.0
        )


def test_no_layer_and_no_step_traces_a_score_function_again(monkeypatch):
    model, given = build("T5ForConditionalGeneration"), translated()
    trained(model, NAME, given)
    traces = []
    monkeypatch.setattr(written, "trace", lambda *args, **kw: traces.append(args))
    trained(build("T5ForConditionalGeneration"), NAME, {**given, "labels": given["labels"][:, :5].contiguous()})
    assert not traces


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_mask_of_floats_is_a_mask_and_a_bias(lowest):
    model, ids = build("Gemma2ForCausalLM"), read()["input_ids"]
    hidden = torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.5
    hidden &= ~torch.eye(TOKENS, dtype=torch.bool)
    added = drawn(2, 1, TOKENS, TOKENS).masked_fill(hidden, lowest)
    results = {}
    for way in (NAME, "eager", DENSE):
        model.set_attn_implementation(way)
        results[way] = {"logits": model(ids, attention_mask=added).logits.detach()}
    model.double()
    truth = {"logits": model(ids, attention_mask=added.double().masked_fill(hidden, -torch.inf)).logits.detach()}
    assert_within_budget(results[NAME], truth, results["eager"], results[DENSE])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at masks
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_a_compiled_model_learns_and_drops_the_same(name):
    given, model = GIVEN[name](), build(name).train()
    expected = seeded(model, NAME, given)
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, backend=counter)
    torch.manual_seed(5)
    model.zero_grad()
    fast(**given).loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert all(torch.equal(x, expected[name]) for name, x in gradients.items())
    compilations = counter.frame_count
    for _ in range(2):
        fast(**given)
    assert counter.frame_count == compilations


def test_sinks_of_each_row_are_one_more_column():
    q, k, v = torch.randn(3, 2, 2, 5, 8, dtype=torch.float64).unbind()
    sinks = torch.randn(2, 2, 5, 1, dtype=torch.float64)
    found = integration.attention_forward(nn.Linear(1, 1), q, k, v, None, sinks=sinks)[0]
    scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (torch.zeros(2), mf.ArgumentError, r"sinks of shape \(2,\), expected \(1, 2, 4, 1\)"),
        (torch.zeros(1, 3, 4, 1), mf.ArgumentError, r"sinks of shape \(1, 3, 4, 1\)"),
        (2.0, mf.ArgumentTypeError, "a float as sinks, expected a floating tensor"),
    ],
    ids=["of heads", "heads", "a number"],
)
def test_sinks_that_do_not_fit_are_refused(sinks, error, message):
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(error, match=message):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, None, sinks=sinks)


CONFIGS["Inkling2TextModel"] = {
    **{**SIZES, "num_key_value_heads": 2, "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    **{"swa_head_dim": 8, "sliding_window_size": 6, "d_rel": 4, "rel_extent": 8, "n_routed_experts": 2},
    **{"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"], "n_layers_per_attn_res_block": 1},
}


def of_a_layer(call, attend, mask, arriving, dtype=torch.float32):
    """What attention gives in a call of a layer, where something arrives, and its gradients."""
    (module, q, k, v, _), asked = call
    given = {"q": q, "k": k, "v": v, "position_bias": asked["position_bias"], "sinks": asked["sinks"]}
    own = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
    q, k, v, *_ = own.values()
    out = attend(module, q, k, v, mask, **{**asked, "position_bias": own["position_bias"], "sinks": own["sinks"]})[0]
    gradients = torch.autograd.grad(out, tuple(own.values()), arriving.to(dtype))
    return {"out": (out * (arriving != 0)).detach(), **dict(zip(own, gradients, strict=True))}


def test_biases_beside_sinks_of_each_row_are_those_of_eager(monkeypatch):
    """Inkling2's layers, one by one, since its experts are float32 whatever the model is."""
    calls = []

    def spy(*args, **asked):
        calls.append((args, asked))
        return integration.attention_forward(*args, **asked)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "spy", spy)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "spy", integration.layer_mask)
    model, given = build("Inkling2TextModel"), read("left")
    model.set_attn_implementation("spy")
    model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    assert len(calls) == 2
    for call in calls:
        mask = call[0][-1]
        seen = mask.mask.at(TOKENS, TOKENS, batch=2, **mask.mask_args).dense()
        added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        arriving = drawn(2, TOKENS, 4, 8) * seen.any(-1)[:, 0, :, None, None]  # eager differs where a row sees nothing
        found = of_a_layer(call, integration.attention_forward, mask, arriving)
        plain = of_a_layer(call, inkling2_eager, added, arriving), of_a_layer(call, dense_forward, seen, arriving)
        assert_as_near(found, of_a_layer(call, dense_forward, seen, arriving, torch.float64), *plain)
