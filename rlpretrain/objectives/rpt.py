r"""RPT: reinforcement pre-training (arXiv 2506.08007), next-token reasoning.

The model thinks, closes its thought, and says the next token or tokens in `\boxed{}`. The reward looks at
nothing but bytes:

- `prefix`: 1 if the prediction is an exact prefix of what follows and ends where one of its tokens ends,
  else 0.
- `first_token`: 1 if the prediction begins with the next token.
- `dense`: 1 as under `prefix`, else the probability of the next token after thought and prediction.
- `conditional_dense`: the same, but only where no thought of the group is right.

Thought and prediction are one sampled sequence and trained alike (`answer_span` marks the prediction): first
up to the close tag, then up to the end of the box. Nothing is injected between the two.

Ours where the paper is silent: `first_token` on bytes; the dense variants' probability and condition; the
entropy threshold of the positions; groups that are all right or all wrong are dropped from the start
(`dynamic_sampling`; the paper from step 500 on).

Pitfalls: the reward is sparse, and a base model that never saw a box earns nothing: look at the hits of the
base first. Tokens carry their leading space, so ` the` is not `the` (`strip` forgives white space, for
tokenizers that cannot write it in a box). A closing bracket ends the prediction. Under `dense` it can pay to
write no box at all, since the next token is then likely enough: where hits were rare it did
(docs/objectives.md). Entropy-filtered positions on noisy text are mostly unpredictable: all groups are then
wrong.
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
"""Says what the paper's prompt says, in our words."""


@dataclass(kw_only=True)
class Config(base.Config):
    """RPT's own fields."""

    template: str = TEMPLATE
    """RPT's instruction in our words; raw or another text with {context} as elsewhere."""
    target_length: Count = 8
    """Window: tokens of the true continuation that a prediction may cover. A longer prediction is wrong."""
    match: Literal["prefix", "first_token", "dense", "conditional_dense"] = "prefix"
    """What a prediction earns; see the objective's documentation."""
    opening: str = "\\boxed{"
    """Text before a prediction."""
    closing: str = "}"
    """Text that ends it, and sampling."""
    max_prediction_tokens: Annotated[int, Field(ge=2)] = 32
    """Longest prediction, with its box."""
    strip: bool = False
    """Compare without white space around prediction and continuation."""
    dynamic_sampling: bool = True
    """Leave out groups that are all right or all wrong."""
    proxy: str | None = None
    """Model (hub id or folder, same tokenizer) whose entropies choose positions; without one `min_entropy`
    asks the policy.
    """
    min_entropy: Amount = 0.0
    """Nats that the next token's entropy must have at a position: over the 16 likeliest tokens of `proxy`, or
    over all of the policy's. The paper splits at .5, 1 and 1.5.
    """


class RPT(base.Objective):
    """Reward a thought if the prediction after it is right, to the byte."""

    Config = Config
    needs = frozenset()

    def __init__(self, config: Any, tokenizer: Any):
        if config.proxy or config.min_entropy:
            config = replace(config, positions="entropy", top_fraction=1.0)  # any place that is unsure enough
        super().__init__(config, tokenizer)
        self.answer_tokens = config.max_prediction_tokens
        if "dense" in config.match:
            self.needs = self.needs | {"target"}
        self.proxy = _Proxy(config.proxy) if config.proxy else None
        if self.proxy:
            self.needs = self.needs - {"entropy"}

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """Places that are unsure enough and whose continuation begins with a whole character."""
        values = trunk if self.proxy is None else self.proxy(document)
        if values is not None and self.config.min_entropy:
            values = self.admitted(values, rng)
        return [p for p in super().positions(document, rng, values) if self.truth(p)[1]]

    def admitted(self, entropies: Tensor, rng: Any) -> Tensor:
        """The entropies of places that may be thought about, NaN elsewhere."""
        return entropies.masked_fill(entropies < self.config.min_entropy, torch.nan)

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """Groups with their matches."""
        truths = [self.truth(g.position) for g in groups]
        return [
            replace(g, rewards=tuple(float(self.right(t, *truth)) for t in g.thoughts))
            for g, truth in zip(groups, truths, strict=True)
        ]

    def right(self, thought: Thought, truth: bytes, ends: Sequence[int]) -> bool:
        """Whether a thought's prediction is."""
        found = self.prediction(thought)
        if found is None:
            return False
        if self.config.match == "first_token":
            return found.startswith(truth[: ends[0]])
        return prefix_match(found, truth, ends)

    def prediction(self, thought: Thought) -> bytes | None:
        """The bytes in the last box after the close tag; None where there is none."""
        if thought.answer_span is None:
            return None
        start, end = thought.answer_span
        said = b"".join(self.reader.raw(thought.token_ids[start:end], after=thought.token_ids[:start]))
        found = last_between(said, self.config.opening.encode(), self.config.closing.encode())
        return _stripped(found) if self.config.strip and found is not None else found

    def truth(self, position: Position) -> tuple[bytes, list[int]]:
        """The bytes of the target, and the byte lengths of its first 1, 2, ... tokens.

        Bytes come from the tokens, so a window may end within a character. Lengths that would cut a character
        in two are left out: no prediction can end there. Where the context ends within a character there are
        none.
        """
        if _unfinished(b"".join(self.reader.raw(position.context_ids[-8:]))):
            return b"", []
        parts = self.reader.raw(position.target_ids, after=position.context_ids)
        heads = [b"".join(parts[:n]) for n in range(1, len(parts) + 1)]
        whole = heads[-1] if heads else b""
        clean = [head for head in heads if not _unfinished(head)]
        if not self.config.strip:
            return whole, [len(head) for head in clean if head]
        lead = (
            len(whole) - len(_stripped(whole + b".")) + 1
        )  # spaces at its end are those before another word
        return whole[lead:], [len(kept) for head in clean if (kept := _stripped(head))]

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that teach something."""
        if not self.config.dynamic_sampling or "target" in self.needs:
            return list(groups)
        return [g for g in groups if base.rewards_differ(g)]

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """The matches [B, G]; dense variants put the next token's probability in place of a 0."""
        hits = super().reward(groups, scores)
        if "target" not in self.needs:
            return hits
        dense = torch.maximum(hits, scores.target_logps[..., 0].double().exp())
        if self.config.match == "dense":
            return dense
        nobody = (hits.nan_to_num(0.0) == 0).all(1, keepdim=True)
        return torch.where(nobody, dense, hits)


def _unfinished(data: bytes) -> bool:
    """Whether bytes end within a character of UTF-8."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead & 0b1100_0000 != 0b1000_0000:  # the byte that begins a character says how many it has
            return lead >= 0b1100_0000 and size < (
                2 if lead < 0b1110_0000 else 3 if lead < 0b1111_0000 else 4
            )
    return False


def _stripped(data: bytes) -> bytes:
    """Without the white space of any script around it; bytes that are no character stay."""
    return data.decode("utf-8", "surrogateescape").strip().encode("utf-8", "surrogateescape")


class _Proxy:
    """A model whose entropies, over its 16 likeliest next tokens, show where text is hard to predict."""

    def __init__(self, path: str):
        from transformers import AutoModelForCausalLM

        self.reads = Reads()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, document: Document) -> Tensor:
        """Nats for each token of a document but the first, which has NaN."""
        ids = torch.tensor([document.token_ids], device=self.model.device)
        self.reads.add(len(document.token_ids))
        logits = self.model(input_ids=ids).logits[0, :-1].float()
        top = logits.topk(min(16, logits.shape[-1])).values.log_softmax(-1)
        return torch.cat([top.new_full((1,), torch.nan), -(top.exp() * top).sum(-1)]).cpu()


OBJECTIVE = RPT
