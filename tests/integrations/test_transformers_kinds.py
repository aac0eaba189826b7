"""Models of other kinds under maskflash: encoders, cross attention, vision, images in text; other ways to run one."""

import pytest
import torch
import transformers
from transformers import DynamicCache

import maskflash as mf
from maskflash.backends.reference import error_budget
from maskflash.integrations import transformers as integration

NAME = integration.register()
VOCABULARY, TOKENS = 64, 30
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**{name: SIZES[name] for name in list(SIZES)[1:-1]}, "image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1, "init_std": 0.3},
    **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
LATENT = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1},
}
GEMMA = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 20}
IMAGE, IMAGE_TOKENS = 60, 4


def build(name, **config):
    """A small model with weights drawn from one seed."""
    family = next(family for family in sorted(CONFIGS, key=len, reverse=True) if name.startswith(family))
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **config})).eval()


CONFIGS = {
    "Llama": DECODER,
    "Mistral": {**DECODER, "sliding_window": 6},
    "DeepseekV3": {**SIZES, **LATENT},
    "Bert": SIZES,
    "ModernBert": {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2},
    "Bart": SEQ2SEQ,
    "Whisper": {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "bos_token_id": 1, "eos_token_id": 2},
    "ViT": VISION,
    "Gemma3": {
        "text_config": {**DECODER, **GEMMA},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": IMAGE_TOKENS,
        "image_token_id": IMAGE,
    },
}


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def read(tokens=TOKENS, padded=True):
    """Token ids, and 1 where they are no padding: on the right in the first row, on the left in the second."""
    ids = torch.randint(3, IMAGE, (2, tokens), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    if padded:
        real[0, -5:] = real[1, :5] = 0
    return {"input_ids": ids * real, "attention_mask": real}


def with_images():
    given = read()
    given["input_ids"][:, 8 : 8 + IMAGE_TOKENS] = IMAGE
    types = (given["input_ids"] == IMAGE).long()
    return {**given, "pixel_values": drawn(2, 3, 32, 32), "token_type_ids": types}


DECODED = {"decoder_input_ids": read(11, padded=False)["input_ids"]}
KINDS = {
    "BertModel": read,
    "ModernBertModel": read,
    "BartModel": lambda: {**read(), **DECODED},
    "WhisperModel": lambda: {"input_features": drawn(2, 8, 40), **DECODED},
    "ViTModel": lambda: {"pixel_values": drawn(2, 3, 32, 32)},
    "DeepseekV3Model": read,
    "Gemma3Model": with_images,
}


def states(model, implementation, given):
    """The last hidden states of what is no padding."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        found = model(**given).last_hidden_state
    real = given.get("attention_mask")
    return found if real is None or real.shape != found.shape[:2] else found[real.bool()]


def assert_as_good(found, exact, *plain):
    """As near to the truth as twice the worst of plain implementations."""
    assert (found.double() - exact).abs().max() <= max(error_budget(other, exact) for other in plain)


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_models_equal_eager(name, monkeypatch):
    calls = []
    monkeypatch.setattr(integration, "attention", lambda *args, **kw: calls.append(args) or mf.attention(*args, **kw))
    given, model = KINDS[name](), build(name)
    found, eager, sdpa = (states(model, way, given) for way in (NAME, "eager", "sdpa"))
    wide = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    assert_as_good(found, states(model.double(), "sdpa", wide), eager, sdpa)
    assert len(calls) >= 2


def test_cross_attention_without_padding_sees_all_of_the_encoder():
    model, given = build("BartModel"), {"input_ids": read(padded=False)["input_ids"], **DECODED}
    found, eager, sdpa = (states(model, way, given) for way in (NAME, "eager", "sdpa"))
    assert_as_good(found, states(model.double(), "sdpa", given), eager, sdpa)


def gradients(model, implementation):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    given = read()
    model(**given, labels=given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = build("MistralForCausalLM").train()
    expected = gradients(model, NAME)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(gradients(model, NAME), expected)


def test_in_bfloat16_it_is_as_near_as_eager():
    given, model = read(), build("MistralModel").bfloat16()
    found, eager, sdpa = (states(model, way, given) for way in (NAME, "eager", "sdpa"))
    assert_as_good(found, states(model.double(), "sdpa", given), eager, sdpa)


WAYS = {
    "beams": {"num_beams": 3},
    "without a cache": {"use_cache": False},
    "guesses from the prompt": {"prompt_lookup_num_tokens": 3},
    "an assistant": {"assistant_model": None},
    "a prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_gives_eager_s_tokens(way):
    model, assistant = build("MistralForCausalLM"), build("LlamaForCausalLM", num_hidden_layers=1)
    asked = {name: assistant if name == "assistant_model" else value for name, value in WAYS[way].items()}
    rows = slice(1, 2) if way in ("guesses from the prompt", "an assistant") else slice(None)  # a batch of one
    prompt = {name: value[rows, :9] for name, value in read().items()}
    found = {}
    for implementation in (NAME, "eager"):
        for part in (model, assistant):
            part.set_attn_implementation(implementation)
        found[implementation] = model.generate(**prompt, **asked, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(found[NAME], found["eager"])


def test_a_compiled_model_follows_its_padding_documents_and_cache():
    """Its masks are made at each forward pass, outside of what is compiled."""
    model, given = build("MistralForCausalLM", num_hidden_layers=1), read()
    model.set_attn_implementation(NAME)
    fast, ids = torch.compile(model, backend="eager"), given["input_ids"]
    other = {**given, "attention_mask": given["attention_mask"].flip(0)}
    packed = {"position_ids": torch.cat([torch.arange(11), torch.arange(19)])[None], "use_cache": False}
    with torch.no_grad():
        for case in (given, other, {"input_ids": ids, **packed}):
            assert torch.equal(fast(**case).logits, model(**case).logits)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for piece in ids.split([20, 1, 9], 1):
            pair = zip((fast, model), caches, strict=True)
            found, expected = (each(input_ids=piece, past_key_values=cache).logits for each, cache in pair)
            assert torch.equal(found, expected)
