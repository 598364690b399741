"""The transformers engine: thoughts from any Hugging Face causal LM, the trainer's module included.

A context is read once, and its cache is forked to the context's thoughts, which are decoded together. Rows
whose thought has ended leave the batch. R rows (thoughts being decoded), T context tokens, L thought
tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rollout import draws
from rollout.engine import EngineInfo, check_request, ending
from rollout.rows import Path, Reader, Rows, sampling_mode
from rollout.types import Prompt, SamplingParams, Thought, WeightSource
from rollout.weights import copy_weights


class HFEngine:
    """Samples thoughts with `transformers`, in this process, on whatever device the model is on.

    `model` may be the trainer's module (`shares_weights`): sampling runs without gradient and in eval mode,
    and leaves every submodule's mode as it was. `tokenizer` is needed for stop strings only. At most
    `batch_size` thoughts are decoded at once; memory grows with batch_size x (T + L). `sample` computes in
    the caller's thread until it is done.

    A model is run in one of three ways. The first prompt decides which, by trying the model's cache;
    `health()` reports it:

    - `padded`: attention keys and values only; contexts of different lengths share a batch, padded on the
      left.
    - `equal_length`: a cache that can be forked but holds more than keys and values (Mamba, hybrids), or no
      `position_ids`; only contexts of one length share a batch, nothing is padded.
    - `recompute`: no cache that can be forked (RWKV, custom code); every step reads the whole sequence again.

    Example: `thoughts = asyncio.run(HFEngine(model).sample([Prompt((5, 6), stop_ids=(2,))], params, n=4,
    seeds=[0]))`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        shares_weights: bool = True,
        batch_size: int = 256,
        version: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.shares_weights = shares_weights
        self.batch_size = batch_size
        self.version = version
        self._reader: Reader | None = None
        self._closed = False
        self._counts = {"prompts": 0, "thoughts": 0, "tokens": 0}

    @property
    def info(self) -> EngineInfo:
        """It needs no probe: weights are read where they are, or copied by name and checked."""
        return EngineInfo(shares_weights=self.shares_weights, needs_probe=False, module=self.model)

    async def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        n: int,
        seeds: Sequence[int],
        *,
        greedy: bool = False,
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; see `Engine.sample`.

        With `greedy` a greedy thought follows each prompt's `n`, from the same reading of the context.

        Thought k of prompt i depends on the weights, the prompt, `params` and `draws.thought_seed(seeds[i],
        k)`, up to the rounding of a differently shaped batch. A thought ends with a stop id or stop string
        of its prompt (CLOSE, which wins over EOS), one of `params.eos_ids` (EOS), or at
        `max_thought_tokens` (LENGTH); the ending token stays in it. `behaviour_logps` are those of the
        distribution drawn from, for temperature 0 those of temperature 1.

        Raises ValueError before anything runs for a request that cannot be sampled (empty or too long
        prompt, ids outside the vocabulary, no tokenizer for stop strings, a missing seed), RuntimeError for
        NaN logits or a closed engine.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        config = self.model.config.get_text_config(decoder=True)
        check_request(
            prompts,
            params,
            n,
            seeds,
            vocabulary=getattr(config, "vocab_size", None) or math.inf,
            most=getattr(config, "max_position_embeddings", None) or math.inf,
            strings=self.tokenizer is not None,
        )
        results: list[list[Thought]] = [[] for _ in prompts]
        with sampling_mode(self.model):
            if prompts and self._reader is None:
                self._reader = Reader(self.model, prompts[0].token_ids)
            for members, indices in self._batches(prompts, n + greedy):
                rows = [(i, draws.thought_seed(seeds[i], k), k == n) for i in members for k in indices]
                thoughts = self._decode(
                    [prompts[i] for i in members],
                    params,
                    [seed for _, seed, _ in rows],
                    torch.tensor([is_greedy for _, _, is_greedy in rows]) if greedy else None,
                )
                for (i, _, _), thought in zip(rows, thoughts, strict=True):
                    results[i].append(thought)
        self._counts["prompts"] += len(prompts)
        self._counts["thoughts"] += (n + greedy) * len(prompts)
        self._counts["tokens"] += sum(len(thought.token_ids) for group in results for thought in group)
        return results

    def sync(self, weights: WeightSource, version: int) -> None:
        """Take the policy's weights and stamp `version` on thoughts from now on.

        With `shares_weights` the model has the weights already and the source is not called. Otherwise
        `copy_weights` copies them; if it raises, `version` stays.
        """
        if not self.shares_weights:
            copy_weights(self.model, weights)
        self.version = version

    def health(self) -> dict[str, Any]:
        """Kind, version, device, dtype, decoding path (None before the first prompt), and counters."""
        facts = {
            "kind": "hf",
            "version": self.version,
            "shares_weights": self.shares_weights,
            "closed": self._closed,
        }
        if not self._closed:
            weight = next(self.model.parameters())
            facts |= {
                "model": type(self.model).__name__,
                "device": str(weight.device),
                "dtype": str(weight.dtype),
            }
        return facts | {
            "path": self._reader and str(self._reader.path),
            "batch_size": self.batch_size,
            **self._counts,
        }

    def close(self) -> None:
        """Release the model; a second call does nothing."""
        self.model = self._reader = None
        self._closed = True

    def _batches(self, prompts: Sequence[Prompt], n: int) -> Iterator[tuple[list[int], range]]:
        """(prompts, thought indices) to decode together: similar lengths, at most `batch_size` rows.

        Lengths in a batch differ by at most a factor of two (short ones by more), which bounds padding.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        most, start = max(1, self.batch_size // n), 0
        while start < len(order):
            shortest, end = len(prompts[order[start]].token_ids), start + 1
            longest = 2 * shortest + 32 if self._reader and self._reader.path == Path.PADDED else shortest
            while end < min(start + most, len(order)) and len(prompts[order[end]].token_ids) <= longest:
                end += 1
            for first in range(0, n, self.batch_size):
                yield order[start:end], range(first, min(n, first + self.batch_size))
            start = end

    def _decode(
        self, prompts: list[Prompt], params: SamplingParams, seeds: list[int], greedy: Tensor | None = None
    ) -> list[Thought]:
        """Decode len(seeds) / len(prompts) thoughts for each prompt; `seeds` are ordered by prompt.

        `greedy` [R] says which of them are greedy; by default none beyond what `params` says.
        """
        copies, steps, device = len(seeds) // len(prompts), params.max_thought_tokens, self.model.device
        owners = [prompt for prompt in prompts for _ in range(copies)]
        endings = [tuple({*prompt.stop_ids, *params.eos_ids}) for prompt in owners]
        widest = max(1, *map(len, endings))
        ends = torch.tensor([(*e, *[-1] * (widest - len(e))) for e in endings], device=device)
        uniform = draws.uniforms(seeds, steps, device)
        ids = torch.full((len(owners), steps), -1, device=device)
        logps = torch.zeros(len(owners), steps, device=device)
        text_ends: dict[int, int] = {}
        alive = torch.arange(len(owners), device=device)
        done = torch.zeros(len(owners), dtype=torch.bool, device=device)
        greedy = None if greedy is None else greedy.to(device)
        patience = 1 if device.type == "cpu" else 8  # reading `done` stalls an accelerator
        assert self._reader is not None
        rows = Rows(self._reader, [prompt.token_ids for prompt in prompts], copies, steps)
        for step in range(steps):
            token, logp = draws.draw(rows.logits, uniform[:, step], params, greedy)
            ids[alive, step], logps[alive, step] = token, logp
            done |= (token[:, None] == ends).any(1)
            if any(prompt.stop_strings for prompt in prompts):
                self._find_strings(owners, ids, alive, step, text_ends)
                done |= torch.tensor([row in text_ends for row in alive.tolist()], device=device)
            if step + 1 == steps:
                break
            if step % patience == 0 and (finished := int(done.sum())) * 4 >= len(alive):
                if finished == len(alive):
                    break
                keep = (~done).nonzero()[:, 0]
                alive, done, token, ends, uniform = (x[keep] for x in (alive, done, token, ends, uniform))
                greedy = None if greedy is None else greedy[keep]
                rows.keep(keep)
            rows.step(token)
        drawn = zip(owners, ids.tolist(), logps.tolist(), seeds, strict=True)
        return [self._thought(params, *row, text_ends.get(r)) for r, row in enumerate(drawn)]

    def _find_strings(
        self, owners: list[Prompt], ids: Tensor, alive: Tensor, step: int, text_ends: dict[int, int]
    ) -> None:
        """Note in `text_ends` the rows whose text has a stop string for the first time at this step.

        Only as many tokens are decoded as the longest string has bytes, and a few more, since decoders trim
        the edges.
        """
        for row in alive.tolist():
            strings = owners[row].stop_strings
            if strings and row not in text_ends:
                window = max(len(s.encode()) for s in strings) + 8
                near = ids[row, max(0, step + 1 - window) : step + 1].tolist()
                if any(s in text for s in strings for text in self._readings(near)):
                    text_ends[row] = step

    def _readings(self, ids: list[int]) -> Iterator[str]:
        """The text of ids, the first of which may lie within a character.

        With byte fallback, one byte that belongs to no character turns all bytes beside it into U+FFFD. So
        the text is also decoded from the second, third and fourth token on.
        """
        for first in range(min(4, len(ids))):
            text = self.tokenizer.decode(ids[first:])
            yield text
            if "\N{REPLACEMENT CHARACTER}" not in text:
                return

    def _thought(
        self,
        params: SamplingParams,
        prompt: Prompt,
        ids: list[int],
        logps: list[float],
        seed: int,
        text_end: int | None,
    ) -> Thought:
        """Cut a row at the end of its thought."""
        ends = (*prompt.stop_ids, *params.eos_ids)
        end = next(
            (step + 1 for step, token in enumerate(ids) if token in ends or step == text_end), len(ids)
        )
        reason = ending(ids[:end], prompt, params, text_end == end - 1)
        if not all(map(math.isfinite, logps[:end])):
            raise RuntimeError(
                f"the model gave NaN or infinite log-probabilities after a prompt of {len(prompt.token_ids)} "
                f"tokens (version {self.version}): look at its weights"
            )
        return Thought(tuple(ids[:end]), tuple(logps[:end]), reason, self.version, seed)
