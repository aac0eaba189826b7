"""Fingerprints: equal for masks of one structure with the same numbers and contents, in every process; else not."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given

import maskflash as mf
from maskflash.testing import masks

IDS = torch.tensor([0, 0, 1, 1, 2])


def window(n):
    return mf.mask(lambda b, h, q, kv: q - n <= kv)


def same(x, y, **mask_args):
    return x.fingerprint(**mask_args) == y.fingerprint(**mask_args)


def test_the_same_structure_numbers_and_contents_are_the_same_mask():
    assert same(window(4), window(4))
    assert same(mf.document(ids=IDS), mf.document(ids=IDS.clone()))
    assert same(mf.document(ids=IDS), mf.mask(lambda b, h, left, right: IDS[left] == IDS[right]))
    spread = torch.stack((IDS, IDS), 1)[:, 0]  # another layout in memory
    assert same(mf.document(ids=IDS), mf.document(ids=spread))
    given = mf.mask(lambda b, h, q, kv, *, n: q - n <= kv)
    assert window(4).fingerprint() == given.fingerprint(n=4)


@pytest.mark.parametrize(
    "others",
    [
        [window(4), window(5), mf.mask(lambda b, h, q, kv: q - 4 < kv), ~window(4)],
        [mf.document(ids=x) for x in (IDS, IDS.int(), IDS + 1, IDS[:4], torch.stack((IDS, IDS)))],
        [mf.causal() & mf.full() & window(n) for n in range(3)],
        [mf.ColumnIntervals(torch.tensor(x), causal=c) for x in ([2, 2], [2, 3], [2, 2, 2]) for c in (True, False)],
        [mf.ColumnIntervals(torch.full((1, n, 4), 2)) for n in (1, 2, 4)],
    ],
)
def test_whatever_differs_tells_masks_apart(others):
    assert len({mask.fingerprint() for mask in others}) == len(others)


@given(masks(), masks())
def test_masks_that_share_it_show_the_same(x, y):
    assert x.fingerprint() == x.fingerprint()
    if same(x, y):
        assert torch.equal(x.dense(30, 30, batch=2, heads=4), y.dense(30, 30, batch=2, heads=4))


def test_a_write_to_a_table_changes_it():
    ids = IDS.clone()
    mask = mf.document(ids=ids)
    before = mask.fingerprint()
    ids[0] = 9
    assert mask.fingerprint() != before
    ids[0] = 0
    assert mask.fingerprint() == before


def test_it_is_the_same_in_every_process():
    program = (
        "import maskflash as mf, torch\n"
        "print((mf.causal() & mf.document(ids=torch.tensor([0, 0, 1, 1, 2]))).fingerprint())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    mask = mf.causal() & mf.document(ids=IDS)
    assert found == mask.fingerprint() == "9a854a61fc56f96998c2a12db18d7be0"


def test_equality_and_hash_stay_those_of_the_object():
    x, y = window(4), window(4)
    assert x != y and len({x, y, x}) == 2


def test_arguments_are_needed():
    mask = mf.mask(lambda b, h, q, kv, *, n: q - n <= kv)
    with pytest.raises(mf.ArgumentTypeError, match=r"Mask.fingerprint: the mask needs n"):
        mask.fingerprint()
