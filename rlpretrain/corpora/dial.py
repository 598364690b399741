"""The dial corpus: arithmetic on one digit, where thinking pays and a program can check every thought.

A plain document is `ann has 6 bob up3 cat times3 shows 7 .`: a start digit, one operation per person, modulo
10, then the answer. Depth is the number of operations. Its trace, the thought that computes the answer, is
`6 bob up3 9 cat times3 7`. A base mix also contains running chains, worked problems, and documents with a
thought before the answer. Most of these thoughts are useless, so that a small model pretrained on the mix can
think but rarely does: reinforcement pretraining has to change that. Steps of traces in the mix are sometimes
wrong while the answer stays true. Without such noise a reader trusts every trace, and a wrong trace then
costs far more than a right one earns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpretrain.corpora.dial_formats import (
    FORMATS,
    HMM,
    MIXES,
    PROSE,
    Formats,
    Mix,
    base_documents,
    chain,
    plain_document,
    prose,
    thought,
    worked,
)
from rlpretrain.corpora.dial_problems import (
    CLOSE,
    EOS,
    NAMES,
    OPEN,
    OPERATIONS,
    PAD,
    UNK,
    Problem,
    draw,
    problems,
    split_problems,
    verify,
)
from rlpretrain.corpora.writing import save_rows

__all__ = [
    "CLOSE",
    "EOS",
    "FORMATS",
    "HMM",
    "MIXES",
    "NAMES",
    "OPEN",
    "OPERATIONS",
    "PAD",
    "PROSE",
    "UNK",
    "WORDS",
    "Formats",
    "Mix",
    "Problem",
    "base_documents",
    "chain",
    "draw",
    "model_config",
    "problems",
    "prose",
    "record",
    "save",
    "split_problems",
    "thought",
    "tokenizer",
    "trace_skill",
    "verify",
    "worked",
    "write",
]

_SYMBOLS = (PAD, EOS, UNK, OPEN, CLOSE, ".", "has", "shows", *map(str, range(10)))
WORDS = tuple(dict.fromkeys((*_SYMBOLS, *OPERATIONS, *NAMES, *HMM, *PROSE)))
"""The vocabulary, in the order of token ids."""


def record(problem: Problem) -> dict[str, Any]:
    """A plain document as a JSON line: its text, and what is needed to check an answer and a thought."""
    return {
        "text": " ".join(plain_document(problem)),
        "answer": str(problem.answer),
        "depth": problem.depth,
        "trace": " ".join(problem.trace()),
    }


def tokenizer(words: Sequence[str] = WORDS):
    """The word-level tokenizer of a dial corpus as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token=UNK,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[OPEN, CLOSE],
        clean_up_tokenization_spaces=False,
    )


def model_config(words: Sequence[str] = WORDS, layers: int = 2):
    """The small Qwen3 that learns a dial corpus on one CPU thread (340 thousand parameters)."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=words.index(PAD),
        eos_token_id=words.index(EOS),
        bos_token_id=None,
        attention_dropout=0.0,
    )


def write(
    out: str | Path,
    *,
    base: int = 200_000,
    train: int = 50_000,
    held_out: int = 1_200,
    seed: int = 0,
    mix: str = "c8",
    depths: Sequence[int] = (1, 2, 3, 4),
    held_out_depths: Sequence[int] = (1, 2, 3, 4, 5, 6),
) -> dict[str, Path]:
    """Write base.jsonl, train.jsonl, held_out.jsonl and model/ (tokenizer and configuration) under `out`.

    No held-out problem of depth 3 or more is a training problem of the same call. Base documents may repeat
    either, as a web crawl would. Raises ValueError for an unknown mix.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix '{mix}': one of {', '.join(MIXES)}")
    held_out_problems, training = split_problems(train, held_out, seed, depths, held_out_depths)
    files = {
        "base": ({"text": text} for text in base_documents(base, seed, MIXES[mix])),
        "train": (record(problem) for problem in training),
        "held_out": (record(problem) for problem in held_out_problems),
    }
    return save(Path(out), files, WORDS)


def save(
    folder: Path, files: Mapping[str, Iterator[dict[str, Any]]], words: Sequence[str]
) -> dict[str, Path]:
    """Write each of `files` as NAME.jsonl, and model/: the tokenizer of `words`, the configuration."""
    paths = save_rows(folder, files, others=("model",))
    tokenizer(words).save_pretrained(folder / "model")
    model_config(words).save_pretrained(folder / "model")
    paths["model"] = folder / "model"
    return paths


def trace_skill(
    model: Any,
    tokenizer: Any,
    *,
    depths: tuple[int, int] = (1, 4),
    count: int = 200,
    seed: int = 0,
    before: Sequence[str] = (),
    after: Sequence[str] = ("shows",),
) -> float:
    """Teacher-forced accuracy in true traces, 0 to 1: can the model compute if it tries?

    A trace follows the words `before`, the question, the words `after` and the open tag. The result is the
    lowest of three accuracies, since one wrong step makes the trace wrong: the start digit, copied from the
    question (compared among the digits only, because a thought may begin with another word); the operations,
    copied; the values, computed. It gates base pretraining: a base model that cannot do one of these has no
    right thought to reinforce.
    """
    import torch

    right = {"start": 0, "operation": 0, "value": 0}
    total = dict.fromkeys(right, 0)
    device = next(model.parameters()).device
    digits = torch.tensor(tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)]), device=device)
    with torch.no_grad():
        for problem in problems(count, seed, range(depths[0], depths[1] + 1), "skill"):
            head = [*before, *problem.question(), *after, OPEN]
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(head + problem.trace())], device=device)
            logits = model(input_ids=ids).logits[0]
            predicted = logits.argmax(-1)
            predicted[len(head) - 1] = digits[logits[len(head) - 1, digits].argmax()]
            kinds = ["start", *("name", "operation", "value") * problem.depth]
            for place, kind in enumerate(kinds, len(head)):
                if kind in right:
                    total[kind] += 1
                    right[kind] += int(predicted[place - 1] == ids[0, place])
    return min(right[kind] / total[kind] for kind in right)
