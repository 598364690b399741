"""The queue: order, bounds, pauses, and nothing that waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch

from rollout.queue import RolloutQueue


@pytest.fixture
def make():
    made = []

    def start(*args, **settings) -> RolloutQueue:
        made.append(RolloutQueue(*args, **settings))
        return made[-1]

    yield start
    for queue in made:
        queue.close()


def piece(name, seconds=0.0, log=None):
    async def work():
        if log is not None:
            log.append(("begin", name))
        await asyncio.sleep(seconds)
        if log is not None:
            log.append(("end", name))
        return [name]

    return work


def test_groups_come_in_the_order_of_the_pieces(make):
    queue = make(3)
    first = queue.submit([piece("a", 0.05), piece("b"), piece("c", 0.02)])
    second = queue.submit([piece("d")])
    assert queue.result(second) == ["d"] and queue.result(first) == ["a", "b", "c"]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_no_more_run_than_may(make, in_flight):
    queue, log = make(in_flight), []
    queue.result(queue.submit([piece(i, 0.01, log) for i in range(8)]))
    running = most = 0
    for what, _ in log:
        running += 1 if what == "begin" else -1
        most = max(most, running)
    assert most == in_flight


def test_a_pause_finishes_what_runs_and_begins_nothing(make):
    queue, log = make(2), []
    ticket = queue.submit([piece(i, 0.05, log) for i in range(6)])
    time.sleep(0.02)
    queue.pause()
    before = list(log)
    assert (
        [name for what, name in before if what == "begin"]
        == [name for what, name in before if what == "end"]
        == [0, 1]
    )
    time.sleep(0.1)
    assert log == before
    queue.resume()
    assert queue.result(ticket) == list(range(6))


def test_what_a_piece_raises_is_raised(make):
    async def bad():
        raise ValueError("no such token")

    queue = make(2)
    with pytest.raises(ValueError, match="no such token"):
        queue.result(queue.submit([piece("a"), bad]))
    assert queue.result(queue.submit([piece("b")])) == ["b"]

    async def late():
        raise TimeoutError("the work's own")

    with pytest.raises(TimeoutError, match="the work's own"):
        queue.result(queue.submit([late]))


def test_nothing_waits_longer_than_the_deadline(make):
    queue, begin = make(1, deadline=0.2), time.monotonic()
    ticket = queue.submit([piece("a", 60.0), piece("b")])
    with pytest.raises(
        TimeoutError, match=r"rollouts took more than 0 s \(2 of 2 pieces missing\): the engine hangs"
    ):
        queue.result(ticket)
    queue.submit([piece("c", 60.0)])
    time.sleep(0.05)
    with pytest.raises(TimeoutError, match="1 rollouts still ran 0 s after the queue was paused"):
        queue.pause()
    queue.close()
    queue.close()
    assert time.monotonic() - begin < 5
    with pytest.raises(RuntimeError, match="this queue is closed"):
        queue.submit([piece("d")])
    with pytest.raises(RuntimeError, match="this queue is closed"):
        queue.pause()


def test_work_runs_elsewhere_with_as_many_threads(make):
    async def where():
        return [threading.current_thread().name, torch.get_num_threads()]

    queue = make(1)
    assert queue.result(queue.submit([where])) == ["rollout-queue", torch.get_num_threads()]


def test_a_queue_needs_room(make):
    with pytest.raises(ValueError, match="in_flight must be at least 1, got 0"):
        make(0)
