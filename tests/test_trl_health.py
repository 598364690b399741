"""What keeps a training of TRL's from learning is said while it goes on, by the rules of a run of ours
(issue 15.21).
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain.prompts import Delimiters
from rlpretrain.tracking.health import RULES
from rlpretrain.trl import InformationGainReward
from tests.builders.tiny import tiny_model
from tests.builders.tokenizers_family import make
from tests.builders.trl import AFTER, Kept, settings
from tests.builders.trl_texts import LONG

trl = pytest.importorskip("trl")


def test_a_base_without_tags_under_mask_is_warned_of(tmp_path):
    """It closes nothing, so no reward ever comes: said once, with TRL's names."""
    tokenizer = make("byte_bpe_bos")
    model = tiny_model("qwen3", len(tokenizer))
    reward = InformationGainReward(model, tokenizer, cut="mask", positions="random")
    never = {"suppress_tokens": [tokenizer.convert_tokens_to_ids(Delimiters().close)]}
    args = settings(tmp_path, max_steps=4, max_completion_length=4, generation_kwargs=never)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trl.GRPOTrainer(
            model,
            reward_funcs=[reward],
            callbacks=[reward.callback],
            processing_class=tokenizer,
            train_dataset=reward.dataset(LONG),
            args=args,
        ).train()
    said = [str(w.message) for w in caught if "No thought counts" in str(w.message)]
    assert len(said) == 1 and said[0].startswith("step 3: ")
    assert "cut='penalise'" in said[0] and "max_completion_length" in said[0]


CASES = {
    "no thought counts": {"thought/uncounted_frac": [1.0] * 3},
    "equal rewards": {"frac_reward_zero_std": [1.0] * 5},
    "only the tags are learnt": {"ig/frozen": [1.0] * 5, "ig/empty": [0.95] * 5},
    "the gain falls": {"ig/frozen": [1.0] * 3 + [0.1] * 3},
    "the no-think loss rises": {"ntp/loss": [2.0] * 10 + [3.0] * 10},
    "thoughts repeat themselves": {"thought/repetition": [0.9] * 10},
}


@pytest.mark.parametrize("rule", CASES)
def test_rules_speak_once_and_on_the_first_rank_alone(rule):
    def warned(first: bool) -> list[str]:
        callback = InformationGainReward(None, make("byte_bpe")).callback
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            courses = CASES[rule]
            for step in range(3 * max(map(len, courses.values()))):
                logs = {name: values[min(step, len(values) - 1)] for name, values in courses.items()}
                state: Any = SimpleNamespace(global_step=step + 1, is_world_process_zero=first)
                callback.on_log(None, state, None, logs=logs | {"train_runtime": "soon"})
            return [str(w.message) for w in caught]

    said = warned(True)
    assert len(said) == 1 and rule in {r.name for r in RULES} and not warned(False)
    assert "sampling." not in said[0] and "optim." not in said[0] and "loss." not in said[0]  # names of TRL's


def test_the_gain_of_an_empty_thought_is_logged_against_the_frozen_model(corpus, tmp_path):
    """ig/frozen and ig/empty, from transformers' own logits with the weights of that step."""
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    initial = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(model, tokenizer, baseline="frozen", cut="force_close", **AFTER)
    kept = Kept(reward)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        args=settings(tmp_path),
        train_dataset=reward.dataset(str(corpus / "train.jsonl")),
        processing_class=tokenizer,
    )
    trainer.train()
    groups, rewards, weights = kept.calls[1]  # after one step
    live = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    live.load_state_dict(weights, strict=False)
    live.tie_weights()

    @torch.no_grad()
    def logp(net: Any, head: tuple[int, ...], target: tuple[int, ...]) -> float:
        logits = net(input_ids=torch.tensor([[*head, *target]])).logits[0].log_softmax(-1)
        return float(sum(logits[len(head) + k - 1, token] for k, token in enumerate(target)))

    empty = [
        logp(live, (*g.prompt.token_ids, reward.close_id), g.position.target_ids)
        - logp(initial, g.position.context_ids, g.position.target_ids)
        for g in groups
    ]
    row = [row for row in trainer.state.log_history if "ig/empty" in row][1]
    assert row["ig/empty"] == pytest.approx(np.mean(empty), abs=1e-4)
    assert row["ig/frozen"] == pytest.approx(np.mean(rewards), abs=1e-4) == row["ig/mean"]
    assert len(rewards) == 8  # the empty thoughts are nobody's completion
