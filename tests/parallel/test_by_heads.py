"""Four processes that share heads out compute what one does."""

import re

import pytest
import torch

from tests.parallel.worlds import in_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def found():
    """By rank, what it computed, received and refused."""
    from tests.parallel.by_heads import cases

    return in_processes(4, cases)


def test_results_gradients_and_bytes_are_those_of_one_process_and_the_dense_mask(found):
    assert sorted(found) == [0, 1, 2, 3]
    for rank, (cases, *_) in found.items():
        assert len(cases) == 20
        for case, errors in cases.items():
            assert len(errors) >= 6 and max(errors) < 1e-12, (rank, case, errors)


def test_bytes_are_those_of_the_plan(found):
    for rank, (_, pairs, _) in found.items():
        assert len(pairs) == 12 and all(counted == expected for counted, expected in pairs), (rank, pairs)
        assert any(counted for counted, _ in pairs)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("another mask", r"the mask is .* on ranks 0, 1 and 3, .* on rank 2; expected the same call"),
        ("one key head", r"k has 1 heads, expected a multiple of the plan's 2 head ranks"),
        ("another mesh", r"group is a mesh of \(2, 2\) ranks, expected \(4,\) or \(1, 4\)"),
        ("another plan", r"the plan is .* on rank 0, .* on ranks 1, 2 and 3; expected the same call"),
    ],
)
def test_what_does_not_fit_is_refused_by_every_rank_alike(found, case, text):
    errors = {errors[case] for *_, errors in found.values()}
    assert len(errors) == 1 and re.search(text, *errors), errors
