"""Where a run's documents come from: the protocol of a document source, and what one is made from.

A source of your own is named in the configuration: `data: {source: "package.module:name", options: {...}}`.
`rlpretrain.data.stream.open_source` calls that class or function with `SourceInputs`. Text in files and on
the hub is read by `DocumentStream`, the source that is used where none is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.types import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInputs:
    """What a document source is made from."""

    config: DataConfig
    """The section `data` or `ntp_data`. A source reads its `options`, and what else it has a use for: `path`,
    `column`, `max_length`, `shuffle`, ... For held-out documents, `path` is `eval.data`.
    """
    tokenizer: Any
    """The run's Hugging Face tokenizer, with the delimiters of thoughts added."""
    rank: int = 0
    """This rank; it takes the documents rank, rank + world_size, ... of one global order."""
    world_size: int = 1
    """Number of ranks."""
    seed: int = 0
    """The run's seed: all that is random in a source depends on it alone."""
    min_length: int = 2
    """Tokens of the shortest document that the objective can use; a source leaves out shorter ones."""
    per_step: int = 32
    """Documents of a step over all ranks; in as many, a mixture keeps to its weights."""
    thinks: bool = False
    """Whether the objective chooses positions in documents."""


class DocumentSource(Protocol):
    """Endless documents of one rank, resumable at any document. A mixture of sources is one too.

    The documents form one global order that does not depend on `world_size`: one rank that takes 2n documents
    and two ranks that take n each get the same ones. Two documents with one `id` have the same tokens.

    More members are optional. `__len__` gives the documents of one epoch over all ranks; without it, or if
    it raises TypeError, a run needs `max_steps`. `one_pass()` yields the documents of one pass in their own
    order; a source without it cannot read held-out documents (`eval.data`). `skip(n)` passes over documents
    without reading them, and `mean_length` is the mean number of their tokens: a mixture uses both.
    """

    @property
    def epoch(self) -> float:
        """Passes over the data that are complete."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest document, at most `data.max_length`; that if it is not known."""
        ...

    @property
    def dropped(self) -> int:
        """Documents that were left out because they are blank or too short, so far."""
        ...

    def take(self, n: int, progress: float = 0.0) -> list[Document]:
        """The next `n` documents of this rank.

        `progress` is how far the run will be with the batch that they are for, from 0 to 1. Batches are drawn
        ahead of training, so it is not the step that is being trained. It is the same on all ranks.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The cursor, made of numbers, texts, lists and dicts. Each rank keeps its own in a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ConfigError if it belongs to other data."""
        ...


MEMBERS = ("take", "state_dict", "load_state_dict", "epoch", "longest", "dropped")
"""What a document source has."""


def name_of(source: object) -> str:
    """A source in error messages: its class, as `package.module:name`."""
    return f"document source '{type(source).__module__}:{type(source).__qualname__}'"


def check_source(source: Any, data: DataConfig) -> None:
    """Raise ConfigError for an object that is not a document source, or whose documents are too long."""
    missing = [member for member in MEMBERS if not hasattr(source, member)]
    if missing:
        raise ConfigError(f"{name_of(source)} has no {', '.join(missing)}: see DocumentSource")
    if source.longest > data.longest:
        raise ConfigError(
            f"{name_of(source)} has documents of {source.longest} tokens, but data.max_length is "
            f"{data.max_length}"
        )
    cursor_of(source)


def take_documents(source: DocumentSource, n: int, progress: float) -> list[Document]:
    """The next `n` documents of a source; ConfigError that names it if it gives anything else."""
    try:
        documents = source.take(n, progress)
    except ConfigError:
        raise
    except (ValueError, LookupError, OSError, StopIteration) as error:
        raise ConfigError(f"{name_of(source)}: {type(error).__name__}: {error}") from error
    if len(documents) != n:
        raise ConfigError(
            f"{name_of(source)}: take({n}) gave {len(documents)} documents; a source is endless"
        )
    for document in documents:
        problem = problem_of(document)
        if problem is None and len(document.token_ids) > source.longest:
            problem = f"it has {len(document.token_ids)} tokens, `longest` is {source.longest}"
        if problem:
            raise ConfigError(f"{name_of(source)}: document {getattr(document, 'id', '?')}: {problem}")
    return documents


def problem_of(document: object) -> str | None:
    """What keeps an object from being a document that can be trained on, in words; None if nothing does."""
    if not isinstance(document, Document):
        return f"a Document is expected, not a {type(document).__name__}"
    size = len(document.token_ids)
    if size < 2:
        return f"{size} tokens are too few to predict one from another"
    if document.scores is not None and len(document.scores) != size:
        return f"{len(document.scores)} scores for {size} tokens"
    if document.answer_at is not None and not 0 <= document.answer_at < size:
        return f"answer_at is {document.answer_at}, of {size} tokens"
    return None


def count_documents(source: object) -> int | None:
    """Documents of one epoch of a source over all ranks; None if their number is not known."""
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:
        return None


def cursor_of(source: DocumentSource) -> dict[str, Any]:
    """The state of a source, as a checkpoint keeps it; ConfigError for values that it cannot read back."""
    state = source.state_dict()
    if place := _not_plain(state, "state_dict()"):
        raise ConfigError(
            f"{name_of(source)}: {place}, which a checkpoint cannot read back: use numbers, texts, lists and "
            "dicts"
        )
    return state


def _not_plain(value: Any, place: str) -> str | None:
    """Where in `value` something stands that is not plain, in words; None if all is."""
    if isinstance(value, dict):
        inner = [(item, f"{place}[{key!r}]") for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(item, f"{place}[{k}]") for k, item in enumerate(value)]
    elif value is None or type(value) in (bool, int, float, str, bytes):
        return None
    else:
        return f"{place} is of type {type(value).__name__}"
    return next((found for item, where in inner if (found := _not_plain(item, where))), None)
