"""RLP as a TRL trainer: `rlpretrain.trl.RLPTrainer`.

It differs from GRPO with `InformationGainReward` (rlpretrain/trl/reward.py) in three ways: the dataset may
hold plain text, advantages are leave-one-out (RLP eq. 7), and the next-token loss on the documents is added.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from rewards import leave_one_out
from rlpretrain.config import ConfigError, as_text
from rlpretrain.models.lengths import limit_of
from rlpretrain.objectives import Objective
from rlpretrain.trl.data import POSITION_COLUMNS, PROMPT_COLUMNS
from rlpretrain.trl.next_token import add_next_token_logps, next_token_loss
from rlpretrain.trl.prompts import check_documents, check_lengths, longest_row, position_of
from rlpretrain.trl.reward import ObjectiveReward


@dataclass
class RLPConfig(GRPOConfig):
    """GRPOConfig with the defaults of RLP (arXiv 2510.01265), and fields that say where to think.

    `num_generations` is the number of thoughts for a position, `max_completion_length` the most tokens of a
    thought, close tag included.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The paper's."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Thoughts in a micro-batch: those of one position."}
    )
    num_generations: int | None = field(
        default=16, metadata={"help": "Thoughts for each position (the paper's 16)."}
    )
    max_completion_length: int | None = field(
        default=2048, metadata={"help": "Longest thought in tokens (the paper's 2048)."}
    )
    loss_type: str = field(
        default="grpo", metadata={"help": "Mean over a thought's tokens, then over thoughts, as RLP's."}
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "none: leave-one-out advantages, as RLP's; else TRL's own."}
    )
    epsilon: float = field(
        default=0.2, metadata={"help": "Ratio clipped below at 1 - epsilon. The paper gives no value."}
    )
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Ratio clipped above at 1 + epsilon_high, likewise."}
    )
    objective: str = field(
        default="rlp", metadata={"help": "An objective of rlpretrain, by name or package.module:Class."}
    )
    positions: str = field(
        default="random", metadata={"help": "Where to think: random, every_k, before, after, sentence, ..."}
    )
    positions_per_document: int = field(default=1, metadata={"help": "Positions drawn in each document."})
    target_length: int = field(default=1, metadata={"help": "Tokens predicted after the thought."})
    marker: str | None = field(
        default=None, metadata={"help": "Text that positions before and after look for."}
    )
    objective_fields: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Other fields of the objective."}
    )
    baseline: str = field(
        default="self", metadata={"help": "What the gain is measured against: self, frozen, ema, none."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Of the baseline ema, per optimizer step."})
    ntp_coef: float = field(
        default=0.3, metadata={"help": "Weight of the next-token loss on the documents; 0 in the paper."}
    )
    cut: str = field(default="penalise", metadata={"help": "Unclosed thoughts: mask, force_close, penalise."})
    cut_penalty: float = field(default=1.0, metadata={"help": "Nats that cut penalise takes."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column with the text."})
    max_length: int = field(default=2048, metadata={"help": "Longest document in tokens."})
    epochs_of_positions: int = field(
        default=1, metadata={"help": "How often each document is given new positions."}
    )

    # fields that transformers reads from the command line as JSON
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "objective_fields"]


class RLPTrainer(GRPOTrainer):
    """TRL's GRPOTrainer for reinforcement as a pretraining objective.

    `train_dataset` has a column of text (`dataset_text_field`), or is made by `ObjectiveReward.dataset`.
    `reward_funcs` are further rewards beside the objective's, weighted by `args.reward_weights` as in TRL.
    Raises ConfigError for settings that cannot work.
    """

    # `ObjectiveReward` reads these two of its trainer.
    leaves_out_uncounted = True  # a thought that the objective does not count gets no further reward either
    prompts_by_ids = True
    _tag_names = ["trl", "rlp", "rlpretrain"]
    _name = "RLP"
    _paper = {
        "title": "RLP: Reinforcement as a Pretraining Objective",
        "id": "2510.01265",
        "citation": textwrap.dedent("""\
            @article{hatamizadeh2025rlp,
                title        = {{RLP: Reinforcement as a Pretraining Objective}},
                author       = {Ali Hatamizadeh and Syeda Nahida Akter and Shrimai Prabhumoye and Jan Kautz and Mostofa Patwary and Mohammad Shoeybi and Bryan Catanzaro and Yejin Choi},
                year         = 2025,
                eprint       = {arXiv:2510.01265},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: Any,
        args: RLPConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_funcs: Any = None,
        callbacks: Sequence[Any] | None = None,
        **others: Any,
    ):
        args = args if args is not None else RLPConfig("RLP")
        if not isinstance(args, RLPConfig):
            raise ConfigError(f"RLPTrainer takes an RLPConfig, not a {type(args).__name__}")
        path = isinstance(model := as_text(model), str)
        given = args.model_init_kwargs if path else None
        loading: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **(given or {})}
        if path:
            from transformers import AutoModelForCausalLM

            if "quantization_config" in others:
                loading["quantization_config"] = others.pop("quantization_config")
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **loading})
            args.model_init_kwargs = None  # TRL would warn that it ignores them
        if processing_class is None:
            from transformers import AutoTokenizer

            source = {name: loading[name] for name in ("revision", "trust_remote_code") if name in loading}
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path, **source)
        if train_dataset is None:
            raise ConfigError("RLPTrainer needs a train_dataset")
        self.reward = _make_reward(model, getattr(processing_class, "tokenizer", processing_class), args)
        self.reward.callback.init_kwargs = given
        self.latest_rewards: Tensor | None = None  # [thoughts, reward functions], all ranks
        self.rows: list[dict[str, Any]] = []  # rows of the dataset that are being sampled for
        self.limit = limit_of(model)
        owner = type(self.reward.objective)
        hooks = [(o.ntp_weights, o.trunk_loss, o.soft_targets) for o in (owner, Objective)]
        if args.ntp_coef and hooks[0] != hooks[1]:
            raise ConfigError(
                f"objective {args.objective} changes the next-token loss, which this trainer does "
                "not: set ntp_coef 0, or use rlpretrain's own trainer"
            )
        if reward_funcs is None:
            further_rewards = []
        else:
            further_rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        keep_columns = bool(further_rewards)  # they may read them
        eval_prompts: Any = eval_dataset
        if isinstance(eval_dataset, Mapping):  # a DatasetDict too
            eval_prompts = {
                name: self._make_prompts(data, args, keep_columns) for name, data in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_prompts = self._make_prompts(eval_dataset, args, keep_columns)
        super().__init__(
            model=model,
            reward_funcs=[self.reward, *further_rewards],
            args=args,
            train_dataset=self._make_prompts(train_dataset, args, keep_columns),
            eval_dataset=eval_prompts,
            processing_class=processing_class,
            callbacks=[self.reward.callback, *(callbacks or [])],
            **others,
        )
        if args.ntp_coef:
            add_next_token_logps(self.model)

    def _make_prompts(self, dataset: Any, args: RLPConfig, keep_columns: bool) -> Any:
        """The prompts of a dataset of text or prompts; ConfigError if rows are too long for the model."""
        columns = getattr(dataset, "column_names", None) or []
        if set(PROMPT_COLUMNS) <= set(columns):
            if args.ntp_coef and "document_token_ids" not in columns:
                raise ConfigError(
                    "ntp_coef needs the documents: make the dataset by reward.dataset(..., whole=True), or "
                    "set 0"
                )
            prompts = dataset
            self.reward.longest.append(longest_row(dataset))
        else:
            taken = (args.dataset_text_field, *PROMPT_COLUMNS)
            prompts = self.reward.dataset(
                dataset,
                column=args.dataset_text_field,
                max_length=args.max_length,
                seed=args.seed,
                epochs=args.epochs_of_positions,
                whole=True,
                keep=[name for name in columns if name not in taken] if keep_columns else [],
                by_ids=True,
            )
        check_lengths(self.reward.objective, self.limit, self.reward.longest, args)
        if args.ntp_coef:
            check_documents(prompts, self.limit, args.max_length)
        return prompts

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """TRL's rewards, NaN in all columns for a thought that the objective does not count."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.latest_rewards = rewards.masked_fill(rewards[:, :1].isnan(), torch.nan)
        return self.latest_rewards

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The prompts' ids. Tokenising their text could give others."""
        if len(prompts) != len(self.rows):
            raise RuntimeError(
                f"{len(prompts)} prompts for {len(self.rows)} rows: this TRL samples in another order"
            )
        if missing := [name for name in POSITION_COLUMNS if name not in self.rows[0]]:
            raise ConfigError(f"the rows lack {', '.join(missing)}: leave remove_unused_columns at false")
        return [list(self.reward.objective.prompt(position_of(row)).token_ids) for row in self.rows], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's samples, with RLP's advantages and the documents of the thoughts."""
        self.rows = inputs
        out = super()._generate_and_score_completions(inputs)
        group = self.num_generations if self.model.training else self.num_generations_eval
        leaves_one_out = (
            self.scale_rewards == "none" and self.multi_objective_aggregation == "sum_then_normalize"
        )
        if leaves_one_out and self.latest_rewards is not None and group > 1:
            first = self.accelerator.process_index * len(inputs)
            advantages = self._leave_one_out(self.latest_rewards, group, out["advantages"])
            out["advantages"] = advantages[first : first + len(inputs)]
        if self.args.ntp_coef:
            out["documents"] = [tuple(row["document_token_ids"]) for row in inputs]
            predicted = sum(len(document) - 1 for document in out["documents"])
            of_rank = torch.tensor(predicted, device=self.accelerator.device)
            out["num_document_tokens"] = self.accelerator.gather(of_rank).sum()
        return out

    def _leave_one_out(self, rewards: Tensor, group: int, like: Tensor) -> Tensor:
        """Advantages [thoughts] from rewards [thoughts, functions]; they replace those in TRL's log."""
        uncounted = rewards.isnan().all(1)
        weighted = (rewards * self.reward_weights.to(rewards)).nansum(1)
        total = weighted.masked_fill(uncounted, torch.nan)
        advantages = leave_one_out(total.view(-1, group)).flatten().to(like)
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        # These losses are a mean over all thoughts; RLP's is over those that count.
        if self.loss_type in ("grpo", "sapo"):
            advantages = advantages * len(uncounted) / (~uncounted).sum().clamp(min=1)
        return advantages

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss plus the next-token loss, a mean over the predicted tokens of the step's documents."""
        loss = super()._compute_loss(model, inputs)
        if not self.args.ntp_coef:
            return loss
        training = self.model.training
        tokens = inputs["num_document_tokens"] / self.accelerator.num_processes
        if training:  # of one optimizer step
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        # Each thought of a position comes with the same document, which is read once.
        times = Counter(inputs["documents"])
        ntp = next_token_loss(model, list(times), list(times.values()), self.accelerator.device) / tokens
        logged = ntp.detach() * (self.current_gradient_accumulation_steps if training else 1)
        mean = self.accelerator.gather(logged).mean().item()
        self._metrics["train" if training else "eval"]["ntp/loss"].append(mean)
        return loss + self.args.ntp_coef * ntp


def _make_reward(model: Any, tokenizer: Any, args: RLPConfig) -> ObjectiveReward:
    """The objective's reward with the settings of a trainer."""
    names = ("positions", "positions_per_document", "target_length", "marker")
    own_fields = {name: getattr(args, name) for name in names}
    further_fields: Any = args.objective_fields or {}
    if twice := sorted(own_fields.keys() & further_fields):
        raise ConfigError(f"objective_fields: {', '.join(twice)}: set it as a field of RLPConfig itself")
    return ObjectiveReward(
        model,
        tokenizer,
        args.objective,
        baseline=args.baseline,
        ema_decay=args.ema_decay,
        cut=args.cut,
        cut_penalty=args.cut_penalty,
        **own_fields,
        **further_fields,
    )
