"""Document sources and an objective with `prepare`, as a user would write them."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import parse
from rlpretrain.data.document_source import DocumentSource, SourceInputs
from rlpretrain.data.stream import open_source
from rlpretrain.objectives.ntp import NTP
from rlpretrain.objectives.rlp import RLP
from rlpretrain.types import Document, MicroBatch, Scores


class Lines:
    """The texts of a JSONL file in file order, again and again; its cursor is one number."""

    def __init__(self, inputs: SourceInputs):
        data, tokenizer = inputs.config, inputs.tokenizer
        self.rank, self.world_size, self.taken, self.dropped = inputs.rank, inputs.world_size, 0, 0
        self.documents: list[Document] = []
        for number, line in enumerate(Path(data.path).read_text().splitlines(), 1):
            text = json.loads(line)[data.options.get("key", "text")]
            ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)[: data.max_length]
            if len(ids) < inputs.min_length:
                self.dropped += 1
                continue
            self.documents.append(Document(f"line {number}", ids, f"{data.path}:{number}"))
        if not self.documents:
            raise ConfigError(f"{data.path} has no document of {inputs.min_length} tokens")
        self.longest = max(len(document.token_ids) for document in self.documents)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def epoch(self) -> float:
        return (self.taken * self.world_size + self.rank) / len(self)

    def take(self, n: int, progress: float = 0.0) -> list[Document]:
        numbers = [(self.taken + k) * self.world_size + self.rank for k in range(n)]
        self.taken += n
        return [self.documents[number % len(self)] for number in numbers]

    def one_pass(self) -> Iterator[Document]:
        return iter(self.documents)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


class Endless(Lines):
    """The same without a known length, and without a pass that could be held out."""

    __len__ = None  # type: ignore[assignment]
    one_pass = None  # type: ignore[assignment]
    epoch = 0.0  # type: ignore[assignment]

    def take(self, n: int, progress: float = 0.0) -> list[Document]:
        numbers = [(self.taken + k) * self.world_size + self.rank for k in range(n)]
        self.taken += n
        return [self.documents[number % len(self.documents)] for number in numbers]


class Mixture:
    """Named sources, each with its own cursor and a seed from its name; `weights` go from first to last.

    Which source gives the i-th document depends on the seed, i and the progress. Each rank follows the draws
    of all ranks, so that several ranks share out the order of one.
    """

    def __init__(self, inputs: SourceInputs):
        self.inputs, self.taken = inputs, 0
        self.weights: dict[str, tuple[float, float]] = inputs.config.options["weights"]
        self.sources: dict[str, DocumentSource] = {}
        for name, section in inputs.config.options["sources"].items():
            data = parse(DataConfig, section, f"data.options.sources.{name}")
            seed = zlib.crc32(f"{inputs.seed} {name}".encode())
            part = replace(inputs, config=data, rank=0, world_size=1, seed=seed)
            self.sources[name] = open_source(part, f"data.options.sources.{name}")

    @property
    def epoch(self) -> float:
        return min(source.epoch for source in self.sources.values())

    @property
    def longest(self) -> int:
        return max(source.longest for source in self.sources.values())

    @property
    def dropped(self) -> int:
        return sum(source.dropped for source in self.sources.values())

    def take(self, n: int, progress: float = 0.0) -> list[Document]:
        documents = []
        weights = [first + progress * (last - first) for first, last in self.weights.values()]
        for i in range(self.taken * self.inputs.world_size, (self.taken + n) * self.inputs.world_size):
            (name,) = random.Random(f"{self.inputs.seed} {i}").choices([*self.weights], weights)
            (document,) = self.sources[name].take(1, progress)
            if i % self.inputs.world_size == self.inputs.rank:
                documents.append(replace(document, id=f"{name} {document.id}"))
        self.taken += n
        return documents

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])


class Labelling:
    """`prepare` puts one of two labels in front, scores the tokens, and drops a third of the documents."""

    tokenizer: Any

    def prepare(self, document: Document, rng: Any) -> Document | None:
        if rng.random() < 1 / 3:
            return None
        label = self.tokenizer.convert_tokens_to_ids("hmm" if rng.random() < 0.5 else "well")
        ids = (label, *document.token_ids)
        return replace(document, token_ids=ids, scores=tuple(1 + (k % 2) / 2 for k in range(len(ids))))

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> torch.Tensor:
        weights = [torch.tensor(document.scores[1:]) for document in micro.documents if document.scores]
        return torch.cat([torch.zeros(0), *weights]).to(scores.trunk_logps)


class LabelledRLP(Labelling, RLP):
    """RLP on labelled documents."""


class LabelledNTP(Labelling, NTP):
    """Next-token prediction on labelled documents."""


class Rebuilding(RLP):
    """Makes a new document with the tokens of the old."""

    def prepare(self, document: Document, rng: Any) -> Document:
        return Document(document.id, document.token_ids)


class DropsAll(RLP):
    """Wants no document."""

    def prepare(self, document: Document, rng: Any) -> None:
        return None


class WrongScores(RLP):
    """Gives one score too few."""

    def prepare(self, document: Document, rng: Any) -> Document:
        return replace(document, scores=(1.0,) * (len(document.token_ids) - 1))


class TooLong(RLP):
    """Makes documents longer than the model's positions."""

    def prepare(self, document: Document, rng: Any) -> Document:
        return replace(document, token_ids=document.token_ids * 400)
