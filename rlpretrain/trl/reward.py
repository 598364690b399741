"""Objectives as reward functions of TRL, whose own see text and never the policy. Nothing here imports TRL.

    reward = InformationGainReward(model, tokenizer, positions="after", marker="=")
    GRPOTrainer(model, reward_funcs=[reward], callbacks=[reward.callback],
                train_dataset=reward.dataset("docs.jsonl"), processing_class=tokenizer,
                args=GRPOConfig(...)).train()
    trl grpo --reward_funcs rlpretrain.trl.information_gain_reward ...      # after `rlpretrain prepare`; or
    any objective's

A prompt is a document up to a position and the open tag, a completion is a thought. The reward scores with
the model that is being trained, which the callback hands it: by its own forward, at temperature 1, on the ids
of the document.
"""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rewards.controls import repetition, target_leakage
from rlpretrain.compat import attention_of, keep_differentiable, sharded, trainer_of, trl_vllm_on_cpu
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.evaluate import contrast
from rlpretrain.models.adapters import plain_name
from rlpretrain.models.kernels import attending_by, settle
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.randomness import check_deterministic, in_mode, switch_off
from rlpretrain.objectives import Objective, parse_section
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.ranks import Ranks
from rlpretrain.scoring import attention
from rlpretrain.scoring.checks import check_model
from rlpretrain.scoring.groups import micro_batches, no_think_contexts, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.references import Ema, Frozen
from rlpretrain.scoring.scorer import NoGradScorer, score_function
from rlpretrain.trl.callback import LiveModel, adapters_of, evaluating, plain, ranks_of
from rlpretrain.trl.data import (
    COLUMNS,
    LONGEST,
    check_end,
    check_tags,
    end_with_thought,
    fields_of_prompts,
    to_prompt_dataset,
)
from rlpretrain.trl.prompts import check_lengths, check_prompts, longest_row
from rlpretrain.types import Batch
from rollout.types import FinishReason, Group, Position, Thought


class ObjectiveReward:
    """The reward of an objective (`name`, and its fields) as a reward function of TRL's trainers.

    `model` and `tokenizer` are those the trainer gets, before it gets them: both are given the thought
    delimiters where they lack them, and the close tag ends a generation. `cut` says what an unclosed thought
    earns, as in `SamplingConfig`: nothing, and it counts nowhere (`mask`), or what it earns once closed
    (`force_close`), less `cut_penalty` (`penalise`).

    `baseline` is what a gain is measured against: the current model (`self`), the initial one (`frozen`: a
    copy, or the model with its adapters off), its moving average (`ema`), or `none`. It is the same for all
    thoughts of a prompt and so cancels in TRL's advantage; it shows in the log.

    Without model and tokenizer it is made late, as on TRL's command line: at its first call it takes those of
    the trainer that calls it. Then the checkpoint must be one that `rlpretrain prepare` has written, and
    `fields` that it was not given are those that the prompts were prepared with.

    Raises ConfigError for settings that cannot work, and RuntimeError if it is called without a model and not
    by a trainer.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        name: str = "rlp",
        *,
        baseline: Literal["self", "frozen", "ema", "none"] = "self",
        ema_decay: float = 0.999,
        cut: Literal["mask", "force_close", "penalise"] = "penalise",
        cut_penalty: float = 1.0,
        token_budget: int = 16384,
        **fields: Any,
    ):
        if isinstance(model, str) or (model is not None and tokenizer is None):
            raise ConfigError(
                "give the model itself and its tokenizer: both may need the thought delimiters before the "
                "trainer has them"
            )
        if baseline not in ("self", "frozen", "ema", "none"):
            raise ConfigError(f"baseline must be self, frozen, ema or none, got '{baseline}'")
        self.section = {"name": name, **fields}
        owner, config = parse_section(self.section)
        if not owner.has_positions:
            raise ConfigError(f"objective {name} has no thoughts to reward")
        if owner.rollout is not Objective.rollout:
            raise ConfigError(
                f"objective {name} samples in rounds of its own, which TRL's trainers do not: use "
                "rlpretrain's"
            )
        self.__name__ = "information_gain" if name == "rlp" else name.rpartition(":")[2]
        self.baseline, self.ema_decay = baseline, ema_decay
        self.layout = Layout(token_budget, cut, cut_penalty)
        self.model: nn.Module | None = None
        self.initial: dict[
            str, torch.Tensor
        ] = {}  # weights before a checkpoint is loaded, until training begins
        self.reference: Frozen | None = None
        self.scored: tuple[Sequence[Group], dict[str, np.ndarray]] = ((), {})
        self.attention: str | None = (
            None  # of the scoring where one rank does it, in a trainer whose own it cannot use
        )
        self.longest: list[int] = []  # tokens of context and target in the datasets made here
        self.callback, self.late, self.trainer = LiveModel(self), tokenizer is None, None
        self.added: list[str] = []
        if self.late:
            trl_vllm_on_cpu()  # no callback will be asked before that starts
        else:
            self.added = ensure_delimiters(tokenizer, model, Delimiters(config.open, config.close))
            self._make(tokenizer, self.section)
        if model is not None and not self.objective.answer_tokens:
            end_with_thought(model, self.close_id)

    def _make(self, tokenizer: Any, section: Mapping[str, Any]) -> None:
        owner, config = parse_section(section)
        self.tokenizer, self.objective = tokenizer, owner(config, tokenizer)
        if getattr(config, "direct", 0):
            raise ConfigError(
                "objective.direct: a loss on the target itself has no place in a reward function: set it to "
                "0, or use rlpretrain's own trainer"
            )
        if (
            "batch" in self.objective.needs
            or getattr(self.objective, "judge", 0) is None
            and config.reward == "judge"
        ):
            raise ConfigError(
                f"objective {section['name']} cannot be a reward function with these settings: it compares "
                "whole batches, or asks the policy to judge (set judge_url or judge_function)"
            )
        self.delimiters, self.close_id = (
            Delimiters(config.open, config.close),
            self.objective.template.close_id,
        )
        self.layout.pad_id, self.layout.target = tokenizer.pad_token_id or 0, "target" in self.objective.needs

    def _adopt(self, log_metric: Any, prompt: str, columns: Mapping[str, Any]) -> None:
        """Without a callback: the model of the trainer that calls, and, made late, its tokenizer and the
        prompts' fields.
        """
        trainer = trainer_of(log_metric)
        if trainer is None:
            raise RuntimeError(
                f"{self.__name__} has no model to score with: pass callbacks=[reward.callback] to the "
                "trainer, or let the trainer call it with log_metric=, as GRPOTrainer does"
            )
        if trainer is self.trainer:
            return
        if self.late:
            section = fields_of_prompts(columns, self.section["name"]) | self.section
            tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
            model = plain(trainer.model)
            check_tags(model, tokenizer, section)
            self._make(tokenizer, section)
            check_end(model, self.objective, section)
            expected = self.groups([[]], {n: columns[n][:1] for n in COLUMNS[1:] if n in columns})[
                0
            ].prompt.token_ids
            if tuple(tokenizer(prompt)["input_ids"]) != expected:
                raise ConfigError(
                    f"{self.__name__}: by its settings the first prompt would be "
                    f"{tokenizer.decode(expected)!r}: give it the template and tags that the prompts were "
                    "made with"
                )
        held = trainer.eval_dataset
        sets = [trainer.train_dataset, *(held.values() if isinstance(held, Mapping) else [held])]
        self.longest += [longest_row(data) for data in sets]
        check_lengths(self.objective, limit_of(plain(trainer.model)), self.longest, trainer.args)
        self.trainer, self.reference = trainer, None
        if (
            trainer.state.global_step
            and self.baseline in ("frozen", "ema")
            and not adapters_of(trainer.model)
        ):
            raise ConfigError(
                f"baseline {self.baseline}: this run was resumed, and a reward without its callback does not "
                "know the model it began with: pass callbacks=[reward.callback], or use self or none"
            )
        self.watch(trainer.model)
        trainer.pop_callback(self.callback)  # twice would be a step too many for the EMA
        trainer.add_callback(self.callback)  # training has begun: of that it does not hear any more

    def dataset(self, documents: Any, **settings: Any) -> Any:
        """`to_prompt_dataset` for this objective."""
        if self.late:
            raise ConfigError(
                "a reward without a tokenizer makes no prompts: give it one, or use `rlpretrain prepare`"
            )
        data = to_prompt_dataset(documents, self.tokenizer, objective=self.objective, **settings)
        known = hasattr(data, "__len__")  # of a stream only the limit
        self.longest.append(longest_row(data) if known else settings.get("max_length", LONGEST))
        return data

    def watch(self, model: nn.Module) -> None:
        """The model to score with: what the callback is given when training begins."""
        inner, parted = plain(model), sharded(model)
        if parted and self.attention:
            raise ConfigError(
                "one rank scores for TRL's asynchronous trainer, and this model is sharded over several "
                "(FSDP, ZeRO-3): train it in one process or under DDP, or with GRPOTrainer"
            )
        self.model, peft = model, adapters_of(model)
        keep_differentiable(inner)
        if not self.attention and getattr(self.objective.config, "score", "") == "jepo":
            raise ConfigError(
                "objective.score jepo has advantages of its own, and this trainer of TRL's computes them "
                "from rewards: take another score, or AsyncRollouts, or rlpretrain's own trainer"
            )
        if peft is not None and peft.active_peft_config.is_prompt_learning:
            raise ConfigError(
                "prompt and prefix tuning put vectors before the tokens, which scoring does not: train LoRA"
            )
        own = (
            []
            if peft is None
            else [n for n, p in inner.named_parameters() if p.requires_grad and plain_name(inner, n)]
        )
        own = [
            n
            for n in own
            if ".modules_to_save." not in n and getattr(peft.base_model, "prefix", "lora_") not in n
        ]
        if self.baseline == "frozen" and own:
            raise ConfigError(
                f"baseline frozen: adapters can be turned off, but weights of the model itself are trained "
                f"as well ({own[0]}): freeze them (biases: bias='none'), or use self or none"
            )
        self._settle(inner, parted)
        with attending_by(inner, self.attention):
            if not parted:
                settle(inner)
                check_model(inner)
            self.layout.tree = attention.install(inner) is None
            self.attention = attention_of(inner) if self.attention else None
            if peft is not None:
                if self.baseline == "ema":
                    raise ConfigError(
                        "baseline ema has no meaning for adapters here: use frozen (adapters off), self or "
                        "none"
                    )
                if self.baseline == "frozen":
                    self.reference = Frozen(
                        inner, adapters_off=True, ranks=ranks_of(next(inner.parameters()).device)
                    )
            elif self.reference is None and self.baseline in ("frozen", "ema"):
                if parted:
                    raise ConfigError(
                        f"baseline {self.baseline} needs a whole copy of the model, which ZeRO-3 has "
                        "nowhere: use self or none (it cancels in the advantage), or train adapters"
                    )
                whole = copy.deepcopy(inner)
                if self.initial:
                    whole.load_state_dict(self.initial, strict=False)  # without buffers, and tied ones once
                self.reference = Ema(whole, self.ema_decay) if self.baseline == "ema" else Frozen(whole)

    def _settle(self, model: nn.Module, parted: bool) -> None:
        """Let the trainer's model compute what it samples, trains and scores: nothing random, no part of
        attention left out.
        """
        with attending_by(model, self.attention), in_mode(model, training=True):
            off = switch_off(model, ask=not parted)
            if not parted:
                check_deterministic(model)
        if off:
            said = (
                f"{self.__name__}: set to 0 in the model, since thoughts are scored as sampled: "
                f"{', '.join(off)}"
            )
            warnings.warn(said, stacklevel=3)
        if not parted and (dropped := settle(model)):
            said = (
                f"{self.__name__}: the model now attends by eager, since its kernel does not compute "
                f"{dropped}"
            )
            warnings.warn(said, stacklevel=3)

    def __call__(
        self,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[..., None] | None = None,
        log_extra: Callable[..., None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for each completion, None where a thought counts nowhere; `ig/*` and `thought/*` go to
        TRL's log.
        """
        if missing := [c for c in COLUMNS[1:5] if c not in columns]:
            raise ConfigError(
                f"{self.__name__}: the dataset lacks {', '.join(missing)}: make it by "
                "reward.dataset(documents), or by `rlpretrain prepare`, and leave remove_unused_columns at "
                "false"
            )
        trainer = trainer_of(log_metric)
        if trainer is None or getattr(trainer, "leaves_out_uncounted", False):
            others = []
        else:
            others = [
                f
                for f in trainer.reward_funcs
                if not isinstance(f, ObjectiveReward) or f.layout.cut != "mask"
            ]
        if others and self.layout.cut == "mask":
            raise ConfigError(
                "cut mask with several reward functions: a thought that counts nowhere is 0 in their sum, "
                "more than most gains at first: use cut='force_close' or 'penalise', or RLPTrainer"
            )
        if self.model is None or self.late or self.trainer is not None:
            self._adopt(log_metric, prompts[0], columns)
        if self.__name__ in columns and self._scored_here(columns):  # by `Rollouts`
            (groups, gains), rewards = self.scored, list(columns[self.__name__])
        else:
            groups = self.groups(completion_ids, columns)
            own = (
                getattr(trainer, "prompts_by_ids", False)
                or getattr(trainer, "rollout_func", None) is not None
            )
            if trainer is not None and not own:
                expected = [group.prompt.token_ids for group in groups for _ in group.thoughts]
                check_prompts(trainer.processing_class, prompts, expected)
            groups = _wait(self.objective.add_rewards(None, groups))
            rewards, gains = self.rewards(groups)
        if log_metric is not None:
            self.log(groups, gains, log_metric)
        if log_extra is not None:
            log_extra("document", list(columns["document_id"]))
            log_extra("target", [self.tokenizer.decode(ids) for ids in columns["target_ids"]])
        return rewards

    def _scored_here(self, columns: Mapping[str, Any]) -> bool:
        """Whether the groups scored last are at these rows, on every rank: `Rollouts` sees prompts, and
        rows may share one.
        """
        at = [(g.position.document_id, g.position.index) for g in self.scored[0] for _ in g.thoughts]
        here = at == list(zip(columns["document_id"], columns["position"], strict=True))
        return not ranks_of(next(plain(self.model).parameters()).device).max([float(not here)])[
            0
        ]  # all ranks score, or none

    def known(self, groups: Sequence[Group]) -> list[float | None]:
        """Rewards of groups that are to be asked for again: see `Rollouts`."""
        rewards, gains = self.rewards(groups)
        self.scored = groups, gains
        return rewards

    def groups(self, completion_ids: Sequence[Sequence[int]], columns: Mapping[str, Any]) -> list[Group]:
        """The completions as groups: neighbours at one position belong together."""
        suffixes = columns.get("suffix_ids") or [()] * len(completion_ids)
        rows = list(
            zip(
                columns["document_id"],
                columns["position"],
                columns["context_ids"],
                columns["target_ids"],
                suffixes,
                completion_ids,
                strict=True,
            )
        )
        out: list[Group] = []
        for (document, index), same in groupby(rows, key=lambda row: row[:2]):
            found = list(same)
            context, target, suffix = (tuple(ids) for ids in found[0][2:5])
            position = Position(str(document), int(index), context, target, suffix)
            thoughts = tuple(self.thought(row[5]) for row in found)
            out.append(
                Group(
                    f"{document}@{index}:{len(out)}", position, self.objective.prompt(position), thoughts, 0
                )
            )
        return out

    def thought(self, ids: Sequence[int]) -> Thought:
        """A completion as a thought: up to its close tag, what is said after it apart, without padding."""
        ids = [int(i) for i in ids]
        eos = self.tokenizer.eos_token_id
        size = ids.index(self.close_id) + 1 if self.close_id in ids else 0
        if not size:
            reason = FinishReason.EOS if eos in ids else FinishReason.LENGTH
            kept = ids[: ids.index(eos) + 1] if eos in ids else ids
            return Thought(tuple(kept), (0.0,) * len(kept), reason, 0, 0)
        kept = ids if self.objective.answer_tokens else ids[:size]
        span = (size, len(kept)) if self.objective.answer_tokens else None
        return Thought(tuple(kept), (0.0,) * len(kept), FinishReason.CLOSE, 0, 0, span)

    @torch.no_grad()
    def rewards(self, groups: Sequence[Group]) -> tuple[list[float | None], dict[str, np.ndarray]]:
        """(rewards in the order of the thoughts, log-probabilities of targets with and without a thought
        [thoughts]).
        """
        if self.model is None:
            raise RuntimeError(
                f"{self.__name__} has no model to score with: pass callbacks=[reward.callback] to the trainer"
            )
        inner = plain(self.model)
        device = next(inner.parameters()).device
        empty = self._empty(groups)
        arms = no_think_contexts(self.objective, [*groups, *empty])
        layout = replace(self.layout, no_think_ids=arms)
        ranks = Ranks(device=device) if self.attention else ranks_of(device)
        micros = micro_batches(Batch((*groups, *empty), ()), layout, ranks)
        with evaluating(self.model), attending_by(inner, self.attention):
            score = score_function(NoGradScorer(inner))
            found = score_batch(
                score, micros, device, reference=self._against, objective=self.objective
            ).groups
        scored = [found[g.id] for g in groups]
        table = {
            "reward": np.concatenate([s.rewards.numpy() for s in scored]),
            "after": np.concatenate([s.joint_target.numpy() for s in scored]),
            "baseline": np.concatenate([s.joint_baseline.numpy() for s in scored]),
            "self": np.concatenate([s.joint_own.numpy() for s in scored]),
            "empty": np.array(
                [float(found[e.id].joint_target[0] - found[e.id].joint_baseline[0]) for e in empty]
            ),
        }
        return [None if np.isnan(r) else float(r) for r in table["reward"]], table

    def _empty(self, groups: Sequence[Group]) -> list[Group]:
        """A thought without content at each position, where the baseline is one that its gain says
        something against.
        """
        if self.baseline != "frozen" or not self.layout.target:
            return []
        return [replace(g, id=f"{g.id}:empty", rewards=None) for g in contrast(groups, "empty")]

    def _against(self, scores: Any, micro: Any) -> Any:
        if self.baseline == "none":
            return replace(scores, baseline_logps=torch.zeros_like(scores.baseline_logps))
        return scores if self.reference is None else self.reference(scores, micro)

    def log(self, groups: Sequence[Group], found: Mapping[str, np.ndarray], log: Callable[..., None]) -> None:
        """What `rewards` found, as metrics."""
        thoughts = [t for g in groups for t in g.thoughts]
        log("thought/closed_frac", float(np.mean([t.finish_reason is FinishReason.CLOSE for t in thoughts])))
        log("thought/uncounted_frac", float(np.isnan(found["reward"]).mean()))
        for g in groups[:1]:  # one thought is enough for a trend
            log("thought/leakage", target_leakage(g.thoughts[0].token_ids, g.position.target_ids))
            log("thought/repetition", repetition(g.thoughts[0].token_ids))
        counted = ~np.isnan(found["reward"])
        if self.layout.target and counted.any():
            sizes = np.array([len(g.position.target_ids) for g in groups for _ in g.thoughts])[counted]
            gain, own = ((found["after"] - found[n])[counted] for n in ("baseline", "self"))
            log("ig/mean", float(gain.mean()))
            if self.baseline == "frozen":
                log("ig/frozen", float(gain.mean()))
                log("ig/empty", float(found["empty"].mean()))
            log("ig/std", float(gain.std()))
            log("ig/positive_frac", float((gain > 0).mean()))
            log("ig/per_token", float((gain / sizes).mean()))
            log("ig/self", float(own.mean()))
            log("baseline/self", float(found["self"][counted].mean()))


class InformationGainReward(ObjectiveReward):
    """RLP's reward (arXiv 2510.01265): log p(target | context, thought) - log p(target | context), in nats.

    Its fields are those of the objective `rlp`: positions, marker, target_length, clip, ...
    """

    def __init__(self, model: Any = None, tokenizer: Any = None, **settings: Any):
        super().__init__(model, tokenizer, "rlp", **settings)


def _wait(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, also where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
