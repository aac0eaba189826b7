"""The packed sequence is real text, fills its length, and is the same for the same seed."""

import sysconfig
from pathlib import Path

import pytest
import torch

from maskflash.demo.documents import LONGEST, pack


@pytest.mark.parametrize("tokens", [1, 99, 8192, 400_000])
def test_documents_fill_the_sequence_and_keep_their_boundaries(tokens):
    packed = pack(tokens, seed=3)
    assert packed.tokens.shape == (tokens,)
    assert packed.ids.shape == (1, tokens)
    assert torch.bincount(packed.ids[0]).tolist() == list(packed.lengths)
    assert packed.ids[0].diff().min().item() >= 0 if tokens > 1 else True
    assert max(packed.lengths) <= LONGEST


def test_every_document_is_a_piece_of_its_file():
    packed = pack(8192, seed=0)
    folder, text, start = Path(sysconfig.get_path("stdlib")), bytes(packed.tokens.tolist()), 0
    assert len(set(packed.files)) == len(packed.files) > 4
    for name, length in zip(packed.files, packed.lengths, strict=True):
        assert text[start : start + length] in (folder / name).read_bytes()
        start += length


def test_the_seed_decides():
    first, again, other = (pack(4096, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens)
    assert first.lengths == again.lengths
    assert not torch.equal(first.tokens, other.tokens)
