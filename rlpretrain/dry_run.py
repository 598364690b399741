"""`rlpretrain train CONFIG --dry-run`: check a configuration, count its model, estimate memory, print the schedule.

Offline, and without weights: the model is built on the meta device from its config.json, which may lie beside the recipe.
For a run of several processes: WORLD_SIZE=8 rlpretrain train CONFIG --dry-run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rlpretrain import compat
from rlpretrain.adapters import check
from rlpretrain.config import ConfigError, DataConfig, ModelConfig, PretrainConfig
from rlpretrain.config.io import build, to_dict
from rlpretrain.memory import GIB, Sizes, count_parameters, memory, peak
from rlpretrain.models import _only_config, load_tokenizer
from rlpretrain.objectives import Objective, parse_section
from rlpretrain.objectives import load as load_objective
from rlpretrain.policy import ds_settings, schedule
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.sources import _files, open_rows, quiet


def dry_run(config: PretrainConfig, beside: Path) -> int:
    """Print everything about a run of `config`, whose file lies in the folder `beside`; 0 if nothing speaks against it.

    Raises ConfigError for whatever a run would refuse and that can be found out without weights and without the network.
    """
    notes: list[str] = []
    objective = make_objective(config, notes)
    check(config)
    shape, where = model_shape(config.model, beside)
    sizes = make_sizes(config, objective, shape, notes)
    documents = count_rows(config.data, notes)
    if config.ntp_data:
        count_rows(config.ntp_data, notes)
    if config.eval.data:
        count_rows(replace(config.data, path=config.eval.data, name=None, split="train", streaming=False), notes)
    if (Path(config.output_dir) / "run.json").exists():
        notes.append(f"{config.output_dir} holds another run: resume it, or choose another output_dir")
    memories = memory(config, shape, sizes)
    rows = [(m.name, f"{m.bytes / GIB:.2f}", m.when, m.formula) for m in memories]
    rows.append(("peak", f"{peak(memories) / GIB:.2f}", "", "always, and the larger of training and sampling"))
    settings = resolved(config, objective, sizes)
    show("Settings that are not defaults, and what auto means here", ("field", "value"), list(settings.items()))
    title = f"{type(shape).__name__} of {where}: P = {sizes.parameters:,} parameters. Memory of a rank of {sizes.ranks}, at most"
    show(title, ("part", "GiB", "when", "formula"), rows)
    show("Schedule", ("", ""), list(timetable(config, objective, sizes, documents).items()))
    print(*(f"note: {note}" for note in notes), sep="\n")
    return 0


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=max(120, Console().width)).print(table)


def model_shape(model: ModelConfig, beside: Path) -> tuple[Any, str]:
    """(the model's Hugging Face configuration, where it was found); ConfigError where there is none.

    It is taken from the folder `model.path`, else from `model.config_beside` (relative to `beside`), else from the hub.
    """
    where, revision = model.path, model.revision
    if _only_config(where) and not model.from_scratch:
        raise ConfigError(f"'{where}' has a configuration but no weights: model.from_scratch: true would initialise them")
    if model.config_beside and not Path(model.path).is_dir():
        where, revision = str(beside / model.config_beside), None
        if not Path(where, "config.json").is_file():
            raise ConfigError(f"model.config_beside: there is no {Path(where, 'config.json')}")
    try:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=model.trust_remote_code), where
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "offline, model.config_beside may name a folder beside the recipe that holds its config.json"
        raise ConfigError(f"no model configuration in '{where}' ({hint}): {reason}") from error


def make_objective(config: PretrainConfig, notes: list[str]) -> Objective:
    """The objective as a run builds it. A tokenizer that is in no folder here is stood in for by one that knows all bytes."""
    owner, section = parse_section(config.objective)
    if Path(config.model.tokenizer or config.model.path).is_dir():
        tokenizer = load_tokenizer(config.model)
    else:
        notes.append("the tokenizer is in no folder here: the words of a template are counted in bytes, an upper bound")
        tokenizer = _stand_in()
    if owner.has_positions:
        ensure_delimiters(tokenizer, None, Delimiters(section.open, section.close))
    return load_objective(config, tokenizer)


def _stand_in() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def make_sizes(config: PretrainConfig, objective: Objective, shape: Any, notes: list[str]) -> Sizes:
    """Ranks, backend and lengths of the run; ConfigError for settings that cannot work together."""
    ranks, policy, backend = int(os.environ.get("WORLD_SIZE", 1)), config.policy, config.policy.backend
    if config.positions_per_step % ranks:
        raise ConfigError(f"positions_per_step {config.positions_per_step} does not divide over {ranks} ranks")
    if backend == "auto":
        backend = "deepspeed" if compat.has_deepspeed() else "torch"
    if backend == "torch" and (policy.zero_stage or policy.deepspeed_config):
        raise ConfigError("policy.zero_stage and policy.deepspeed_config need policy.backend deepspeed")
    if backend == "deepspeed" and not compat.has_deepspeed():
        notes.append(f"DeepSpeed is not installed here: {compat.INSTALL['deepspeed']}")
    dtype = getattr(torch, config.model.dtype)
    stage = ds_settings(policy, config.optim, dtype)["zero_optimization"]["stage"] if backend == "deepspeed" else 0
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    prompt = row = config.data.max_length
    piece = template = 0
    if objective.has_positions:
        c, thought = objective.config, config.sampling.max_thought_tokens + objective.answer_tokens
        template = len(objective.template.head) + len(objective.template.tail)
        prompt = template + config.data.max_length - c.target_length + 1
        row = prompt + thought + 1 + c.target_length
        arm = c.no_think != "raw" or config.ntp_data is not None  # a row of its own for the arm without a thought
        each, around = row, (1 + arm) * row  # tokens a thought, and those that all of them share
        if config.packing == "tree":  # the trunk and what a prompt adds to it; a thought is a branch
            added = prompt if objective.template.head else template
            each, around = row - prompt, config.data.max_length + added + arm * (prompt + c.target_length)
        group, piece = around + config.sampling.thoughts * each, around + each
        if group > config.token_budget:
            notes.append(f"a group at its longest has {group:,} tokens, more than token_budget: there its thoughts are "
                         "spread over micro-batches, and the step scores everything once more")  # fmt: skip
    most = getattr(shape.get_text_config(), "max_position_embeddings", None)
    room = most - (row - template - config.data.max_length) if most else config.data.max_length
    if room < 2:
        raise ConfigError(f"the model has {most} positions: sampling.max_thought_tokens leaves no room for a context")
    if room < config.data.max_length:
        notes.append(f"a document over {room} tokens leaves no room in the model's {most} positions: lower data.max_length")
    if objective.has_positions and config.engine.name in ("vllm_server", "ray"):
        notes.append(f"engine {config.engine.name}: what it needs on its own devices is not in this table")
    if objective.has_positions and config.engine.name == "vllm_local" and config.engine.kv_cache_gib is None:
        notes.append(f"engine.kv_cache_gib: null lets vLLM fill {config.engine.gpu_memory_utilization:.0%} of the device, "
                     "its weights included")  # fmt: skip
    micro = max(config.token_budget, row, piece)
    parameters, trained, linear = count_parameters(shape, config.model.trust_remote_code, policy.lora)
    return Sizes(parameters, trained, linear, ranks, backend, stage, device, prompt, row, micro)


def count_rows(data: DataConfig, notes: list[str]) -> int | None:
    """Rows of local files; None for a stream, and for what is not here. ConfigError for files that cannot be read."""
    if "://" in data.path or not (Path(data.path).expanduser().exists() or _files(data)):
        notes.append(f"'{data.path}' was not looked for: it is no file or folder here, so it must be on the hub")
        return None
    with quiet():
        rows = open_rows(data)
    return None if data.streaming else len(rows)


def timetable(config: PretrainConfig, objective: Objective, sizes: Sizes, documents: int | None) -> dict[str, str]:
    """Steps, positions, thoughts, tokens, learning rates and documents, in words."""
    n, s, thinks = config.positions_per_step, config.sampling, objective.has_positions
    each = objective.config.positions_per_document if thinks else 1
    steps, needed = config.max_steps, -(-n // each)
    if steps is None and config.data.streaming:
        raise ConfigError("a stream has no known length: give max_steps instead of epochs")
    if steps is None and documents is not None:
        steps = max(1, -(-int((config.epochs or 1.0) * documents * each) // n))

    def whole(per_step: int) -> str:
        return f"{per_step:,} a step" + (f", {per_step * steps:,} in all" if steps else "")

    out = {"steps": f"{steps:,}" if steps else f"unknown offline: {config.epochs:g} epochs", "positions": whole(n)}
    out["document tokens, at most"] = whole(needed * config.data.max_length)
    if thinks:
        out["thoughts"] = whole(n * s.thoughts)
        out["sampled tokens, at most"] = whole(n * s.thoughts * s.max_thought_tokens)
        out["scored tokens, at most"] = f"{whole(n * s.thoughts * sizes.row)}, in rows of up to {sizes.row:,}"
    warm, inner = config.optim.warmup_steps, config.loss.inner_epochs
    rate = schedule(config.optim, steps or 1, inner)
    places = sorted({1, max(1, warm), *((max(1, steps // 2), steps) if steps else ())})
    shown = [i for i in places if not steps or i <= steps]
    rates = ", ".join(f"{config.optim.lr * rate(i * inner - 1):.2e} (step {i})" for i in shown)
    out["learning rate"] = f"{rates}; {warm} steps of warm-up, then {config.optim.schedule}"
    out["documents, at least"] = whole(needed)
    if documents is None:
        return out | {"rows there are": "unknown offline"}
    epochs = f": {needed * steps / documents:.3g} epochs" if steps else ""
    return out | {"rows there are": f"{documents:,}{epochs}" + "; long ones are split" * (config.data.long == "split")}


def resolved(config: PretrainConfig, objective: Objective, sizes: Sizes) -> dict[str, Any]:
    """Dotted names and values of what the user or the recipe set, with `auto` resolved."""
    plain = to_dict(build({"model": config.model.path, "data": config.data.path}))
    usual = _flat(plain | {"objective": asdict(type(objective).Config())})
    given = _flat(to_dict(config) | {"objective": asdict(objective.config)})
    out = {"model.path": config.model.path, "data.path": config.data.path, "objective.name": config.objective.get("name", "rlp")}
    out |= {k: v for k, v in given.items() if v is not None and usual.get(k) != v}
    autos = {"policy.backend": (config.policy.backend, sizes.backend), "device": (config.device, sizes.device)}
    return out | {k: f"auto: {found}" for k, (asked, found) in autos.items() if asked == "auto"}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values under dotted names."""
    parts = ({f"{k}.{n}": x for n, x in _flat(v).items()} if isinstance(v, Mapping) else {k: v} for k, v in values.items())
    return {n: x for part in parts for n, x in part.items()}
