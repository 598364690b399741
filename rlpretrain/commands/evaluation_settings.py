"""What `rlpretrain eval` evaluates: a model with the options given, or a run with its own settings."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpretrain.commands.arguments import objective_section
from rlpretrain.config import ConfigError, ModelConfig, PretrainConfig

DEFAULTS: Mapping[str, Any] = {
    "column": "text",
    "thoughts": 4,
    "positions": 1,
    "temperature": 1.0,
    "max_thought_tokens": 512,
    "max_length": 2048,
    "dtype": "float32",
    "seed": 0,
}
"""Of the options that a run's own settings replace."""
_FROM_RUN = {
    "data": ("column", "answer_column", "answer_join", "max_length", "long", "append_eos"),
    "sampling": ("temperature", "top_p", "top_k", "banned_tokens", "max_thought_tokens"),
    "model": ("dtype", "attn_implementation", "trust_remote_code"),
}
"""What is taken over from a run's configuration."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate, and how: `config.model` is that model."""

    config: PretrainConfig
    frozen: ModelConfig | None
    """The initial model, if it is another."""
    has_documents: bool = True
    """False: only tasks of lm-eval are answered."""


def subject_of(args: argparse.Namespace) -> Subject:
    """The subject that the options name. `args.model` is a model, or the folder of a run.

    A run gives its trained model, its objective and its settings; options that were given come first. The
    frozen model is that of `initial_model`. Raises ConfigError for a run without a model, and if no documents
    are named.
    """
    from rlpretrain.config.io import build

    run = run_config(args.model)
    path = str(model_of_run(Path(args.model))) if run else args.model
    model = {"path": path} | _model_settings(args, run)
    values = {
        "model": model,
        "objective": _objective(args, run),
        "output_dir": os.devnull,
        "data": _data(args, run),
        "sampling": _kept(run, "sampling")
        | _given(args, ("temperature", "max_thought_tokens"), use_defaults=not run),
        "eval": _evaluation(args, run),
        "seed": _value(args, "seed", run),
        "device": args.device,
    }
    config = build(values)
    frozen = initial_model(args.frozen, config.model)
    return Subject(config, frozen, has_documents=values["data"]["path"] != os.devnull)


def initial_model(given: str | None, model: ModelConfig) -> ModelConfig | None:
    """The model that another is compared with: `given`, else the one from which the run began that saved it.

    None if there is no such run, if the run began from scratch, and, with a line that says so, if its initial
    model is not where it was.
    """
    section = _section_of_run(model.path) or {}
    path = given
    if path is None:
        if not section or section.get("from_scratch"):
            return None
        path = str(section["path"])
        if path.startswith(("/", ".", "~")) and not Path(path).expanduser().exists():
            print(f"the base of the run, {path}, is not here: give --frozen to see its numbers beside")
            return None
    if path == model.path:
        return None
    names = ("tokenizer", "revision", "quantization") if path == section.get("path") else ()
    return replace(model, path=path, **{name: section[name] for name in names if name in section})


def _section_of_run(model: str) -> dict[str, Any] | None:
    """The section `model` of the run that saved a model in one of its folders; None if there is no run."""
    if not Path(model).exists():
        return None  # a hub id is no path, whatever run the present folder belongs to
    for folder in Path(model).resolve().parents[:3]:
        if run := run_config(str(folder)):
            return run["model"]
    return None


def run_config(folder: str) -> dict[str, Any]:
    """The configuration of a run's folder; empty if the folder holds no run."""
    record = Path(folder) / "run.json"
    if not record.is_file():
        return {}
    try:
        return json.loads(record.read_text())["config"]
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"{record} has no configuration: {error}") from None


def model_of_run(folder: Path) -> Path:
    """The trained model of a run; ConfigError if it has none."""
    model = folder / "model"
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"{folder} is a run without a trained model ({model} is missing): let it end (rlpretrain train "
            "--resume), or name a model's folder"
        )
    return model


def _given(args: argparse.Namespace, names: tuple[str, ...], use_defaults: bool) -> dict[str, Any]:
    """The options that were given, and with `use_defaults` the defaults of the others."""
    values = {name: getattr(args, name) for name in names}
    if use_defaults:
        values = {name: DEFAULTS[name] if value is None else value for name, value in values.items()}
    return {name: value for name, value in values.items() if value is not None}


def _value(args: argparse.Namespace, name: str, run: Mapping[str, Any]) -> Any:
    """An option, else the run's setting of that name, else the default."""
    given = getattr(args, name)
    return run.get(name, DEFAULTS[name]) if given is None else given


def _kept(run: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The settings that are taken over from a section of a run."""
    stored = run.get(section, {})
    return {name: stored[name] for name in _FROM_RUN[section] if name in stored}


def _model_settings(args: argparse.Namespace, run: Mapping[str, Any]) -> dict[str, Any]:
    settings = _kept(run, "model") | _given(args, ("dtype",), use_defaults=not run)
    if args.trust_remote_code:
        settings["trust_remote_code"] = True
    return settings


def _objective(args: argparse.Namespace, run: Mapping[str, Any]) -> dict[str, Any]:
    given = args.objective
    objective = run.get("objective", {"name": "rlp"}) if given is None else objective_section(given)
    if args.positions is not None:
        objective = dict(objective) | {"positions_per_document": args.positions}
    return objective


def _data(args: argparse.Namespace, run: Mapping[str, Any]) -> dict[str, Any]:
    path, section = args.data or (run.get("eval") or {}).get("data"), "data"
    held_out = (run.get("eval") or {}).get("data")
    if isinstance(held_out, dict):
        if path is held_out:
            raise ConfigError(
                f"the run has several held-out files: name one as --data: {', '.join(held_out)}"
            )
        section = args.data if args.data in held_out else "data"
        path = held_out.get(args.data, path)
    if path is None and args.tasks and not args.pass_at:
        path = os.devnull
    if path is None:
        run_hint = "the run has no eval.data" if run else "a model alone names none"
        raise ConfigError(f"no documents to evaluate on: give --data FILE ({run_hint})")
    columns = {"meta_columns": [args.by] if args.by else []}
    given = _given(args, ("column", "max_length"), use_defaults=not run)
    given |= _given(args, ("answer_column", "answer_join"), use_defaults=False)
    stored = run if section == "data" else {"data": run["data"]["sources"][section]}
    return {"path": path} | _kept(stored, "data") | columns | given


def _evaluation(args: argparse.Namespace, run: Mapping[str, Any]) -> dict[str, Any]:
    stored = {name: (run.get("eval") or {}).get(name) for name in ("thoughts", "positions")}
    kept = {name: value for name, value in stored.items() if value is not None}
    given = _given(args, ("thoughts", "positions", "documents"), use_defaults=False)
    defaults = {name: DEFAULTS[name] for name in ("thoughts", "positions")}
    return defaults | kept | given
