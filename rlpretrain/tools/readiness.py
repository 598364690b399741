"""What a dry run notes about its own machine: missing libraries, tags, memory, disk, servers.

These are notes and no errors, since a run may be planned on one machine for another.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from rlpretrain.compat import INSTALL
from rlpretrain.config import PretrainConfig
from rlpretrain.prompts import Delimiters
from rlpretrain.tools.memory import GIB, Sizes

PATIENCE = 2.0
"""Seconds to wait for a server to accept a connection."""


def missing_libraries(config: PretrainConfig, thinks: bool) -> list[str]:
    """Libraries that the settings need and this environment lacks, each with the line that installs it."""
    engine = config.engine
    wanted: dict[str, tuple[str, str]] = {}  # library → (the setting that needs it, its install line)
    for name in engine.libraries() if thinks else ():
        wanted[name] = (f"engine {engine.name}", INSTALL.get(name, f"pip install {name}"))
    if config.policy.backend == "deepspeed":
        wanted["deepspeed"] = ("policy.backend deepspeed", INSTALL["deepspeed"])
    if config.policy.lora:
        wanted["peft"] = ("policy.lora", INSTALL["peft"])
    if config.model.quantization != "none":
        wanted["bitsandbytes"] = ("model.quantization", INSTALL["qlora"])
    wanted |= {name: (f"report_to {name}", f"pip install {name}") for name in config.report_to}
    return [
        f"{setting} needs {name}, which is not installed here: {line}"
        for name, (setting, line) in wanted.items()
        if importlib.util.find_spec(name) is None
    ]


def missing_tags(tokenizer: Any, tags: Delimiters | None) -> list[str]:
    """A note of the thought tags that a tokenizer lacks; call it before they are added."""
    if tags is None:
        return []
    known = tokenizer.get_vocab()
    absent = [tag for tag in (tags.open, tags.close) if tag not in known]
    if not absent:
        return []
    return [
        f"the tokenizer lacks {' and '.join(absent)}: they are added, and the model has never seen them. "
        "Servers must be started on a checkpoint that has them"
    ]


def memory_here(device: str) -> float | None:
    """Free bytes on the CPU, all bytes of a GPU; None if this machine has no such device."""
    if device.startswith("cuda"):  # never run: docs/gpu.md
        if not torch.cuda.is_available():
            return None
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    return min([free, *(float(text) for text in texts if text.isdigit())])


def memory_note(needed: float, sizes: Sizes) -> list[str]:
    """A note if the ranks on this machine need more memory than it has; on a CPU they share it."""
    available = memory_here(sizes.device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", sizes.ranks)) if sizes.device == "cpu" else 1
    if available is None or needed * ranks <= available:
        return []
    who = f"{ranks} ranks need" if ranks > 1 else "the run needs"
    return [
        f"{who} up to {needed * ranks / GIB:.1f} GiB, and {sizes.device} has {available / GIB:.1f} GiB "
        "free here: lower token_budget, data.max_length or engine.batch_size, set "
        "model.gradient_checkpointing, or train adapters (policy.lora)"
    ]


def disk_needed(config: PretrainConfig, sizes: Sizes) -> float:
    """The most bytes of a run's folder: the model, the kept checkpoints, and one that is being written."""
    b = getattr(torch, config.model.dtype).itemsize
    model = b * sizes.parameters
    checkpoint = model + 8 * sizes.trained + (4 * sizes.trained if b == 2 else 0)
    if config.baseline.name == "ema":
        checkpoint += 4 * sizes.parameters
    copies = config.checkpoint.keep + 2 if config.checkpoint.every else 0  # the best one is kept, too
    synced = 2 * model if config.engine.writes_weights else 0
    return 2 * model + copies * checkpoint + synced  # a model is written under another name, then renamed


def disk_note(config: PretrainConfig, sizes: Sizes) -> list[str]:
    """A note if the disk under `output_dir` has less room than the run may need."""
    folder = Path(config.output_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, disk_needed(config, sizes)
    if needed <= free:
        return []
    return [
        f"checkpoints and model need up to {needed / GIB:.1f} GiB, and {existing} has {free / GIB:.1f} GiB "
        "free: lower checkpoint.keep, or choose another output_dir"
    ]


def silent_servers(config: PretrainConfig, section: Any, thinks: bool) -> list[str]:
    """Servers in the settings (vLLM's, Ray's, a judge's) that accept no connection."""
    addresses = config.engine.addresses() if thinks else []
    if url := getattr(section, "judge_url", None):
        addresses.append(("objective.judge_url", url))
    return [
        f"{field} {url} cannot be reached: {problem}"
        for field, url in addresses
        if (problem := _try_to_connect(url))
    ]


def _try_to_connect(url: str) -> str:
    """Why a server accepts no connection; empty if it does."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


def notes(config: PretrainConfig, section: Any, sizes: Sizes, needed: float, thinks: bool) -> Sequence[str]:
    """All notes, in the order in which to act on them."""
    return [
        *missing_libraries(config, thinks),
        *memory_note(needed, sizes),
        *disk_note(config, sizes),
        *silent_servers(config, section, thinks),
    ]
