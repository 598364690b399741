"""Saving the trained model as an ordinary Hugging Face folder, with its card."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlpretrain import __version__
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.files import writing
from rlpretrain.models.adapters import adapter_config, has_lora, pieces, plain_name
from rlpretrain.models.loading import no_bars
from rlpretrain.prompts import Delimiters
from rollout.folders import MARK, begin_folder, finish_folder
from rollout.weights import write_adapter

CARD = """---
library_name: transformers
tags: [rlpretrain, {objective}]
{base}---
# {name}

{origin} trained for {steps} steps with the objective `{objective}` of rlpretrain {version}.

{thinking}
The settings of the run are in `run.json` of its output folder.
"""
THINKING = """The model may think before it continues a text: open a thought with `{open}` at the end of the
context, sample until `{close}`, then continue the text. To use or show only the text, remove the thoughts:

```python
from rlpretrain.prompts import Delimiters, strip_thoughts
text = strip_thoughts(generated, Delimiters("{open}", "{close}"))
```
"""


def save_model(policy: Any, tokenizer: Any, path: Path, first: bool) -> None:
    """Write the policy's weights and the tokenizer to `path` (aside, then renamed). All ranks call it, the
    first one writes.

    With LoRA the weights are merged; the adapter alone goes to `adapter` beside it, as PEFT's
    `from_pretrained` reads it.
    """
    lora = has_lora(policy.model)
    adapter = {name: tensor.to("cpu", copy=True) for name, tensor in policy.adapter()} if lora else {}
    state = {}
    for name, tensor in policy.weights():
        if first:
            state[name] = tensor.to("cpu", copy=True) if policy.stage_gathers else tensor
    if not first:
        return
    if lora:
        folder = path.with_name("adapter")
        with writing(folder):
            work = begin_folder(folder)
            write_adapter(work, adapter, adapter_config(policy.model))
            finish_folder(work, folder)
    _write(policy.model, state, tokenizer, path)


def save_start(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a model that is not (or no longer) what its path holds, for an engine that loads from disk."""
    _write(model, {piece.name: piece.make() for piece in pieces(model)}, tokenizer, path)


def _write(model: Any, state: dict[str, Any], tokenizer: Any, path: Path) -> None:
    """An ordinary folder, aside and then renamed; of a quantised model one in its full precision."""
    kept = model.state_dict().keys()  # buffers too are the checkpoint's, where they are stored
    buffers = {plain_name(model, n): b for n, b in model.named_buffers() if n in kept}
    state = {n: b for n, b in buffers.items() if n is not None} | state
    if getattr(model, "is_quantized", False):
        config, ends = copy.deepcopy(model.config), model.generation_config
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.generation_config = ends
    with writing(path), no_bars():
        work = begin_folder(path)
        try:
            model.save_pretrained(work, state_dict=_tied_once(model, state))
            tokenizer.save_pretrained(work)
            finish_folder(work, path)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def try_saving(model: Any, tokenizer: Any, config: ModelConfig) -> None:
    """Write everything but the weights, as at the end of a run, and delete it: ConfigError for what cannot be
    saved.

    transformers refuses to save some configurations that it loads, for instance one that sets `temperature`
    without `do_sample`.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"the model could not be saved at the end, transformers refuses the configuration or the "
            f"tokenizer of '{config.path}': {why}"
        ) from None


def _tied_once(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Names of one tied weight with one tensor, which is stored once: what was gathered or merged came as
    a copy for each.
    """
    first: dict[int, str] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(model, full)
        kept = first.setdefault(id(parameter), name) if name in state else None
        if kept is not None and kept != name and torch.equal(state[kept], state[name]):
            state[name] = state[kept]
    return state


def model_card(path: Path, *, base: str, objective: str, steps: int, delimiters: Delimiters | None) -> None:
    """README.md of a saved model: where it comes from, and how to strip the delimiters at inference."""
    thinking = THINKING.format(open=delimiters.open, close=delimiters.close) if delimiters else ""
    local = Path(base).exists()
    (path / "README.md").write_text(
        CARD.format(
            objective=objective,
            name=path.parent.name,
            steps=steps,
            version=__version__,
            thinking=thinking,
            base="" if local else f"base_model: {base}\n",
            origin="A local base checkpoint" if local else f"`{base}`",
        )
    )


def push(path: Path, hub_id: str) -> None:
    """Upload a saved model to the Hugging Face hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(hub_id, exist_ok=True)
    api.upload_folder(repo_id=hub_id, folder_path=str(path), ignore_patterns=[MARK])
