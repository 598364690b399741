"""How weights travel into an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rollout.engine import Engine
from rollout.folders import begin_folder, finish_folder, follow_umask
from rollout.types import Prompt, SamplingParams, Thought, WeightSource


def copy_weights(model: nn.Module, weights: WeightSource) -> None:
    """Copy the tensors of a weight source into the parameters (and persistent buffers) of the same names.

    Each is cast to the type and device of its parameter. Every parameter must come under at least one of its
    names (tied weights have several). Raises ValueError, naming the parameters, for unknown names, other
    shapes and missing parameters; tensors that came before the fault was found have then been copied.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    kept = model.state_dict().keys()  # persistent buffers are in it, others are not
    accepted = own | {
        name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept
    }
    given: set[int] = set()
    unknown: list[str] = []
    with torch.no_grad():
        for name, tensor in weights():
            if name not in accepted:
                unknown.append(name)
                continue
            own_tensor = accepted[name]
            if own_tensor.shape != tensor.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)}, the engine has {tuple(own_tensor.shape)}"
                )
            own_tensor.copy_(tensor)
            given.add(id(own_tensor))
    missing = [name for name, parameter in own.items() if id(parameter) not in given]
    if unknown or missing:
        raise ValueError(does_not_fit({"unknown": unknown, "missing": missing}))


class Parameter(NamedTuple):
    """What a checkpoint's parameter is called, by all its names where it is tied, and its shape."""

    names: tuple[str, ...]
    shape: torch.Size


def parameters_of(model: str | Path, **where: Any) -> list[Parameter]:
    """The parameters of a checkpoint as transformers names them; no weights are read.

    `where` goes to transformers' `from_pretrained` (revision, trust_remote_code).
    """
    config = AutoConfig.from_pretrained(model, **where)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            config, trust_remote_code=where.get("trust_remote_code", False)
        )
    found: dict[int, tuple[list[str], torch.Size]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter.shape))[0].append(name)
    return [Parameter(tuple(names), shape) for names, shape in found.values()]


def complete(state: Mapping[str, torch.Tensor], parameters: Sequence[Parameter]) -> dict[str, torch.Tensor]:
    """`state` with every tied weight under every name it has; ValueError if something is missing, unknown or
    of another shape.

    Engines that pack their weights keep a copy of a tied head, and it goes stale in silence where the head's
    name does not come: neither files nor `named_parameters()` have it.
    """
    shapes = {name: p.shape for p in parameters for name in p.names}
    wrong = {
        "missing": [p.names[0] for p in parameters if not any(name in state for name in p.names)],
        "unknown": [name for name in state if name not in shapes],
        "of another shape": [
            f"{n} is {tuple(t.shape)}, not {tuple(shapes[n])}"
            for n, t in state.items()
            if n in shapes and t.shape != shapes[n]
        ],
        "not floating point": [n for n, t in state.items() if not t.is_floating_point()],
    }
    if any(wrong.values()):
        raise ValueError(does_not_fit(wrong))
    whole = {}
    for p in parameters:
        tensor = next(state[name] for name in p.names if name in state)
        whole |= {name: state.get(name, tensor) for name in p.names}
    return whole


def does_not_fit(wrong: Mapping[str, Sequence[str]]) -> str:
    """What is wrong with weights, in words: the first few of each kind."""
    parts = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in wrong.items()
        if names
    ]
    return "the weights do not fit the engine's model; " + "; ".join(parts)


def write_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write `folder`/model.safetensors (aside, then renamed), tied weights under every name, as engines
    elsewhere load it.
    """
    from safetensors.torch import save_file

    work = begin_folder(folder)
    seen: set[int] = set()
    whole = {}
    for name, tensor in state.items():  # the file format knows no shared memory
        whole[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(whole, work / "model.safetensors", metadata={"format": "pt"})
    finish_folder(work, folder)


def write_adapter(folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a LoRA adapter as PEFT does, into a folder of its own."""
    from safetensors.torch import save_file

    save_file(
        {n: t.contiguous() for n, t in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)))
    follow_umask(folder)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of those in a folder; ValueError, without a word of its
    content, for another file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path.name} holds no .safetensors file")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file.name} is not a readable safetensors file ({type(error).__name__})"
            ) from None
    return state


class StaleWeights(RuntimeError):
    """An engine does not sample from the weights it was given."""

    says_all = True  # a command line prints the message without a traceback


class Probe:
    """Shows after every sync that an engine samples from the policy's weights: a few tokens, and what the
    trainer makes of them.

    The prompt is fixed, at least two blocks of the engine's prefix cache long, and was sampled after before
    the sync (the probe of the last one did), so that a prefix cache that outlived the weights shows too:
    log-probs of a scored prompt would not, since engines do not read the cache for those. `tolerance` is in
    nats, the largest difference of one token.
    """

    def __init__(
        self,
        vocabulary: int,
        block_size: int,
        most: int,
        *,
        tokens: int = 4,
        temperature: float = 1.0,
        tolerance: float = 1e-3,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        length = max(1, min(2 * block_size + 1, most - tokens - 1))
        self.prompt = Prompt(
            tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()), stop_ids=()
        )
        self.params = SamplingParams(max_thought_tokens=tokens, temperature=temperature)
        self.tolerance = tolerance
        self.covers_cache = length > 2 * block_size

    async def ask(self, engine: Engine) -> list[Thought]:
        """What the engine says after the prompt, with its log-probs; from each engine of a pool, since
        those deal evenly.
        """
        copies = getattr(engine, "num_engines", 1)
        groups = await engine.sample([self.prompt] * copies, self.params, 1, [engine.version] * copies)
        return [thought for (thought,) in groups]

    async def verify(
        self, engine: Engine, thoughts: Sequence[Thought], logps: Sequence[Sequence[float]], version: int
    ) -> float:
        """The largest difference (nats) between the engine's log-probs and the trainer's, of all thoughts.

        Raises StaleWeights above the tolerance, with the likely cause: the thought is sampled again after the
        engine's prefix cache was emptied, and if the log-probs then change the cache was to blame.
        """
        if stale := [t.policy_version for t in thoughts if t.policy_version != version]:
            raise StaleWeights(f"the engine answers with version {stale[0]} where {version} was handed over")
        apart = [
            max((abs(a - b) for a, b in zip(t.behaviour_logps, own, strict=True)), default=0.0)
            for t, own in zip(thoughts, logps, strict=True)
        ]
        worst = next((d for d in apart if d != d), max(apart))  # NaN is worse than anything
        if not worst <= self.tolerance:
            cause = (
                "a tensor did not arrive, or the engine runs in another "
                "dtype than the trainer (then raise engine.probe_tolerance)"
            )
            which = [i for i, d in enumerate(apart) if not d <= self.tolerance]
            many = f"; {len(which)} of {len(apart)} engines" if len(apart) > 1 else ""
            thought = thoughts[which[0]]
            if hasattr(engine, "reset_prefix_cache"):
                engine.reset_prefix_cache()
                again = (await self.ask(engine))[which[0]]
                same = again.token_ids == thought.token_ids and all(
                    abs(a - b) <= self.tolerance
                    for a, b in zip(again.behaviour_logps, thought.behaviour_logps, strict=True)
                )
                cause = (
                    cause if same else "its prefix cache kept contexts that were read with the old weights"
                )
            raise StaleWeights(
                f"after the sync of version {version} the engine's log-probs of a fixed probe are up to "
                f"{worst:.3g} nats off the trainer's (tolerance {self.tolerance:g}{many}), "
                f"so it does not sample from these weights. Likely cause: {cause}"
            )
        return worst
