"""How often models that `preference` trained write wrong steps, in worked problems sampled after a question.

A model with control tokens is asked behind the good one, and behind the bad one, where it must be wrong more
often. Control tokens are banned in the samples. `loss` is that of right problems (nats per token, the first
aside), for such a model with the good token before each segment, which is not counted itself.

    python -m examples.preference_samples runs/dial_family/preference_compare \
        --held-out runs/dial_family/scored_held_out.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.trained_models import measure_models
from rlpretrain.corpora.dial_problems import EOS, Problem, problems
from rlpretrain.corpora.dial_scored import wrong_steps
from rollout import HFEngine, Prompt, SamplingParams

GOOD, BAD = "<|good|>", "<|bad|>"
"""Control tokens of the objective, by its defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the shares of each trained model under a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run, or output_dir of a comparison")
    parser.add_argument(
        "--held-out", type=Path, required=True, help="problems without wrong steps, with spans"
    )
    parser.add_argument("--problems", type=int, default=250)
    parser.add_argument("--thoughts", type=int, default=4, help="samples of each problem")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    asked = list(problems(args.problems, args.seed, (1, 2, 3, 4), "samples"))
    held_out = [json.loads(line) for line in args.held_out.read_text().splitlines()]

    def measure(model: Path) -> dict[str, float]:
        return rates_of(model, asked, args.thoughts, args.seed) | {"loss": loss_of(model, held_out)}

    measure_models(args.folder, measure)
    return 0


def rates_of(folder: Path, asked: Sequence[Problem], thoughts: int, seed: int) -> dict[str, float]:
    """The share of samples with a wrong step: "plain", or behind "good" and "bad" if these are tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(folder).eval())
    vocabulary = tokenizer.get_vocab()
    control = tuple(vocabulary[token] for token in (GOOD, BAD) if token in vocabulary)
    params = SamplingParams(40, eos_ids=(vocabulary[EOS],), banned_ids=control)
    kinds = {"good": [GOOD], "bad": [BAD]} if control else {"plain": []}
    rates = {}
    for kind, before in kinds.items():
        prompts = []
        for problem in asked:
            words = [*([GOOD] if before else []), *problem.question(), ".", *before, "so"]
            ids = tuple(vocabulary[word] for word in words)
            prompts.append(Prompt(ids, stop_ids=(vocabulary["."],)))
        groups = asyncio.run(engine.sample(prompts, params, thoughts, range(seed, seed + len(prompts))))
        wrong = [
            wrong_steps(problem, tokenizer.convert_ids_to_tokens(list(thought.token_ids))[:-1]) > 0
            for problem, group in zip(asked, groups, strict=True)
            for thought in group
        ]
        rates[kind] = sum(wrong) / len(wrong)
    return rates


@torch.no_grad()
def loss_of(folder: Path, held_out: Sequence[Mapping[str, Any]]) -> float:
    """The mean loss of right problems, behind good tokens if the model has them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    good = tokenizer.get_vocab().get(GOOD)
    losses = []
    for row in held_out:
        ids: list[int] = []
        for start, end, _ in row["spans"]:
            ids += [] if good is None else [good]
            ids += tokenizer(row["text"][start:end]).input_ids
        read = torch.tensor(ids)
        logps = model(input_ids=read[None]).logits[0, :-1].log_softmax(-1)
        own = logps.gather(1, read[1:, None])[:, 0][read[1:] != (-1 if good is None else good)]
        losses.append(-own[0 if good is None else 1 :])
    return float(torch.cat(losses).mean())


if __name__ == "__main__":
    raise SystemExit(main())
