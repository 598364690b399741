"""Prompts in token ids: the document's context, an optional template around it, and the open tag.

Nothing here tokenises document text. The words of a template are tokenised once and separately, and ids are
concatenated. So context and target have the same ids with and without a thought, even where the tokenizer
would merge text across the boundary.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AddedToken

from rlpretrain.compat import embedding_weight_of, fill_vocabulary, without_notices
from rlpretrain.config import ConfigError
from rollout.types import Position, Prompt

NoThink = Literal["raw", "template", "empty_thought"]

RLP_TEMPLATE = (
    "Here is the beginning of a text. Before you go on with it, think for a moment, in a few words between "
    "{open} and {close}, about what has been said and what has to come next. Then carry on exactly where it "
    "stops, for a few steps, with the same voice, notation and LaTeX. Do not skip to a final boxed answer, "
    "do not repeat what is there "
    "already, and say nothing about these instructions.\n\n{context}\n\n"
)
"""RLP's second version gives base models an instruction with this content (METHODS §1.3), in our words."""
EXPERT_TEMPLATE = (
    "Read the following text as an expert of its subject would, and write down what goes through your mind "
    "while you work through it. Stay with what is difficult and says much, pass over what is plain, and "
    "explain the hard steps so simply that a beginner could follow. Put all of it between {open} and "
    "{close}.\n\n{context}\n\n"
)
"""The instruction of thinking-augmented pretraining to its generator (arXiv 2509.20186), in our words."""
TEMPLATES = {"raw": "{context}", "rlp": RLP_TEMPLATE, "expert": EXPERT_TEMPLATE}


@dataclass(frozen=True, slots=True)
class Delimiters:
    """The tags around a thought. Each is one token."""

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self) -> None:
        if not self.open.strip() or not self.close.strip() or self.open == self.close:
            raise ConfigError(f"a thought needs two different tags, got '{self.open}' and '{self.close}'")

    @property
    def tokens(self) -> tuple[str, ...]:
        """Both."""
        return self.open, self.close


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Tokens that an objective without thoughts puts into documents; new ones start as the mean row."""

    tokens: tuple[str, ...]


AddedTokens = Delimiters | ControlTokens
"""What an objective adds to tokenizer and model, where they lack it."""


def ensure_delimiters(
    tokenizer: Any, model: nn.Module | None = None, delimiters: AddedTokens | None = None
) -> list[str]:
    """Make both tags single tokens of `tokenizer` and `model`; return the tags that were added.

    They are added as ordinary (not "special") tokens: decoding with `skip_special_tokens` keeps them in the
    text, where `strip_thoughts` finds them. Without them, a thought would run into the answer unmarked. The
    embedding table grows only if it is too small. Tied heads stay tied, and a table with spare rows keeps its
    size.

    A new tag starts as the mean of the rows of the pieces into which the tokenizer split it before ("<",
    "think", ">"), for input and output. On SmolLM2-135M, 32 positions of GSM8K with targets of three tokens,
    an empty thought then costs 5.1 nats; started as the mean of all rows it costs 6.6 (NOTES.md). If the
    tokenizer has no such pieces (a word tokenizer), the tag starts as the mean of the rows in use. So do
    control tokens, whose words mean nothing.

    A model whose table is too small for a tokenizer that already has both tags is resized too.
    """
    delimiters = delimiters or Delimiters()
    vocabulary = tokenizer.get_vocab()
    used_ids = sorted(vocabulary.values())
    added = [tag for tag in delimiters.tokens if tag not in vocabulary]
    is_thought = isinstance(delimiters, Delimiters)
    pieces = {tag: _split_tag(tokenizer, tag) if is_thought else [] for tag in added}
    if added:
        fill_vocabulary(tokenizer)
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in added])
        if taken := set(tokenizer.convert_tokens_to_ids(added)) & set(used_ids):
            raise ConfigError(
                f"this tokenizer gives new tokens ids that others have "
                f"({', '.join(map(str, sorted(taken)))}): its vocabulary has unused ids. Add the tags to it "
                "yourself, or use two of its tokens: objective.open and objective.close"
            )
    if model is None:
        return added
    causal: Any = model
    rows = embedding_weight_of(model).shape[0]
    if (size := table_size(tokenizer)) > rows:
        with without_notices():  # the notice describes the new rows' initial values, which we want
            causal.resize_token_embeddings(size, mean_resizing=True)
    ids_with_row = [i for i in used_ids if i < rows]
    tables = (causal.get_input_embeddings(), causal.get_output_embeddings())
    weights = {id(table.weight): table.weight for table in tables if table is not None}  # tied ones once
    with torch.no_grad():
        for weight in weights.values():
            for tag in added:
                row = tokenizer.convert_tokens_to_ids(tag)
                if pieces[tag] or row < rows or not is_thought:
                    mean = weight[pieces[tag] or ids_with_row].float().mean(0)
                    weight[row] = mean.to(weight.dtype)
    return added


def _split_tag(tokenizer: Any, tag: str) -> list[int]:
    """Return the ids into which a tokenizer splits a tag; none if a part of it is unknown."""
    ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
    return [] if tokenizer.unk_token_id in ids else list(ids)


def table_size(tokenizer: Any) -> int:
    """Return the rows that a table of embeddings needs: the largest id plus one.

    `len(tokenizer)` is the number of tokens, which is smaller if there are unused ids.
    """
    return max(tokenizer.get_vocab().values()) + 1


class ThoughtPrompt:
    """Makes the prompts of a run: a position's context inside a template, then the open tag.

    `template` is `raw` (the thought is opened inside the document itself), `rlp` or `expert` (an instruction
    before the context), or a text that contains `{context}` once, with `{open}` and `{close}` for the tags.
    The open tag is added after the template. If the tokenizer starts every text with a BOS, the document's
    BOS stays first, before the template's words.
    """

    def __init__(self, tokenizer: Any, delimiters: Delimiters | None = None, template: str = "raw"):
        self.delimiters = delimiters or Delimiters()
        vocabulary = tokenizer.get_vocab()
        missing = [tag for tag in (self.delimiters.open, self.delimiters.close) if tag not in vocabulary]
        if missing:
            raise ConfigError(
                f"the tokenizer lacks the token {' and '.join(missing)}: call ensure_delimiters first"
            )
        self.open_id = vocabulary[self.delimiters.open]
        self.close_id = vocabulary[self.delimiters.close]
        bos = tokenizer.bos_token_id
        starts_with_bos = tokenizer("a")["input_ids"][:1] == [bos]
        self.bos = bos if bos is not None and starts_with_bos else None
        before, after = _split_template(template)
        self.head = self._tokenise(tokenizer, before)
        self.tail = self._tokenise(tokenizer, after)

    def _tokenise(self, tokenizer: Any, text: str) -> tuple[int, ...]:
        """Return the ids of a template's words."""
        text = text.replace("{open}", self.delimiters.open).replace("{close}", self.delimiters.close)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    def __call__(self, position: Position) -> Prompt:
        """Return the prompt at `position`.

        The thought stops at the close tag, which is injected if the thought lacks it.
        """
        close = (self.close_id,)
        return Prompt((*self._in_template(position), self.open_id), stop_ids=close, close_ids=close)

    def no_think(self, position: Position, kind: NoThink = "raw") -> tuple[int, ...]:
        """Return the tokens before the target if there is no thought.

        `raw`: the context alone. `template`: the context inside the template, without tags. `empty_thought`:
        the prompt with the thought closed at once; for the template `raw` that is context, open tag, close
        tag.
        """
        if kind == "raw":
            return position.context_ids
        if kind == "template":
            return self._in_template(position)
        if kind == "empty_thought":
            return (*self._in_template(position), self.open_id, self.close_id)
        raise ConfigError(f"no_think must be raw, template or empty_thought, got '{kind}'")

    def _in_template(self, position: Position) -> tuple[int, ...]:
        """Return the context inside the template, with the document's BOS first."""
        context = position.context_ids
        bos_length = 1 if self.bos is not None and context[:1] == (self.bos,) else 0
        return (*context[:bos_length], *self.head, *context[bos_length:], *self.tail)


def strip_thoughts(text: str, delimiters: Delimiters | None = None) -> str:
    """Return generated text without its thoughts; all other text, white space included, is unchanged.

    A close tag before any open tag ends a thought that the prompt opened. A thought without a close tag
    extends to the end.

    >>> strip_thoughts("The answer is<think> 2 and 2 </think> 4.")
    'The answer is 4.'
    """
    tags = delimiters or Delimiters()
    before, close, after = text.partition(tags.close)
    if close and tags.open not in before:
        text = after
    return re.sub(rf"{re.escape(tags.open)}.*?({re.escape(tags.close)}|\Z)", "", text, flags=re.DOTALL)


def _split_template(template: str) -> tuple[str, str]:
    """Return the words before and after the context; ConfigError for a template that cannot be used."""
    text = TEMPLATES.get(template, template)
    if text.count("{context}") != 1:
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        choices = f"use {', '.join(TEMPLATES)} or a text with {{context}} in it once"
        hint = f"did you mean '{near[0]}'?" if near else choices
        raise ConfigError(f"no template '{template}': {hint}")
    if text.rstrip().endswith("{open}"):
        raise ConfigError("a template must not end with {open}: the open tag is added after it")
    before, after = text.split("{context}")
    return before, after
