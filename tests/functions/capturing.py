"""A module whose mask reads it in every way, what changes it, and whether a mask agrees with Python pair by pair."""

from collections import namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

import maskflash as mf

N = 24
Pair = namedtuple("Pair", "low high")


@dataclass
class Config:
    window: int = 4
    tables: dict = field(default_factory=lambda: {"doc": torch.arange(N) // 4})
    nested: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(radius=2.5))


class Model(torch.nn.Module):
    shift = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("doc", torch.arange(N) // 6)
        self.register_buffer("place", torch.arange(N).float() * 0.75)
        self.config = Config()
        self.spans = [(2, 5), (8, 9)]
        self.limits = Pair(2, 20)
        self.layers = torch.nn.ParameterList([torch.nn.Parameter(torch.arange(N).float())])
        self.attn = mf.compile(self.visible)

    @property
    def reach(self):
        return self.config.window + self.shift

    def near(self, q, kv):
        return abs(self.place[q] - self.place[kv]) < self.config.nested.radius

    def visible(self, b, h, q, kv):
        if any(low <= kv < high for low, high in self.spans):
            return True
        inside = self.limits.low <= q < self.limits.high
        return inside and (self.doc[q] == self.doc[kv] or (q - kv < self.reach and self.near(q, kv)))


def pair_by_pair(predicate, **mask_args):
    """Python's own answer, a pair at a time."""
    return torch.tensor([[bool(predicate(0, 0, q, kv, **mask_args)) for kv in range(N)] for q in range(N)])


def holds(mask, predicate, **mask_args):
    """Whether all that is asked of a mask agrees with Python."""
    expected = pair_by_pair(predicate, **mask_args)
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, expected).nan_to_num()
    return (
        torch.equal(mask.dense(N, N, **mask_args)[0, 0], expected)
        and mask.block_map(N, N, block_size=1, **mask_args).counts["full"] == expected.sum()
        and torch.allclose(mf.attention(q, k, v, mask, **mask_args), plain, atol=1e-5)
        and torch.allclose(mf.compile(mask)(q, k, v, **mask_args), plain, atol=1e-5)
    )


CHANGES = {
    "a buffer loaded by assignment": lambda m: m.load_state_dict(
        {**m.state_dict(), "doc": torch.arange(N) // 11}, assign=True
    ),
    "a buffer set": lambda m: setattr(m, "doc", torch.arange(N) // 3),
    "a buffer written to": lambda m: m.doc.zero_(),
    "a buffer with other data": lambda m: setattr(m.doc, "data", torch.arange(N) // 2),
    "a buffer of another dtype": lambda m: (m.double(), m.place.mul_(2)),
    "an int": lambda m: setattr(m.config, "window", 9),
    "an int that becomes a float": lambda m: setattr(m.config, "window", 2.5),
    "a float": lambda m: setattr(m.config.nested, "radius", 7.25),
    "another object": lambda m: setattr(m, "config", Config(window=1, nested=SimpleNamespace(radius=0.5))),
    "an object of another class": lambda m: setattr(
        m, "config", SimpleNamespace(window=7, nested=SimpleNamespace(radius=9.0))
    ),
    "a list that grows": lambda m: m.spans.append((13, 17)),
    "an item of a list": lambda m: m.spans.__setitem__(0, (0, 1)),
    "another list": lambda m: setattr(m, "spans", [(20, 24)]),
    "a named tuple": lambda m: setattr(m, "limits", Pair(5, 9)),
    "an attribute of the class": lambda m: setattr(type(m), "shift", 6),
    "an attribute that hides the class's": lambda m: setattr(m, "shift", 8),
}
