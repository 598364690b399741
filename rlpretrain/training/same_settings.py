"""The settings of a run that may differ from those of the run that it resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.config.engines import own_settings
from rlpretrain.config.io import build, to_dict

MACHINE = (
    "output_dir",
    "console",
    "log_every",
    "report_to",
    "push_to_hub",
    "threads",
    "device",
    "peak_flops",
    "save_rollouts",
    "engine.urls",
    "engine.token_file",
    "engine.weights_dir",
    "engine.transfer",
    "engine.master_address",
    "engine.concurrency",
    "engine.request_timeout",
    "engine.deadline",
    "engine.num_engines",
    "engine.resources",
    "engine.strategy",
    "engine.address",
    "engine.kv_cache_gib",
    "engine.gpu_memory_utilization",
    "engine.sleep",
    "engine.probe_tolerance",
    "baseline.cache_tokens",
    "policy.fsdp",
)
"""Settings of the machine and of the output, which change none of a run's numbers."""
FREE_TO_CHANGE = (
    *MACHINE,
    "max_steps",
    "epochs",
    "checkpoint",
    "eval",
    "stop",
    "optim.schedule.anneal_from",
    "average.device",
)
"""Settings that may differ between a checkpoint and the run that resumes from it."""


def check_same(before: dict[str, Any], config: dict[str, Any], where: Path) -> None:
    """Raise ConfigError if `config` differs from the settings `before` of a run that is to be resumed."""
    now = json.loads(json.dumps(config))
    known = before | {"engine": own_settings(before["engine"])} if "engine" in before else before
    changed = changes(without(filled(known, now), FREE_TO_CHANGE), without(now, FREE_TO_CHANGE))
    if changed:
        raise ConfigError(
            f"cannot resume from {where}: {'; '.join(changed)}. Use another output_dir, or restore the "
            "configuration"
        )


def without(config: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """A configuration without some of its fields, named `section` or `section.field`."""
    left = {}
    for key, value in config.items():
        inside = [name.partition(".")[2] for name in fields if name.startswith(f"{key}.")]
        if key not in fields:
            left[key] = without(value, inside) if isinstance(value, dict) else value
    return left


def filled(config: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings that an older version wrote, plus the fields of `now` that it lacked.

    They have their default values, since that is how the older version behaved.
    """
    engine = (now.get("engine") or {}).get("name", "hf")
    defaults = json.loads(json.dumps(to_dict(build({"model": "", "data": "", "engine": engine}))))
    if (config.get("policy") or {}).get("lora"):
        defaults["policy"]["lora"] = {"use_dora": False, "new_tokens": False}

    def fill(given: Any, default: Any, now: Any) -> Any:
        if isinstance(given, str) and isinstance(default, dict) and "name" in default:
            given = {"name": given}  # a section that was a name
        if not (isinstance(given, dict) and isinstance(default, dict) and isinstance(now, dict)):
            return given
        old = {k: fill(value, default.get(k), now.get(k)) for k, value in given.items()}
        new = {k: default[k] for k in now if k in default and k not in given}
        return old | new

    return fill(config, defaults, now)


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """The differences, field by field; a missing field counts as null (older versions have fewer)."""
    if old == new:
        return []
    before, after = ({} if side is None else side for side in (old, new))
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [f"{name} was {old!r}, is {new!r}"]
    differences = []
    for key in sorted({*before, *after}):
        differences += changes(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    return differences
