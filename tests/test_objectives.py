"""Objectives: found by name or path, with their own fields; RLP's horizon, arms and positions; baselines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import rlpretrain
from rewards import information_gain
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives import available, load_objective, parse_section, rlp
from rlpretrain.objectives.base import NEEDS
from rlpretrain.scoring.references import Ema
from rlpretrain.training.advantages import compute_advantages
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.runs import merged, same, trained, weights
from tests.builders.tiny import tiny_model


def test_objectives_are_found_by_module_name_or_by_path():
    assert {"ntp", "rlp"} <= set(available())
    owner, config = parse_section({"name": "tests.builders.my_objective:LengthObjective", "wanted": 5})
    assert owner.__name__ == "LengthObjective" and config.wanted == 5
    with pytest.raises(ConfigError, match="did you mean 'wanted'"):
        parse_section({"name": "tests.builders.my_objective:LengthObjective", "wantd": 5})
    with pytest.raises(ConfigError, match="did you mean 'rlp'"):
        parse_section({"name": "rrlp"})
    with pytest.raises(ConfigError, match="cannot be loaded"):
        parse_section({"name": "tests.builders.my_objective:Nothing"})


def test_every_token_of_needs_is_read_somewhere_and_no_other_is_accepted(values):
    """Issue 15.20: "baseline", "reference" and "text" could be asked for, and nothing gave them."""
    root = Path(rlpretrain.__file__).parent
    sources = {f: f.read_text() for f in root.rglob("*.py")}
    for token in NEEDS:
        readers = [
            f.name for f, text in sources.items() if re.search(rf'"{token}" (not )?in [a-z_.]*needs', text)
        ]
        assert readers, f"nothing reads {token!r}"
    tokenizer = AutoTokenizer.from_pretrained(values["model"])
    required = {"sip": {"target_length": 6, "judge_function": "rlpretrain.corpora.dial_judge:exact"}}
    required["v_pretrain"] = {"feedback": values["data"]}
    for name in available():
        section = {"name": name} | required.get(name, {})
        objective = load_objective(
            build(merged(values, objective=section, ntp_data=values["data"])), tokenizer
        )
        assert objective.needs <= set(NEEDS)
    for token in ("baseline", "text", "taget"):
        Asking.needs = frozenset({"target", token})
        with pytest.raises(
            ConfigError, match=f"Asking: needs has '{token}', which no run can give; there are target, "
        ):
            load_objective(build(merged(values, objective=f"{__name__}:Asking")), tokenizer)


class Asking(rlp.RLP):
    """An objective that asks for what a test gives it."""


def test_a_users_objective_with_stored_rewards_learns(values, tmp_path):
    """Thoughts come to have the wanted length: the loop trains what the objective rewards, and nothing
    else is needed.
    """
    objective = {
        "name": "tests.builders.my_objective:LengthObjective",
        "positions": "after",
        "marker": "shows",
        "wanted": 3,
    }
    run = Run(
        build(
            merged(
                values,
                objective=objective,
                max_steps=40,
                sampling__thoughts=8,
                sampling__max_thought_tokens=12,
                sampling__cut="force_close",
                loss__ntp_coef=0.0,
                loss__reader_coef=0.0,
            )
        ),
        None,
    )
    train(run)
    run.close()
    rows = [
        json.loads(line) for line in (Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    rewards = [r["reward"] for r in rows if "reward" in r]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1.0


def test_ntp_is_the_same_as_a_plain_training_loop(values, tmp_path):
    run = merged(
        values,
        objective="ntp",
        positions_per_step=8,
        data__shuffle=False,
        optim__warmup_steps=0,
        optim__clip_grad_norm=0.0,
        token_budget=200,
        output_dir=str(tmp_path / "ntp"),
    )
    ours = trained(run)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(values["model"])
    tokenizer = AutoTokenizer.from_pretrained(values["model"])
    texts = [json.loads(line)["text"] for line in Path(values["data"]["path"]).read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        loss, n = 0.0, 0
        for text in texts[step * 8 : step * 8 + 8]:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            loss = loss + model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            n += ids.shape[1] - 1
        (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-3, atol=2e-4)


def test_rlp_reward_is_the_information_gain_of_each_thought(values):
    run = Run(
        build(
            merged(
                values, objective={"name": "rlp", "positions": "random", "target_length": 3, "discount": 0.5}
            )
        ),
        None,
    )
    batch = run.next_batch()
    micro = run.pack(batch, run.count(batch))[0]
    scores = run.policy.score(micro)
    known = compute_advantages(run.objective, micro, scores)
    reward = known.rewards
    advantage = known.advantages
    gain = (scores.target_logps - scores.baseline_logps[:, None]).double().detach()
    byhand = gain[..., 0] + 0.5 * gain[..., 1] + 0.25 * gain[..., 2]
    torch.testing.assert_close(reward, byhand)
    expected = information_gain(
        scores.target_logps.detach(), scores.baseline_logps, scores.target_mask, discount=0.5
    )
    torch.testing.assert_close(reward, expected)
    g = reward.shape[1]
    torch.testing.assert_close(
        advantage.double(), g / (g - 1) * (reward - reward.mean(1, keepdim=True)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("no_think", ["raw", "template", "empty_thought"])
@pytest.mark.parametrize("template", ["raw", "rlp"])
def test_the_no_think_arm_is_what_its_name_says(values, no_think, template):
    section = {
        "name": "rlp",
        "positions": "after",
        "marker": "shows",
        "template": template,
        "no_think": no_think,
    }
    if template == "rlp":
        section["template"] = "ann {context} bob"
    run = Run(build(merged(values, objective=section)), None)
    batch = run.next_batch()
    scored = [(m, run.policy.score(m)) for m in run.pack(batch, run.count(batch))]
    for micro, scores in scored:
        for b, group in enumerate(micro.groups):
            position = group.position
            context = {
                "raw": position.context_ids,
                "template": group.prompt.token_ids[:-1],
                "empty_thought": (*group.prompt.token_ids, *group.prompt.close_ids),
            }[no_think]
            ids = torch.tensor([[*context, *position.target_ids]])
            logits = run.policy.model(input_ids=ids).logits[0, -2].log_softmax(-1)
            assert float(scores.baseline_logps[b, 0]) == pytest.approx(
                float(logits[position.target_ids[0]].detach()), abs=1e-4
            )


def test_entropy_positions_use_the_current_model(values):
    run = Run(
        build(merged(values, objective={"name": "rlp", "positions": "entropy", "top_fraction": 0.0})), None
    )
    batch = run.next_batch()
    for group in batch.groups:
        document = next(d for d in batch.documents if d.id == group.position.document_id)
        logits = run.policy.model(input_ids=torch.tensor([document.token_ids])).logits[0]
        entropy = torch.distributions.Categorical(logits=logits).entropy()[:-1]
        special = set(run.tokenizer.all_special_ids)
        allowed = [i for i in range(1, len(document.token_ids)) if document.token_ids[i] not in special]
        best = max(allowed, key=lambda i, e=entropy: float(e[i - 1]))
        assert group.position.index == best


def test_ema_is_a_float32_average_after_each_step():
    model, shadow = tiny_model("qwen3").bfloat16(), tiny_model("qwen3", seed=5)
    before = {n: p.detach().clone() for n, p in shadow.named_parameters()}

    class Policy:
        def weights(self):
            return ((n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False))

    ema = Ema(shadow, 0.999)
    ema.update(Policy())
    for name, p in ema.model.named_parameters():
        assert p.dtype == torch.float32
        wanted = 0.999 * before[name] + 0.001 * dict(model.named_parameters())[name].float()
        torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-7)
    again = Ema(tiny_model("qwen3", seed=9), 0.999)
    again.load_state_dict(ema.state_dict())
    assert same(dict(again.model.named_parameters()), dict(ema.model.named_parameters()))


def test_the_ema_baseline_lags_the_policy_and_is_logged(values):
    run = Run(build(merged(values, baseline__name="ema", baseline__decay=0.9, max_steps=5)), None)
    start = {n: p.detach().clone() for n, p in run.policy.model.named_parameters()}
    train(run)
    now, shadow = dict(run.policy.model.named_parameters()), dict(run.baseline.model.named_parameters())
    moved = [n for n in now if not torch.equal(now[n], start[n])]
    assert moved
    for n in moved:
        assert float((shadow[n] - start[n]).norm()) < float((now[n] - start[n]).norm())
    assert run.last["baseline/logp"] != run.last["baseline/self"]
    run.close()


def test_documents_for_next_token_loss_may_come_from_elsewhere(values, corpus, tmp_path):
    run = Run(build(merged(values, ntp_data={"path": str(corpus / "base.jsonl")})), None)
    batch = run.next_batch()
    assert not {d.id for d in batch.documents} & {
        g.position.document_id for g in batch.groups
    }  # rows of both begin at 0
    micros = run.pack(batch, run.count(batch))
    assert all(bool((m.baseline_rows[m.target_mask] >= 0).all()) for m in micros)
    train(run)
    run.end()
    run.close()
    assert weights(tmp_path / "run" / "model")
