"""Need "learner": what an objective reads of the trained model, how it shifts it, and its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives import ntp, rlp
from rlpretrain.tools.dry_run import dry_run
from rlpretrain.tools.memory import Sizes, memory
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.runs import merged, same, trained


class Looking(rlp.RLP):
    """RLP that lets a test look at the learner in every step."""

    needs = frozenset({"target", "learner"})
    look: Any = None
    calls: list[Any] = []

    def start(self, learner):
        Looking.calls.append(("start", learner.seed, learner.vocabulary, learner.limit))

    def before_step(self, learner, micros):
        Looking.calls.append(("before", len(micros)))
        return Looking.look(learner, micros) or {}


class Reading(ntp.NTP):
    """The same without thoughts; its state is a number and a tensor."""

    needs = frozenset({"learner"})
    look: Any = None
    steps = 0

    def before_step(self, learner, micros):
        self.steps += 1
        return (Reading.look and Reading.look(learner, micros)) or {"ntp/soft_frac": self.steps}

    def state_dict(self):
        return {"steps": self.steps, "sum": torch.tensor([float(self.steps)])}

    def load_state_dict(self, state):
        assert float(state["sum"]) == state["steps"]
        self.steps = state["steps"]


def ones(micro: Any) -> torch.Tensor:
    return torch.ones(len(micro.trunk_labels))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_it_reads_the_present_weights_beside_thoughts(values, packing):
    """Likeliest tokens, their log-probs, and those of given tokens, against transformers, after a step."""
    Looking.calls = []
    model = AutoModelForCausalLM.from_pretrained(values["model"])
    seen = []

    def look(learner: Any, micros: Any) -> dict[str, float]:
        model.load_state_dict({n: p.detach() for n, p in learner.parameters("all").items()}, strict=False)
        model.tie_weights()
        for micro in micros:
            top = learner.likeliest(micro, 3, 2.0)
            ids = torch.cat([micro.trunk_labels[:, None], top.ids], 1)
            ids[:, 1] = -100
            given = learner.candidate_logps(micro, ids)
            logits = [model(torch.tensor([d.token_ids])).logits[0, :-1] for d in micro.documents]
            logits = torch.cat([*logits, torch.zeros(0, model.config.vocab_size)]).detach()
            warm, cold = (logits / 2).log_softmax(-1), logits.log_softmax(-1)
            wanted = warm.topk(3, dim=1)
            own = warm.gather(1, micro.trunk_labels[:, None])[:, 0]
            assert torch.equal(top.ids, wanted.indices)
            assert torch.allclose(top.logps, wanted.values, atol=1e-5)
            assert torch.allclose(top.own_logps, own, atol=1e-5)
            assert torch.allclose(given[:, 0], cold.gather(1, ids[:, :1])[:, 0], atol=1e-5)
            assert bool((given[:, 1] == 0).all())
            assert torch.allclose(given[:, 2:], cold.gather(1, ids[:, 2:]), atol=1e-5)
            seen.append(len(ids))
        return {"ntp/soft_frac": 0.25}

    Looking.look = look
    config = merged(values, objective__name=f"{__name__}:Looking", packing=packing, max_steps=2)
    run = Run(build(config), None)
    train(run)
    run.close()
    assert Looking.calls[0] == ("start", 0, model.config.vocab_size, model.config.max_position_embeddings)
    assert [call[0] for call in Looking.calls] == ["start", "before", "before"] and sum(seen) > 40
    assert run.last["ntp/soft_frac"] == 0.25


@pytest.mark.parametrize("budget", [16384, 40])
def test_gradient_and_loss_are_those_of_autograd(values, budget):
    """Weighted, over several micro-batches, for all parameters, the last block, and the head."""
    model = AutoModelForCausalLM.from_pretrained(values["model"])
    found: dict[str, Any] = {}

    def look(learner: Any, micros: Any) -> None:
        documents = [document for micro in micros for document in micro.documents][:3]

        def weights(micro: Any) -> torch.Tensor:
            return torch.cat([torch.arange(1.0, len(d.token_ids)) for d in micro.documents])

        for subset in ("all", "last:1", "head"):
            found[subset] = learner.gradient(documents, weights, learner.parameters(subset))
        found["loss"], found["documents"] = learner.loss(documents, weights), documents
        assert all(p.grad is None for p in learner.parameters("all").values())

    Reading.look = look
    config = merged(values, objective=f"{__name__}:Reading", max_steps=1, token_budget=budget)
    run = Run(build(config), None)
    train(run)
    run.close()
    total = weight = torch.tensor(0.0)
    for document in found["documents"]:
        ids = torch.tensor([document.token_ids])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        of_token = torch.arange(1.0, len(document.token_ids))
        total, weight = total - (of_token * logps).sum(), weight + of_token.sum()
    (total / weight).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert found["all"].loss == pytest.approx(float(total / weight), abs=1e-5)
    assert found["loss"] == pytest.approx(found["all"].loss, abs=1e-6)
    assert same(dict(found["all"].values), wanted, within=1e-5)
    last = {name for name in wanted if f".layers.{model.config.num_hidden_layers - 1}." in name}
    assert set(found["last:1"].values) == last and last < set(wanted)
    head = id(model.get_output_embeddings().weight)
    assert set(found["head"].values) == {n for n, p in model.named_parameters() if id(p) == head}
    for subset in ("last:1", "head"):
        part = dict(found[subset].values)
        assert same(part, {name: wanted[name] for name in part}, within=1e-5)


def test_a_shift_is_taken_back_to_the_bit_even_after_an_error(values):
    def look(learner: Any, micros: Any) -> None:
        parameters = learner.parameters("all")
        before = {name: p.detach().clone() for name, p in parameters.items()}
        direction = {name: torch.randn_like(p) * 1e-3 for name, p in parameters.items()}
        with learner.shifted(direction, -0.7) as moved:
            assert not same(dict(parameters), before, within=1e-4)
            difference = {name: p - before[name] for name, p in parameters.items()}
            assert same(difference, {n: -0.7 * d for n, d in direction.items()}, within=1e-6)
            length = torch.cat([d.flatten() for d in difference.values()]).norm()
            assert moved == pytest.approx(float(length), rel=1e-4)
        assert same(dict(parameters), before)
        with pytest.raises(RuntimeError, match="inside"), learner.shifted(direction, 1.0):
            raise RuntimeError("inside")
        assert same(dict(parameters), before)
        undone = before[next(iter(before))] + 0.7 * direction[next(iter(before))]
        undone = undone - 0.7 * direction[next(iter(before))]
        assert not torch.equal(undone, before[next(iter(before))])  # what subtracting would leave

    Reading.look = look
    run = Run(build(merged(values, objective=f"{__name__}:Reading", max_steps=1)), None)
    train(run)
    run.close()


def test_looking_changes_no_weight_and_the_state_is_in_the_checkpoint(values, tmp_path):
    def look(learner: Any, micros: Any) -> None:
        parameters = learner.parameters("all")
        documents = [document for micro in micros for document in micro.documents]
        gradient = learner.gradient(documents, ones, parameters)
        with learner.shifted(gradient.values, 0.1):
            learner.likeliest(micros[0], 2)

    Reading.look = look
    config = merged(values, objective=f"{__name__}:Reading", checkpoint={"every": 2, "keep": 2}, max_steps=4)
    ends = trained(config, output_dir=str(tmp_path / "looked"))
    assert same(ends, trained(merged(values, objective="ntp", max_steps=4), output_dir=str(tmp_path / "ntp")))
    Reading.look = None
    run = Run(build(config | {"output_dir": str(tmp_path / "looked")}), str(tmp_path / "looked/checkpoint-2"))
    assert run.objective.state_dict()["steps"] == 2
    train(run)
    run.close()
    assert run.last["ntp/soft_frac"] == 4 == run.objective.state_dict()["steps"]


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_gives_the_gradient_and_is_shifted_too(values, stage):
    pytest.importorskip("deepspeed")
    seen: list[Any] = []

    def look(learner: Any, micros: Any) -> None:
        documents = [document for micro in micros for document in micro.documents]
        parameters = learner.parameters("all")
        gradient = learner.gradient(documents, ones, parameters)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        with learner.shifted(gradient.values, -0.1):
            lower = learner.loss(documents, ones)
        assert same(dict(parameters), before) and lower < gradient.loss
        seen.append({name: value.clone() for name, value in gradient.values.items()})

    Reading.look = look
    for policy in ({"backend": "torch"}, {"backend": "deepspeed", "zero_stage": stage}):
        folder = f"{values['output_dir']}-{policy['backend']}"
        config = merged(values, objective=f"{__name__}:Reading", policy=policy, output_dir=folder)
        run = Run(build(config), None)
        train(run)
        run.close()
    assert len(seen) == 6
    for ours, theirs in zip(seen[:3], seen[3:], strict=True):
        assert same(ours, theirs, within=1e-4)


def test_settings_that_shard_or_round_are_refused(values, tmp_path):
    Reading.look = None
    for match, changes in (
        (
            "policy.zero_stage 2: objective Reading reads",
            {"policy": {"backend": "deepspeed", "zero_stage": 2}},
        ),
        ("policy.zero_stage 3: .* which it shards", {"policy": {"backend": "deepspeed", "zero_stage": 3}}),
        ("policy.deepspeed_config .ZeRO 3.: objective", {"policy": {"deepspeed_config": "tests/zero3.json"}}),
        ("policy.backend fsdp: objective", {"policy": {"backend": "fsdp"}}),
        (
            "model.dtype bfloat16: objective Reading",
            {"model": {"path": values["model"], "dtype": "bfloat16"}},
        ),
        (
            "model.quantization 4bit: objective Reading",
            {"model": {"path": values["model"], "quantization": "4bit"}, "policy": {"lora": {"r": 2}}},
        ),
    ):
        policy = {"backend": "deepspeed"} | changes.get("policy", {}) if "policy" in changes else None
        config = merged(values, objective=f"{__name__}:Reading", **changes)
        config = config | ({"policy": policy} if policy and "lora" not in policy else {})
        for start in (lambda config: Run(config, None), lambda config: dry_run(config, tmp_path)):
            with pytest.raises(ConfigError, match=match):
                start(build(config))


def test_a_dry_run_counts_direction_and_copy(values):
    from transformers import AutoConfig

    sizes = Sizes(1000, 1000, 800, 1, "torch", 0, "cpu", 10, 20, 100, own=7, needs=frozenset({"learner"}))
    config = build(merged(values, objective="ntp"))
    items = {item.name: item for item in memory(config, AutoConfig.from_pretrained(values["model"]), sizes)}
    assert items["shift of the weights, at most"].bytes == 8000
    assert items["model of the objective, with AdamW"].bytes == 112
