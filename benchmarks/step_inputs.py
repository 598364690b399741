"""What `benchmarks.step` measures on: shapes, the model, its documents, and the thoughts of each step."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from rollout import FinishReason, Group, Position, Prompt, Thought
from tests.builders.tiny import word_tokenizer

OPEN, CLOSE, FIRST_WORD = 3, 4, 5
"""Ids of <think>, of </think>, and of the first word."""
TOKEN_BUDGET = 32768
"""Tokens of a micro-batch, padding included."""


@dataclass(frozen=True)
class Shape:
    """What is measured: lengths in tokens, and counts of positions and thoughts."""

    document: int = 512
    positions: int = 4
    thoughts: int = 8
    thought: int = 64
    target: int = 16
    hidden: int = 512
    layers: int = 3
    vocabulary: int = 8192

    def position_index(self, position: int) -> int:
        """The tokens before a position; positions are spread evenly over the document."""
        return (2 * position + 1) * self.document // (2 * self.positions)


GRID = [
    Shape(document=document, thoughts=thoughts, thought=thought)
    for document in (512, 1024, 2048)
    for thoughts in (8, 16)
    for thought in (64, 256)
]
CURVES = {"thoughts": (2, 4, 8, 16, 32), "vocabulary": (2048, 8192, 32768, 131072)}


def write_model(folder: Path, shape: Shape) -> None:
    """Write a random model with its tokenizer, and 64 random documents."""
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = shape.hidden // 64
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=2 * shape.document + shape.thought + 64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    words = shape.vocabulary - FIRST_WORD
    tokenizer = word_tokenizer(["<think>", "</think>", *(f"w{i}" for i in range(words))])
    tokenizer.save_pretrained(folder / "model")
    with (folder / "documents.jsonl").open("w") as lines:
        for document in range(64):
            drawn = random.Random(f"document {document}").choices(range(words), k=shape.document)
            lines.write(json.dumps({"text": " ".join(f"w{word}" for word in drawn)}) + "\n")


def make_batch(shape: Shape, step: int) -> tuple[tuple[int, ...], list[Group]]:
    """(document, its groups) of a step; every thought has full length and is closed."""
    rng = random.Random(step)

    def words(n: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(FIRST_WORD, shape.vocabulary), k=n))

    ids, groups = words(shape.document), []
    for p in range(shape.positions):
        at = shape.position_index(p)
        position = Position(f"d{step}", at, ids[:at], ids[at : at + shape.target])
        thoughts = tuple(
            Thought((*words(shape.thought - 1), CLOSE), (-9.0,) * shape.thought, FinishReason.CLOSE, step, g)
            for g in range(shape.thoughts)
        )
        prompt = Prompt((*ids[:at], OPEN), (CLOSE,), (CLOSE,))
        groups.append(Group(f"d{step}@{at}", position, prompt, thoughts, step))
    return ids, groups


def count_tokens(shape: Shape, packing: str) -> int:
    """Tokens of a step that go through our model, padding included."""
    from rlpretrain.scoring.packing import Layout, count, pack
    from rlpretrain.types import Batch, Document

    ids, groups = make_batch(shape, 0)
    batch = Batch(tuple(groups), (Document("d0", ids),))
    micros = pack(batch, Layout(TOKEN_BUDGET, tree=packing == "tree"), count(batch))
    return sum(micro.input_ids.numel() for micro in micros)
