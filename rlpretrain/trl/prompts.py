"""Prompts as TRL's trainers take them: as texts that are tokenised again, or beside that by the ids they were
made of.

GRPOTrainer calls `processing_class(text=prompts)`. So a prompt of ours is a text that gives its ids there,
the beginning of text that the tokenizer adds included; some prompts have no such text. `RLPTrainer`,
`Rollouts` and `AsyncRollouts` take ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import Limit, Names, check_rows
from rollout.types import Position

NAMES = Names("the prompt dataset", "max_length", "max_completion_length")
"""What the settings that make rows long are called here."""
FEWEST = 0.1
"""Share of the positions that must be left where prompts are texts; below it the run would be another one."""
JUDGED = 100
"""Positions of a stream after which that share is asked for; of other data it is known at the end."""


def position_of(row: Mapping[str, Any]) -> Position:
    """The position that a row of a prompt dataset stands for."""
    context, target, suffix = (
        tuple(row.get(name) or ()) for name in ("context_ids", "target_ids", "suffix_ids")
    )
    return Position(str(row["document_id"]), int(row["position"]), context, target, suffix)


class PromptWriter:
    """Finds the text of a prompt, and counts the prompts that have none.

    With `by_ids` every prompt has a text, and it is a name: where it would be tokenised to other ids, the
    position stands behind it, so that two prompts never share one.
    """

    def __init__(self, tokenizer: Any, by_ids: bool):
        self.tokenizer, self.by_ids = tokenizer, by_ids
        self.given = self.left_out = 0
        self.example = ""
        framed = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        starts = range(len(framed) - len(bare) + 1)
        at = next((k for k in starts if framed[k : k + len(bare)] == bare), 0)
        self.lead, self.tail = framed[:at], framed[at + len(bare) :]

    def __call__(self, position: Position, ids: Sequence[int]) -> str | None:
        """The text of the prompt `ids`; None if the position is left out."""
        text = self._exact(list(ids))
        if text is None and self.by_ids:
            text = f"{self._decode(ids)}⟨{position.document_id}@{position.index}⟩"
        if text is None:
            self.left_out += 1
            self.example = self.example or self._decode(ids)[-60:]
        else:
            self.given += 1
        return text

    @property
    def warning(self) -> str | None:
        """How many positions were left out, and why."""
        if not self.left_out:
            return None
        return f"{self.left_out} of {self.left_out + self.given} positions left out: {self._why()}"

    def check(self, least: int = 1) -> None:
        """Raise ConfigError if, of at least `least` positions, nearly all are left out."""
        total = self.given + self.left_out
        if self.left_out and total >= least and self.given < FEWEST * total:
            raise ConfigError(
                f"{self.warning}. TRL's own trainers take prompts as text; RLPTrainer, Rollouts and "
                "AsyncRollouts take ids and leave none out: use one of them, and make the dataset with "
                "by_ids=True"
            )

    def _exact(self, ids: list[int]) -> str | None:
        """A text that the tokenizer reads as `ids`."""
        size = len(self.lead)
        if self.tail or ids[:size] != self.lead:
            return None
        text = self._decode(ids[size:])
        for candidate in (text, f" {text}"):  # a decoder may drop the first space
            if list(self.tokenizer(candidate, verbose=False)["input_ids"]) == ids:
                return candidate
        return None

    def _why(self) -> str:
        name = type(self.tokenizer).__name__
        if self.tail:
            ends = self._decode(self.tail)
            return f"the tokenizer ({name}) ends every text with {ends}, so no text is tokenised to a prompt"
        return f"their prompts tokenise to other ids, that of …{self.example!r} for one"

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def check_prompts(processing_class: Any, prompts: Sequence[str], expected: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError if the trainer read a prompt as other ids than those of its document."""
    unique = dict(zip(prompts, expected, strict=True))
    found = processing_class(text=list(unique))["input_ids"]
    for (text, ids), read in zip(unique.items(), found, strict=True):
        if list(read) != list(ids):
            raise ConfigError(
                f"the trainer tokenises the prompt …{text[-60:]!r} to other ids than those of its document: "
                "give the trainer the tokenizer and the reward the settings that the dataset was made with, "
                "and make it without by_ids for any trainer but RLPTrainer, Rollouts and AsyncRollouts"
            )


def longest_row(dataset: Any) -> int:
    """The most tokens of context and target in a prompt dataset; 0 for a stream, and for one that is not
    ours.
    """
    columns = ("context_ids", "target_ids")
    if not hasattr(dataset, "__len__") or not set(columns) <= set(
        getattr(dataset, "column_names", None) or ()
    ):
        return 0
    import pyarrow.compute as pc

    longest = 0
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(4096):
        context, target = (pc.list_value_length(batch[name]) for name in columns)
        longest = max(longest, pc.max(pc.add(context, target)).as_py() or 0)
    return longest


def check_documents(dataset: Any, limit: Limit | None, max_length: int) -> None:
    """Raise ConfigError if a document that comes with the prompts, for the next-token loss, is longer than
    the model takes.
    """
    name = "document_token_ids"
    if limit is None:
        return
    longest = max_length  # of a stream no more is known
    if hasattr(dataset, "__len__"):
        import pyarrow.compute as pc

        batches = dataset.select_columns([name]).with_format("arrow").iter(4096)
        longest = max((pc.max(pc.list_value_length(batch[name])).as_py() for batch in batches), default=0)
    if longest > limit.tokens:
        raise ConfigError(
            f"{limit.reason}, but a document of {NAMES.documents} has up to {longest} tokens, all of which "
            f"the next-token loss reads: set {NAMES.max_length} to at most {limit.tokens}"
        )


def check_lengths(objective: Any, limit: Limit | None, longest: Iterable[int], args: Any) -> None:
    """Raise ConfigError if a row of `longest` tokens of context and target, with a thought as long as the
    trainer's arguments `args` let it become, is longer than the model takes, or than TRL's vLLM does.
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
