"""Text files -> a small GPT, trained on their bytes in packed sequences. Copy it, and change what is yours.

Run: python -m maskflash.examples.train_packed --steps 100 (then with more steps, to go on where it ended)
"""

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import maskflash as mf

WIDTH, HEADS, LAYERS = 128, 4, 3


@mf.mask
def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *, doc: Tensor) -> bool | Tensor:
    """Causal, and inside one document."""
    return q >= kv and doc[b, q] == doc[b, kv]


attend = mf.compile(packed)  # one op for all layers: a step analyses its documents once


class PackedFiles(Dataset[tuple[Tensor, ...]]):
    """Sequence i: files drawn by chance, laid end to end. The loader's workers pack them."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.files, self.tokens = sorted(path for path in folder.glob("*.py") if path.stat().st_size), tokens

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        draw, texts = Random(i), list[bytes]()
        while sum(map(len, texts)) <= self.tokens:
            texts.append(draw.choice(self.files).read_bytes()[:2000])
        row = torch.tensor(list(b"".join(texts)))[: self.tokens + 1]
        doc = torch.repeat_interleave(torch.tensor([len(text) for text in texts]))[: self.tokens + 1]
        place = torch.cat([torch.arange(len(text)) for text in texts])[: self.tokens]
        following = torch.where(doc[1:] == doc[:-1], row[1:], -100)  # a document's last byte has none
        return row[:-1], place, doc[:-1], following


class Block(nn.Module):
    """Attention and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, doc: Tensor) -> Tensor:
        """(B, S, WIDTH) to the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v, doc=doc).transpose(1, 2).flatten(2))
        added: Tensor = self.mlp(x)
        return x + added


class SmallGpt(nn.Module):
    """Bytes, and their places in their documents, to logits of the byte after each."""

    def __init__(self) -> None:
        super().__init__()
        self.byte, self.place, self.head = nn.Embedding(256, WIDTH), nn.Embedding(2000, WIDTH), nn.Linear(WIDTH, 256)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, row: Tensor, place: Tensor, doc: Tensor, following: Tensor) -> Tensor:
        """The loss in nats; activations of a block are computed again for its backward."""
        x = self.byte(row) + self.place(place)
        for block in self.blocks:
            x = checkpoint(block, x, doc, use_reentrant=False)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), following.flatten())


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    parser = argparse.ArgumentParser(description="Train a small GPT on packed files.")
    parser.add_argument("--folder", type=Path, default=Path(sysconfig.get_path("stdlib")), help="of the files")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=100, help="in all, those before a resume included")
    parser.add_argument("--workers", type=int, default=2, help="processes that pack")
    parser.add_argument("--backend", default="inductor", help='of torch.compile; "aot_eager" needs no C++ compiler')
    parser.add_argument("--save", type=Path, default=Path("train_packed.pt"), help="the checkpoint")
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = SmallGpt().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    first = 0
    if options.save.exists():
        saved = torch.load(options.save, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    fast = torch.compile(model, fullgraph=True, backend=options.backend)
    rows = range(first * options.batch, options.steps * options.batch)  # where it ended, it goes on
    data = PackedFiles(options.folder, options.tokens)
    losses = []
    for step, batch in enumerate(DataLoader(data, options.batch, sampler=rows, num_workers=options.workers), first + 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = fast(*(tensor.to(device) for tensor in batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f} nats", flush=True)
        if step % 50 == 0 or step == options.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, options.save)
    return losses


if __name__ == "__main__":
    main()
