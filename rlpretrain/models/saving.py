"""Saving the trained model as a Hugging Face folder, with its card."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlpretrain import __version__
from rlpretrain.compat import without_progress_bars
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.files import writing
from rlpretrain.models.adapters import adapter_config, has_lora, pieces, plain_name
from rlpretrain.prompts import AddedTokens, Delimiters
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
    """Write the policy's weights and the tokenizer to `path`. All ranks call it, and the first rank writes.

    The folder is written under a temporary name and then renamed. With LoRA the weights are merged, and the
    adapter alone goes to a folder beside it, which PEFT's `from_pretrained` reads: `adapter` for the folder
    `model`, `NAME_adapter` for another.
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
        folder = path.with_name("adapter" if path.name == "model" else f"{path.name}_adapter")
        with writing(folder):
            work = begin_folder(folder)
            write_adapter(work, adapter, adapter_config(policy.model))
            finish_folder(work, folder)
    _write(policy.model, state, tokenizer, path)


def save_start(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a model that differs from the checkpoint at its path, for an engine that loads from disk."""
    _write(model, {piece.name: piece.make() for piece in pieces(model)}, tokenizer, path)


def _write(model: Any, state: dict[str, Any], tokenizer: Any, path: Path) -> None:
    """Write a Hugging Face folder under a temporary name, then rename it. No weights are quantised in it."""
    stored = model.state_dict().keys()  # a checkpoint has those buffers that are in the state dict
    buffers = {plain_name(model, name): b for name, b in model.named_buffers() if name in stored}
    state = {name: buffer for name, buffer in buffers.items() if name is not None} | state
    if getattr(model, "is_quantized", False):
        config, generation_config = copy.deepcopy(model.config), model.generation_config
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.generation_config = generation_config
    with writing(path), without_progress_bars():
        work = begin_folder(path)
        try:
            model.save_pretrained(work, state_dict=_tied_once(model, state))
            _write_dtype(model, state, work)
            tokenizer.save_pretrained(work)
            finish_folder(work, path)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _write_dtype(model: Any, state: dict[str, Any], folder: Path) -> None:
    """Let config.json name the precision of the saved weights; transformers writes that of `model`.

    A sharded model has its weights in float32 and passes them on in half precision.
    """
    saved = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), model.dtype)
    if saved != model.dtype:
        config = copy.deepcopy(model.config)
        config.dtype = saved
        config.save_pretrained(folder)


def try_saving(model: Any, tokenizer: Any, config: ModelConfig) -> None:
    """Raise ConfigError if a model could not be saved at the end of a run.

    Everything but the weights is written to a temporary folder. transformers loads some configurations that
    it refuses to save, for instance one that sets `temperature` without `do_sample`.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        message = " ".join(str(error).split())
        raise ConfigError(
            f"the model could not be saved at the end, transformers refuses the configuration or the "
            f"tokenizer of '{config.path}': {message}"
        ) from None


def _tied_once(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Give all names of a tied weight the same tensor, so that it is stored once.

    Gathering and merging make a copy for each name.
    """
    first_names: dict[int, str] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(model, full_name)
        if name is None or name not in state:
            continue
        first = first_names.setdefault(id(parameter), name)
        if first != name and torch.equal(state[first], state[name]):
            state[name] = state[first]
    return state


def model_card(path: Path, *, base: str, objective: str, steps: int, delimiters: AddedTokens | None) -> None:
    """Write the README.md of a saved model: its origin, and how to remove thoughts at inference."""
    thinking = ""
    if isinstance(delimiters, Delimiters):
        thinking = THINKING.format(open=delimiters.open, close=delimiters.close)
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
