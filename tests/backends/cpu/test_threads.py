"""Jobs side by side: each runs once, errors arrive, and torch's own threads stay as they were."""

import subprocess
import sys
import threading

import pytest
import torch

from maskflash.backends.cpu.threads import WORKERS

side_by_side = WORKERS.side_by_side


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_job_runs_once_and_each_on_one_core():
    numbers, cores = [], set()

    def job(n):
        numbers.append(n)
        cores.add(torch.get_num_threads())

    side_by_side([lambda n=n: job(n) for n in range(200)])
    assert sorted(numbers) == list(range(200))
    assert cores == {1}


def test_jobs_run_at_the_same_time():
    together = threading.Barrier(3, timeout=60)
    side_by_side([together.wait] * 3)


def test_torch_keeps_its_threads():
    side_by_side([lambda: None])
    seen = [torch.get_num_threads()]
    another = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    another.start()
    another.join()
    assert seen == [3, 3]
    torch.set_num_threads(2)
    side_by_side([lambda: None])
    assert torch.get_num_threads() == 2


def test_an_error_arrives_once_all_have_stopped():
    running = []

    def fails():
        raise ValueError("of a job")

    def takes_long():
        running.append(1)
        threading.Event().wait(0.1)
        running.pop()

    with pytest.raises(ValueError, match="of a job"):
        side_by_side([takes_long, fails, takes_long])
    assert not running


def test_autograd_is_off_and_inference_mode_is_the_callers():
    x = torch.ones(3, requires_grad=True)
    found = []
    side_by_side([lambda: found.append(x * 2)])
    with torch.inference_mode():
        y = torch.zeros(3)
        side_by_side([lambda: y.add_(1), lambda: found.append(x * 2)])
    assert [z.requires_grad for z in found] == [False, False]
    assert [z.is_inference() for z in found] == [False, True]
    assert y.tolist() == [1, 1, 1]


@pytest.mark.parametrize("started", [0, 1])
def test_jobs_run_where_no_thread_can_be_started(monkeypatch, started):
    monkeypatch.setattr(WORKERS, "_pools", {})
    start, starts = threading.Thread.start, []

    def refused(thread):
        starts.append(thread)
        if len(starts) > started:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    numbers = []
    side_by_side([lambda n=n: numbers.append(n) for n in range(20)])
    assert sorted(numbers) == list(range(20))
    assert torch.get_num_threads() == 3


def test_an_error_of_the_caller_s_own_job_arrives_once_all_have_stopped(monkeypatch):
    side_by_side([lambda: None])
    pool, submitted, running = WORKERS._pools[3], [], []

    def submit(work):
        if submitted:
            raise RuntimeError("cannot schedule new futures")
        submitted.append(1)
        return type(pool).submit(pool, work)

    def takes_long():
        running.append(1)
        began.set()
        threading.Event().wait(0.1)
        running.pop()

    def fails():
        began.wait(60)
        raise ValueError("of a job")

    began = threading.Event()
    monkeypatch.setattr(pool, "submit", submit)
    with pytest.raises(ValueError, match="of a job"):
        side_by_side([takes_long, fails, *[takes_long] * 5])
    assert not running


@pytest.mark.parametrize("wait", [1, 2])
def test_an_interrupt_while_threads_start_lets_the_process_end(wait):
    program = f"""
import threading, torch
from maskflash.backends.cpu.threads import WORKERS
torch.set_num_threads(3)
waits, original = [], threading.Barrier.wait
def wait(barrier, timeout=None):
    if threading.current_thread() is threading.main_thread():
        waits.append(1)
        if len(waits) == {wait}:
            raise KeyboardInterrupt
    return original(barrier, timeout)
threading.Barrier.wait = wait
try:
    WORKERS.side_by_side([print] * 2)
except KeyboardInterrupt:
    another = threading.Thread(target=lambda: print(torch.get_num_threads()))
    another.start()
    another.join()
"""
    ended = subprocess.run([sys.executable, "-c", program], check=True, timeout=600, capture_output=True, text=True)
    assert ended.stdout.split() == ["3"]


def test_a_thread_with_a_number_of_its_own_leaves_that_of_others(monkeypatch):
    monkeypatch.setattr(WORKERS, "_pools", {})
    torch.set_num_threads(2)
    seen = []

    def own():
        torch.get_num_threads()
        restored = threading.Thread(target=torch.set_num_threads, args=(2,))
        torch.set_num_threads(5)
        restored.start()
        restored.join()
        side_by_side([lambda: None])

    for target in (own, lambda: seen.append(torch.get_num_threads())):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert seen == [2]


def test_jobs_run_while_the_interpreter_ends():
    program = """
import atexit, torch
from maskflash.backends.cpu.threads import WORKERS
torch.set_num_threads(2)
WORKERS.side_by_side([lambda: None])
atexit.register(lambda: WORKERS.side_by_side([lambda: print("ran")] * 2))
"""
    ended = subprocess.run([sys.executable, "-c", program], check=True, timeout=600, capture_output=True, text=True)
    assert ended.stdout.split() == ["ran", "ran"]


def test_a_forked_process_makes_threads_of_its_own():
    program = """
import os, torch
from maskflash.backends.cpu.threads import WORKERS
torch.set_num_threads(2)
WORKERS.side_by_side([lambda: None])
child = os.fork()
if child == 0:
    found = []
    WORKERS.side_by_side([lambda: found.append(1)] * 5)
    os._exit(len(found))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=600)
