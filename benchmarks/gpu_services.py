"""The part of `benchmarks.gpu` that runs what stands beside the loop: servers, Ray actors, TRL's trainers."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engines_processes import child, wait_until_ready
from benchmarks.gpu import OLDEST
from benchmarks.gpu_paths import train_path, write_inputs
from benchmarks.gpu_shapes import Cell, Report, Settings, measuring
from tests.builders.processes import free_port

SERVE = (
    "import json, sys; from rlpretrain import floors; floors.OLDEST.update(json.loads(sys.argv.pop(1)));"
    " from rlpretrain.cli import main; raise SystemExit(main())"
)
"""Runs `rlpretrain` with the oldest versions that this benchmark allows."""
NEEDS = {"vllm": ("vllm", "fastapi", "httpx"), "hf": ("fastapi", "httpx"), "ray": ("ray",), "trl": ("trl",)}


def measure_services(settings: Settings, report: Report) -> None:
    """Four steps of RLP through each of them."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for title, needs, run in (
            ("TRL's GRPOTrainer with our reward", "trl", _train_with_grpo),
            ("RLPTrainer", "trl", _train_with_rlp_trainer),
            ("RLPTrainer, LoRA", "trl", _train_with_adapter),
            ("rlpretrain serve, hf, weights by files", "hf", _train_on_hf_server),
            ("a Ray actor, hf", "ray", _train_on_ray),
            ("rlpretrain serve, vLLM, weights by files", "vllm", _train_on_vllm_server),
        ):
            cell = Cell(title)
            missing = [lib for lib in NEEDS[needs] if importlib.util.find_spec(lib) is None]
            if settings.tiny and title != "RLPTrainer":
                continue  # the tests of the library run all of them
            if missing:
                cell.status = f"{', '.join(missing)} is not installed"
            elif time.perf_counter() - begin > 0.85 * settings.seconds:
                cell.status = "no time left"
            else:
                with measuring(cell):
                    start = time.perf_counter()
                    cell.values = run(settings, folder, cell)
                    cell.values["seconds"] = time.perf_counter() - start
            report(cell)


def _train_on_hf_server(settings: Settings, folder: Path, cell: Cell) -> dict[str, Any]:
    return _train_on_server(settings, folder, cell, "hf", ["--device", settings.device])


def _train_on_vllm_server(settings: Settings, folder: Path, cell: Cell) -> dict[str, Any]:
    return _train_on_server(settings, folder, cell, "vllm", ["--kv-cache-gib", "1"])


def _train_on_server(
    settings: Settings, folder: Path, cell: Cell, engine: str, options: list[str]
) -> dict[str, Any]:
    """The probe compares the server's log-probs with the trainer's after every sync."""
    weights = folder / f"weights-{engine}"
    weights.mkdir()
    with _server(folder, engine, ["--weights-dir", str(weights), *options], settings.seconds / 2) as url:
        changes = {"engine": {"name": "vllm_server", "urls": [url], "weights_dir": str(weights)}}
        train_path(settings, folder, f"server {engine}", changes, cell)
    return cell.values


@contextmanager
def _server(folder: Path, engine: str, options: list[str], seconds: float) -> Iterator[str]:
    """The address of a server that is ready; it ends with its children."""
    port = free_port()
    command = [sys.executable, "-c", SERVE, json.dumps(OLDEST), "serve", str(folder / "base"), *options]
    command += ["--engine", engine, "--port", str(port), "--dtype", "float32"]
    url, log = f"http://127.0.0.1:{port}", folder / f"server-{engine}.log"
    with child(command, log) as process:
        wait_until_ready(url, process, log, seconds)
        yield url


def _train_on_ray(settings: Settings, folder: Path, cell: Cell) -> dict[str, Any]:
    resources = {"num_cpus": 1, "num_gpus": 0.5}
    train_path(settings, folder, "ray", {"engine": {"name": "ray", "of": "hf", "resources": resources}}, cell)
    return cell.values


def _train_with_rlp_trainer(
    settings: Settings, folder: Path, cell: Cell, adapter: Any = None
) -> dict[str, Any]:
    from rlpretrain.trl import RLPConfig, RLPTrainer

    args = _trl_settings(settings, folder, RLPConfig, positions="after", marker="shows", ntp_coef=0.3)
    trainer = RLPTrainer(str(folder / "base"), args=args, train_dataset=_texts(folder), peft_config=adapter)
    return _logged(trainer)


def _train_with_adapter(settings: Settings, folder: Path, cell: Cell) -> dict[str, Any]:
    from peft import LoraConfig

    return _train_with_rlp_trainer(settings, folder, cell, LoraConfig(r=4, task_type="CAUSAL_LM"))


def _train_with_grpo(settings: Settings, folder: Path, cell: Cell) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from rlpretrain.trl import InformationGainReward

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    reward = InformationGainReward(model, tokenizer, positions="after", marker="shows")
    args = _trl_settings(settings, folder, GRPOConfig, scale_rewards="none", loss_type="grpo")
    return _logged(
        GRPOTrainer(
            model,
            reward_funcs=[reward],
            callbacks=[reward.callback],
            processing_class=tokenizer,
            train_dataset=reward.dataset(folder / "train.jsonl"),
            args=args,
        )
    )


def _trl_settings(settings: Settings, folder: Path, kind: Any, **own: Any) -> Any:
    on_cpu = {} if settings.device.startswith("cuda") else {"use_cpu": True, "bf16": False}
    return kind(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **on_cpu,
        **own,
    )


def _texts(folder: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")


def _logged(trainer: Any) -> dict[str, Any]:
    """Train; the last loss and the rewards. ValueError if a number is not finite or no reward differs."""
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    rewards = [row["reward"] for row in rows]
    losses = [row["loss"] for row in rows]
    if len(rows) != 4 or not all(map(math.isfinite, [*rewards, *losses])) or len(set(rewards)) == 1:
        raise ValueError(f"rewards {rewards}, losses {losses}")
    where = {str(p.device.type) for p in trainer.model.parameters()}
    if where != {trainer.args.device.type}:
        raise ValueError(f"weights are on {where}")
    return {"loss": losses[-1]}
