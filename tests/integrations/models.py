"""Small models of Transformers, with weights drawn from one seed."""

import torch
import transformers

from maskflash.integrations import transformers as integration

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


def make(name, dtype=torch.float32, **changes):
    """A small model with weights drawn from one seed."""
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **MODELS.get(name, {}), **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
