"""What a Transformers model asks of maskflash in vain is refused by name; what layers hand on is checked."""

import importlib
import re
import sys

import pytest
import torch
import transformers
from torch import nn

import maskflash as mf
from maskflash.integrations import transformers as integration
from tests.integrations.models import NAME, VOCABULARY, make


def test_what_maskflash_does_not_compute_is_refused_by_name():
    ids = torch.randint(1, VOCABULARY, (1, 8))
    model = make("Llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(mf.ArgumentError, match="LlamaAttention asks for output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(mf.ArgumentTypeError, match=r"mask of torch.int64, expected torch.bool.* or floats that are"):
        model(ids, attention_mask=torch.zeros(1, 1, 8, 8, dtype=torch.long))
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(mf.ArgumentTypeError, match=r"a tensor of 2 dimensions.* padding as \(batch, tokens\)"):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, torch.ones(1, 4))
    with pytest.raises(mf.ArgumentTypeError, match=r"has a list as attention_mask"):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, [1])


@pytest.mark.parametrize("name", ["head_mask", "indices", "cache", "something_new"])
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


def test_transformers_that_is_not_there_is_told_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(
        ImportError, match=r"transformers can't be imported \(.*\); pip install 'maskflash\[transformers\]'"
    ):
        importlib.import_module(integration.__name__)
