"""Objectives as reward functions of TRL, whose own see text and never the policy. Nothing here imports TRL.

    reward = InformationGainReward(model, tokenizer, positions="after", marker="=")
    GRPOTrainer(model, reward_funcs=[reward], callbacks=[reward.callback],
                train_dataset=reward.dataset("docs.jsonl"), processing_class=tokenizer, args=GRPOConfig(...)).train()

A prompt is a document up to a position and the open tag, a completion is a thought. The reward scores with the model that is
being trained, which the callback hands it: by its own forward, at temperature 1, on the ids of the document.
`RLPTrainer` and `RLPConfig` (rlpretrain/trl_trainer.py) are loaded from here when they are asked for.
"""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from rlpretrain import attention
from rlpretrain.baseline import Ema, Frozen
from rlpretrain.compat import gathered, sharded
from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.documents import read_all
from rlpretrain.loop import rewards_of
from rlpretrain.objectives import Objective, parse_section
from rlpretrain.packing import Layout, count, idle, pack
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.ranks import Ranks
from rlpretrain.scoring import Scorer, check_head, score
from rlpretrain.sources import Cutter
from rlpretrain.types import Batch, Document
from rollout.types import FinishReason, Group, Position, Thought

COLUMNS = ("prompt", "document_id", "position", "context_ids", "target_ids", "suffix_ids")
"""Of a prompt dataset; TRL hands all but the first to reward functions as they are."""


class ObjectiveReward:
    """The reward of an objective (`name`, and its fields) as a reward function of TRL's trainers.

    `model` and `tokenizer` are those the trainer gets, before it gets them: both are given the thought delimiters where they lack
    them, and the close tag ends a generation. `cut` says what an unclosed thought earns, as in `SamplingConfig`: nothing, and it
    counts nowhere (`mask`), or what it earns once closed (`force_close`), less `cut_penalty` (`penalise`).

    `baseline` is what a gain is measured against: the current model (`self`), the initial one (`frozen`: a copy, or the model
    with its adapters off), its moving average (`ema`), or `none`. It is the same for all thoughts of a prompt and so cancels
    in TRL's advantage; it shows in the log.

    Raises ConfigError for settings that cannot work, and RuntimeError if it is called without a model, since then
    `callbacks=[reward.callback]` is missing.
    """

    def __init__(self, model: Any = None, tokenizer: Any = None, name: str = "rlp", *,
                 baseline: Literal["self", "frozen", "ema", "none"] = "self", ema_decay: float = 0.999,
                 cut: Literal["mask", "force_close", "penalise"] = "mask", cut_penalty: float = 1.0, token_budget: int = 16384,
                 **fields: Any):  # fmt: skip
        if isinstance(model, str) or (model is not None and tokenizer is None):
            raise ConfigError("give the model itself and its tokenizer: both may need the thought delimiters before the trainer "
                              "has them")  # fmt: skip
        if baseline not in ("self", "frozen", "ema", "none"):
            raise ConfigError(f"baseline must be self, frozen, ema or none, got '{baseline}'")
        owner, config = parse_section({"name": name, **fields})
        if not owner.has_positions:
            raise ConfigError(f"objective {name} has no thoughts to reward")
        self.__name__ = "information_gain" if name == "rlp" else name.rpartition(":")[2]
        self.delimiters = Delimiters(config.open, config.close)
        self.added = ensure_delimiters(tokenizer, model, self.delimiters)
        self.tokenizer, self.objective = tokenizer, owner(config, tokenizer)
        if "batch" in self.objective.needs or getattr(self.objective, "judge", 0) is None and config.reward == "judge":
            raise ConfigError(f"objective {name} cannot be a reward function with these settings: it compares whole batches, or "
                              "asks the policy to judge (set judge_url or judge_function)")  # fmt: skip
        if owner.rollout is not Objective.rollout:
            raise ConfigError(f"objective {name} samples in rounds of its own, which TRL's trainers do not: use rlpretrain's")
        self.baseline, self.ema_decay = baseline, ema_decay
        self.layout = Layout(token_budget, cut, cut_penalty, pad_id=tokenizer.pad_token_id or 0,
                             target="target" in self.objective.needs)  # fmt: skip
        self.model: nn.Module | None = None
        self.reference: Frozen | None = None
        self.scored: tuple[Sequence[Group], dict[str, np.ndarray]] = ((), {})
        self.attention: str | None = None  # of the scoring where one rank does it, in a trainer whose own it cannot use
        self.callback = _LiveModel(self)
        self.close_id = self.objective.template.close_id
        if model is not None:
            known = model.generation_config.eos_token_id
            ends = [known] if isinstance(known, int) else list(known or [])
            if self.close_id not in ends and not self.objective.answer_tokens:
                model.generation_config.eos_token_id = [*ends, self.close_id]

    def dataset(self, documents: Any, **settings: Any) -> Any:
        """`to_prompt_dataset` for this objective."""
        return to_prompt_dataset(documents, self.tokenizer, objective=self.objective, **settings)

    def watch(self, model: nn.Module) -> None:
        """The model to score with: what the callback is given when training begins."""
        inner, parted = plain(model), sharded(model)
        if parted and self.attention:
            raise ConfigError("one rank scores for TRL's asynchronous trainer, and this model is sharded over several (FSDP, "
                              "ZeRO-3): train it in one process or under DDP, or with GRPOTrainer")  # fmt: skip
        self.model = model
        with attention.attending_by(inner, self.attention):
            if not parted:
                check_head(inner)
            self.layout.tree = attention.install(inner) is None
            self.attention = inner.config._attn_implementation if self.attention else None
            if self.baseline == "ema" and _has_adapters(model):
                raise ConfigError("baseline ema has no meaning for adapters here: use frozen (adapters off), self or none")
            if self.reference is None and self.baseline in ("frozen", "ema") and not _has_adapters(model):
                if parted:
                    raise ConfigError(f"baseline {self.baseline} needs a whole copy of the model, which ZeRO-3 has nowhere: use "
                                      "self or none (it cancels in the advantage), or train adapters")  # fmt: skip
                whole = copy.deepcopy(inner)
                self.reference = Ema(whole, self.ema_decay) if self.baseline == "ema" else Frozen(whole)

    def __call__(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]],
                 log_metric: Callable[..., None] | None = None, log_extra: Callable[..., None] | None = None,
                 **columns: Any) -> list[float | None]:  # fmt: skip
        """A reward for each completion, None where a thought counts nowhere; `ig/*` and `thought/*` go to TRL's log."""
        if missing := [c for c in COLUMNS[1:5] if c not in columns]:
            raise ConfigError(f"{self.__name__}: the dataset lacks {', '.join(missing)}: make it by reward.dataset(documents)")
        if self.__name__ in columns:  # `Rollouts` has scored them already
            (groups, gains), rewards = self.scored, list(columns[self.__name__])
        else:
            groups = _wait(self.objective.rewarded(None, self.groups(completion_ids, columns)))
            rewards, gains = self.rewards(groups)
        if log_metric is not None:
            self.log(groups, gains, log_metric)
        if log_extra is not None:
            log_extra("document", list(columns["document_id"]))
            log_extra("target", [self.tokenizer.decode(ids) for ids in columns["target_ids"]])
        return rewards

    def known(self, groups: Sequence[Group]) -> list[float | None]:
        """Rewards of groups that are to be asked for again: see `Rollouts`."""
        rewards, gains = self.rewards(groups)
        self.scored = groups, gains
        return rewards

    def groups(self, completion_ids: Sequence[Sequence[int]], columns: Mapping[str, Any]) -> list[Group]:
        """The completions as groups: neighbours at one position belong together."""
        suffixes = columns.get("suffix_ids") or [()] * len(completion_ids)
        rows = list(zip(columns["document_id"], columns["position"], columns["context_ids"], columns["target_ids"], suffixes,
                        completion_ids, strict=True))  # fmt: skip
        out: list[Group] = []
        for (document, index), same in groupby(rows, key=lambda row: row[:2]):
            found = list(same)
            context, target, suffix = (tuple(ids) for ids in found[0][2:5])
            position = Position(str(document), int(index), context, target, suffix)
            thoughts = tuple(self.thought(row[5]) for row in found)
            out.append(Group(f"{document}@{index}:{len(out)}", position, self.objective.prompt(position), thoughts, 0))
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
        """(rewards in the order of the thoughts, log-probabilities of targets with and without a thought [thoughts])."""
        if self.model is None:
            raise RuntimeError(f"{self.__name__} has no model to score with: pass callbacks=[reward.callback] to the trainer")
        inner = plain(self.model)
        device, scorer = next(inner.parameters()).device, _Gathering(inner)
        arms = {g.id: ids for g in groups if (ids := self.objective.no_think(g.position)) is not None}
        batch, layout = Batch(tuple(groups), ()), replace(self.layout, no_think_ids=arms)
        micros = list(pack(batch, layout, count(batch, layout.cut)))
        ranks = Ranks(device=device) if self.attention else _ranks(device)
        micros += [idle(layout.pad_id)] * (int(ranks.max([float(len(micros))])[0]) - len(micros))
        found: dict[str, list[list[float]]] = {g.id: [] for g in groups}
        with _evaluating(self.model), attention.attending_by(inner, self.attention):
            for micro in micros:
                micro = micro.to(device)
                scores = score(scorer, micro)[0]
                own = (scores.baseline_logps * micro.target_mask).sum(-1)
                scores = self._against(scores, micro)
                if not micro.groups:
                    continue
                reward = rewards_of(self.objective, micro, scores)
                after = (scores.target_logps * micro.target_mask[:, None]).sum(-1)
                base = (scores.baseline_logps * micro.target_mask).sum(-1)
                for b, group in enumerate(micro.groups):
                    rows = range(len(group.thoughts))
                    found[group.id] += [[float(x) for x in (reward[b, g], after[b, g], base[b], own[b])] for g in rows]
        table = np.array([row for g in groups for row in found[g.id]]).reshape(-1, 4)
        rewards = [None if np.isnan(r) else float(r) for r in table[:, 0]]
        return rewards, {"reward": table[:, 0], "after": table[:, 1], "baseline": table[:, 2], "self": table[:, 3]}

    def _against(self, scores: Any, micro: Any) -> Any:
        if self.baseline == "none":
            return replace(scores, baseline_logps=torch.zeros_like(scores.baseline_logps))
        if self.baseline == "frozen" and _has_adapters(self.model):
            with self.model.disable_adapter():  # type: ignore[union-attr]
                return _Shared(plain(self.model))(scores, micro)
        return scores if self.reference is None else self.reference(scores, micro)

    def log(self, groups: Sequence[Group], found: Mapping[str, np.ndarray], log: Callable[..., None]) -> None:
        """What `rewards` found, as metrics."""
        thoughts = [t for g in groups for t in g.thoughts]
        log("thought/closed_frac", float(np.mean([t.finish_reason is FinishReason.CLOSE for t in thoughts])))
        log("thought/uncounted_frac", float(np.isnan(found["reward"]).mean()))
        counted = ~np.isnan(found["reward"])
        if self.layout.target and counted.any():
            sizes = np.array([len(g.position.target_ids) for g in groups for _ in g.thoughts])[counted]
            gain, own = ((found["after"] - found[n])[counted] for n in ("baseline", "self"))
            log("ig/mean", float(gain.mean()))
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


def to_prompt_dataset(documents: Any, tokenizer: Any, *, objective: Any = "rlp", column: str = "text", max_length: int = 2048,
                      epochs: int = 1, seed: int = 0, whole: bool = False, **fields: Any) -> Any:  # fmt: skip
    """Documents → a `datasets.Dataset` of prompts for TRL, a row for each position.

    `documents` is a path or hub id (as `data.path`), a `datasets.Dataset` or `IterableDataset` (stays one) with `column`, or
    a sequence of texts. With `epochs` above 1 every document gives new positions each time; `whole` adds the documents, for a
    next-token loss. TRL takes prompts as text and tokenises them again; positions where that gives other ids than the
    document's are left out, and how many is said in a warning.

    Raises ConfigError where no position is left, and for positions that need the live model (`entropy`).
    """
    import datasets

    if isinstance(objective, str):
        owner, config = parse_section({"name": objective, **fields})
        ensure_delimiters(tokenizer, None, Delimiters(config.open, config.close))
        objective = owner(config, tokenizer)
    if "entropy" in objective.needs:
        raise ConfigError("positions of high entropy need the live model, which a dataset made beforehand has not: take others, "
                          "or a proxy model where the objective has one")  # fmt: skip
    left_out = [0]

    def rows() -> Iterator[dict[str, Any]]:
        i = 0
        for _ in range(epochs):
            for document in _documents(documents, tokenizer, column, max_length):
                for p in objective.positions(document, np.random.default_rng((seed, i))):
                    ids = objective.prompt(p).token_ids
                    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                    if tuple(tokenizer(text)["input_ids"]) != ids:
                        left_out[0] += 1
                        continue
                    values = (text, p.document_id, p.index, list(p.context_ids), list(p.target_ids), list(p.suffix_ids))
                    yield dict(zip(COLUMNS, values, strict=True)) | ({"document_token_ids": document.token_ids} if whole else {})
                i += 1

    if isinstance(documents, datasets.IterableDataset):
        return datasets.IterableDataset.from_generator(rows)
    found = list(rows())
    if not found:
        raise ConfigError(f"no document gives a prompt: {left_out[0]} positions are left out because their text tokenises to "
                          "other ids, the rest has no position for this objective")  # fmt: skip
    if left_out[0]:
        warnings.warn(f"{left_out[0]} of {left_out[0] + len(found)} positions left out: their prompts tokenise to other ids",
                      stacklevel=2)  # fmt: skip
    return datasets.Dataset.from_list(found)


def _documents(given: Any, tokenizer: Any, column: str, max_length: int) -> Iterable[Document]:
    if isinstance(given, str):
        return read_all(DataConfig(path=given, column=column, max_length=max_length), tokenizer)
    known = getattr(given, "column_names", None)
    if known and column not in known:
        raise ConfigError(f"the dataset has no column '{column}': it has {', '.join(known)}")
    cutter = Cutter(DataConfig(path="texts", column=column, max_length=max_length), tokenizer, 2)

    def cut() -> Iterator[Document]:
        for i, row in enumerate(given):
            (pieces,) = cutter.pieces({column: [row if isinstance(row, str) else row[column]]}, [i])
            for k, (ids, answer_at) in enumerate(pieces):
                if len(ids) > 1:
                    yield cutter.document(i, k if len(pieces) > 1 else -1, ids, answer_at, {})

    return cut()


class _LiveModel(TrainerCallback):
    """Hands the trained model to its reward when training begins, and moves the EMA after every step."""

    def __init__(self, reward: ObjectiveReward):
        self.reward = reward

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The model as the trainer has it, adapters included."""
        self.reward.watch(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After the optimizer step."""
        self.reward.objective.progress = state.global_step / max(state.max_steps, 1)
        if self.reward.reference is not None:
            self.reward.reference.update(_Weights(plain(model)))


class _Weights:
    """What `Ema.update` reads."""

    def __init__(self, model: nn.Module):
        self.model = model

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters by name."""
        return self.model.named_parameters(remove_duplicate=False)


class _Shared(Frozen):
    """The trained model itself, for as long as its adapters are off."""

    def __init__(self, model: nn.Module):
        self.model, self.scorer = model, Scorer(model)


def plain(model: Any) -> Any:
    """The causal language model inside whatever wraps it; adapters, being layers, stay active."""
    while not hasattr(model, "get_output_embeddings") or _has_adapters(model):
        model = model.get_base_model() if _has_adapters(model) else model.module
    return model


def _has_adapters(model: Any) -> bool:
    return hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Gathering(Scorer):
    """A scorer for a model that ZeRO-3 has sharded without it: layers are gathered by their own hooks, the head is not."""

    def read(self, hidden: torch.Tensor, labels: torch.Tensor, temperature: Any, want: str) -> Any:
        """With the whole head."""
        with gathered(self.model.get_output_embeddings().parameters()):
            return super().read(hidden, labels, temperature, want)


def _ranks(device: torch.device) -> Ranks:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Ranks(device=device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _wait(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, also where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def __getattr__(name: str) -> Any:
    if name not in ("RLPConfig", "RLPTrainer"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    try:
        from rlpretrain import trl_trainer
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == "trl":
            raise ImportError(f'{name} needs TRL: pip install "rlpretrain[trl]"') from error
        raise
    return getattr(trl_trainer, name)
