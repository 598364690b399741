"""Prompts as TRL's trainers take them: texts that are tokenised again, or ids.

GRPOTrainer calls `processing_class(text=prompts)`. So a prompt is a text that this call turns into the
prompt's ids, including a beginning of text that the tokenizer adds. Some prompts have no such text.
`RLPTrainer`, `Rollouts` and `AsyncRollouts` take ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import Limit, Names, check_rows
from rollout.types import Position

NAMES = Names("the prompt dataset", "max_length", "max_completion_length")
"""Names of the settings that bound the length of a row."""
FEWEST = 0.1
"""Share of the positions that must remain where prompts are texts; with fewer the data are too different."""
JUDGED = 100
"""Positions of a stream after which that share is checked; for other data it is checked at the end."""


def position_of(row: Mapping[str, Any]) -> Position:
    """The position that a row of a prompt dataset stands for."""
    context, target, suffix = (
        tuple(row.get(name) or ()) for name in ("context_ids", "target_ids", "suffix_ids")
    )
    return Position(str(row["document_id"]), int(row["position"]), context, target, suffix)


class PromptWriter:
    """Finds the text of a prompt, and counts the prompts that have none.

    With `by_ids` every prompt gets a text, which only identifies it: where its ids differ from the
    prompt's, the position is added to it, so that two prompts never share a text.
    """

    def __init__(self, tokenizer: Any, by_ids: bool):
        self.tokenizer, self.by_ids = tokenizer, by_ids
        self.written = self.left_out = 0
        self.example = ""  # the end of the first prompt that was left out
        framed = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        starts = range(len(framed) - len(bare) + 1)
        start = next((k for k in starts if framed[k : k + len(bare)] == bare), 0)
        self.lead, self.tail = (
            framed[:start],
            framed[start + len(bare) :],
        )  # that the tokenizer adds to a text

    def __call__(self, position: Position, ids: Sequence[int]) -> str | None:
        """The text of the prompt `ids`; None if the position is left out."""
        text = self._exact_text(list(ids))
        if text is None and self.by_ids:
            text = f"{self._decode(ids)}⟨{position.document_id}@{position.index}⟩"
        if text is None:
            self.left_out += 1
            self.example = self.example or self._decode(ids)[-60:]
        else:
            self.written += 1
        return text

    @property
    def warning(self) -> str | None:
        """How many positions were left out, and why."""
        if not self.left_out:
            return None
        return f"{self.left_out} of {self.left_out + self.written} positions left out: {self._reason()}"

    def check(self, least: int = 1) -> None:
        """Raise ConfigError if, of at least `least` positions, nearly all are left out."""
        total = self.written + self.left_out
        if self.left_out and total >= least and self.written < FEWEST * total:
            raise ConfigError(
                f"{self.warning}. TRL's own trainers take prompts as text; RLPTrainer, Rollouts and "
                "AsyncRollouts take ids and leave none out: use one of them, and make the dataset with "
                "by_ids=True"
            )

    def _exact_text(self, ids: list[int]) -> str | None:
        """A text that the tokenizer turns into `ids`; None if none is found."""
        size = len(self.lead)
        if self.tail or ids[:size] != self.lead:
            return None
        text = self._decode(ids[size:])
        for candidate in (text, f" {text}"):  # a decoder may drop the first space
            if list(self.tokenizer(candidate, verbose=False)["input_ids"]) == ids:
                return candidate
        return None

    def _reason(self) -> str:
        name = type(self.tokenizer).__name__
        if self.tail:
            ends = self._decode(self.tail)
            return f"the tokenizer ({name}) ends every text with {ends}, so no text is tokenised to a prompt"
        return f"their prompts tokenise to other ids, for example that of …{self.example!r}"

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def check_prompts(processing_class: Any, prompts: Sequence[str], expected: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError if the trainer tokenises a prompt to other ids than those of its document."""
    unique = dict(zip(prompts, expected, strict=True))
    tokenised = processing_class(text=list(unique))["input_ids"]
    for (text, ids), read in zip(unique.items(), tokenised, strict=True):
        if list(read) != list(ids):
            raise ConfigError(
                f"the trainer tokenises the prompt …{text[-60:]!r} to other ids than those of its document: "
                "give the trainer the tokenizer and the reward the settings that the dataset was made with, "
                "and make it without by_ids for any trainer but RLPTrainer, Rollouts and AsyncRollouts"
            )


def longest_row(dataset: Any) -> int:
    """The most tokens of context and target in a prompt dataset; 0 for a stream or any other dataset."""
    columns = ("context_ids", "target_ids")
    present = getattr(dataset, "column_names", None) or ()
    if not hasattr(dataset, "__len__") or not set(columns) <= set(present):
        return 0
    return _longest_sum(dataset, columns)


def _longest_sum(dataset: Any, columns: Sequence[str]) -> int:
    """The most entries that the lists of a row in these columns have together; 0 without rows."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # makes its functions when it is imported, which type checkers do not see
    longest = 0
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(4096):
        lengths = [pc.list_value_length(batch[name]) for name in columns]
        row_lengths = lengths[0] if len(lengths) == 1 else pc.add(*lengths)
        longest = max(longest, pc.max(row_lengths).as_py() or 0)
    return longest


def check_documents(dataset: Any, limit: Limit | None, max_length: int) -> None:
    """Raise ConfigError if a document for the next-token loss is longer than the model takes."""
    if limit is None:
        return
    has_length = hasattr(dataset, "__len__")  # a stream has not: only the limit is known
    longest = _longest_sum(dataset, ["document_token_ids"]) if has_length else max_length
    if longest > limit.tokens:
        raise ConfigError(
            f"{limit.reason}, but a document of {NAMES.documents} has up to {longest} tokens, all of which "
            f"the next-token loss reads: set {NAMES.max_length} to at most {limit.tokens}"
        )


def check_lengths(objective: Any, limit: Limit | None, longest: Iterable[int], args: Any) -> None:
    """Raise ConfigError if the longest row is longer than the model or TRL's vLLM takes.

    `longest` are tokens of context and target; the thought has as many as the trainer's arguments `args`
    allow.
    """
    size, completion = max(longest, default=0), args.max_completion_length
    if not size or completion is None:
        return
    thought = max(completion - objective.answer_tokens, 0)  # a completion holds the answer as well
    check_rows(objective, size, limit, NAMES, thought_tokens=thought)
    most = getattr(args, "vllm_max_model_length", None) if getattr(args, "use_vllm", False) else None
    need = objective.window(size, thought).sampled
    if most is not None and need > most:
        raise ConfigError(
            f"vllm_max_model_length is {most}, but prompts and completions reach {need} tokens: raise it, or "
            f"lower {NAMES.max_length} or {NAMES.max_thought_tokens}"
        )
