"""Four processes that share heads out compute what one does."""

import socket

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def found():
    """By rank and case, how far each result is from one process's."""
    from tests.parallel.by_heads import rank_of_four

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=rank_of_four, args=(rank, port, queue)) for rank in range(4)]
    for process in processes:
        process.start()
    try:
        yield dict(queue.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def test_results_and_gradients_are_those_of_one_process(found):
    assert sorted(found) == [0, 1, 2, 3]
    for rank, cases in found.items():
        for case, errors in cases.items():
            assert len(errors) >= 5 and max(errors) < 1e-12, (rank, case, errors)
