"""The model that a trainer of TRL's trains: out of its wrappers, and handed to a reward by a callback."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from rlpretrain.compat import sharded, trl_vllm_on_cpu
from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.saving import save_start
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.references import Ema
from rlpretrain.tracking.health import TRL_FIELDS, Health
from rlpretrain.trl.data import ends_of
from rlpretrain.trl.prompts import check_lengths, longest_row
from rollout.folders import usual_mode

EMA = "ema.safetensors"
"""In a checkpoint: the moving average of a reward's baseline."""


class LiveModel(TrainerCallback):
    """Hands the trained model to its reward when training begins, and moves the EMA after every step.

    Before the trainer starts its vLLM, that is told where a thought ends, where to find tags that were added,
    and how to live on a CPU.
    """

    def __init__(self, reward: Any):
        self.reward = reward
        self.health = Health(TRL_FIELDS)
        self.init_kwargs: dict[str, Any] | None = None  # how the model was loaded
        self.named: str | None = None  # what the configuration calls the model

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The trainer stands, its vLLM not yet."""
        if self.reward.late:
            raise ConfigError(
                "a reward without model and tokenizer is for TRL's command line, which knows no callbacks: "
                "here give it both"
            )
        reward, inner, adapters = self.reward, plain(model), adapters_of(model)
        if reward.baseline in ("frozen", "ema") and adapters is None and not sharded(model):
            reward.initial = {name: p.detach().to("cpu", copy=True) for name, p in inner.named_parameters()}
        vllm, colocated = getattr(args, "use_vllm", False), getattr(args, "vllm_mode", "") == "colocate"
        if vllm and not reward.objective.answer_tokens:
            args.generation_kwargs = {"stop_token_ids": [reward.close_id], **(args.generation_kwargs or {})}
        if vllm and reward.added and not colocated:
            raise ConfigError(
                f"{' and '.join(reward.added)} were added to the model just now, and the vLLM server has "
                "them not: save model and tokenizer, start the server and the training from there"
            )
        referred = bool(getattr(args, "beta", 0)) and adapters is None
        if reward.added and (vllm or referred) and sharded(inner):
            raise ConfigError(
                f"{' and '.join(reward.added)} were added to the model just now, and it is sharded already: "
                "save model and tokenizer, start the training from there"
            )
        if (
            self.init_kwargs is not None
        ):  # after TRL has said that it ignores them, before it loads a reference
            args.model_init_kwargs = self.init_kwargs
        if reward.added and (vllm or referred):
            start, ranks = Path(args.output_dir) / "start", ranks_of(torch.device("cpu"))
            if ranks.first:
                save_start(inner, reward.tokenizer, start)
            ranks.barrier()
            inner.name_or_path = str(start)  # what TRL's vLLM loads
            if referred:
                self.named, inner.config._name_or_path = (
                    inner.config._name_or_path,
                    str(start),
                )  # what its KL is measured to
        if vllm and colocated:
            trl_vllm_on_cpu()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """The model as the trainer has it, adapters included."""
        reward, inner = self.reward, plain(model)
        if self.named is not None:
            inner.config._name_or_path, self.named = self.named, None
        lacks = (
            max(reward.close_id, reward.objective.template.open_id)
            >= inner.config.get_text_config().vocab_size
        )
        stops = reward.objective.answer_tokens or reward.attention or getattr(args, "use_vllm", False)
        if lacks or not (stops or reward.close_id in ends_of(inner)):
            what = (
                "has no rows for the tags of a thought"
                if lacks
                else "does not end a generation at the close tag"
            )
            raise ConfigError(
                f"the trained model is not the one that the reward was given, it {what}: give the "
                "trainer and the reward the same model and tokenizer"
            )
        data = getattr(train_dataloader, "dataset", None)
        check_lengths(reward.objective, limit_of(inner), [*reward.longest, longest_row(data)], args)
        reward.watch(model)
        reward.initial = {}
        if state.global_step and isinstance(reward.reference, Ema):
            given = args.resume_from_checkpoint
            folder = Path(
                given if isinstance(given, str) and Path(given).is_dir() else _checkpoint(args, state)
            )
            average = _average(folder, state)
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
            save_file(average, work, metadata={"log": _log(state)})
            work.chmod(usual_mode(folder))
            work.replace(folder / EMA)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """A warning, once, of each thing that keeps the training from learning: the rules of
        rlpretrain/tracking/health.py.
        """
        row = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        for finding in self.health.observe(state.global_step, row):
            if state.is_world_process_zero:
                warnings.warn(f"step {finding.step}: {finding}", stacklevel=2)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After the optimizer step."""
        if self.reward.reference is not None:
            self.reward.reference.update(_Weights(plain(model)))


class _Weights:
    """What `Ema.update` reads."""

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


def _log(state: Any) -> str:
    """What tells a run's checkpoint from another's of the same step: transformers does not say which one
    it resumed.
    """
    return blake2b(
        json.dumps(state.log_history, sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()


def _average(folder: Path, state: Any) -> dict[str, torch.Tensor] | None:
    """The moving average in a checkpoint of this run, if there is one."""
    if not (folder / EMA).is_file():
        return None
    with safe_open(folder / EMA, "pt") as file:
        if (file.metadata() or {}).get("log") != _log(state):
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def ranks_of(device: torch.device) -> Ranks:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Ranks(device=device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
