"""`rlpretrain train CONFIG --dry-run`: check a configuration, count its model, estimate memory, print the schedule.

Offline, and without weights: the model is built on the meta device from its config.json, which may lie beside the recipe.
Memory is an estimate for planning: an upper bound on what tensors need, without the allocator's slack, the CUDA context,
collective buffers and offloading. Plan for several processes with WORLD_SIZE=8 rlpretrain train ... --dry-run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlpretrain import compat
from rlpretrain.config import ConfigError, DataConfig, ModelConfig, PretrainConfig
from rlpretrain.config_io import build, to_dict
from rlpretrain.models import load_tokenizer
from rlpretrain.objectives import Objective, parse_section
from rlpretrain.objectives import load as load_objective
from rlpretrain.policy import ds_settings, schedule
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.sources import _files, open_rows

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will be, as far as it can be known before it starts."""

    parameters: int
    model_from: str
    ranks: int
    backend: str
    stage: int
    device: str
    prompt: int
    """Longest prompt in tokens: template, context and open tag."""
    row: int
    """Longest row in tokens: prompt, thought, close tag and target."""
    micro: int
    """Most tokens of one micro-batch."""
    documents: int | None
    """Rows of the data; None where they cannot be counted here."""
    steps: int | None
    """None: epochs of documents that cannot be counted here."""
    notes: list[str]


def dry_run(config: PretrainConfig, beside: Path) -> int:
    """Check and print everything about a run of `config`, whose file lies in the folder `beside`; 0 if it can work.

    The model's configuration is taken from the folder `model.path`, else from `model.config_beside` (a folder relative to
    `beside`), else from the hub. Raises ConfigError for whatever a run would refuse and that can be found out here.
    """
    from rich.console import Console
    from rich.table import Table

    shape, where = model_shape(config.model, beside)
    plan = make_plan(config, shape, where)
    console = Console(width=max(110, Console().width))
    table = Table("field", "value", title="Settings that differ from the defaults, and what `auto` means here")
    for name, value in resolved(config, plan).items():
        table.add_row(name, str(value))
    console.print(table)
    console.print(f"model: {type(shape).__name__} from {plan.model_from}, {plan.parameters:,} parameters")

    items = memory(config, shape, plan)
    table = Table("per rank", "GiB", "when", "formula", title=f"Memory, at most, on each of {plan.ranks} rank(s)")
    for item in items:
        table.add_row(item.name, f"{item.bytes / GIB:.2f}", item.when, item.formula)
    table.add_row("peak", f"{peak(items) / GIB:.2f}", "", "always + the larger of training and sampling", style="bold")
    console.print(table)

    table = Table("schedule", "", title="Schedule")
    for name, value in timetable(config, plan).items():
        table.add_row(name, value)
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}")
    return 0


def model_shape(model: ModelConfig, beside: Path) -> tuple[Any, str]:
    """(the model's Hugging Face configuration, where it was found); ConfigError where it is nowhere."""
    where, common = model.path, {"trust_remote_code": model.trust_remote_code}
    if model.config_beside and not Path(model.path).is_dir():
        where = str(beside / model.config_beside)
        if not (Path(where) / "config.json").is_file():
            raise ConfigError(f"model.config_beside: there is no {Path(where) / 'config.json'}")
    elif not Path(model.path).is_dir():
        common["revision"] = model.revision
    try:
        return AutoConfig.from_pretrained(where, **common), where
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "offline, a folder with its config.json beside the recipe would do: model.config_beside"
        raise ConfigError(f"no model configuration in '{where}' ({hint}): {reason}") from error


def make_plan(config: PretrainConfig, shape: Any, where: str) -> Plan:
    """Everything that is derived from the settings; ConfigError for those that cannot work together."""
    notes: list[str] = []
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.positions_per_step % ranks:
        raise ConfigError(f"positions_per_step {config.positions_per_step} does not divide over {ranks} ranks")
    objective, exact = _objective(config)
    if not exact:
        notes.append("the tokenizer is not here: template lengths are counted in bytes, an upper bound")
    backend, stage = _backend(config, notes)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    context, micro = config.data.max_length, max(config.token_budget, config.data.max_length)
    prompt = row = context
    if objective.has_positions:
        extra = len(objective.template.head) + len(objective.template.tail)
        prompt = extra + context - objective.config.target_length + 1
        row = prompt + config.sampling.max_thought_tokens + 1 + objective.config.target_length
        arms = 1 + (objective.config.no_think != "raw" or config.ntp_data is not None)
        micro = max(config.token_budget, (config.sampling.thoughts + arms) * row)
        if micro > config.token_budget:
            notes.append(f"one group at its longest is {micro:,} tokens: it gets a micro-batch of its own, above token_budget")
    most = getattr(shape.get_text_config(), "max_position_embeddings", None)
    needed = row - (0 if exact or row == context else extra)
    if most and needed > most:
        raise ConfigError(f"up to {needed} tokens in a row, and the model has {most} positions: lower data.max_length or "
                          "sampling.max_thought_tokens")  # fmt: skip
    documents = count_rows(config.data, notes)
    for other in (config.ntp_data, replace(config.data, path=config.eval.data, name=None) if config.eval.data else None):
        if other is not None:
            count_rows(other, notes)
    steps, per_document = config.max_steps, getattr(objective.config, "positions_per_document", 1)
    if steps is None and config.data.streaming:
        raise ConfigError("a stream has no known length: give max_steps instead of epochs")
    if steps is None and documents is not None:
        steps = max(1, -(-int(config.epochs * documents * per_document) // config.positions_per_step))
    if (Path(config.output_dir) / "run.json").exists():
        notes.append(f"{config.output_dir} holds another run: resume it, or choose another output_dir")
    return Plan(count_parameters(shape, config.model), where, ranks, backend, stage, device, prompt, row, micro, documents,
                steps, notes)  # fmt: skip


def count_parameters(shape: Any, model: ModelConfig) -> int:
    """Parameters of the model as transformers builds it, tied ones once; nothing is allocated."""
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(shape, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        raise ConfigError(f"'{model.path}' is no causal language model that transformers can build: {error}") from error
    return sum(p.numel() for p in built.parameters())


def count_rows(data: DataConfig, notes: list[str]) -> int | None:
    """Rows of local files, None for streams, and for a hub id, which is left alone; ConfigError for what cannot be read."""
    if "://" in data.path or (not Path(data.path).expanduser().is_dir() and not _files(data)):
        notes.append(f"'{data.path}' was not looked for: no file or folder here, so it is a URL or an id of the hub")
        return None
    rows = open_rows(data)
    return None if data.streaming else len(rows)


def timetable(config: PretrainConfig, plan: Plan) -> dict[str, str]:
    """The schedule in words: steps, positions, thoughts, tokens at most, learning rates, documents."""
    owner, section = parse_section(config.objective)
    unit = "positions" if owner.has_positions else "documents"
    n, documents = config.positions_per_step, config.positions_per_step
    out = {"steps": f"{plan.steps:,}" if plan.steps else f"unknown offline ({config.epochs:g} epochs)", f"{unit} a step": f"{n:,}"}
    tokens = n * config.data.max_length
    out["document tokens a step, at most"] = f"{tokens:,}" + (f"; {tokens * plan.steps:,} in all" if plan.steps else "")
    if owner.has_positions:
        s = config.sampling
        out["thoughts a step"] = f"{n * s.thoughts:,} ({s.thoughts} a position)"
        out["sampled tokens a step, at most"] = f"{n * s.thoughts * s.max_thought_tokens:,}"
        out["scored tokens a step, at most"] = f"{n * s.thoughts * plan.row:,} in rows of up to {plan.row:,}"
        documents = -(-n // section.positions_per_document)
    warm, last = config.optim.warmup_steps, plan.steps or config.optim.warmup_steps + 1
    rate = schedule(config.optim, last)
    known = last if plan.steps or config.optim.schedule == "constant" else 0
    places = sorted({1, max(1, warm // 2), warm + 1, last // 2, last} & set(range(1, known + 1))) or [1]
    out["learning rate"] = ", ".join(f"step {i}: {config.optim.lr * rate(i - 1):.2e}" for i in places)
    out["warm-up, then"] = f"{warm} steps, {config.optim.schedule}"
    needed = f"{documents * plan.steps:,}" if plan.steps else "unknown offline"
    out["documents needed, at least"] = needed
    if plan.documents is None:
        out["documents there"] = "unknown offline"
    else:
        epochs = f", {documents * plan.steps / plan.documents:.2f} epochs" if plan.steps else ""
        out["documents there"] = f"{plan.documents:,} rows{epochs}" + (", longer ones are split" if config.data.long == "split" else "")
    return out


def resolved(config: PretrainConfig, plan: Plan) -> dict[str, Any]:
    """Dotted names and values of all settings that are not defaults, with `auto` resolved."""
    plain = build({"model": config.model.path, "data": config.data.path, "max_steps": config.max_steps, "epochs": config.epochs})
    given, usual = _flat(to_dict(config)), _flat(to_dict(plain))
    owner, section = parse_section(config.objective)
    objective = {k: v for k, v in asdict(section).items() if v != asdict(owner.Config())[k]}
    always = {"model.path", "data.path", "max_steps", "epochs"}
    out = {k: v for k, v in given.items() if not k.startswith("objective.") and v is not None and (k in always or usual.get(k) != v)}
    out |= {"objective.name": config.objective.get("name", "rlp")} | {f"objective.{k}": v for k, v in objective.items()}
    if config.policy.backend == "auto":
        out["policy.backend"] = f"auto: {plan.backend}"
    if config.device == "auto":
        out["device"] = f"auto: {plan.device}"
    return out


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out


def _objective(config: PretrainConfig) -> tuple[Objective, bool]:
    """The objective as a run would build it, and whether with the model's own tokenizer: only where that is in a folder here."""
    owner, section = parse_section(config.objective)
    local = Path(config.model.tokenizer or config.model.path).is_dir()
    tokenizer = load_tokenizer(config.model) if local else _stand_in()
    if owner.has_positions:
        ensure_delimiters(tokenizer, None, Delimiters(section.open, section.close))
    return load_objective(config, tokenizer), local


def _stand_in() -> Any:
    """A tokenizer that can write any text, a token a byte: enough to check templates, markers and positions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def _backend(config: PretrainConfig, notes: list[str]) -> tuple[str, int]:
    """(torch or deepspeed, ZeRO stage) of a run here."""
    policy, backend = config.policy, config.policy.backend
    if backend == "auto":
        backend = "deepspeed" if compat.has_deepspeed() else "torch"
    if backend == "torch" and (policy.zero_stage or policy.deepspeed_config):
        raise ConfigError("policy.zero_stage and policy.deepspeed_config need policy.backend deepspeed")
    if backend == "torch":
        return backend, 0
    if not compat.has_deepspeed():
        notes.append(f"DeepSpeed is not installed here: {compat.INSTALL['deepspeed']}")
    settings = ds_settings(policy, config.optim, getattr(torch, config.model.dtype))
    return backend, settings["zero_optimization"]["stage"]
