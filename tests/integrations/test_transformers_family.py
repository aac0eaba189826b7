"""Many architectures, each made from a config that asks for maskflash: they compute as eager, or say by name why not.

Those whose attention can't be replaced warn once, and give what they give without being asked.
"""

import warnings

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel

import maskflash as mf
from maskflash.backends.reference import error_budget
from maskflash.integrations import transformers as integration
from tests.integrations.models import DENSE, NAME

SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "intermediate_size", "ffn_dim", "d_ff", "hidden_dim"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **{
        "attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "image_size": 32,
        "patch_size": 8,
    },
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **{"attention_dropout": 0.0, "decoder_start_token_id": 1, "num_experts_per_tok": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
TEXT = [
    *("albert", "apertus", "arcee", "bart", "bert", "biogpt", "bitnet", "camembert", "cohere", "cohere2", "ctrl"),
    *("distilbert", "electra", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode"),
    *("gpt_neox", "granite", "helium", "hyperclovax", "jetmoe", "llama", "llama4_text"),
    *("marian", "mbart", "mistral", "modernbert", "olmo", "olmo2", "opt", "persimmon", "phi", "phi3"),
    *("qwen2", "qwen3", "roberta", "smollm3", "stablelm", "starcoder2"),
]
SINKS = ["deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "openai_privacy_filter"]
CAPPED = ["gemma2", "vaultgemma"]
BIASED = ["layoutlm", "markuplm", "mt5", "swin", "t5", "umt5"]  # some by masks of floats
UNPADDED = ["granite_swa", "granitemoe_swa", "imagegpt"]  # eager gives NaN where there is padding, or takes none
IMAGES = ["beit", "clip_vision_model", "deit", "dinov2", "ijepa", "siglip_vision_model", "vit", "vit_mae"]
WINDOWS = {"depths": [2], "num_heads": [4], "window_size": 2, "patch_size": 4}
SETTINGS = {
    **dict.fromkeys(("swin", "swinv2"), WINDOWS),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
}
THEIR_OWN = [
    *("big_bird", "bloom", "convbert", "data2vec-vision", "deberta", "deberta-v2", "falcon", "flaubert", "funnel"),
    *("gpt_neo", "gpt_neox_japanese", "gptj", "ibert", "imagegpt", "luke", "mpnet", "mpt"),
    *("openai-gpt", "swinv2", "tapas", "xglm"),
]
REFUSED = {
    "doge": r"model \(doge\) computes aten.where.self of its attention mask",
    "hy_v4": r"model \(hy_v4\) computes aten.select.int of its attention mask",
    "deepseek_v32": r"model \(deepseek_v32\) computes aten.select.int of its attention mask",
}


def build(kind, **config):
    """A small model of a kind, with weights drawn from one seed."""
    made = CONFIG_MAPPING[kind]
    known = made()
    fits = {name: size for name, size in SIZES.items() if isinstance(getattr(known, name, None), int | float)}
    fits |= {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if hasattr(known, name)}
    fits = {name: size for name, size in fits.items() if not isinstance(getattr(made, name, None), property)}
    if getattr(known, "layer_types", None):
        fits["layer_types"] = [known.layer_types[0], known.layer_types[-1]]
    ready = made(**{**fits, **SETTINGS.get(kind, {}), **config})
    found = MODEL_MAPPING[made]
    torch.manual_seed(0)
    model = (found[0] if isinstance(found, tuple) else found)(ready)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others take no float64
    return model.eval()


def example(kind, model):
    """Inputs of a model: images, or tokens that are padded on the left, of which the second are compared."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}, None
    ids = torch.randint(3, 60, (2, 17), generator=generator)
    real = torch.ones_like(ids)
    real[1, :5] = 0
    if kind in UNPADDED:
        return {"input_ids": ids}, None
    given = {"input_ids": ids * real, "attention_mask": real}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :7]
    return given, real.bool()


def states(kind, model):
    given, real = example(kind, model)
    if model.dtype == torch.float64:
        given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    with torch.no_grad():
        found = model(**given).last_hidden_state
    return found if real is None or real.shape != found.shape[:2] else found[real]


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
@pytest.mark.parametrize("kind", TEXT + SINKS + CAPPED + BIASED + IMAGES)
def test_it_computes_as_eager_does(kind, monkeypatch):
    calls = []
    monkeypatch.setattr(integration, "attention", lambda *args, **kw: calls.append(args) or mf.attention(*args, **kw))
    model = build(kind, attn_implementation=NAME)
    found = states(kind, model)
    assert len(calls) >= 2
    model.set_attn_implementation("eager")
    eager = states(kind, model)
    if kind not in SINKS:  # eager's softmax is of float32
        model.set_attn_implementation(DENSE if kind in CAPPED + BIASED else "sdpa")
    exact = states(kind, model.double())
    assert (found.double() - exact).abs().max() <= error_budget(eager, exact)
    assert len(calls) == (6 if model.config.is_encoder_decoder else 2)


@pytest.mark.parametrize("kind", THEIR_OWN)
def test_attention_of_their_own_is_kept_with_one_warning(kind):
    plain = build(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(kind, attn_implementation=NAME)
    told = [str(each.message) for each in caught if "maskflash" in str(each.message)]
    assert len(told) == 1
    assert f"{type(model).__name__} brings its own attention" in told[0]
    assert f"runs '{plain.config._attn_implementation}'" in told[0]
    assert torch.equal(states(kind, model), states(kind, plain))
    model.set_attn_implementation(NAME)  # of which Transformers itself warns
    assert torch.equal(states(kind, model), states(kind, plain))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_more_than_a_mask_is_refused_by_name(kind):
    model = build(kind, attn_implementation=NAME)
    with pytest.raises(mf.MaskflashError, match=REFUSED[kind]):
        states(kind, model)


def test_a_model_of_the_user_is_what_it_is_made_of():
    """It counts whose attention it inherits, not where it is written."""
    llama, bloom = (type(build(kind)) for kind in ("llama", "bloom"))
    mine, other = type("Mine", (llama,), {}), type("Other", (bloom,), {})
    assert not integration._brings_its_own(mine)
    assert integration._brings_its_own(other)
    assert not integration._brings_its_own(PreTrainedModel)
