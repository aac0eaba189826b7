"""A small Gemma 3 and four processes -> a few steps of training: two ranks share each sequence, FSDP2 the parameters.

    torchrun --nproc-per-node 4 -m maskflash.examples.train_on_ranks

             batch 0   batch 1
    tokens      0         1        ranks 0 and 2 hold the tokens of batch 0, ranks 1 and 3 those of batch 1;
    tokens      2         3        ranks 0 and 1 hold a half of the parameters each, and so do ranks 2 and 3

The model has windows in three layers of four. One plan serves them all, and each kind of layer has an op. At the end
rank 0 repeats the steps alone, by torch's attention, and prints both losses.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import maskflash as mf
from maskflash.integrations.shards import on_shards
from maskflash.integrations.transformers import register

TOKENS, WINDOW, WORDS, STEPS, TOKEN_RANKS = 1000, 128, 64, 3, 2
KINDS = ["sliding_attention"] * 3 + ["full_attention"]
MASKS = {"sliding_attention": mf.sliding_window(WINDOW - 1), "full_attention": mf.causal()}


def model_with(attention: str, dtype: torch.dtype) -> Gemma3ForCausalLM:
    """The model, with the same weights at each call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": len(KINDS)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    windows = {"layer_types": KINDS, "sliding_window": WINDOW, "initializer_range": 0.2}
    config = Gemma3TextConfig(**sizes, **heads, **windows, attn_implementation=attention)
    return Gemma3ForCausalLM(config).to(dtype)


def texts(step: int, batches: int) -> torch.Tensor:
    """All tokens of a step, (batches, TOKENS): what a data loader gives."""
    return torch.randint(WORDS, (batches, TOKENS), generator=torch.Generator().manual_seed(step))


def shifted(tokens: torch.Tensor) -> torch.Tensor:
    """What each token has to say: the next one, which may live on another rank. So shift first, and shard then."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)


def train(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on a mesh of (tokens, batches); return each step's loss, and the last step's gradients, both of all."""
    token_ranks, batches = mesh.shape
    place, batch = mesh.get_local_rank("tokens"), mesh.get_local_rank("batches")
    layers = [(mask, KINDS.count(kind)) for kind, mask in MASKS.items()]
    plan = mf.parallel.plan(layers, TOKENS, token_ranks, heads=4, kv_heads=2, head_dim=16, dtype=dtype, links="cpu")
    masks = {kind: on_shards(mf.parallel.compile(mask, plan, group=mesh["tokens"])) for kind, mask in MASKS.items()}

    model = model_with(register(), dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)  # of two dimensions: parameters are split over batches, and the same over tokens
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        tokens = texts(step, batches)[batch : batch + 1]
        labels = plan.shard(shifted(tokens), place, dim=1)
        own, positions = plan.shard(tokens, place, dim=1), plan.positions(place)[None]
        logits = model(own, position_ids=positions, attention_mask=masks, use_cache=False).logits
        count = batches * (TOKENS - 1)  # labels of all ranks
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
        optimizer.zero_grad()
        (loss * mesh.size()).backward()  # FSDP2 divides the sum of gradients by the number of ranks
        optimizer.step()
        dist.all_reduce(whole := loss.detach().clone())
        losses.append(whole.item())
    return losses, {name: x.grad.full_tensor() for name, x in model.named_parameters()}


def train_alone(batches: int, dtype: torch.dtype = torch.float32) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same steps in one process, by torch's attention."""
    model = model_with("sdpa", dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        tokens = texts(step, batches)
        loss = cross_entropy(model(tokens).logits.flatten(0, 1), shifted(tokens).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: x.grad for name, x in model.named_parameters()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    shape = TOKEN_RANKS, dist.get_world_size() // TOKEN_RANKS
    losses, _ = train(init_device_mesh("cpu", shape, mesh_dim_names=("tokens", "batches")))
    if dist.get_rank() == 0:
        print("on ranks", *(f"{loss:.6f}" for loss in losses))
        print("alone   ", *(f"{loss:.6f}" for loss in train_alone(shape[1])[0]))
    dist.destroy_process_group()
