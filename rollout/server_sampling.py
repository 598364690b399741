"""Thoughts from a pool of servers: each prompt is one request, sent again until a server answers it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from rollout.server_pool import ServerPool
from rollout.servers import EngineUnavailable, Server, body_of
from rollout.types import FinishReason, Prompt, SamplingParams, Thought


@dataclass(frozen=True)
class Answer:
    """The thoughts of one prompt and the server that sampled them; None if every server failed on it."""

    thoughts: list[Thought]
    server: Server | None


async def sample_prompts(
    pool: ServerPool, prompts: list[Prompt], params: SamplingParams, n: int, seeds: list[int]
) -> list[list[Thought]]:
    """The thoughts of each prompt.

    A server that was restarted meanwhile had other weights: what it sampled is sampled again.
    """
    groups: list[list[Thought]] = [[] for _ in prompts]
    left = list(range(len(prompts)))
    while left:
        await pool.leave_out_restarted()
        end = time.monotonic() + pool.settings.deadline
        work = [
            asyncio.ensure_future(_sample_prompt(pool, prompts[i], params, n, seeds[i], end)) for i in left
        ]
        try:
            answers = dict(zip(left, await asyncio.gather(*work), strict=True))
        finally:
            for task in work:
                task.cancel()
        restarted = await pool.leave_out_restarted()
        for i, answer in answers.items():
            groups[i] = answer.thoughts
        left = [i for i, answer in answers.items() if answer.server in restarted]
        pool.counts["resampled_prompts"] += len(left)
    pool.counts.update(
        prompts=len(prompts),
        thoughts=n * len(prompts),
        tokens=sum(len(thought.token_ids) for group in groups for thought in group),
    )
    return groups


async def _sample_prompt(
    pool: ServerPool, prompt: Prompt, params: SamplingParams, n: int, seed: int, end: float
) -> Answer:
    """The thoughts of one prompt, from the first server that manages."""
    failures = 0
    while True:
        await pool.open.wait()
        server = await pool.least_loaded(end)
        async with pool.slot(server):
            if not server.alive or not pool.open.is_set():
                continue
            server.in_flight += 1
            version = pool.version
            try:
                answer = await server.sample(server.request(prompt, params, n, seed))
                if answer.status_code == 200:
                    pool.answered = time.monotonic()
                    sampled = server.thoughts(body_of(answer), prompt, params, seed, version)
                    if sampled is not None:
                        return Answer(sampled, server)
                    server.last_error = "it aborted a request"
                elif answer.status_code == 429:
                    server.last_error = "429: too many requests"
                elif answer.status_code < 500 and answer.status_code != 408:
                    raise ValueError(
                        f"{server.url} refused a prompt of {len(prompt.token_ids)} tokens: "
                        f"{answer.text[:300]}"
                    )
                else:
                    failures += 1
                    pool.leave_out(server, f"{answer.status_code} {answer.text[:300]}")
            except (pool.transport_error, KeyError) as error:
                pool.leave_out(server, repr(error))
            finally:
                server.in_flight -= 1
        pool.counts["retries"] += 1
        if time.monotonic() > max(end, pool.answered + pool.settings.deadline):
            raise EngineUnavailable(
                f"a prompt had no answer within {pool.settings.deadline:.0f} s: {pool.last_errors()}"
            )
        await asyncio.sleep(pool.settings.patience / 10)
        if failures >= 3 * len(pool.servers):  # every server fails on this prompt and answers others
            pool.counts["aborted_prompts"] += 1
            aborted = [Thought((), (), FinishReason.ABORT, pool.version, seed + k) for k in range(n)]
            return Answer(aborted, None)
