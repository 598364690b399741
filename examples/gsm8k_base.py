"""The documents of the GSM8K example, and a tokenizer and a small base model trained on them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlpretrain import Pretrainer
from rlpretrain.config import DataConfig, PretrainConfig
from rlpretrain.config.io import build, to_dict
from rlpretrain.data.opening import open_rows, quiet

ANNOTATION = re.compile(r"<<.*?>>")
HELD_OUT = 0.05
TRAINING = {
    "objective": "ntp",
    "positions_per_step": 16,
    "token_budget": 4096,
    "checkpoint": {"every": 0},
    "log_every": 100,
    "optim": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 30, "weight_decay": 0.01},
    "policy": {"backend": "torch"},
}
"""How the base model is pretrained; its data section is the recipe's."""
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
QUICK_SHAPE = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
VOCABULARY, QUICK_VOCABULARY = 2048, 512


def document(question: str, answer: str) -> str:
    """Problem and solution as plain text, without the calculator annotations.

    >>> document("Two and two?", "2+2=<<2+2=4>>4\\n#### 4")
    'Two and two?\\n2+2=4\\n#### 4'
    """
    return f"{question.strip()}\n{ANNOTATION.sub('', answer).strip()}"


def write_documents(data: str, out: Path) -> dict[str, int]:
    """Write documents.jsonl and, the last twentieth, held_out.jsonl; returns their sizes.

    Raises ConfigError if the problems cannot be read.
    """
    name = None if Path(data).exists() else "main"
    source = DataConfig(path=data, name=name, column="question", meta_columns=("answer",))
    with quiet():
        texts = [document(row["question"], row["answer"]) for row in open_rows(source)]
    held_out = max(1, round(HELD_OUT * len(texts)))
    out.mkdir(parents=True, exist_ok=True)
    parts = {"documents": texts[:-held_out], "held_out": texts[-held_out:]}
    for part, part_texts in parts.items():
        work = out / f".{part}.jsonl.tmp"
        work.write_text("".join(json.dumps({"text": text}) + "\n" for text in part_texts))
        work.replace(out / f"{part}.jsonl")
    return {part: len(part_texts) for part, part_texts in parts.items()}


def make_base(out: Path, config: PretrainConfig, steps: int, seed: int, quick: bool) -> None:
    """Train a tokenizer and a small Qwen3 on the documents, under `out`/base; an existing one is kept."""
    if (out / "base" / "model" / "model.safetensors").exists():
        print(f"base model: cached in {out / 'base'} (--fresh deletes it)")
        return
    shutil.rmtree(out / "base", ignore_errors=True)
    shape = out / "base" / "shape"
    tokenizer = make_tokenizer(out / "documents.jsonl", QUICK_VOCABULARY if quick else VOCABULARY)
    tokenizer.save_pretrained(shape)
    model_config(tokenizer, QUICK_SHAPE if quick else SHAPE).save_pretrained(shape)
    values = {
        "model": {"path": str(shape), "from_scratch": True},
        "data": to_dict(config.data),
        "max_steps": steps,
        "output_dir": str(out / "base"),
        "seed": seed,
        "device": config.device,
        "threads": config.threads,
        "console": config.console,
    }
    Pretrainer(build(TRAINING | values)).train()


def make_tokenizer(documents: Path, size: int) -> Any:
    """A byte-level BPE tokenizer of `size` tokens. It has no thought tags, so that RLP adds them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    # A token per digit, as in most models that calculate.
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_texts(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def _texts(documents: Path) -> Iterator[str]:
    with documents.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def model_config(tokenizer: Any, shape: dict[str, int]) -> Any:
    """The small Qwen3 (2 million parameters)."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )
