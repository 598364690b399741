"""The model of a TRL trainer: found inside its wrappers, and handed to a reward by a callback."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from rlpretrain.compat import sharded, text_config_of, trl_vllm_on_cpu
from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.saving import save_start
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.references import Ema
from rlpretrain.tracking.health import TRL_FIELDS, Health
from rlpretrain.trl.prepared import ends_of
from rlpretrain.trl.prompts import check_lengths, longest_row
from rollout.folders import usual_mode

EMA = "ema.safetensors"
"""File of a checkpoint that holds the moving average of a reward's baseline."""


class LiveModel(TrainerCallback):
    """Hands the trained model to its reward when training begins, and moves the EMA after every step.

    Before the trainer starts its vLLM, the callback sets what vLLM needs: the token that ends a thought,
    a checkpoint with the added tags, and the settings that a CPU requires.
    """

    def __init__(self, reward: Any):
        self.reward = reward
        self.health = Health(TRL_FIELDS)
        self.init_kwargs: dict[str, Any] | None = None  # how the model was loaded
        self.original_name: str | None = None  # of the model in its configuration, while it is replaced

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The trainer is made, but not yet its vLLM."""
        if self.reward.late:
            raise ConfigError(
                "a reward without model and tokenizer is for TRL's command line, which has no callbacks: "
                "give it both here"
            )
        reward, inner, adapters = self.reward, plain(model), adapters_of(model)
        if reward.baseline in ("frozen", "ema") and adapters is None and not sharded(model):
            reward.initial = {name: p.detach().to("cpu", copy=True) for name, p in inner.named_parameters()}
        vllm = getattr(args, "use_vllm", False)
        colocated = getattr(args, "vllm_mode", "") == "colocate"
        if vllm and not reward.objective.answer_tokens:
            args.generation_kwargs = {"stop_token_ids": [reward.close_id], **(args.generation_kwargs or {})}
        if vllm and reward.added and not colocated:
            raise ConfigError(
                f"{' and '.join(reward.added)} were added to the model just now, and the vLLM server does "
                "not have them: save model and tokenizer, start the server and the training from there"
            )
        loads_reference = bool(getattr(args, "beta", 0)) and adapters is None
        loads_again = bool(reward.added) and (vllm or loads_reference)
        if loads_again and sharded(inner):
            raise ConfigError(
                f"{' and '.join(reward.added)} were added to the model just now, and it is sharded already: "
                "save model and tokenizer, start the training from there"
            )
        # Not before: TRL would warn that it ignores them. Not later: it loads its reference model with them.
        if self.init_kwargs is not None:
            args.model_init_kwargs = self.init_kwargs
        if loads_again:
            start, ranks = Path(args.output_dir) / "start", ranks_of(torch.device("cpu"))
            if ranks.first:
                save_start(inner, reward.tokenizer, start)
            ranks.barrier()
            inner.name_or_path = str(start)  # what TRL's vLLM loads
            if loads_reference:  # from this path, for its KL term
                self.original_name = inner.config._name_or_path
                inner.config._name_or_path = str(start)
        if vllm and colocated:
            trl_vllm_on_cpu()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """The reward gets the model as the trainer has it, adapters included."""
        reward, inner = self.reward, plain(model)
        if self.original_name is not None:
            inner.config._name_or_path, self.original_name = self.original_name, None
        _check_same_model(reward, inner, getattr(args, "use_vllm", False))
        data = getattr(train_dataloader, "dataset", None)
        check_lengths(reward.objective, limit_of(inner), [*reward.longest, longest_row(data)], args)
        reward.watch(model)
        reward.initial = {}
        if state.global_step and isinstance(reward.reference, Ema):
            given = args.resume_from_checkpoint
            named = isinstance(given, str | PathLike) and Path(given).is_dir()
            folder = Path(given) if named else _checkpoint(args, state)
            average = _load_average(folder, state)
            if average is not None:
                reward.reference.load_state_dict(average)
            else:
                warnings.warn(
                    f"{folder} has no {EMA} of this run: the moving average begins again, at the weights the "
                    "run began with. If the checkpoint is elsewhere, name it in the arguments too "
                    "(resume_from_checkpoint)",
                    stacklevel=2,
                )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The moving average goes into the checkpoint."""
        folder = _checkpoint(args, state)
        if isinstance(self.reward.reference, Ema) and state.is_world_process_zero and folder.is_dir():
            work = folder / f".{EMA}.tmp"
            average = {name: p.contiguous() for name, p in self.reward.reference.state_dict().items()}
            save_file(average, work, metadata={"log": _hash_log(state)})
            work.chmod(usual_mode(folder))
            work.replace(folder / EMA)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Warn once of each thing that keeps the training from learning (rlpretrain/tracking/health.py)."""
        row = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        for finding in self.health.observe(state.global_step, row):
            if state.is_world_process_zero:
                warnings.warn(f"step {finding.step}: {finding}", stacklevel=2)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After the optimizer step."""
        if self.reward.reference is not None:
            self.reward.reference.update(_Weights(plain(model)))


class _Weights:
    """A model in the form that `Ema.update` reads."""

    def __init__(self, model: nn.Module):
        self.model = model

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters by name."""
        return self.model.named_parameters(remove_duplicate=False)


def plain(model: Any) -> Any:
    """The causal language model inside whatever wraps it; adapters, being layers, stay active."""
    while not hasattr(model, "get_output_embeddings") or _has_adapters(model):
        model = model.get_base_model() if _has_adapters(model) else model.module
    return model


def adapters_of(model: Any) -> Any:
    """The PEFT model inside whatever wraps it; None if there is none."""
    while not _has_adapters(model) and hasattr(model, "module"):
        model = model.module
    return model if _has_adapters(model) else None


def _has_adapters(model: Any) -> bool:
    return hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")


def _hash_log(state: Any) -> str:
    """A hash of the log, which tells two runs apart: transformers does not name the resumed checkpoint."""
    history = json.dumps(state.log_history, sort_keys=True, default=str)
    return blake2b(history.encode(), digest_size=16).hexdigest()


def _load_average(folder: Path, state: Any) -> dict[str, torch.Tensor] | None:
    """The moving average in a checkpoint of this run, if there is one."""
    if not (folder / EMA).is_file():
        return None
    with safe_open(folder / EMA, "pt") as file:
        if (file.metadata() or {}).get("log") != _hash_log(state):
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _check_same_model(reward: Any, model: Any, use_vllm: bool) -> None:
    """Raise ConfigError if the trained model cannot be the one that the reward was given."""
    tags = reward.close_id, reward.objective.template.open_id
    lacks_rows = max(tags) >= text_config_of(model).vocab_size
    stops_otherwise = reward.objective.answer_tokens or reward.attention or use_vllm
    if lacks_rows:
        problem = "has no rows for the tags of a thought"
    elif not stops_otherwise and reward.close_id not in ends_of(model):
        problem = "does not end a generation at the close tag"
    else:
        return
    raise ConfigError(
        f"the trained model is not the one that the reward was given, it {problem}: give the "
        "trainer and the reward the same model and tokenizer"
    )


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def ranks_of(device: torch.device) -> Ranks:
    """The ranks of the process group; one rank where there is none."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Ranks(device=device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
