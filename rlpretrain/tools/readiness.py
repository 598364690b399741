"""What a run needs of the machine it is planned on: libraries, memory, disk, servers, time. Each function
gives notes.

They are notes and no errors, since a run may be planned on one machine for another.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from rlpretrain.compat import INSTALL
from rlpretrain.config import PretrainConfig
from rlpretrain.prompts import Delimiters
from rlpretrain.tools.memory import GIB, Sizes

PATIENCE = 2.0
"""Seconds to wait for a server to take a connection."""


def missing_libraries(config: PretrainConfig, thinks: bool) -> list[str]:
    """What the settings need and this environment lacks, with the line that installs it."""
    engine, wanted = config.engine, {}
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
        f"{what} needs {name}, which is not installed here: {line}"
        for name, (what, line) in wanted.items()
        if importlib.util.find_spec(name) is None
    ]


def missing_tags(tokenizer: Any, tags: Delimiters | None) -> list[str]:
    """Tags of a thought that a tokenizer lacks. Asked before they are added."""
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
    """Bytes that are free on the device of a run; of a GPU all that it has. None if there is no such
    device here.
    """
    if device.startswith("cuda"):
        return (
            float(torch.cuda.get_device_properties(device).total_memory)
            if torch.cuda.is_available()
            else None
        )
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    told = [path.read_text().strip() for path in limits if path.is_file()]
    return min([free, *(float(t) for t in told if t.isdigit())])


def memory_note(needed: float, sizes: Sizes) -> list[str]:
    """A note if the ranks on this machine need more than it has; on a CPU they share its memory."""
    here = memory_here(sizes.device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", sizes.ranks)) if sizes.device == "cpu" else 1
    if here is None or needed * ranks <= here:
        return []
    who = f"{ranks} ranks need" if ranks > 1 else "the run needs"
    said = (
        f"{who} up to {needed * ranks / GIB:.1f} GiB, and {sizes.device} has {here / GIB:.1f} GiB free here"
    )
    return [
        f"{said}: lower token_budget, data.max_length or engine.batch_size, set "
        "model.gradient_checkpointing, or train adapters (policy.lora)"
    ]


def disk_needed(config: PretrainConfig, sizes: Sizes) -> float:
    """Bytes of a run's folder at most: the model, the checkpoints that are kept, and one more while it is
    written.
    """
    b = getattr(torch, config.model.dtype).itemsize
    model = b * sizes.parameters
    checkpoint = model + 8 * sizes.trained + (4 * sizes.trained if b == 2 else 0)
    if config.baseline.name == "ema":
        checkpoint += 4 * sizes.parameters
    copies = config.checkpoint.keep + 2 if config.checkpoint.every else 0  # the best one is kept beside them
    synced = 2 * model if config.engine.writes_weights else 0
    return 2 * model + copies * checkpoint + synced  # a model is written aside, then renamed


def disk_note(config: PretrainConfig, sizes: Sizes) -> list[str]:
    """A note if the disk under `output_dir` has less room than the run may need."""
    folder = Path(config.output_dir).expanduser().absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free, needed = shutil.disk_usage(there).free, disk_needed(config, sizes)
    if needed <= free:
        return []
    return [
        f"checkpoints and model need up to {needed / GIB:.1f} GiB, and {there} has {free / GIB:.1f} GiB "
        "free: lower checkpoint.keep, or choose another output_dir"
    ]


def silent_servers(config: PretrainConfig, section: Any, thinks: bool) -> list[str]:
    """Servers of the settings that take no connection: vLLM's, Ray's, a judge's."""
    asked = config.engine.addresses() if thinks else []
    if url := getattr(section, "judge_url", None):
        asked.append(("objective.judge_url", url))
    return [f"{field} {url} cannot be reached: {why}" for field, url in asked if (why := _refused(url))]


def _refused(url: str) -> str:
    """Why a server takes no connection; empty if it does."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


@dataclass(frozen=True, slots=True)
class Speed:
    """What this machine was measured to do."""

    flops: float
    """Floating-point operations a second in a matrix product."""
    bandwidth: float
    """Bytes a second read by a product with one vector."""


def measure_speed(device: str, dtype: torch.dtype) -> Speed:
    """A product of matrices and one of a matrix and a vector, about half a second."""
    size = 4096 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    v = torch.randn(size, device=device, dtype=dtype)
    many = torch.randn(8, size, size, device=device, dtype=dtype)  # more than a cache holds

    def seconds(work: Any, times: int) -> float:
        work()
        best = float("inf")
        for _ in range(times):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        return best

    flops = 2 * size**3 / seconds(lambda: a @ b, 3)
    return Speed(flops, many.numel() * many.element_size() / seconds(lambda: many @ v, 3))


def time_of_step(
    config: PretrainConfig, sizes: Sizes, speed: Speed, trained: int, thoughts: int, sampled: int
) -> float:
    """Seconds of a step of one rank, roughly: 6 operations a parameter and trained token, 2 for a sampled or
    read one.

    Sampling reads all weights for every token of a batch of thoughts, which bounds it from below. Matrices as
    large as those of the measurement are rare in a model: half of the measured speed is assumed.
    """
    rate, p = speed.flops / 2, sizes.parameters
    train = (8 if config.model.gradient_checkpointing else 6) * p * trained * config.loss.inner_epochs / rate
    if not thoughts or not config.engine.in_process:
        return train
    batches = -(-thoughts // config.engine.batch_size)
    prompts = 2 * p * sizes.prompt * -(-thoughts // config.sampling.thoughts) / rate
    read = (
        batches
        * (sampled // max(thoughts, 1))
        * p
        * getattr(torch, config.model.dtype).itemsize
        / speed.bandwidth
    )
    return train + prompts + max(2 * p * sampled / rate, read)


def in_words(seconds: float) -> str:
    """A duration as a reader would say it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds"


def notes(config: PretrainConfig, section: Any, sizes: Sizes, needed: float, thinks: bool) -> Sequence[str]:
    """All of them, in the order in which they are to be put right."""
    return [
        *missing_libraries(config, thinks),
        *memory_note(needed, sizes),
        *disk_note(config, sizes),
        *silent_servers(config, section, thinks),
    ]
