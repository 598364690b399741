"""Check that the outputs of a run replace neither its inputs nor files that no run wrote."""

from __future__ import annotations

from pathlib import Path

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.training.checkpoint import holds_run
from rollout.folders import MARK


def check(config: PretrainConfig) -> None:
    """Raise ConfigError where the outputs of a run would replace its inputs, or folders that no run wrote."""
    folder = Path(config.output_dir)
    names = ["model", "nonfinite", "tensorboard", "weights"]
    names += ["adapter"] if config.policy.lora else []
    names += ["start"] if config.engine.loads_from_disk else []
    names += ["rollouts"] if config.save_rollouts else []
    written = {name: (folder / name).resolve() for name in names}
    for field, path in _inputs(config).items():
        for name, out in written.items():
            if path.resolve().is_relative_to(out):
                raise ConfigError(
                    f"{field} is {path}, and a run with output_dir {folder} writes its own '{name}' there: "
                    "choose another output_dir"
                )
    if holds_run(folder):  # the folder is resumed with --resume, or `checkpoint.open_folder` refuses it
        return
    for name in ("model", "adapter", "start", "rollouts"):
        path = folder / name
        if name in written and path.exists() and not (path / MARK).is_file():
            raise ConfigError(
                f"{path} exists, and no run wrote it, but this run would replace it: choose another "
                "output_dir"
            )


def _inputs(config: PretrainConfig) -> dict[str, Path]:
    """The files and folders that a configuration names and that exist."""
    paths = {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "data.path": config.data.path,
        "ntp_data.path": config.ntp_data.path if config.ntp_data else None,
        **_held_out_files(config.eval.data),
        **{f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()},
        "replay": config.replay,
        "policy.deepspeed_config": config.policy.deepspeed_config,
        **config.engine.files(),
    }
    named = {field: Path(str(path)) for field, path in paths.items() if path}
    return {field: path for field, path in named.items() if path.exists()}


def _held_out_files(data: str | dict[str, str] | None) -> dict[str, str | None]:
    """The files of `eval.data`, by the names of their fields."""
    return {f"eval.data.{k}": v for k, v in data.items()} if isinstance(data, dict) else {"eval.data": data}
