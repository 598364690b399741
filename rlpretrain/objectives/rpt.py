r"""RPT: reinforcement pre-training (arXiv 2506.08007), next-token reasoning.

The model thinks, closes its thought, and writes the next token or tokens in `\boxed{}`. The reward compares
bytes:

- `prefix`: 1 if the prediction is an exact prefix of the following text and ends where one of its tokens
  ends, else 0.
- `first_token`: 1 if the prediction begins with the next token.
- `dense`: 1 as under `prefix`, else the probability of the next token after thought and prediction.
- `conditional_dense`: as `dense`, but only if no thought of the group is right, else as `prefix`.

Thought and prediction are one sampled sequence and trained alike (`answer_span` marks the prediction): first
up to the close tag, then up to the end of the box. Nothing is injected between the two.

Our choices where the paper is silent: `first_token` on bytes; the dense variants' probability and condition;
the entropy threshold of the positions; groups that are all right or all wrong are dropped from the start
(`dynamic_sampling`; in the paper from step 500 on).

Pitfalls: the reward is sparse, and 0 for a base model that never saw a box: check the base model's hits
first. Tokens include their leading space, so ` the` is not `the`; `strip` ignores white space, for tokenizers
that cannot write it in a box. A closing bracket ends the prediction. Under `dense` a thought without a box
can have the larger reward, since the next token is then likely enough; this happened where hits were rare
(docs/objectives.md). On noisy text, positions of high entropy are mostly unpredictable, and then all groups
are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rewards.matching import last_between, prefix_match
from rlpretrain.config import Amount, Count
from rlpretrain.models.spending import Reads
from rlpretrain.objectives import base
from rlpretrain.types import Document, Scores
from rollout.engine import Engine
from rollout.types import Group, Position, Thought

TEMPLATE = (
    "Here is the beginning of a text. Work out which token comes next: think between {open} and {close}, "
    "look at a few candidates, and then write the one you settle on in \\boxed{}, exactly as the text has "
    "it, with its leading space if it "
    "has one and without \\text{}.\n\n### Context\n{context}\n\n"
)
"""The paper's prompt, in our words."""


@dataclass(kw_only=True)
class Config(base.Config):
    """RPT's own fields."""

    template: str = TEMPLATE
    """RPT's instruction in our words; raw or another text with {context} as elsewhere."""
    target_length: Count = 8
    """Tokens of the true continuation that a prediction may cover. A longer prediction is wrong."""
    match: Literal["prefix", "first_token", "dense", "conditional_dense"] = "prefix"
    """The reward of a prediction; see the objective's documentation."""
    opening: str = "\\boxed{"
    """Text before a prediction."""
    closing: str = "}"
    """Text that ends a prediction, and its sampling."""
    max_prediction_tokens: Annotated[int, Field(ge=2)] = 32
    """Longest prediction, box included."""
    strip: bool = False
    """Compare without white space around prediction and continuation."""
    advantage: base.AdvantageForm = "leave_one_out"
    """How the thoughts of a group are compared: leave_one_out, group_normalised (GRPO) or max_rl."""
    dynamic_sampling: bool = True
    """Leave out groups that are all right or all wrong."""
    proxy: str | None = None
    """Model (hub id or folder, same tokenizer) whose entropies choose positions; by default the policy."""
    min_entropy: Amount = 0.0
    """Smallest entropy (nats) of the next token at a position. The paper splits at .5, 1 and 1.5.
    It is taken over the 16 likeliest tokens of `proxy`, or over all tokens of the policy.
    """


class RPT(base.Objective):
    """Reward a thought if the prediction after it is right, to the byte."""

    Config = Config
    needs = frozenset()

    def __init__(self, config: Any, tokenizer: Any):
        if config.proxy or config.min_entropy:
            # all positions whose entropy is large enough
            config = replace(config, positions="entropy", top_fraction=1.0)
        super().__init__(config, tokenizer)
        self.answer_tokens = config.max_prediction_tokens
        if "dense" in config.match:
            self.needs = self.needs | {"target"}
        self.proxy = _Proxy(config.proxy) if config.proxy else None
        if self.proxy:
            self.needs = self.needs - {"entropy"}

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """Positions of sufficient entropy whose continuation begins with a whole character."""
        entropies = trunk if self.proxy is None else self.proxy(document)
        if entropies is not None and self.config.min_entropy:
            entropies = self.admitted(entropies, rng)
        candidates = super().positions(document, rng, entropies)
        return [position for position in candidates if self.truth(position)[1]]

    def admitted(self, entropies: Tensor, rng: Any) -> Tensor:
        """The entropies of tokens that may have a position before them, NaN elsewhere."""
        return entropies.masked_fill(entropies < self.config.min_entropy, torch.nan)

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """Groups with reward 1 for right predictions, 0 for others."""
        out = []
        for group in groups:
            truth, ends = self.truth(group.position)
            rewards = tuple(float(self.right(thought, truth, ends)) for thought in group.thoughts)
            out.append(replace(group, rewards=rewards))
        return out

    def right(self, thought: Thought, truth: bytes, ends: Sequence[int]) -> bool:
        """Whether a thought's prediction is right."""
        prediction = self.prediction(thought)
        if prediction is None:
            return False
        if self.config.match == "first_token":
            return prediction.startswith(truth[: ends[0]])
        return prefix_match(prediction, truth, ends)

    def prediction(self, thought: Thought) -> bytes | None:
        """The bytes in the last box after the close tag; None if there is no box."""
        if thought.answer_span is None:
            return None
        start, end = thought.answer_span
        answer = b"".join(self.reader.raw(thought.token_ids[start:end], after=thought.token_ids[:start]))
        boxed = last_between(answer, self.config.opening.encode(), self.config.closing.encode())
        return _stripped(boxed) if self.config.strip and boxed is not None else boxed

    def truth(self, position: Position) -> tuple[bytes, list[int]]:
        """The bytes of the target, and the byte lengths of its first 1, 2, ... tokens.

        Bytes come from the tokens, so a target may end within a character. Lengths that would split a
        character are left out, since no prediction can end there. If the context ends within a character,
        there are no lengths.
        """
        if _unfinished(b"".join(self.reader.raw(position.context_ids[-8:]))):
            return b"", []
        parts = self.reader.raw(position.target_ids, after=position.context_ids)
        heads = [b"".join(parts[:n]) for n in range(1, len(parts) + 1)]
        whole = heads[-1] if heads else b""
        clean = [head for head in heads if not _unfinished(head)]
        if not self.config.strip:
            return whole, [len(head) for head in clean if head]
        # a "." protects white space at the end, which belongs to the next word
        leading = len(whole) - len(_stripped(whole + b".")) + 1
        lengths = [len(_stripped(head)) for head in clean]
        return whole[leading:], [length for length in lengths if length]

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Advantages [B, G] in the form of the field `advantage`."""
        return base.ADVANTAGES[self.config.advantage](reward)

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to train on; with `dynamic_sampling` not those that are all right or all wrong."""
        if not self.config.dynamic_sampling or "target" in self.needs:
            return list(groups)
        return [group for group in groups if base.rewards_differ(group)]

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """The matches [B, G]; dense variants replace 0 by the probability of the next token."""
        hits = super().reward(groups, scores)
        if "target" not in self.needs:
            return hits
        dense = torch.maximum(hits, scores.target_logps[..., 0].double().exp())
        if self.config.match == "dense":
            return dense
        none_right = (hits.nan_to_num(0.0) == 0).all(1, keepdim=True)
        return torch.where(none_right, dense, hits)


def _unfinished(data: bytes) -> bool:
    """Whether bytes end within a character of UTF-8."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead & 0b1100_0000 != 0b1000_0000:  # the first byte of a character tells its length
            character_size = 2 if lead < 0b1110_0000 else 3 if lead < 0b1111_0000 else 4
            return lead >= 0b1100_0000 and size < character_size
    return False


def _stripped(data: bytes) -> bytes:
    """Bytes without leading and trailing Unicode white space; bytes that are not UTF-8 are kept."""
    return data.decode("utf-8", "surrogateescape").strip().encode("utf-8", "surrogateescape")


class _Proxy:
    """A model whose entropies over its 16 likeliest next tokens show where text is hard to predict."""

    def __init__(self, path: str):
        from transformers import AutoModelForCausalLM

        self.reads = Reads()
        device = "cuda" if torch.cuda.is_available() else "cpu"  # tested on CPUs: docs/gpu.md
        model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, document: Document) -> Tensor:
        """The entropy (nats) of each token of a document; NaN for the first."""
        ids = torch.tensor([document.token_ids], device=self.model.device)
        self.reads.add(len(document.token_ids))
        logits = self.model(input_ids=ids).logits[0, :-1].float()
        top = logits.topk(min(16, logits.shape[-1])).values.log_softmax(-1)
        return torch.cat([top.new_full((1,), torch.nan), -(top.exp() * top).sum(-1)]).cpu()


OBJECTIVE = RPT
