"""The no-think log-probs and rewards of TRL's reward function are those of the library's loop, exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain.config.io import build
from rlpretrain.scoring.groups import compute_rewards, rows_by_group
from rlpretrain.training.run import Run
from rlpretrain.trl import InformationGainReward
from rlpretrain.types import Batch
from tests.builders.runs import merged
from tests.builders.trl import AFTER


def moved(model: torch.nn.Module) -> None:
    """Change the weights, so that initial and current model differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("baseline", ["self", "frozen", "ema", "none"])
def test_baseline_of_trl_is_the_loops(values, corpus, baseline):
    """The same groups, packed by the loop with its policy and baseline, and scored by TRL's reward."""
    changes = {"baseline__name": baseline, "loss__ntp_coef": 0.0, "token_budget": 16384}
    run = Run(build(merged(values, **changes)), None)
    batch = run.next_batch()
    moved(run.policy.model)
    run.policy.model.eval()
    run.baseline.update(run.policy)
    micros = run.pack(Batch(batch.groups, ()), run.count(batch))
    expected_baseline, expected_rewards = [], []
    with torch.no_grad():
        for micro in micros:
            scores = run.baseline(run.policy.score(micro), micro)
            expected_baseline.append(scores.baseline_logps)
            expected_rewards.append(compute_rewards(run.objective, micro, scores))
    baseline_by_group = rows_by_group(micros, [b[:, None].expand(-1, 4, -1) for b in expected_baseline])
    rewards_by_group = rows_by_group(micros, expected_rewards)
    run.close()

    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(
        model, tokenizer, baseline=baseline, cut="force_close", ema_decay=run.config.baseline.decay, **AFTER
    )
    reward.watch(model)
    moved(model)
    reward.callback.on_step_end(None, None, None, model=model)
    scores = reward.score(batch.groups)
    expected = torch.cat([baseline_by_group[g.id].sum(-1) for g in batch.groups]).double()
    assert torch.equal(torch.from_numpy(scores.baseline_logps), expected)
    expected = torch.cat([rewards_by_group[g.id] for g in batch.groups]).double()
    # Against a frozen baseline TRL's reward scores an empty thought too, in the same matrix products.
    within = 1e-6 if baseline == "frozen" else 0.0
    assert torch.allclose(torch.from_numpy(scores.rewards), expected, rtol=0.0, atol=within)
    assert bool(scores.baseline_logps.any()) == (baseline != "none")
