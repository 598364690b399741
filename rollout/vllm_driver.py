"""Runs a vLLM engine on its own thread, so that new calls join the batch that is being decoded."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Job:
    """Requests that were submitted together, and their outputs so far."""

    def __init__(self, requests: Sequence[tuple[Any, Any]]):
        self.requests = requests
        self.outputs: list[Any] = [None] * len(requests)
        self.left = len(requests)
        self.ids: list[str] = []
        self.future: Future[tuple[list[Any], int]] = Future()


class Driver:
    """Owns a `vllm.v1.engine.llm_engine.LLMEngine`: only this thread touches it, in the order of the calls.

    `version` is that of the weights. `run` waits until nothing is being decoded, so a job is sampled under
    one version, which its answer carries. If the engine fails, all jobs in flight and all later ones raise.
    """

    def __init__(self, engine: Any, version: int, device: torch.device | None = None):
        self.version = version
        self.lora: Any = None  # the adapter that every request runs with
        self._engine, self._device, self._threads = engine, device, torch.get_num_threads()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: dict[str, tuple[Job, int]] = {}
        self._names = itertools.count()
        self._door = threading.Lock()
        self._end: RuntimeError | None = None  # why new calls are refused
        self._stopped = False
        self.thread = threading.Thread(target=self._drive, name="vllm-driver", daemon=True)
        self.thread.start()

    async def generate(self, requests: Sequence[tuple[Any, Any]]) -> tuple[list[Any], int]:
        """vLLM's outputs for (prompt, sampling parameters) pairs, and the version of the weights.

        Cancelling the call aborts the requests.
        """
        job = Job(requests)
        job.future.add_done_callback(lambda f: self._inbox.put(("abort", job)) if f.cancelled() else None)
        self._put("add", job)
        return await asyncio.wrap_future(job.future)

    def run(self, work: Callable[[], T]) -> T:
        """Call `work` on this thread after all earlier calls are done; later calls wait for it."""
        if threading.current_thread() is self.thread:
            return work()
        future: Future[T] = Future()
        self._put("run", (work, future))
        return future.result()

    @property
    def failure(self) -> str | None:
        """Why new calls are refused; None while they are not."""
        return str(self._end) if self._end else None

    def stop(self) -> None:
        """Finish the requests in flight and end the thread."""
        self._inbox.put(("stop", None))
        self.thread.join()

    def _put(self, kind: str, what: Any) -> None:
        with self._door:
            if self._end is not None:
                raise RuntimeError(str(self._end)) from self._end.__cause__
            self._inbox.put((kind, what))

    def _drive(self) -> None:
        torch.set_num_threads(self._threads)  # torch keeps it for each thread, like the device
        if self._device is not None:
            torch.cuda.set_device(self._device)  # what ran on a card: docs/gpu.md
        end = RuntimeError("this engine is closed")
        try:
            while not self._stopped:
                try:
                    kind, what = self._inbox.get(block=not self._running)
                except queue.Empty:
                    self._step()
                    continue
                getattr(self, f"_{kind}")(what)
        except BaseException as error:
            end = RuntimeError(f"vLLM failed, start the engine again: {error!r}")
            end.__cause__ = error
        with self._door:
            self._end = end
        waiting = [job.future for job, _ in self._running.values()]
        while not self._inbox.empty():
            kind, what = self._inbox.get()
            if kind == "add":
                waiting.append(what.future)
            elif kind == "run":
                waiting.append(what[1])
        for future in set(waiting):
            _settle(future, error=end)

    def _add(self, job: Job) -> None:
        if job.future.cancelled():
            return
        try:
            prompts = [prompt for prompt, _ in job.requests]
            renderer = getattr(self._engine, "renderer", None)
            if renderer is not None:  # newer versions of vLLM want rendered prompts
                prompts = renderer.render_cmpl(prompts)
            for i, (prompt, (_, params)) in enumerate(zip(prompts, job.requests, strict=True)):
                job.ids.append(name := f"r{next(self._names)}")
                self._engine.add_request(name, prompt, params, lora_request=self.lora)
                self._running[name] = (job, i)
        except Exception as error:  # vLLM refuses this request
            self._abort(job)
            _settle(job.future, error=error)

    def _abort(self, job: Job) -> None:
        alive = [name for name in job.ids if self._running.pop(name, None)]
        if alive:
            self._engine.abort_request(alive)

    def _run(self, task: tuple[Callable[[], Any], Future[Any]]) -> None:
        work, future = task
        while self._running:
            self._step()
        try:
            _settle(future, work())
        except Exception as error:
            _settle(future, error=error)

    def _stop(self, _: None) -> None:
        while self._running:
            self._step()
        self._stopped = True

    def _step(self) -> None:
        for output in self._engine.step():
            if not output.finished or output.request_id not in self._running:
                continue
            job, i = self._running.pop(output.request_id)
            job.outputs[i] = output
            job.left -= 1
            if not job.left:
                _settle(job.future, (job.outputs, self.version))


def _settle(future: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    """Answer a future, unless it was cancelled or answered already."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
