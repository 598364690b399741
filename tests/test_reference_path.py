"""`reference.path`: log-probs of trunk and thoughts under a second checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.objectives import ntp, rlp
from rlpretrain.prompts import Delimiters
from rlpretrain.scoring.reference_model import check_vocabulary
from rlpretrain.tools.dry_run import dry_run, make_objective, model_shape
from rlpretrain.tools.memory import memory
from rlpretrain.tools.sizes import make_sizes
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import MicroBatch, Scores
from tests.builders.runs import merged, same, trained, weights
from tests.builders.tiny import tiny_model, word_tokenizer


class Watching(ntp.NTP):
    """Next-token prediction whose weights come from the reference, and which keeps what it was given."""

    needs = frozenset({"reference"})
    seen: list[tuple[MicroBatch, Scores]] = []

    def ntp_weights(self, micro, scores):
        self.seen.append((micro, scores.detached()))
        return (scores.trunk_reference - scores.trunk_logps.detach()).sigmoid()


THINKING, READING = f"{__name__}:Thinking", f"{__name__}:Watching"


class Thinking(rlp.RLP):
    """RLP that keeps the scores its next-token loss was given."""

    needs = frozenset({"target", "reference"})
    seen: list[tuple[MicroBatch, Scores]] = []

    def trunk_loss(self, micro, scores):
        self.seen.append((micro, scores.detached()))
        return super().trunk_loss(micro, scores)


def apart(scores: Scores) -> tuple[float, float]:
    """Largest difference (nats) between policy and reference, on trunk and thoughts."""
    assert scores.trunk_reference is not None and scores.thought_reference is not None
    trunk = (scores.trunk_logps - scores.trunk_reference).abs().max()
    thoughts = (scores.thought_logps - scores.thought_reference).abs().max()
    return float(trunk), float(thoughts)


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second checkpoint with the vocabulary of the corpus: another architecture and other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny_model("llama", vocab_size=len(dial.WORDS), seed=8).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    return str(folder)


def run_of(values: dict[str, Any], name: str = THINKING, **changes: Any) -> Run:
    Thinking.seen, Watching.seen = [], []
    return Run(build(merged(values, objective__name=name, **changes)), None)


def reading(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The values of a run of `Watching` over 8 documents, two steps an epoch."""
    file = Path(values["output_dir"]).parent / "eight.jsonl"
    file.write_text("".join(Path(values["data"]["path"]).read_text().splitlines(True)[:8]))
    return merged(values, objective={"name": READING}, data__path=str(file), **changes)


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_same_checkpoint_differs_by_exactly_nothing(values, packing, lora):
    policy = {"backend": "torch", "lora": lora}
    changes = {"packing": packing, "policy": policy, "sampling__temperature": 0.7, "max_steps": 1}
    run = run_of(values, reference=values["model"], **changes)
    assert run.frozen is None and run.reference.frozen.model is not run.policy.model
    train(run)
    run.close()
    assert Thinking.seen and all(scores.thought_logps.numel() for _, scores in Thinking.seen)
    assert {apart(scores) for _, scores in Thinking.seen} == {(0.0, 0.0)}


def test_under_autocast_too(values):
    policy = {"backend": "torch", "autocast": "bfloat16"}
    run = run_of(values, reference=values["model"], policy=policy, max_steps=1)
    train(run)
    run.close()
    assert {apart(scores) for _, scores in Thinking.seen} == {(0.0, 0.0)}


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_another_checkpoint_gives_its_own_log_probs(values, other, packing):
    """Against transformers' logits of each sequence alone."""
    run = run_of(values, reference=other, packing=packing, sampling__temperature=0.7)
    assert packing == "padded" or run.layout.tree
    train(run)
    run.close()
    model = AutoModelForCausalLM.from_pretrained(other)

    def logps(ids, temperature):
        logits = model(torch.tensor([ids])).logits[0, :-1] / temperature
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]

    for micro, scores in Thinking.seen:
        trunk = [logps(d.token_ids, 1.0) for d in micro.documents]
        assert torch.allclose(torch.cat(trunk), scores.trunk_reference, atol=1e-5)
        for b, group in enumerate(micro.groups):
            for g, thought in enumerate(group.thoughts):
                size, prompt = len(thought.token_ids), group.prompt.token_ids
                expected = logps((*prompt, *thought.token_ids), 0.7)[len(prompt) - 1 :]
                assert torch.allclose(expected, scores.thought_reference[b, g, :size], atol=1e-5)
                assert not scores.thought_reference[b, g, size:].any()


def test_a_reference_changes_no_random_number(values, other, tmp_path):
    """A reference that no loss uses: the same thoughts, adapters and weights."""
    lora = {"policy": {"backend": "torch", "lora": {"r": 4}}}
    plain = trained(values, output_dir=str(tmp_path / "plain"), **lora)
    watched = trained(
        values, objective__name=THINKING, reference=other, output_dir=str(tmp_path / "watched"), **lora
    )
    assert same(plain, watched)


def test_the_second_epoch_needs_no_forward(values, other):
    run = run_of(reading(values, max_steps=4), READING, reference=other)
    read: list[int] = []
    forward = run.reference.frozen.scorer.forward
    run.reference.frozen.scorer.forward = lambda ids, *rest: read.append(ids.numel()) or forward(ids, *rest)
    train(run)
    run.close()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["reference/cached_frac"] for row in rows] == [0, 0, 1, 1] and len(read) == 2
    first: dict[str, torch.Tensor] = {}
    for micro, scores in Watching.seen:
        assert scores.trunk_reference is not None
        parts = scores.trunk_reference.split([len(d.token_ids) - 1 for d in micro.documents])
        for document, logps in zip(micro.documents, parts, strict=True):
            key = document.id.split(":")[0]
            assert torch.equal(first.setdefault(key, logps), logps)
    assert len(first) == 8


def test_inner_epochs_read_thoughts_from_the_cache(values, other):
    """Weights with and without the cache are the same, and each epoch after the first reads nothing."""
    ends = []
    for keep in (0, 10_000):
        folder = f"{values['output_dir']}-{keep}"
        reference = {"path": other, "cache_tokens": keep}
        changes = {"loss__inner_epochs": 2, "max_steps": 2, "output_dir": folder}
        ends.append(trained(values, objective__name=THINKING, reference=reference, **changes))
    assert same(*ends)
    row = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["reference/cached_frac"] == pytest.approx(2 / 3)  # scored first, then trained twice


def test_a_resumed_run_has_the_cache_of_the_run(values, other, tmp_path):
    """Epochs mix documents in other ways, so a value scored anew could differ in its last bit."""
    changes = reading(values, reference=other, max_steps=6, checkpoint={"every": 3, "keep": 3})
    whole = trained(changes, output_dir=str(tmp_path / "whole"))
    halves = changes | {"output_dir": str(tmp_path / "halves")}
    Watching.seen = []
    run = Run(build(halves), None)
    run.remaining_steps = lambda steps=run.remaining_steps: (
        s for s, _ in zip(steps(), range(3), strict=False)
    )
    train(run)
    before = copy.deepcopy(run.reference.state_dict())
    run.close()
    resumed = Run(build(halves), True)
    after = resumed.reference.state_dict()
    assert before["cache"]["keys"] == after["cache"]["keys"] and len(before["cache"]["keys"]) == 8
    assert torch.equal(before["cache"]["logps"], after["cache"]["logps"])
    train(resumed)
    resumed.end()
    resumed.close()
    assert same(whole, weights(tmp_path / "halves" / "model"))


def test_references_that_cannot_be_used(values, corpus, tmp_path):
    def refused(match: str, reference: Any, name: str = THINKING, dry: bool = True) -> None:
        config = merged(values, objective__name=name, reference=reference)
        with pytest.raises(ConfigError, match=match):
            run_of(config, name)
        if dry:
            with pytest.raises(ConfigError, match=match):
                dry_run(build(config), tmp_path)

    words = tmp_path / "words"
    tiny_model("qwen3", vocab_size=len(dial.WORDS)).save_pretrained(words)
    word_tokenizer(["<think>", "</think>", "shows", "dial"]).save_pretrained(words)
    refused(r"another tokenizer than the model: [\d,]+ tokens differ, for instance '", str(words))
    larger = tmp_path / "larger"
    tiny_model("qwen3", vocab_size=len(dial.WORDS) + 8).save_pretrained(larger)
    dial.tokenizer().save_pretrained(larger)
    refused(r"rows of embeddings, the model has \d+: their probabilities", str(larger))
    refused("uses no reference", values["model"], "rlp")
    refused("no tokenizer in '.*nowhere': no such folder", str(tmp_path / "nowhere"), dry=False)
    short = tmp_path / "short"
    model = tiny_model("qwen3", vocab_size=len(dial.WORDS))
    model.config.max_position_embeddings = 12
    model.save_pretrained(short)
    dial.tokenizer().save_pretrained(short)
    refused("reference.path: the model has 12 positions", str(short))
    with pytest.raises(ConfigError, match="'dtype' is set without 'path'"):
        build(values | {"reference": {"dtype": "bfloat16"}})


def test_a_chat_model_of_the_same_vocabulary_is_a_reference(values, other, tmp_path):
    """Another end-of-text token and template do not change what ids mean."""
    tokenizer = dial.tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<pad>", "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "chat")
    reference = {"path": other, "tokenizer": str(tmp_path / "chat")}
    check_vocabulary(build(merged(values, reference=reference)), Delimiters())


def test_its_memory_is_planned(values, other):
    plain, planned = [], []
    for reference, items in (({}, plain), ({"path": other, "dtype": "bfloat16"}, planned)):
        config = build(merged(values, objective__name=THINKING, reference=reference))
        shape, _ = model_shape(config.model, Path())
        sizes = make_sizes(config, make_objective(config, []), shape, [])
        items += [(item.name, item.bytes) for item in memory(config, shape, sizes)]
    size = sum(p.numel() for p in tiny_model("llama", vocab_size=len(dial.WORDS)).parameters())
    assert dict(planned)["reference model"] == 2 * size
    assert "initial model" in dict(plain) and "initial model" not in dict(planned)
