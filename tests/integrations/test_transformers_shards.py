"""Models of Transformers whose layers attend across ranks: threads as ranks compute what one model does."""

import copy

import pytest
import torch
from torch import nn

import maskflash as mf

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
from maskflash.integrations import shards  # noqa: E402
from maskflash.integrations import transformers as integration  # noqa: E402
from tests.integrations.models import DENSE, NAME, TOKENS, VOCABULARY, WINDOW, assert_as_near, make  # noqa: E402
from tests.parallel.worlds import in_threads  # noqa: E402

FULL, SLIDING = "full_attention", "sliding_attention"
MASKS = {FULL: mf.causal(), SLIDING: mf.sliding_window(WINDOW - 1)}
KINDS = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
CAPPED = {"head_dim": 8, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 3.0, **KINDS}
CASES = {  # a model, what its config has, and what its ops have
    "Llama": ({}, {}),
    "Gemma3": ({}, {"scale": 20**-0.5}),
    "Gemma2": (CAPPED, {"scale": 0.5, "score": mf.scores.softcap(3.0)}),
    "GptOss": ({"head_dim": 16, "rope_parameters": None, **EXPERTS, **KINDS}, {}),
}
HELD = [[(0, 32), (96, TOKENS)], [(32, 96)]]
PLAN = mf.parallel.plan(mf.causal(), TOKENS, 2, chunk=32, shards=HELD)
ALONE = mf.parallel.plan(mf.causal(), 4, 1)
q, k, v = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()


def learned(model, logits, of_logits):
    """Logits, and the gradients of all parameters for a loss that is a sum over tokens."""
    (logits * of_logits).sum().backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {"logits": logits.detach(), **found}


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_model_does(name):
    config, given = CASES[name]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, TOKENS), generator=draw)
    of_logits = torch.randn(2, TOKENS, VOCABULARY, generator=draw)
    models = [make(name, **config, attn_implementation=NAME) for _ in range(2)]

    def whole(way, dtype):
        model = copy.deepcopy(models[0]).to(dtype)
        model.set_attn_implementation(way)
        return learned(model, model(ids).logits, of_logits.to(dtype))

    def rank_does(rank):
        ops = {kind: mf.parallel.compile(mask, PLAN, **given) for kind, mask in MASKS.items()}
        masks = {kind: shards.on_shards(attn) for kind, attn in ops.items()}
        own, of_own = (PLAN.shard(x, rank, dim=1) for x in (ids, of_logits))
        mask = masks if "layer_types" in vars(models[rank].config) else masks[FULL]
        logits = models[rank](own, position_ids=PLAN.positions(rank)[None], attention_mask=mask).logits
        return learned(models[rank], logits, of_own)

    parts = in_threads(2, rank_does)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    logits = PLAN.unshard([part.pop("logits") for part in parts], dim=1)
    found = {"logits": logits, **{name: parts[0][name] + parts[1][name] for name in parts[0]}}
    assert_as_near(found, whole(DENSE, torch.float64), whole("eager", torch.float32), whole(DENSE, torch.float32))


def call(attn, layer=None, **asked):
    mask = shards.on_shards(attn)
    return integration.attention_forward(layer or nn.Linear(1, 1), q, k, v, mask, **asked)[0]


def test_one_rank_computes_what_the_op_does():
    attn = mf.parallel.compile(mf.causal(), ALONE)
    assert torch.equal(call(attn), mf.attention(q, k, v, mf.causal()).transpose(1, 2))
    assert torch.equal(call(attn, scaling=8**-0.5), call(attn))
    torch.manual_seed(0)
    dropped = call(attn, nn.Linear(1, 1).train(), dropout=0.5)
    torch.manual_seed(0)
    nn.Linear(1, 1)  # draws as much
    assert torch.equal(dropped, mf.attention(q, k, v, mf.causal(), dropout_p=0.5).transpose(1, 2))
    assert torch.equal(call(attn, nn.Linear(1, 1).eval(), dropout=0.5), call(attn))


def test_a_mask_has_its_arguments():
    documents = mf.mask(lambda b, h, q, kv, *, doc: doc[q] == doc[kv])
    attn, doc = mf.parallel.compile(documents, ALONE), torch.tensor([0, 0, 1, 1])
    out = integration.attention_forward(nn.Linear(1, 1), q, k, v, shards.on_shards(attn, doc=doc))[0]
    assert torch.equal(out, mf.attention(q, k, v, documents, doc=doc).transpose(1, 2))
    with pytest.raises(mf.ArgumentTypeError, match="doc"):
        call(attn)


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("Linear scales its scores by 0.5, but the op on shards by 0.353553; pass scale=0.5 to", {"scaling": 0.5}),
        (r"asks for softcap, and the op on shards has no score.*score=mf.scores.softcap\(3.0\)", {"softcap": 3.0}),
        ("asks for position_bias, which is of one rank's tokens; let", {"position_bias": torch.zeros(1, 1, 4, 4)}),
        ("asks for sinks, which is of", {"sinks": torch.zeros(1, 2, 4, 1)}),
        ("asks for output_attentions", {"output_attentions": True}),
        ("asks for cu_seq_lens_q, which is of", {"cu_seq_lens_q": torch.tensor([0, 2, 4])}),
    ],
)
def test_what_ranks_do_not_compute_is_refused(said, asked):
    with pytest.raises(mf.ArgumentError, match=said):
        call(mf.parallel.compile(mf.causal(), ALONE), **asked)


def test_mistakes_are_told():
    with pytest.raises(mf.ArgumentTypeError, match=r"integrations.on_shards: attn is .*, expected a ShardedAttention"):
        shards.on_shards(mf.compile(mf.causal()))
    with pytest.raises(mf.ArgumentError, match="q has 4 tokens, expected the 5 that rank 0"):
        call(mf.parallel.compile(mf.causal(), mf.parallel.plan(mf.causal(), 5, 1)))
    with pytest.raises(mf.ArgumentError, match=r"computes .* of its attention mask, which holds no pairs"):
        shards.on_shards(mf.parallel.compile(mf.causal(), ALONE)) + 1
