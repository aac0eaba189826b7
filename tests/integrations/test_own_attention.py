"""Models whose attention no interface reaches, with forward functions of a few lines in its place: as eager.

docs/integrations.md has the first as a recipe; the others are as long.
"""

import math

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add
from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3SelfAttention
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention
from transformers.models.mpt.modeling_mpt import MptAttention

from maskflash.integrations.transformers import attention_forward
from tests.integrations.models import DENSE, NAME, assert_as_near, dense_forward, dropout, randomise

VOCABULARY, TOKENS = 64, 20
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 64},
}
ATTEND = {NAME: attention_forward, DENSE: dense_forward}


def bloom(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **_):
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        k, v = layer_past.update(k, v, self.layer_idx)
    out, weights = ATTEND[self.way](
        *(self, q, k, v, attention_mask),
        scaling=self.inv_norm_factor,
        dropout=self.attention_dropout.p,
        position_bias=alibi.view(*q.shape[:2], 1, -1),
    )
    return dropout_add(self.dense(out.flatten(2)), residual, self.hidden_dropout, self.training), weights


def mpt(self, hidden_states, position_bias, past_key_values=None, attention_mask=None, **_):
    q, k, v = (x.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for x in self.Wqkv(hidden_states).chunk(3, 2))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    out, weights = ATTEND[self.way](
        *(self, q, k, v, attention_mask),
        scaling=self.softmax_scale,
        dropout=self.attn_dropout_p,
        position_bias=position_bias[None, :, -1:, -k.shape[2] :],
    )
    return self.out_proj(out.flatten(2)), weights


def mpnet(self, hidden_states, attention_mask=None, position_bias=None, **_):
    q, k, v = (
        x(hidden_states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2) for x in (self.q, self.k, self.v)
    )
    out, _ = ATTEND[self.way](
        *(self, q, k, v, attention_mask), dropout=self.dropout.p, position_bias=position_bias, is_causal=False
    )
    return (self.o(out.flatten(2)),)


def layoutlmv3(self, hidden_states, attention_mask=None, rel_pos=None, rel_2d_pos=None, **_):
    q, k, v = (
        x(hidden_states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
        for x in (self.query, self.key, self.value)
    )
    bias = (rel_pos + rel_2d_pos) / math.sqrt(self.attention_head_size)
    out, weights = ATTEND[self.way](
        *(self, q, k, v, attention_mask), dropout=self.dropout.p, position_bias=bias, is_causal=False
    )
    return out.flatten(2), weights


MODELS = {
    "BloomForCausalLM": (BloomAttention, bloom, {"hidden_size": 32, "n_layer": 2, "n_head": 6, "hidden_dropout": 0.1}),
    "MptForCausalLM": (MptAttention, mpt, {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "MPNetForMaskedLM": (MPNetSelfAttention, mpnet, SIZES),
    "LayoutLMv3ForTokenClassification": (
        *(LayoutLMv3SelfAttention, layoutlmv3),
        {**SIZES, "visual_embed": False, "coordinate_size": 6, "shape_size": 4, "num_labels": VOCABULARY},
    ),
}


def build(name, way, dtype=torch.float32):
    """A small model, its layers told which attention they take; eager is their own."""
    family, (layer, _, sizes) = name.partition("For")[0], MODELS[name]
    sizes = sizes if family != "Bloom" else {**sizes, "hidden_size": 36, "attention_dropout": 0.1}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **without(sizes, "vocab_size"))
    model = randomise(getattr(transformers, name)(config)).to(dtype).train()
    if way != "eager":
        model.config._attn_implementation = way  # which its masks are made for
        for module in model.modules():
            if isinstance(module, layer):
                module.way = way
    return model


def without(sizes, name):
    return {key: value for key, value in sizes.items() if key != name}


def given_to(name):
    ids = torch.randint(3, 60, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, -5:] = 0
    corners = torch.randint(0, 30, (2, TOKENS, 2), generator=torch.Generator().manual_seed(3))
    boxes = {"bbox": torch.cat([corners, corners + 5], -1)} if name.startswith("LayoutLM") else {}
    return {"input_ids": ids * real, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100), **boxes}


def trained(model, given):
    torch.manual_seed(5)
    loss = model(**given).loss
    loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_of_a_few_lines_trains_them_as_eager(name, monkeypatch):
    """With the model's own rates of dropout, where the same pairs are kept."""
    monkeypatch.setattr(nn.functional, "dropout", dropout)
    given = given_to(name)
    eager = trained(build(name, "eager"), given)
    layer, forward, _ = MODELS[name]
    monkeypatch.setattr(layer, "forward", forward)
    found, dense = (trained(build(name, way), given) for way in (NAME, DENSE))
    assert_as_near(found, trained(build(name, DENSE, torch.float64), given), eager, dense)


@pytest.mark.parametrize("name", ["BloomForCausalLM", "MptForCausalLM"])
def test_they_generate_eager_s_tokens(name, monkeypatch):
    layer, forward, _ = MODELS[name]
    prompt = {key: value[:1, :9] for key, value in given_to(name).items() if key != "labels"}
    asked = {**prompt, "do_sample": False, "max_new_tokens": 6}
    expected = build(name, "eager").eval().generate(**asked)
    monkeypatch.setattr(layer, "forward", forward)
    assert torch.equal(build(name, NAME).eval().generate(**asked), expected)
