"""Small models of Transformers, with weights drawn from one seed, and plain attention that they are compared with."""

import torch
import transformers
from torch import nn
from transformers import masking_utils

import maskflash as mf
from maskflash.backends.reference import error_budget
from maskflash.integrations import transformers as integration
from maskflash.scores.seeds import seed_of

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


def dense_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    s_aux=None,
    softcap=None,
    position_bias=None,
    sinks=None,
    is_causal=None,
    **_,
):
    """All that layers ask for by plain operations in the dtype of their tensors, float64 too: a truth beside eager.

    Weights are divided by their sum last, as in blocked attention, so that gradients round as there.
    """
    shape = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    mask = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask
    if attention_mask is None and (getattr(module, "is_causal", False) if is_causal is None else is_causal):
        mask = mask.tril()
    key, value = (x.repeat_interleave(shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    if mask.is_floating_point():
        scores, mask = scores + mask, mask > torch.finfo(torch.float32).min
    sinks = sinks if s_aux is None else s_aux[:, None, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    top = top if sinks is None else torch.maximum(top, sinks.detach())
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else (sinks - top).exp())
    if dropout and module.training:
        weights = weights * keep(dropout, shape).to(weights.dtype)
    return (weights @ value / total.masked_fill(total == 0, 1)).transpose(1, 2).contiguous(), None


def dense_mask(*args, **given):
    """A mask of bools where eager has floats."""
    return masking_utils.sdpa_mask(*args, **{**given, "allow_is_causal_skip": False})


DENSE = "dense"
transformers.AttentionInterface.register(DENSE, dense_forward)
transformers.AttentionMaskInterface.register(DENSE, dense_mask)


def keep(p, shape):
    """What maskflash's dropout multiplies weights by in the next call; draws the seed as that call would."""
    return mf.testing.dropout_keep(seed_of("keep", None, None, torch.device("cpu")), p, *shape) / (1 - p)


def dropout(x, p=0.5, training=True, inplace=False):
    """torch's dropout, but of attention weights maskflash's, and of all else the same in any dtype."""
    if not training or p == 0:
        return x
    return x * (keep(p, x.shape) if x.ndim == 4 else (torch.rand(x.shape) >= p) / (1 - p)).to(x.dtype)


def randomise(model, std=0.2):
    """The model with weights wide enough for results that differ; norms keep their ones."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            nn.init.normal_(parameter, std=std)
    return model


def assert_within_budget(found, exact, *plain):
    """As near to the truth as twice the worst of plain implementations; eager's float64 is none: its softmax is not."""
    for name, truth in exact.items():
        budget = max(error_budget(results[name], truth) for results in plain)
        error = (found[name].double() - truth).abs().max().item()
        assert error <= budget, f"{name}: error {error:.3g} exceeds its budget of {budget:.3g}"


def assert_as_near(found, exact, *plain):
    """Likewise by root mean squares, for gradients: the largest error of a few elements is a matter of chance."""

    def size(x):
        return x.double().square().mean().sqrt().item()

    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        budget = 2 * max(size(results[name].double() - truth) for results in plain)
        budget += torch.finfo(found[name].dtype).eps * size(truth)
        error = size(found[name].double() - truth)
        assert error <= budget, f"{name}: error {error:.3g} exceeds its budget of {budget:.3g}"
