"""Text files -> a small GPT, trained on their bytes in packed sequences. Copy it, and change what is yours.

Run: python -m maskflash.examples.train_packed --steps 100 (then with more steps, to go on where it ended)
"""

import argparse
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import maskflash as mf

FILES = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.stat().st_size)
SAVE = Path("train_packed.pt")
LONGEST, TOKENS, BATCH, WORKERS = 2000, 4096, 2, 2  # bytes of a document, of a sequence; sequences; who packs them
WIDTH, HEADS, LAYERS = 128, 4, 3


@mf.mask
def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *, doc: Tensor) -> bool | Tensor:
    """Causal, and inside one document."""
    return q >= kv and doc[b, q] == doc[b, kv]


attend = mf.compile(packed)  # one op for all layers: a step analyses its documents once


class PackedFiles(Dataset[tuple[Tensor, ...]]):
    """Sequence i: files drawn by chance, laid end to end. The loader's workers pack them."""

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        draw, texts = random.Random(i), list[bytes]()
        while sum(map(len, texts)) <= TOKENS:
            texts.append(draw.choice(FILES).read_bytes()[:LONGEST])
        row = torch.tensor(list(b"".join(texts)))[: TOKENS + 1]
        doc = torch.repeat_interleave(torch.tensor([len(text) for text in texts]))[: TOKENS + 1]
        place = torch.cat([torch.arange(len(text)) for text in texts])[:TOKENS]
        target = row[1:].where(doc[1:] == doc[:-1], -100)  # a document's last byte has none
        return row[:-1], place, doc[:-1], target


class Block(nn.Module):
    """Attention and a perceptron: (B, S, WIDTH) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH))

    def forward(self, x: Tensor, doc: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v, doc=doc).transpose(1, 2).flatten(2))
        return x.add(self.mlp(x))


class SmallGpt(nn.Module):
    """Bytes, their places in their documents, and the documents, to the loss of guessing the byte after each."""

    def __init__(self) -> None:
        super().__init__()
        self.byte, self.place, self.head = nn.Embedding(256, WIDTH), nn.Embedding(LONGEST, WIDTH), nn.Linear(WIDTH, 256)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, row: Tensor, place: Tensor, doc: Tensor, target: Tensor) -> Tensor:
        x = self.byte(row) + self.place(place)
        for block in self.blocks:  # its activations are computed again for its backward
            x = checkpoint(block, x, doc, use_reentrant=False)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), target.flatten())


def train(steps: int, backend: str) -> list[float]:
    """Train up to a step, from the checkpoint on if there is one, and return the losses in nats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, first, losses = SmallGpt().to(device), 0, []
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    if SAVE.exists():
        saved = torch.load(SAVE, device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    fast = torch.compile(model, fullgraph=True, backend=backend)
    rows = range(first * BATCH, steps * BATCH)  # sequence i is the same in every run: the loader has no state
    for step, batch in enumerate(DataLoader(PackedFiles(), BATCH, sampler=rows, num_workers=WORKERS), first + 1):
        with torch.autocast(device, torch.bfloat16):
            loss = fast(*(tensor.to(device) for tensor in batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f} nats", flush=True)
        if step % 50 == 0 or step == steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, SAVE)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small GPT on packed files.")
    parser.add_argument("--steps", type=int, default=100, help="in all, those before a resume included")
    parser.add_argument("--backend", default="inductor", help='of torch.compile; "aot_eager" needs no C++ compiler')
    train(**vars(parser.parse_args()))
