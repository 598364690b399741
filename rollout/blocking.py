"""Wait for a coroutine from code that is not one, in scripts and in notebooks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

Result = TypeVar("Result")


def wait_for_result(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, or its exception.

    Where an event loop runs in this thread already, as in every cell of a notebook, `asyncio.run` is refused;
    the coroutine then runs in a thread of its own.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, work).result()
