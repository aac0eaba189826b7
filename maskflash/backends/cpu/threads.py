"""Jobs -> their effects: large ones on all cores, one after the other; many small ones side by side, a core each.

A short kernel call on all cores spends a good part of its time waiting for the last of them: short calls are faster
each on one.

    on all cores      core 0  ##. ##. #.. ##.        side by side    core 0  ####### ####
                      core 1  ##  ##  ##  #..                        core 1  ##### ######
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from heapq import heapreplace
from typing import Final, NamedTuple

import torch

_WORTH_THREADS: Final = (1 << 16) * 512  # pairs x heads x head dim: for less, other threads aren't woken
_MAX_WAIT: Final = 0.05  # as a part of all work: about what a call of middling size gains from having one core


class Job(NamedTuple):
    """Something to run, and its predicted cost in pairs x heads x head dim."""

    run: Callable[[], None]
    cost: float


class Workers:
    """Threads with one core each, as many as torch has, kept from one call to the next."""

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def do(self, jobs: Sequence[Job]) -> None:
        """Run jobs that write to no memory in common: side by side if no core then waits long, else on all cores."""
        jobs = sorted(jobs, key=lambda job: job.cost, reverse=True)
        threads, large = torch.get_num_threads(), 0
        while large < len(jobs) and _waits(jobs[large:], threads):
            large += 1
        cost = sum(job.cost for job in jobs[large:])
        worth = cost >= _WORTH_THREADS and 2 * cost >= sum(job.cost for job in jobs)
        if threads == 1 or len(jobs) - large < 2 or not worth:
            large = len(jobs)
        if large < len(jobs):  # first: after a call on all cores, torch's threads keep them busy for a while
            self.side_by_side([job.run for job in jobs[large:]])
        for job in jobs[:large]:
            job.run()

    def side_by_side(self, jobs: Sequence[Callable[[], None]]) -> None:
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
                pool = self._pool(threads)
                for _ in range(min(threads, len(left))):
                    running.append(pool.submit(work))
            except RuntimeError:  # no thread is to be had, as when the interpreter ends
                work()
            for each in running:
                each.result()
        finally:
            left.clear()
            wait(running)

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        """As many threads as that, each with one core.

        Raises:
            RuntimeError: they can't be started.
        """
        with self._lock:
            if threads not in self._pools:
                self._pools[threads] = _started(threads)
            return self._pools[threads]

    def _forget(self) -> None:
        """Begin without threads: in a forked process there are none but the one that forked."""
        self._lock = threading.Lock()
        self._pools: dict[int, ThreadPoolExecutor] = {}  # by how many threads they have


def _waits(jobs: Sequence[Job], threads: int) -> bool:
    """Whether threads would wait long for the last of them, if they ran the jobs side by side in this order."""
    done = [0.0] * threads
    for job in jobs:
        heapreplace(done, done[0] + job.cost)
    return threads * max(done) > (1 + _MAX_WAIT) * sum(done)


def _started(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="maskflash")
    everyone, begun_with = threading.Barrier(threads + 1), [threads]

    def join() -> None:
        # A thread takes over the number for all when it first asks: not after it has its own.
        begun_with.append(torch.get_num_threads())
        everyone.wait()
        torch.set_num_threads(1)
        everyone.wait()

    try:
        for _ in range(threads):
            pool.submit(join)
        everyone.wait()
        everyone.wait()
    except BaseException:  # an interrupt too: threads that wait for ever would not let the process end
        everyone.abort()
        pool.shutdown()
        raise
    finally:
        # The number is each thread's own, but also what threads begin with from now on: back to what it was.
        restore = threading.Thread(target=torch.set_num_threads, args=begun_with[-1:])
        restore.start()
        restore.join()
    return pool


WORKERS: Final = Workers()
