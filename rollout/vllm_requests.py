"""Converts prompts to requests of an in-process vLLM, and its outputs to thoughts."""

from __future__ import annotations

import math
from typing import Any

from rollout.engine import ending
from rollout.types import FinishReason, Prompt, SamplingParams, Thought


def request_of(prompt: Prompt, params: SamplingParams, n: int, seed: int) -> tuple[Any, Any]:
    """vLLM's prompt and sampling parameters."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    how = VLLMSamplingParams(
        n=n,
        max_tokens=params.max_thought_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=seed,
        logprobs=0,
        ignore_eos=True,
        stop_token_ids=[*prompt.stop_ids, *params.eos_ids],
        stop=list(prompt.stop_strings),
        logit_bias=dict.fromkeys(params.banned_ids, -math.inf) or None,
        detokenize=bool(prompt.stop_strings),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return TokensPrompt(prompt_token_ids=list(prompt.token_ids)), how


def thoughts_of(
    output: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int
) -> list[Thought]:
    """The thoughts of a finished request; thought k has the seed `seed` + k, which is vLLM's rule.

    Raises RuntimeError for NaN or infinite log-probabilities.
    """
    completions = sorted(output.outputs, key=lambda completion: completion.index)
    return [
        _thought(completion, prompt, params, seed + completion.index, version) for completion in completions
    ]


def _thought(completion: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int) -> Thought:
    ids = tuple(completion.token_ids)
    logps = tuple(float(at[token].logprob) for token, at in zip(ids, completion.logprobs, strict=True))
    if not all(map(math.isfinite, logps)):
        raise RuntimeError(
            f"vLLM gave NaN or infinite log-probabilities after a prompt of {len(prompt.token_ids)} "
            f"tokens (version {version}): look at the weights"
        )
    reason = FinishReason.ABORT
    if completion.finish_reason != "abort":
        reason = ending(ids, prompt, params, by_string=isinstance(completion.stop_reason, str))
    return Thought(ids, logps, reason, version, seed)
