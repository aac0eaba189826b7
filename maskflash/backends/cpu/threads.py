"""Jobs -> their effects, side by side: each job on one core, as many at once as torch has threads.

A short kernel call on all cores spends a good part of its time waiting for the last of them: short calls are faster
each on one.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

_pools: dict[int, ThreadPoolExecutor] = {}  # by how many threads they have
_lock = threading.Lock()


def side_by_side(jobs: Iterable[Callable[[], None]]) -> None:
    """Run jobs that write to no memory in common, in about their order.

    Without autograd, in the caller's inference mode. What a job raises is raised once all of them have stopped.
    """
    left = deque(jobs)
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while left:
                try:
                    job = left.popleft()
                except IndexError:  # another took the last
                    return
                job()

    threads = torch.get_num_threads()
    running: list[Future[None]] = []
    try:
        try:
            pool = _pool(threads)
            for _ in range(min(threads, len(left))):
                running.append(pool.submit(work))
        except RuntimeError:  # no thread is to be had, as when the interpreter ends
            work()
        for each in running:
            each.result()
    finally:
        left.clear()
        wait(running)


def _pool(threads: int) -> ThreadPoolExecutor:
    """As many threads as that, each with one core.

    Raises:
        RuntimeError: they can't be started.
    """
    with _lock:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="maskflash")
            everyone, begun_with = threading.Barrier(threads + 1), [threads]
            try:
                for _ in range(threads):
                    pool.submit(_join, everyone, begun_with)
                everyone.wait()
                everyone.wait()
                _pools[threads] = pool
            except BaseException:  # an interrupt too: threads that wait for ever would not let the process end
                everyone.abort()
                pool.shutdown()
                raise
            finally:
                # The number is each thread's own, but also what threads begin with from now on: back to what it was.
                restore = threading.Thread(target=torch.set_num_threads, args=begun_with[-1:])
                restore.start()
                restore.join()
    return _pools[threads]


def _join(everyone: threading.Barrier, begun_with: list[int]) -> None:
    # A thread takes over the number for all when it first asks: not after it has its own.
    begun_with.append(torch.get_num_threads())
    everyone.wait()
    torch.set_num_threads(1)
    everyone.wait()


def _forget() -> None:
    """In a forked process there are no threads but the one that forked."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget)
