"""How weights travel into an engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rollout.engine import Engine
from rollout.types import Prompt, SamplingParams, Thought, WeightSource


def copy_weights(model: nn.Module, weights: WeightSource) -> None:
    """Copy the tensors of a weight source into the parameters (and persistent buffers) of the same names.

    Each is cast to the type and device of its parameter. Every parameter must come under at least one of its names
    (tied weights have several). Raises ValueError, naming the parameters, for unknown names, other shapes and missing
    parameters; tensors that came before the fault was found have then been copied.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    kept = model.state_dict().keys()  # persistent buffers are in it, others are not
    accepted = own | {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept}
    given: set[int] = set()
    unknown: list[str] = []
    with torch.no_grad():
        for name, tensor in weights():
            if name not in accepted:
                unknown.append(name)
                continue
            own_tensor = accepted[name]
            if own_tensor.shape != tensor.shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, the engine has {tuple(own_tensor.shape)}")
            own_tensor.copy_(tensor)
            given.add(id(own_tensor))
    missing = [name for name, parameter in own.items() if id(parameter) not in given]
    if unknown or missing:
        parts = [f"{what}: {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
        raise ValueError("the weights do not fit the engine's model; " + "; ".join(parts))


def parameter_names(model: str | Path, **where: Any) -> list[tuple[str, ...]]:
    """The names of a checkpoint's parameters as transformers has them, those of tied weights together; no weights are read.

    `where` goes to transformers' `from_pretrained` (revision, trust_remote_code).
    """
    config = AutoConfig.from_pretrained(model, **where)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=where.get("trust_remote_code", False))
    groups: dict[int, list[str]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [tuple(names) for names in groups.values()]


def complete(state: dict[str, torch.Tensor], names: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """`state` with every tied weight under every name it has; ValueError if a parameter is missing or unknown.

    Engines that pack their weights keep a copy of a tied head, and it goes stale in silence where the head's name does not
    come: neither files nor `named_parameters()` have it.
    """
    known = {name for group in names for name in group}
    missing = [group[0] for group in names if not any(name in state for name in group)]
    unknown = [name for name in state if name not in known]
    if missing or unknown:
        parts = [f"{what}: {', '.join(found)}" for what, found in (("unknown", unknown), ("missing", missing)) if found]
        raise ValueError("the weights do not fit the engine's model; " + "; ".join(parts))
    whole = {}
    for group in names:
        tensor = next(state[name] for name in group if name in state)
        whole |= {name: state.get(name, tensor) for name in group}
    return whole


def write_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write `folder`/model.safetensors (aside, then renamed), tied weights under every name, as engines elsewhere load it."""
    from safetensors.torch import save_file

    work = folder.with_name(f".{folder.name}.tmp")
    for old in (folder, work):
        shutil.rmtree(old, ignore_errors=True)
    work.mkdir(parents=True)
    seen: set[int] = set()
    whole = {}
    for name, tensor in state.items():  # the file format knows no shared memory
        whole[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(whole, work / "model.safetensors", metadata={"format": "pt"})
    work.replace(folder)


class StaleWeights(RuntimeError):
    """An engine does not sample from the weights it was given."""


class Probe:
    """Shows after every sync that an engine samples from the policy's weights: a few tokens, and what the trainer makes of them.

    The prompt is fixed, at least two blocks of the engine's prefix cache long, and was sampled after before the sync (the
    probe of the last one did), so that a prefix cache that outlived the weights shows too: log-probs of a scored prompt
    would not, since engines do not read the cache for those. `tolerance` is in nats, the largest difference of one token.
    """

    def __init__(self, vocabulary: int, block_size: int, most: int, *, tokens: int = 4, temperature: float = 1.0,
                 tolerance: float = 1e-3) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        length = max(1, min(2 * block_size + 1, most - tokens - 1))
        self.prompt = Prompt(tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()), stop_ids=())
        self.params = SamplingParams(max_thought_tokens=tokens, temperature=temperature)
        self.tolerance = tolerance
        self.covers_cache = length > 2 * block_size

    async def ask(self, engine: Engine) -> Thought:
        """What the engine says after the prompt, with its log-probs."""
        ((thought,),) = await engine.sample([self.prompt], self.params, 1, [engine.version])
        return thought

    async def verify(self, engine: Engine, thought: Thought, logps: Sequence[float], version: int) -> float:
        """The largest difference (nats) between the engine's log-probs and the trainer's.

        Raises StaleWeights above the tolerance, with the likely cause: the thought is sampled again after the engine's prefix
        cache was emptied, and if the log-probs then change the cache was to blame.
        """
        said = thought.behaviour_logps
        worst = max((abs(a - b) for a, b in zip(said, logps, strict=True)), default=0.0)
        if thought.policy_version != version:
            raise StaleWeights(f"the engine answers with version {thought.policy_version} where {version} was handed over")
        if not worst <= self.tolerance:  # NaN too
            cause = ("a tensor did not arrive, or the engine runs in another "
                     "dtype than the trainer (then raise engine.probe_tolerance)")  # fmt: skip
            if hasattr(engine, "reset_prefix_cache"):
                engine.reset_prefix_cache()
                again = await self.ask(engine)
                same = again.token_ids == thought.token_ids and all(
                    abs(a - b) <= self.tolerance for a, b in zip(again.behaviour_logps, said, strict=True)
                )
                cause = cause if same else "its prefix cache kept contexts that were read with the old weights"
            raise StaleWeights(
                f"after the sync of version {version} the engine's log-probs of a fixed probe are up to {worst:.3g} nats off the "
                f"trainer's (tolerance {self.tolerance:g}), so it does not sample from these weights. Likely cause: {cause}"
            )
        return worst
