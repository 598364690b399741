"""Texts and answers for RLPT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rlpretrain.objectives import Setting
from rlpretrain.objectives.rlpt import RLPT, Config
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.types import Document
from rollout.types import FinishReason, Position, SamplingParams, Thought
from tests.builders.tiny import bpe_tokenizer

TEXT = (
    "Dr. Smith has six cats. He went home at noon! Was it late? No, 3.5 hours were left.\n\nThe cats "
    "slept. 漢字を読む。 End."
)
BPE = bpe_tokenizer([TEXT, "<think> <MASK>"], 380)
BPE.add_tokens(["<|startofprediction|>", "<|endofprediction|>"])
ensure_delimiters(BPE)
CLOSE = BPE.convert_tokens_to_ids("</think>")


def ids(text: str) -> tuple[int, ...]:
    return tuple(BPE(text, add_special_tokens=False)["input_ids"])


def rlpt(**fields) -> RLPT:
    objective = RLPT(Config(**{"min_segment_tokens": 1, "positions_per_document": 99} | fields), BPE)
    objective.setting = Setting(SamplingParams(max_thought_tokens=8), 2, 0.0)
    return objective


def document(text: str = TEXT) -> Document:
    return Document("d", (*ids(text), BPE.eos_token_id), "d.txt:1")


def drawn(objective, doc=None, seed=0) -> list[Position]:
    return objective.positions(doc or document(), np.random.default_rng(seed))


def said(text: str) -> Thought:
    head = (*ids("so"), CLOSE)
    tokens = head + ids(text)
    return Thought(tokens, (-1.0,) * len(tokens), FinishReason.CLOSE, 0, 0, (len(head), len(tokens)))


def sentences(values, folder: Path) -> dict:
    texts = [json.loads(line)["text"] for line in Path(values["data"]["path"]).read_text().splitlines()]
    rows = [{"text": " ".join(texts[4 * i : 4 * i + 4])} for i in range(len(texts) // 4)]
    (folder / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(folder / "four.jsonl"), "max_length": 96}
