"""What stands before a thought, in token ids: the document's context, an optional template around it, and the
open tag.

Nothing here tokenises document text: the words of a template are tokenised once, apart from it, and ids are
joined. So context and target have the same ids with and without a thought, whatever the tokenizer would merge
across the seam.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AddedToken, PreTrainedModel

from rlpretrain.compat import fill_vocabulary, without_notices
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
"""RLP's second version gives base models an instruction of this content (METHODS §1.3); the words are
ours.
"""
TEMPLATES = {"raw": "{context}", "rlp": RLP_TEMPLATE}


@dataclass(frozen=True, slots=True)
class Delimiters:
    """The tags around a thought. Each is one token."""

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self) -> None:
        if not self.open.strip() or not self.close.strip() or self.open == self.close:
            raise ConfigError(f"a thought needs two different tags, got '{self.open}' and '{self.close}'")


def ensure_delimiters(
    tokenizer: Any, model: PreTrainedModel | None = None, delimiters: Delimiters | None = None
) -> list[str]:
    """Make both tags single tokens of `tokenizer` and known to `model`; returns the tags that were added, to
    be said.

    They are added as ordinary (not "special") tokens: decoding with `skip_special_tokens` leaves them in the
    text, where `strip_thoughts` finds them, rather than letting a thought run into the answer unmarked. The
    embedding table grows only if it is too small; tied heads stay tied, and a table with spare rows keeps its
    size.

    A new tag starts as the mean of the rows of the pieces that the tokenizer wrote it with before ("<",
    "think", ">"), input and output. On SmolLM2-135M, 32 positions of GSM8K with targets of three tokens, an
    empty thought then costs 5.1 nats; started as the mean of all rows it costs 6.6 (NOTES.md). Where the
    tokenizer has no such pieces (a word tokenizer), the tag starts as the mean of the rows in use.

    A model whose table was too small from the start, for a tokenizer that has both tags, is resized too.
    """
    delimiters = delimiters or Delimiters()
    known = tokenizer.get_vocab()
    used = sorted(known.values())
    added = [tag for tag in (delimiters.open, delimiters.close) if tag not in known]
    pieces = {tag: _pieces(tokenizer, tag) for tag in added}
    if added:
        fill_vocabulary(tokenizer)
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in added])
        if taken := set(tokenizer.convert_tokens_to_ids(added)) & set(used):
            raise ConfigError(
                f"this tokenizer gives new tokens ids that others have "
                f"({', '.join(map(str, sorted(taken)))}): its vocabulary has holes. Add the tags to it "
                "yourself, or take two of its tokens: objective.open and objective.close"
            )
    if model is None:
        return added
    rows = model.get_input_embeddings().weight.shape[0]
    if (size := table_size(tokenizer)) > rows:
        with without_notices():  # of how the new rows begin, which is meant
            model.resize_token_embeddings(size, mean_resizing=True)
    in_use = [i for i in used if i < rows]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for table in {id(table.weight): table for table in tables if table is not None}.values():
            for tag in added:
                row = tokenizer.convert_tokens_to_ids(tag)
                if pieces[tag] or row < rows:
                    start = table.weight[pieces[tag] or in_use].float().mean(0)
                    table.weight[row] = start.to(table.weight.dtype)
    return added


def _pieces(tokenizer: Any, tag: str) -> list[int]:
    """The ids that a tokenizer writes a tag with that is no token of its own; none where it does not know
    a part of it.
    """
    ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
    return [] if tokenizer.unk_token_id in ids else list(ids)


def table_size(tokenizer: Any) -> int:
    """Rows that a table of embeddings needs: one more than the largest id. `len` counts tokens, and ids
    may have holes.
    """
    return max(tokenizer.get_vocab().values()) + 1


class ThoughtPrompt:
    """Prompts of one run: a position's context between the words of a template, then the open tag.

    `template` is `raw` (the thought is opened inside the document itself), `rlp` (an instruction before the
    context), or a text with `{context}` in it once, where `{open}` and `{close}` stand for the tags. The open
    tag follows the template by itself. If the tokenizer puts a BOS before every text, the document's BOS
    stays first, before the template's words.
    """

    def __init__(self, tokenizer: Any, delimiters: Delimiters | None = None, template: str = "raw"):
        self.delimiters = delimiters or Delimiters()
        vocabulary = tokenizer.get_vocab()
        missing = [tag for tag in (self.delimiters.open, self.delimiters.close) if tag not in vocabulary]
        if missing:
            raise ConfigError(
                f"the tokenizer lacks the token {' and '.join(missing)}: call ensure_delimiters first"
            )
        self.open_id, self.close_id = vocabulary[self.delimiters.open], vocabulary[self.delimiters.close]
        probe, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
        self.bos = bos if bos is not None and probe[:1] == [bos] else None
        self.head, self.tail = (self._ids(tokenizer, text) for text in _halves(template))

    def _ids(self, tokenizer: Any, text: str) -> tuple[int, ...]:
        text = text.replace("{open}", self.delimiters.open).replace("{close}", self.delimiters.close)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    def __call__(self, position: Position) -> Prompt:
        """The prompt at `position`. The thought stops at the close tag, which is injected where a thought
        lacks it.
        """
        close = (self.close_id,)
        return Prompt((*self._framed(position), self.open_id), stop_ids=close, close_ids=close)

    def no_think(self, position: Position, kind: NoThink = "raw") -> tuple[int, ...]:
        """What precedes the target when there is no thought.

        `raw`: the context alone. `template`: with the template's words around it, no tags. `empty_thought`:
        the prompt with the thought closed at once; for the template `raw` that is context, open tag, close
        tag.
        """
        if kind == "raw":
            return position.context_ids
        if kind == "template":
            return self._framed(position)
        if kind == "empty_thought":
            return (*self._framed(position), self.open_id, self.close_id)
        raise ConfigError(f"no_think must be raw, template or empty_thought, got '{kind}'")

    def _framed(self, position: Position) -> tuple[int, ...]:
        context = position.context_ids
        lead = 1 if self.bos is not None and context[:1] == (self.bos,) else 0
        return (*context[:lead], *self.head, *context[lead:], *self.tail)


def strip_thoughts(text: str, delimiters: Delimiters | None = None) -> str:
    """Generated text without its thoughts, all else as it is, white space included.

    A close tag before any open one ends a thought that the prompt opened; a thought never closed lasts to the
    end.

    >>> strip_thoughts("The answer is<think> 2 and 2 </think> 4.")
    'The answer is 4.'
    """
    tags = delimiters or Delimiters()
    first, close, rest = text.partition(tags.close)
    if close and tags.open not in first:
        text = rest
    return re.sub(rf"{re.escape(tags.open)}.*?({re.escape(tags.close)}|\Z)", "", text, flags=re.DOTALL)


def _halves(template: str) -> tuple[str, str]:
    """The words before and after the context."""
    text = TEMPLATES.get(template, template)
    if text.count("{context}") != 1:
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        others = f"use {', '.join(TEMPLATES)} or a text with {{context}} in it once"
        hint = f"did you mean '{near[0]}'?" if near else others
        raise ConfigError(f"no template '{template}': {hint}")
    if text.rstrip().endswith("{open}"):
        raise ConfigError("a template must not end with {open}: the open tag follows it by itself")
    head, tail = text.split("{context}")
    return head, tail
