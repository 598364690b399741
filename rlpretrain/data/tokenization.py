"""Rows become token ids: what decides the ids of a text, how long texts are cut, and where an answer
begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from datasets.fingerprint import Hasher

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.token_text import TokenReader
from rlpretrain.types import Document

Piece = tuple[list[int], int]
"""Token ids, and where in them the answer begins (-1: nowhere)."""
CUT_VERSION = 2
"""Of how texts become documents: another one makes cached tokens unused."""
PROBE = "Ab ab  don't 2+2=4, 1234 naïve ½ 漢字🙂\n\n\tx(y)  "
"""A text of many kinds of characters: tokenizers that read it otherwise are not the same."""
NOT_OF_IDS = frozenset(
    {
        "name_or_path",
        "init_kwargs",
        "init_inputs",
        "chat_template",
        "model_max_length",
        "padding_side",
        "truncation_side",
        "verbose",
        "deprecation_warnings",
        "cache",
        "model_input_names",
    }
)
"""Attributes of a tokenizer that do not decide ids."""
BEHIND = ("\n", "a", ".", "1")
"""Characters behind which an answer is tokenised as one that goes on."""


def fingerprint(tokenizer: Any) -> str:
    """Changes with all of a tokenizer that can change the ids of a text, and with nothing else.

    A fast tokenizer is what its `tokenizers` object writes, one in Python its vocabulary, its plain
    attributes and its model; to both belong their special tokens and what they make of `PROBE`, since a class
    may do more than it says. Folders, chat templates and padding do not count.
    """
    probe = PROBE + "".join(map(str, tokenizer.all_special_tokens))
    with_special = {
        name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "sep", "cls")
    }
    about = [
        type(tokenizer).__name__,
        with_special,
        bool(getattr(tokenizer, "split_special_tokens", False)),
        *(list(tokenizer(probe, add_special_tokens=on, verbose=False)["input_ids"]) for on in (False, True)),
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        for leftover in ("truncation", "padding"):  # of earlier calls
            state.pop(leftover, None)
    else:
        state = {"vocabulary": tokenizer.get_vocab()}
        for name, value in vars(tokenizer).items():
            plain = isinstance(value, bool | int | float | str | list | tuple | dict | set | frozenset)
            if plain and not name.startswith("_") and name not in NOT_OF_IDS and "file" not in name:
                state[name] = (
                    sorted(map(repr, value.items() if isinstance(value, dict) else value))
                    if isinstance(value, dict | set | frozenset)
                    else repr(value)
                )
        model = getattr(tokenizer, "sp_model", None)
        if model is not None:
            state["model"] = Hasher.hash(model.serialized_model_proto())
    written = json.dumps([about, state], sort_keys=True)  # hashed as one string: many objects are slow
    return Hasher.hash(written)


def older_fingerprint(tokenizer: Any) -> str:
    """What checkpoints of before `fingerprint` hold: it misses what a fast tokenizer's object does not
    write.
    """
    probe, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
    lead = [bos] if bos is not None and probe[:1] == [bos] else []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for leftover in ("truncation", "padding"):
        state.pop(leftover, None)
    return Hasher.hash([type(tokenizer).__name__, json.dumps(state, sort_keys=True), lead])


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind every text."""
    bare, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for at in range(len(framed) - len(bare) + 1):
        if framed[at : at + len(bare)] == bare:
            return framed[:at], framed[at + len(bare) :]
    bos = tokenizer.bos_token_id
    return ([bos] if bos is not None and framed[:1] == [bos] else []), []


class Cutter:
    """Texts to token ids, pieces and Documents, as the data section asks."""

    def __init__(self, data: DataConfig, tokenizer: Any, min_length: int, cells: bool = False):
        self.data, self.tokenizer, self.min_length = data, tokenizer, min_length
        self.cells = cells  # values are JSON: see rows.py
        self.eos = tokenizer.eos_token_id if data.append_eos else None
        self.lead, self.tail = _frame(tokenizer)
        if data.max_length <= len(self.lead):
            raise ConfigError(
                f"data.max_length is {data.max_length}: the tokenizer alone begins a text with "
                f"{len(self.lead)}"
            )
        self.reader = TokenReader(tokenizer)
        whole_file = os.path.isfile(os.path.expanduser(data.path)) and "[" not in data.split
        self.lines = whole_file and data.path.endswith(".txt")
        self.columns = (data.column, *([data.answer_column] if data.answer_column else ()))
        self.fingerprint = fingerprint(tokenizer)

    def pieces(self, columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> list[list[Piece]]:
        """For each row its pieces, at least one; a blank or missing text gives one empty piece."""
        data = self.data
        if self.cells:
            columns = {name: [json.loads(cell) for cell in columns[name]] for name in self.columns}
        if data.answer_column is None:
            return [[(part, -1) for part in self._cut(ids)] for ids in self._ids(columns, data.column, rows)]
        prompts = self._ids(columns, data.column, rows, after=data.answer_join)
        alone = self._ids(columns, data.answer_column, rows, add_special_tokens=False)
        both = zip(columns[data.column], columns[data.answer_column], strict=True)
        texts = [f"{prompt}{data.answer_join}" for prompt, _ in both]
        given = zip(texts, columns[data.answer_column], prompts, alone, strict=True)
        return [[self._joined(*row)] for row in given]

    def _ids(
        self,
        columns: Mapping[str, Sequence[Any]],
        name: str,
        rows: Sequence[int],
        after: str = "",
        **how: Any,
    ) -> list[list[int]]:
        texts = columns[name]
        for text, row in zip(texts, rows, strict=True):
            if text is not None and not isinstance(text, str):
                raise ConfigError(
                    f"{self.source(row)}: column '{name}' holds {type(text).__name__}, not text"
                )
        full = [text + after for text in texts if text and not text.isspace()]
        found = iter(
            self.tokenizer(full, return_attention_mask=False, verbose=False, **how)["input_ids"]
            if full
            else []
        )
        return [next(found) if text and not text.isspace() else [] for text in texts]

    def _joined(self, text: str, answer: str, prompt: list[int], alone: list[int]) -> Piece:
        """Prompt and answer; nothing where one is blank, or both are longer than `max_length`."""
        if not prompt or not alone:
            return [], -1
        prompt = prompt[: len(prompt) - len(self.tail)]
        ids, at = self._beside(text, answer, prompt, alone)
        ids = [*ids, *([self.eos] if self.eos is not None and ids[-1:] != [self.eos] else ())]
        return (ids, at) if len(ids) <= self.data.max_length else ([], -1)

    def _beside(self, text: str, answer: str, prompt: list[int], alone: list[int]) -> Piece:
        """Ids that say `text` and `answer` one after the other, and the first of the answer's.

        A tokenizer may begin every text with a space of its own, or mark a word that goes on: then the
        answer's own ids say something else behind a prompt. In this order, the first that says what both
        texts say together: their common ids, where the prompt's are the first of them; the answer's own
        behind the prompt's; those it has behind another character; and the common ids from the first that is
        not the prompt's.
        """
        common = self.tokenizer(text + answer, verbose=False)["input_ids"]
        common = common[: len(common) - len(self.tail)]
        if common[: len(prompt)] == prompt and len(common) > len(prompt):
            return common, len(prompt)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and common.count(unknown) > (prompt + alone).count(unknown):
            return prompt + alone, len(prompt)  # two known words, of which it knows no compound
        said = self.reader.text(common)
        for ids in (
            alone,
            *(self._behind(character, answer) for character in dict.fromkeys((text[-1:], *BEHIND))),
        ):
            if ids and self.reader.text(prompt + ids) == said:
                return prompt + ids, len(prompt)
        shared = next(
            (k for k, pair in enumerate(zip(prompt, common, strict=False)) if len({*pair}) > 1),
            len(common) - 1,
        )
        return common, min(shared, len(common) - 1)

    def _behind(self, character: str, answer: str) -> list[int]:
        """The answer's ids behind a character; none where they merge with it."""
        before, both = (
            self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (character, character + answer)
        )
        return both[len(before) :] if before and both[: len(before)] == before else []

    def _cut(self, ids: list[int]) -> list[list[int]]:
        """A text's pieces. The last holds something of the text: its end alone is no document."""
        if not ids:
            return [[]]
        said = len(ids) - (len(self.tail) if self.tail and ids[-len(self.tail) :] == self.tail else 0)
        if self.eos is not None and ids[-1:] != [self.eos]:
            ids = [*ids, self.eos]
        most, step = self.data.max_length, self.data.max_length - len(self.lead)
        tails = range(most, said, step) if self.data.long == "split" else ()
        return [ids[:most], *(self.lead + ids[i : i + step] for i in tails)]

    def source(self, row: int) -> str:
        """`file:line` in a text file, where a row is a line; else `data[row]`."""
        return f"{self.data.path}:{row + 1}" if self.lines else f"{self.data.path}[{row}]"

    def document(
        self, row: int, piece: int, ids: Sequence[int], answer_at: int, values: Mapping[str, Any]
    ) -> Document:
        """`piece` -1 is a whole text; `values` are the row's columns."""
        meta = {
            name: json.loads(values[name]) if self.cells else values[name] for name in self.data.meta_columns
        }
        id_ = str(row) if piece < 0 else f"{row}.{piece}"
        return Document(id_, tuple(ids), self.source(row), meta or None, None if answer_at < 0 else answer_at)

    def all_short(self, dropped: int) -> ConfigError:
        """What to raise when nothing is left."""
        few = f"no document has {self.min_length} tokens; {dropped} are blank or shorter"
        return ConfigError(f"{self.data.path}: {few if dropped else 'fewer rows than ranks'}")
