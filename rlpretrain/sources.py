"""What `datasets` reads becomes rows, rows become token ids, what goes wrong a ConfigError with the place."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetNotFoundError
from datasets.fingerprint import Hasher

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.token_text import TokenReader
from rlpretrain.types import Document

KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""File ending to reader of `datasets`."""
Piece = tuple[list[int], int]
"""Token ids, and where in them the answer begins (-1: nowhere)."""
BEHIND = ("\n", "a", ".", "1")
"""Characters behind which an answer is tokenised as one that goes on."""
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def open_rows(data: DataConfig) -> Dataset | IterableDataset:
    """The rows of `data`, with at least one row and with the columns it names.

    A file, a glob of files of one kind, a folder (of files, or written by `save_to_disk`), a hub id or a URL; an
    IterableDataset with `streaming: true`. Local files count as the split that is asked for, whatever its name.

    Raises ConfigError for a missing, empty or unknown file, a line that cannot be read (file and line), a missing split
    or column (those there are listed), and a hub dataset that does not exist or cannot be reached.
    """
    files = _files(data)
    with readable(data):
        rows = _load(data, files)
        first = next(iter(rows), None) if isinstance(rows, IterableDataset) or not len(rows) else {}
    if first is None:
        raise ConfigError(f"{data.path} is empty: it holds no rows")
    names = list(rows.column_names or first)
    for column in (data.column, *([data.answer_column] if data.answer_column else ()), *data.meta_columns):
        if column not in names:
            raise ConfigError(f"{data.path} has no column '{column}'; its columns: {', '.join(names)}")
    return rows


def _load(data: DataConfig, files: list[str]) -> Dataset | IterableDataset:
    path, split = os.path.expanduser(data.path), data.split
    if files:
        options = {"sep": "\t"} if ".tsv" in Path(files[0]).suffixes else {}
        named = {split.split("[")[0]: files}  # train[:10%] is a part of train
        return datasets.load_dataset(_kind(files[0]), data_files=named, split=split, streaming=data.streaming, **options)
    if not any(os.path.isfile(os.path.join(path, mark)) for mark in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(path, data.name, split=split, streaming=data.streaming)
    rows = datasets.load_from_disk(path)
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ConfigError(f"{data.path} has no split '{split}'; its splits: {', '.join(rows)}")
        rows = rows[split]
    return rows.to_iterable_dataset() if data.streaming else rows


def _files(data: DataConfig) -> list[str]:
    """The files or URLs that `data.path` names, all of one known kind; none for a folder or a hub id."""
    path = os.path.expanduser(data.path)
    if os.path.isfile(path) or "://" in path:
        files = [path]
    elif os.path.isdir(path):
        return []
    elif any(c in path for c in "*?["):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise ConfigError(f"no file matches {data.path}")
    elif _kind(path) or path.startswith((".", "/")) or path.count("/") > 1:  # a hub id is `name` or `owner/name`
        raise ConfigError(f"no such file or folder: {data.path}")
    else:
        return []
    kinds = {_kind(file) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ConfigError(f"{data.path} must name files of one kind, by their ending one of: {', '.join(KINDS)}")
    local = [file for file in files if "://" not in file]
    if local and not any(os.path.getsize(file) for file in local):
        raise ConfigError(f"{data.path} is empty: 0 bytes")
    return files


def _kind(path: str) -> str | None:
    """The reader for a file name, looking through a compression suffix."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix not in COMPRESSED]
    return KINDS.get(suffixes[-1]) if suffixes else None


@contextmanager
def readable(data: DataConfig) -> Iterator[None]:
    """Around every read: what `datasets` raises is said as a ConfigError that names the place."""
    try:
        yield
    except ConfigError:
        raise
    except DatasetNotFoundError as error:
        raise ConfigError(f"'{data.path}' is no file or folder here, and no dataset of the hub: {error}") from error
    except ConnectionError as error:
        raise ConfigError(
            f"'{data.path}' is no file or folder here, and the hub cannot be reached (offline?) to look there: {error}"
        ) from error
    except Exception as error:
        for file in _files(data):
            if os.path.isfile(file) and Path(file).suffix not in COMPRESSED and (place := _bad_line(file)):
                raise ConfigError(place) from error
        raise ConfigError(f"cannot read {data.path}: {error.__cause__ or error}") from error


def _bad_line(file: str) -> str | None:
    """`file:line: what is wrong` for the first line that cannot be read; None for formats without lines."""
    kind = _kind(file)
    if kind not in ("text", "json"):
        return None
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if kind == "json" and number == 1 and line.lstrip().startswith(b"["):
                return None  # one array over all lines
            try:
                text = line.decode()
                value = json.loads(text) if kind == "json" and text.strip() else {}
            except UnicodeDecodeError as error:
                return f"{file}:{number}: not UTF-8: {error}"
            except json.JSONDecodeError as error:
                return f"{file}:{number}: not JSON: {error.msg} at column {error.colno}: {text.strip()[:80]!r}"
            if not isinstance(value, dict):
                return f"{file}:{number}: not a JSON object with columns but {text.strip()[:80]!r}"
    return None


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind every text."""
    bare, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for at in range(len(framed) - len(bare) + 1):
        if framed[at : at + len(bare)] == bare:
            return framed[:at], framed[at + len(bare) :]
    bos = tokenizer.bos_token_id
    return ([bos] if bos is not None and framed[:1] == [bos] else []), []


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets`, which are as they were afterwards."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    if bars:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


class Cutter:
    """Texts to token ids, pieces and Documents, as the data section asks."""

    def __init__(self, data: DataConfig, tokenizer: Any, min_length: int):
        self.data, self.tokenizer, self.min_length = data, tokenizer, min_length
        self.eos = tokenizer.eos_token_id if data.append_eos else None
        self.lead, self.tail = _frame(tokenizer)
        if data.max_length <= len(self.lead):
            raise ConfigError(f"data.max_length is {data.max_length}: the tokenizer alone begins a text with {len(self.lead)}")
        self.reader = TokenReader(tokenizer)
        whole_file = os.path.isfile(os.path.expanduser(data.path)) and "[" not in data.split
        self.lines = whole_file and data.path.endswith(".txt")
        self.columns = (data.column, *([data.answer_column] if data.answer_column else ()))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
        for leftover in ("truncation", "padding"):  # of earlier calls
            state.pop(leftover, None)
        written = json.dumps(state, sort_keys=True)  # hashed as one string: hundreds of thousands of objects are slow
        self.fingerprint = Hasher.hash([type(tokenizer).__name__, written, self.lead])

    def pieces(self, columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> list[list[Piece]]:
        """For each row its pieces, at least one; a blank or missing text gives one empty piece."""
        data = self.data
        if data.answer_column is None:
            return [[(part, -1) for part in self._cut(ids)] for ids in self._ids(columns, data.column, rows)]
        prompts = self._ids(columns, data.column, rows, after=data.answer_join)
        alone = self._ids(columns, data.answer_column, rows, add_special_tokens=False)
        both = zip(columns[data.column], columns[data.answer_column], strict=True)
        texts = [f"{prompt}{data.answer_join}" for prompt, _ in both]
        given = zip(texts, columns[data.answer_column], prompts, alone, strict=True)
        return [[self._joined(*row)] for row in given]

    def _ids(self, columns: Mapping[str, Sequence[Any]], name: str, rows: Sequence[int], after: str = "",
             **how: Any) -> list[list[int]]:  # fmt: skip
        texts = columns[name]
        for text, row in zip(texts, rows, strict=True):
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{self.source(row)}: column '{name}' holds {type(text).__name__}, not text")
        full = [text + after for text in texts if text and not text.isspace()]
        found = iter(self.tokenizer(full, return_attention_mask=False, verbose=False, **how)["input_ids"] if full else [])
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

        A tokenizer may begin every text with a space of its own, or mark a word that goes on: then the answer's own
        ids say something else behind a prompt. In this order, the first that says what both texts say together:
        their common ids, where the prompt's are the first of them; the answer's own behind the prompt's; those it
        has behind another character; and the common ids from the first that is not the prompt's.
        """
        common = self.tokenizer(text + answer, verbose=False)["input_ids"]
        common = common[: len(common) - len(self.tail)]
        if common[: len(prompt)] == prompt and len(common) > len(prompt):
            return common, len(prompt)
        said = self.reader.text(common)
        for ids in (alone, *(self._behind(character, answer) for character in dict.fromkeys((text[-1:], *BEHIND)))):
            if ids and self.reader.text(prompt + ids) == said:
                return prompt + ids, len(prompt)
        shared = next((k for k, pair in enumerate(zip(prompt, common, strict=False)) if len({*pair}) > 1), len(common) - 1)
        return common, min(shared, len(common) - 1)

    def _behind(self, character: str, answer: str) -> list[int]:
        """The answer's ids behind a character; none where they merge with it."""
        before, both = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (character, character + answer))
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

    def document(self, row: int, piece: int, ids: Sequence[int], answer_at: int, values: Mapping[str, Any]) -> Document:
        """`piece` -1 is a whole text; `values` are the row's columns."""
        meta = {name: values[name] for name in self.data.meta_columns}
        id_ = str(row) if piece < 0 else f"{row}.{piece}"
        return Document(id_, tuple(ids), self.source(row), meta or None, None if answer_at < 0 else answer_at)

    def all_short(self, dropped: int) -> ConfigError:
        """What to raise when nothing is left."""
        few = f"no document has {self.min_length} tokens; {dropped} are blank or shorter"
        return ConfigError(f"{self.data.path}: {few if dropped else 'fewer rows than ranks'}")
