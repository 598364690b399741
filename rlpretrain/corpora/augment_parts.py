"""What `augment` needs of a configuration: first what loads no weights, then generator and scorer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from rlpretrain import models
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.engines import BUILT_IN, ServerConfig
from rlpretrain.corpora.text_places import RowReader
from rlpretrain.corpora.thought_gains import GainScorer, check_rewards
from rlpretrain.data.data_files import find_files
from rlpretrain.data.opening import open_rows, quiet, reads_cells
from rlpretrain.models.lengths import Names, check_engine, check_rows, limit_of
from rlpretrain.objectives import Objective, load_objective, thought_tags
from rlpretrain.prompts import TEMPLATES, Delimiters, ensure_delimiters
from rlpretrain.ranks import join
from rlpretrain.rollouts.engines import find_engine, make_engine, write_start
from rlpretrain.scoring.checks import check_model
from rlpretrain.scoring.reference_model import check_vocabulary, load_reference, reference_shape
from rollout.engine import Engine

NAMES = Names("the data", "--max-length", "--max-thought-tokens")
"""Options that make rows long."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked configuration, the rows of its data, and how they are read."""

    config: PretrainConfig
    tokenizer: Any
    tags: Delimiters
    added: list[str]
    """Tags that the model's own tokenizer lacks."""
    rows: Dataset
    reader: RowReader
    thoughts: int
    size: dict[str, Any]
    """Rows and bytes of the data: an interrupted command goes on with the same ones only."""

    @property
    def generator(self) -> str:
        """The model that samples, with its revision."""
        model = self.config.model
        return f"{model.path}@{model.revision}" if model.revision else model.path


@dataclass(frozen=True, slots=True)
class Samplers:
    """What samples thoughts, and what scores them."""

    objective: Objective
    engine: Engine
    scorer: GainScorer | None


def make_plan(config: PretrainConfig, where: str, thoughts: int, chat: bool, fit_length: bool) -> Plan:
    """Check everything that needs no weights; ConfigError that says what to change."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "augment is one process: for more devices use engine ray, vllm_server or sglang_server, "
            "or start it for parts "
            "of the data (--data.split 'train[:50%]') with an --out each"
        )
    data = config.data
    if data.sources or data.source or data.streaming:
        raise ConfigError(
            "augment reads rows by their numbers: give one file, folder or hub dataset, without 'streaming', "
            "'sources' or a 'source' of your own"
        )
    tags = thought_tags(config.objective)
    if tags is None:
        raise ConfigError(f"objective {config.objective['name']} has no thoughts to sample: use rlp")
    find_engine(config.engine)
    with quiet():
        rows = open_rows(data)
    assert isinstance(rows, Dataset), "only a stream is another kind"
    tokenizer = models.load_tokenizer(config.model)
    added = ensure_delimiters(tokenizer, None, tags)
    if added and isinstance(config.engine, ServerConfig):
        raise ConfigError(
            f"the tokenizer of {config.model.path} lacks {' and '.join(added)}, and so do its servers: start "
            "them on a checkpoint that `rlpretrain tag` wrote, and name it as --model too"
        )
    if config.reference.path:
        check_vocabulary(config, tags)
    if chat:
        section = dict(config.objective)
        section["template"] = chat_template(tokenizer, section.get("template", "raw"), tags)
        config = replace(config, objective=section)
    objective = load_objective(config, tokenizer)
    if "entropy" in objective.needs and where != "inferable":
        raise ConfigError("positions 'entropy' need a scorer, which only --where inferable has")
    if where == "inferable":
        check_rewards(objective)
    config = _fitting(config, objective, fit_length, objective.shortest_target if where == "after" else 0)
    reader = RowReader(config.data, tokenizer, 2, reads_cells(data))
    sizes = [os.path.getsize(file) for file in find_files(data) if "://" not in file]
    size = {"rows": len(rows), "bytes": sum(sizes)}
    return Plan(config, tokenizer, tags, added, rows, reader, thoughts, size)


def chat_template(tokenizer: Any, template: str, tags: Delimiters) -> str:
    """The template inside the tokenizer's chat template, as a user's message; the answer is the thought.

    The open tag with which some chat templates begin the answer is left out, since every prompt ends with it,
    and so is the BOS, which every document of such a tokenizer begins with.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--chat: the tokenizer has no chat template")
    message = TEMPLATES.get(template, template).strip()
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if tokenizer.bos_token and begins:
        written = written.removeprefix(tokenizer.bos_token)
    if written.rstrip().endswith(tags.open):
        written = written.rstrip().removesuffix(tags.open)
    return written


def _fitting(config: PretrainConfig, objective: Objective, fit: bool, more: int) -> PretrainConfig:
    """The configuration with the longest documents that the model takes, if `fit`, and without end tokens.

    `more` are tokens of a document that the objective expects behind the thought, and that stand before it.
    """
    limit, length = limit_of(reference_shape(config.model)), config.data.max_length
    if fit and limit is not None:
        added = objective.window(length + more).row - length
        length = max(min(length, limit.tokens - added), min(length, objective.min_length))
    check_rows(objective, length + more, limit, NAMES)
    return replace(config, data=replace(config.data, max_length=length, append_eos=False))


def load_samplers(plan: Plan, scores: bool, stack: ExitStack, say: Callable[[str], None]) -> Samplers:
    """Load the model and make engine and scorer; `stack` closes them.

    A model that samples elsewhere, and scores nothing, is not loaded here.
    """
    config = plan.config
    ranks = join(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    own = config.engine.name in BUILT_IN and not config.engine.reads_policy
    is_elsewhere = own and not plan.added and not (scores and not config.reference.path)
    if is_elsewhere:
        model, tokenizer = _without_weights(config), plan.tokenizer
    else:
        model, tokenizer, _ = models.load_with_tokenizer(config.model, plan.tags, config.seed)
        check_model(model.to(ranks.device))
        if plan.added:
            say(f"added to the tokenizer, with untrained embeddings: {', '.join(plan.added)}")
    scoring = model
    if scores and config.reference.path:
        scoring = load_reference(config, plan.tags, model, ranks.device)
    objective = load_objective(config, tokenizer)
    scorer = GainScorer(scoring, config, tokenizer, stack) if scores else None
    if scorer is not None:
        check_rows(scorer.objective, config.data.max_length, limit_of(scoring), NAMES)
    start = write_start(config, model, tokenizer, ranks, changed=bool(plan.added))
    # an engine has room for the target behind the longest prompt: after a whole document there is none
    room = replace(config.data, max_length=config.data.max_length + objective.shortest_target)
    engine = make_engine(
        replace(config, data=room), model, tokenizer, objective, ranks, shares=True, start=start, frozen=True
    )
    stack.callback(engine.close)
    check_engine(objective, config.data.max_length, engine.info.max_model_len, NAMES)
    if config.engine.name not in BUILT_IN:  # the contract of EngineContext
        engine.sync(lambda: _weights_of(model), 0)
    objective = objective.with_setting(replace(objective.setting, thoughts=plan.thoughts))
    return Samplers(objective, engine, scorer)


def _weights_of(model: nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
    return [(name, weight.detach()) for name, weight in model.named_parameters(remove_duplicate=False)]


def _without_weights(config: PretrainConfig) -> nn.Module:
    """The model on the meta device: what engines elsewhere ask of it is in its configuration."""
    trust = config.model.trust_remote_code
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(reference_shape(config.model), trust_remote_code=trust)
