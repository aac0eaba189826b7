"""Ranks for tests: threads of this process, or processes of their own on gloo; none of them waits for ever."""

import socket
import threading
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

SECONDS = 60


def in_threads(world_size, rank_does):
    """What each of some threads returns, or the exception that it raises, each of them a rank of one group."""
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    found = [None] * world_size
    threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    store = dist.HashStore()

    def run(rank):
        dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
        try:
            found[rank] = rank_does(rank)
        except Exception as error:
            found[rank] = error
        finally:
            dist.destroy_process_group()

    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a rank waits for others"
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
    return found


def in_processes(world_size, rank_does, *args, exit_codes=None, preload=("maskflash.parallel",)):
    """What each of some processes puts into a queue, by rank: `rank_does(rank, *args)`, a function of a module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))  # torch is loaded once, not in each process
    queue = context.Queue()
    processes = [
        context.Process(target=_run, args=(rank_does, rank, world_size, port, queue, args))
        for rank in range(world_size)
    ]
    expected = exit_codes or [0] * world_size
    for process in processes:
        process.start()
    try:
        found = {}
        for _ in range(expected.count(0)):
            rank, value, error = queue.get(timeout=4 * SECONDS)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = value
        for process, code in zip(processes, expected, strict=True):
            process.join(SECONDS)
            assert process.exitcode == code
    finally:
        for process in processes:
            process.kill()
    return found


def _run(rank_does, rank, world_size, port, queue, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        queue.put((rank, rank_does(rank, *args), None))
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()
