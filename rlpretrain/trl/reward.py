"""Objectives as reward functions of TRL, which shows rewards the text and never the policy.

    reward = InformationGainReward(model, tokenizer, positions="after", marker="=")
    GRPOTrainer(model, reward_funcs=[reward], callbacks=[reward.callback],
                train_dataset=reward.dataset("docs.jsonl"), processing_class=tokenizer,
                args=GRPOConfig(...)).train()
    # after `rlpretrain prepare`, with this objective's reward or any other's:
    trl grpo --reward_funcs rlpretrain.trl.information_gain_reward ...

A prompt is a document up to a position and the open tag; a completion is a thought. The reward scores
with the live model, which the callback hands over: with forwards of its own, at temperature 1, on the ids
of the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from rlpretrain.compat import trainer_of, trl_vllm_on_cpu
from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import limit_of
from rlpretrain.objectives import Objective, parse_section
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.scoring.packing import Layout
from rlpretrain.trl.callback import LiveModel, adapters_of, plain, ranks_of
from rlpretrain.trl.completions import group_completions
from rlpretrain.trl.data import LONGEST, POSITION_COLUMNS, PROMPT_COLUMNS, to_prompt_dataset
from rlpretrain.trl.gains import ThoughtScores
from rlpretrain.trl.live_scorer import LiveScorer
from rlpretrain.trl.prepared import check_end, check_tags, end_with_thought, fields_of_prompts
from rlpretrain.trl.prompts import check_lengths, check_prompts, longest_row
from rollout.blocking import wait_for_result
from rollout.types import Group


class ObjectiveReward(LiveScorer):
    """The reward of an objective (`name`, and its fields) as a reward function of TRL's trainers.

    `model` and `tokenizer` are those the trainer gets, before it gets them: both are given the thought
    delimiters where they lack them, and the close tag ends a generation. `cut` says what an unclosed
    thought earns, as in `SamplingConfig`: nothing, and it counts nowhere (`mask`); what it earns once
    closed (`force_close`); or that less `cut_penalty` (`penalise`).

    `baseline` is what a gain is measured against: the current model (`self`), the initial one (`frozen`:
    a copy, or the model with its adapters off), its moving average (`ema`), or `none`. It is the same for
    all thoughts of a prompt, so it cancels in TRL's advantage; it shows in the log.

    Without model and tokenizer, as on TRL's command line, the first call takes both from the trainer that
    calls. Then the checkpoint must be one that `rlpretrain prepare` has written, and `fields` that are
    not given are those that the prompts were prepared with.

    Raises ConfigError for settings that cannot work, and RuntimeError if it is called without a model and
    not by a trainer.
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
        if isinstance(model, str | PathLike) or (model is not None and tokenizer is None):
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
        if not owner.importance_weights:
            raise ConfigError(
                f"objective {name} trains on texts of its choice, not on all that TRL's trainers sample: use "
                "rlpretrain's trainer"
            )
        if owner.rollout is not Objective.rollout:
            raise ConfigError(
                f"objective {name} samples in rounds of its own, which TRL's trainers do not: use "
                "rlpretrain's trainer"
            )
        short_name = "information_gain" if name == "rlp" else name.rpartition(":")[2]
        super().__init__(short_name, Layout(token_budget, cut, cut_penalty), baseline, ema_decay)
        self.remembered: tuple[Sequence[Group], ThoughtScores] | None = None  # by `score_and_remember`
        self.longest: list[int] = []  # tokens of context and target in the datasets made here
        self.callback, self.late, self.trainer = LiveModel(self), tokenizer is None, None
        self.added: list[str] = []
        if self.late:
            trl_vllm_on_cpu()  # TRL's vLLM starts before the first call, and there is no callback to ask
        else:
            self.added = ensure_delimiters(tokenizer, model, Delimiters(config.open, config.close))
            self._make_objective(tokenizer, self.section)
        if model is not None and not self.objective.answer_tokens:
            end_with_thought(model, self.close_id)

    def _make_objective(self, tokenizer: Any, section: Mapping[str, Any]) -> None:
        owner, config = parse_section(section)
        self.tokenizer, self.objective = tokenizer, owner(config, tokenizer)
        if getattr(config, "direct", 0):
            raise ConfigError(
                "objective.direct: a loss on the target itself has no place in a reward function: set it to "
                "0, or use rlpretrain's own trainer"
            )
        if getattr(config, "fixed_length", False):
            raise ConfigError(
                "objective.fixed_length: thoughts that TRL samples end at the close tag: set it to false, or "
                "use rlpretrain's own trainer"
            )
        policy_judges = getattr(self.objective, "judge", 0) is None and config.reward == "judge"
        if {"batch", "reference", "target_baseline"} & self.objective.needs or policy_judges:
            raise ConfigError(
                f"objective {section['name']} cannot be a reward function with these settings: it compares "
                "whole batches, needs a second model, or asks the policy to judge (set judge_url or "
                "judge_function)"
            )
        self.delimiters = Delimiters(config.open, config.close)
        self.close_id = self.objective.template.close_id
        self.layout.pad_id = tokenizer.pad_token_id or 0
        self.layout.target = "target" in self.objective.needs

    def dataset(self, documents: Any, **settings: Any) -> Any:
        """`to_prompt_dataset` for this objective."""
        if self.late:
            raise ConfigError(
                "a reward without a tokenizer makes no prompts: give it one, or use `rlpretrain prepare`"
            )
        data = to_prompt_dataset(documents, self.tokenizer, objective=self.objective, **settings)
        has_length = hasattr(data, "__len__")  # a stream has not: only the limit is known
        self.longest.append(longest_row(data) if has_length else settings.get("max_length", LONGEST))
        return data

    def __call__(
        self,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[..., None] | None = None,
        log_extra: Callable[..., None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for each completion, None where a thought does not count; logs `ig/*` and `thought/*`."""
        if missing := [name for name in POSITION_COLUMNS if name not in columns]:
            raise ConfigError(
                f"{self.__name__}: the dataset lacks {', '.join(missing)}: make it by "
                "reward.dataset(documents), or by `rlpretrain prepare`, and leave remove_unused_columns at "
                "false"
            )
        trainer = trainer_of(log_metric)
        self._check_sum_of_rewards(trainer)
        if self.model is None or self.late or self.trainer is not None:
            self._adopt(log_metric, prompts[0], columns)
        if self.__name__ in columns and self._remembers(columns):
            assert self.remembered is not None
            groups, scores = self.remembered
            rewards = list(columns[self.__name__])
        else:
            groups = group_completions(self.objective, completion_ids, columns)
            if trainer is not None and not _takes_ids(trainer):
                expected = [group.prompt.token_ids for group in groups for _ in group.thoughts]
                check_prompts(trainer.processing_class, prompts, expected)
            engine: Any = None  # only a judging policy would need one, and that was refused
            groups = wait_for_result(self.objective.add_rewards(engine, groups))
            scores = self.score(groups)
            rewards = scores.for_trl()
        if log_metric is not None:
            self.log(groups, scores, log_metric)
        if log_extra is not None:
            log_extra("document", list(columns["document_id"]))
            log_extra("target", [self.tokenizer.decode(ids) for ids in columns["target_ids"]])
        return rewards

    def score_and_remember(self, groups: Sequence[Group]) -> list[float | None]:
        """Rewards of groups that TRL will ask for again: see `Rollouts`."""
        scores = self.score(groups)
        self.remembered = groups, scores
        return scores.for_trl()

    def _remembers(self, columns: Mapping[str, Any]) -> bool:
        """Whether the groups that were remembered stand at these rows, on every rank.

        `Rollouts` sees prompts only, and rows may share a prompt. All ranks score again, or none does.
        """
        groups = self.remembered[0] if self.remembered is not None else ()
        places = [(g.position.document_id, g.position.index) for g in groups for _ in g.thoughts]
        same = places == list(zip(columns["document_id"], columns["position"], strict=True))
        device = next(plain(self.model).parameters()).device
        return not ranks_of(device).max([float(not same)])[0]

    def _check_sum_of_rewards(self, trainer: Any) -> None:
        """Raise ConfigError where TRL would add up an uncounted thought as 0 with further rewards."""
        if self.layout.cut != "mask" or trainer is None or getattr(trainer, "leaves_out_uncounted", False):
            return
        others = [
            function
            for function in trainer.reward_funcs
            if not isinstance(function, ObjectiveReward) or function.layout.cut != "mask"
        ]
        if others:
            raise ConfigError(
                "cut mask with several reward functions: a thought that does not count is 0 in their sum, "
                "more than most gains at first: use cut='force_close' or 'penalise', or RLPTrainer"
            )

    def _adopt(self, log_metric: Any, prompt: str, columns: Mapping[str, Any]) -> None:
        """Take the model of the calling trainer; if made late, its tokenizer and the prompts' fields too."""
        trainer = trainer_of(log_metric)
        if trainer is None:
            raise RuntimeError(
                f"{self.__name__} has no model to score with: pass callbacks=[reward.callback] to the "
                "trainer, or let the trainer call it with log_metric=, as GRPOTrainer does"
            )
        if trainer is self.trainer:
            return
        if self.late:
            self._adopt_settings(trainer, prompt, columns)
        held_out = trainer.eval_dataset
        evaluated = held_out.values() if isinstance(held_out, Mapping) else [held_out]
        self.longest += [longest_row(data) for data in (trainer.train_dataset, *evaluated)]
        check_lengths(self.objective, limit_of(plain(trainer.model)), self.longest, trainer.args)
        self.trainer, self.reference = trainer, None
        resumed, has_adapters = trainer.state.global_step > 0, adapters_of(trainer.model) is not None
        if resumed and self.baseline in ("frozen", "ema") and not has_adapters:
            raise ConfigError(
                f"baseline {self.baseline}: this run was resumed, and a reward without its callback does not "
                "know the model it began with: pass callbacks=[reward.callback], or use self or none"
            )
        self.watch(trainer.model)
        trainer.pop_callback(self.callback)  # a second one would move the EMA twice a step
        trainer.add_callback(self.callback)  # after `on_train_begin`, which it therefore does not get

    def _adopt_settings(self, trainer: Any, prompt: str, columns: Mapping[str, Any]) -> None:
        """Make the objective, from the trainer's tokenizer and the fields of its prepared prompts."""
        section = fields_of_prompts(columns, self.section["name"]) | self.section
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        model = plain(trainer.model)
        check_tags(model, tokenizer, section)
        self._make_objective(tokenizer, section)
        check_end(model, self.objective, section)
        first_row = {name: columns[name][:1] for name in PROMPT_COLUMNS[1:] if name in columns}
        (group,) = group_completions(self.objective, [[]], first_row)
        expected = group.prompt.token_ids
        if tuple(tokenizer(prompt)["input_ids"]) != expected:
            raise ConfigError(
                f"{self.__name__}: with its settings the first prompt would be "
                f"{tokenizer.decode(expected)!r}: give it the template and tags that the prompts were "
                "made with"
            )


class InformationGainReward(ObjectiveReward):
    """RLP's reward (arXiv 2510.01265): log p(target | context, thought) - log p(target | context), in nats.

    Its fields are those of the objective `rlp`: positions, marker, target_length, clip, ...
    """

    def __init__(self, model: Any = None, tokenizer: Any = None, **settings: Any):
        super().__init__(model, tokenizer, "rlp", **settings)


def _takes_ids(trainer: Any) -> bool:
    """Whether the trainer gets prompts as ids and so does not tokenise their text."""
    return getattr(trainer, "prompts_by_ids", False) or getattr(trainer, "rollout_func", None) is not None
