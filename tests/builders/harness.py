"""A small model, and tasks in lm-eval's format whose data are local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from rlpretrain.objectives import find
from rlpretrain.objectives.settings import Setting
from rlpretrain.prompts import ensure_delimiters
from rollout.types import SamplingParams
from tests.builders.tiny import tiny_model, word_tokenizer

WORDS = ["Q", "A", "the", "dial", "moves", "up", "down", "shows", "end", *(str(n) for n in range(10))]
EXAMPLES = 12


class Ready(NamedTuple):
    """A checkpoint on disk, loaded, and a folder of tasks: `pick` (multiple choice), `say` (generation)."""

    folder: Path
    model: Any
    tokenizer: Any
    tasks: Path


def make_ready(folder: Path) -> Ready:
    """The delimiters are tokens of the checkpoint already."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=5, eos_token_id=None)
    ensure_delimiters(tokenizer, model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = folder / "tasks"
    write_tasks(tasks, model, tokenizer)
    return Ready(folder / "model", model, tokenizer, tasks)


def objective(tokenizer: Any, name: str = "rlp", thought_tokens: int = 8, **fields: Any) -> Any:
    """An objective with thoughts of up to `thought_tokens` tokens."""
    owner = find(name)
    made = owner(owner.Config(**fields), tokenizer)
    return made.with_setting(Setting(SamplingParams(thought_tokens), 2, 0.0))


def write_tasks(folder: Path, model: Any, tokenizer: Any) -> None:
    """The tasks `pick` and `say`; every third answer of `say` is what the model says without a thought."""
    folder.mkdir()
    contexts = [f"Q the dial moves up {n % 10} down {n % 7} A" for n in range(EXAMPLES)]
    choices = [["1 end", "2", "3 3 end", "up"]] * EXAMPLES
    picks = [
        {"context": context, "choices": of_example, "gold": n % 4}
        for n, (context, of_example) in enumerate(zip(contexts, choices, strict=True))
    ]
    says = [
        {"context": context, "answer": greedy(model, tokenizer, tokenizer(context)["input_ids"], 3)}
        if n % 3 == 0
        else {"context": context, "answer": "end"}
        for n, context in enumerate(contexts)
    ]
    for name, rows in (("pick", picks), ("say", says)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "test_split": "train", "doc_to_text": "{{context}}"}
    pick = {
        "task": "pick",
        "dataset_kwargs": {"data_files": str(folder / "pick.jsonl")},
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    say = {
        "task": "say",
        "dataset_kwargs": {"data_files": str(folder / "say.jsonl")},
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["end"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (pick, say):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, ids: Any, tokens: int, special: bool = False) -> str:
    """The text of the likeliest tokens, one by one, up to "end"."""
    ids, start = list(ids), len(ids)
    for _ in range(tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=not special).split("end")[0]
