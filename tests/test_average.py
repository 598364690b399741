"""The average of the weights against the checkpoints that it averages: ZeRO, two ranks, LoRA, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives.rlp import RLP
from rlpretrain.training.loop import train
from rlpretrain.training.planning import check_settings
from rlpretrain.training.run import Run
from rlpretrain.training.run_evaluation import RunEvaluation
from tests.builders.faults import poison
from tests.builders.policies import SHARDED
from tests.builders.runs import launch, merged, same, trained, weights

KINDS: dict[str, dict[str, Any]] = {
    "sma": {"kind": "sma", "every": 2, "start": 3},
    "ema": {"kind": "ema", "decay": 0.6},
    "last_k": {"kind": "last_k", "every": 2, "last": 2},
}
STEPS = 6
LONG: dict[str, Any] = {"max_steps": STEPS, "checkpoint__every": 1, "checkpoint__keep": 9, "objective": "ntp"}
WHOLE = {"policy": {"backend": "deepspeed", "zero_stage": 3}}  # so small that DeepSpeed gathers all for good
SHARDS = {"policy": {"backend": "deepspeed", "deepspeed_config": SHARDED}}


def after(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of the torch backend."""
    state = torch.load(folder / f"checkpoint-{step}" / "policy.pt", weights_only=True)["model"]
    return {name: values.double() for name, values in state.items() if name != "lm_head.weight"}


def expected(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """The average from the checkpoints, in float64."""
    at = {step: after(folder, step) for step in range(1, STEPS + 1)}
    if kind == "ema":  # .6^5 of the first, .4 · .6^(6 - s) of each other
        share = {step: 0.4 * 0.6 ** (STEPS - step) for step in at} | {1: 0.6 ** (STEPS - 1)}
    else:
        share = {4: 0.5, 6: 0.5}
    return {name: sum(part * at[step][name] for step, part in share.items()) for name in at[1]}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_average_of_the_saved_checkpoints(values, kind):
    run = trained(values, average=KINDS[kind], **LONG)
    folder = Path(values["output_dir"])
    found = weights(folder / "averaged")
    for name, mean in expected(kind, folder).items():
        assert float((found[name] - mean).abs().max()) <= 1e-6, name
    assert not same(run, found, within=1e-5)


@pytest.mark.parametrize("kind", ["sma", "last_k"])
def test_equal_weights_have_themselves_as_their_average(values, kind):
    settings = {"kind": kind, "last": 5} if kind == "last_k" else kind
    found = trained(values, average=settings, **LONG | {"optim__lr": 0.0})
    assert same(found, weights(Path(values["output_dir"]) / "averaged"))


def resumed(values: dict[str, Any], tmp_path: Path, **changes: Any) -> tuple[dict, dict]:
    """The averages of a run and of the same run resumed from its checkpoint 3."""
    run = merged(values, **LONG | {"checkpoint__every": 3} | changes)
    trained(run, output_dir=str(tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    trained(run, resume="auto", output_dir=str(tmp_path / "parts"))
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model"))
    return weights(tmp_path / "whole" / "averaged"), weights(tmp_path / "parts" / "averaged")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("ema", {}),
        ("last_k", {"dtype": "bfloat16"}),
        ("last_k", SHARDS),
        ("ema", {"policy": {"backend": "deepspeed", "zero_stage": 2}}),
        ("sma", {"policy": {"backend": "torch", "lora": {"r": 2}}}),
    ],
)
def test_a_resumed_run_has_the_same_average(values, tmp_path, kind, more):
    whole, again = resumed(values, tmp_path, average=KINDS[kind] | {"start": 0}, **more)
    assert same(whole, again) and not same(whole, weights(tmp_path / "whole" / "model"), within=1e-6)


@pytest.mark.slow
def test_two_ranks_average_like_one_and_resume(values, tmp_path):
    """Torch splits whole parameters over the ranks, ZeRO 3 has shards; in exact resumes on two ranks too."""
    base = merged(values, **LONG | {"checkpoint__every": 3})
    runs = {
        f"{kind}-{name}": merged(base, average=KINDS[kind] | {"start": 0}, **backend)
        for kind, name, backend in (
            ("ema", "torch", {}),
            ("ema", "zero3", SHARDS),
            ("last_k", "zero3", SHARDS),
        )
    }
    for kind in ("ema", "last_k"):
        trained(runs[f"{kind}-zero3"] | {"policy": {"backend": "torch"}}, output_dir=str(tmp_path / kind))
    first = {name: merged(run, output_dir=str(tmp_path / name)) for name, run in runs.items()}
    again = {name: merged(run, output_dir=str(tmp_path / f"{name}-again")) for name, run in runs.items()}
    launch([{"config": run} for run in first.values()], tmp_path)
    for name in runs:
        (tmp_path / f"{name}-again").mkdir()
        (tmp_path / name / "checkpoint-3").rename(tmp_path / f"{name}-again" / "checkpoint-3")
    launch([{"config": run, "resume": "auto"} for run in again.values()], tmp_path)
    for name in runs:
        found = weights(tmp_path / name / "averaged")
        assert same(found, weights(tmp_path / name.split("-")[0] / "averaged"), within=5e-5), name
        assert same(found, weights(tmp_path / f"{name}-again" / "averaged")), name
    sizes = [
        (tmp_path / "ema-torch" / "checkpoint-6" / f"average-{rank}.pt").stat().st_size for rank in (0, 1)
    ]
    total = sum(4 * p.numel() for p in weights(Path(values["model"])).values())
    assert max(sizes) < 0.8 * total  # neither rank has all of it


@pytest.mark.parametrize("more", [{}, SHARDS, {"policy": {"backend": "torch", "lora": {"r": 2}}}])
def test_it_is_evaluated_and_the_run_goes_on_with_its_own_weights(values, corpus, tmp_path, more):
    """The last evaluation is that of the saved models, and training is that of a run without an average."""
    held_out: dict[str, Any] = {
        "eval__data": str(corpus / "held_out.jsonl"),
        "eval__documents": 4,
        "eval__every": 1,
    }
    plain = trained(values, output_dir=str(tmp_path / "plain"), **held_out, **more)
    average = {"kind": "ema", "decay": 0.9, "start": 2}
    found = trained(values, average=average, **held_out, **more)
    assert same(plain, found)
    folder = Path(values["output_dir"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "eval_averaged/no_think_loss" not in rows[0] and "eval/no_think_loss" in rows[0]
    for name, prefix in (("model", "eval"), ("averaged", "eval_averaged")):
        start = values | {"model": str(folder / name), "policy": {"backend": "torch"}}
        run = Run(build(merged(start, output_dir=str(tmp_path / name), **held_out)), None)
        again = run.evaluation.evaluate()
        run.close()
        for number in ("no_think_loss", "think_sampled", "thought_tokens"):
            if f"eval/{number}" in again:
                logged = rows[-1][f"{prefix}/{number}"]
                assert logged == pytest.approx(again[f"eval/{number}"], rel=1e-4), (prefix, number)
    assert rows[-1]["eval/no_think_loss"] != rows[-1]["eval_averaged/no_think_loss"]


def test_adapters_are_averaged_and_saved_like_adapters(values):
    run = merged(values, policy__lora={"r": 2}, average="sma", **LONG)
    trained(run)
    folder = Path(values["output_dir"])
    states = [
        torch.load(folder / f"checkpoint-{step}" / "policy.pt", weights_only=True)["model"]
        for step in range(1, STEPS + 1)
    ]
    names = {name.replace(".default", ""): name for name in states[0] if ".lora_" in name}
    saved = load_file(folder / "averaged_adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in saved} == set(names)
    for short, name in names.items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        assert float((saved[f"base_model.model.{short}"] - mean).abs().max()) <= 1e-6
    assert set(load_file(folder / "averaged" / "model.safetensors")) == set(
        load_file(folder / "model" / "model.safetensors")
    )


def test_a_tied_weight_is_saved_once(values):
    trained(values, average="ema", **LONG | {"max_steps": 2})
    names = set(load_file(Path(values["output_dir"]) / "averaged" / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_a_skipped_step_does_not_count(values):
    run = Run(build(merged(values, average="sma", max_steps=4)), None)
    poison(run, "gradients", at={2})
    seen = []
    update = run.finish

    def spy(step: int, batch: Any) -> None:
        seen.append({n: p.detach().clone() for n, p in run.policy.model.named_parameters()})
        update(step, batch)

    run.finish = spy
    train(run)
    run.end()
    run.close()
    assert run.skipped == 1 and run.average is not None and run.average.count == 3
    found = weights(Path(values["output_dir"]) / "averaged")
    for name in found:
        mean = torch.stack([seen[step][name] for step in (0, 2, 3)]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=0, atol=1e-6)


def test_a_collapse_gives_back_the_average_of_the_best_checkpoint(values, corpus, monkeypatch):
    gains, loss = iter([0.1, 0.9, 0.3, 0.2]), {"eval/no_think_loss": 1.0}
    monkeypatch.setattr(RunEvaluation, "evaluate", lambda *_: {"eval/gain_frozen": next(gains), **loss})
    monkeypatch.setattr(RunEvaluation, "evaluate_average", lambda *_: {})
    held_out = {"eval__data": str(corpus / "held_out.jsonl"), "eval__documents": 4, "eval__every": 1}
    run = Run(build(merged(values, average="sma", max_steps=4, checkpoint__every=1, **held_out)), None)
    train(run)
    run.stopped = "collapse: said so"
    run.end()
    run.close()
    folder = Path(values["output_dir"])
    at = [after(folder, step) for step in (2, 3, 4)]
    assert run.average is not None and run.average.count == 2
    assert all(same_values(weights(folder / "model")[n], at[0][n]) for n in at[0])
    assert not any(same_values(weights(folder / "averaged")[n], at[0][n]) for n in at[0])


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.double(), b.double())


@pytest.mark.parametrize(
    ("average", "said"),
    [
        ("swa", "average.kind.*'sma', 'ema' or 'last_k'"),
        ({"kind": "sma", "decay": 0.5}, "decay is a setting of average ema, not of average sma"),
        ({"kind": "ema", "last": 3}, "last is a setting of average last_k, not of average ema"),
        ({"kind": "ema", "decay": 1.5}, "average.decay.*less than or equal to 1"),
        ({"kind": "ema", "evry": 2}, "did you mean 'every'"),
        ({"kind": "last_k", "last": 7}, "average.last 7: only 6 of the run's 6 steps count"),
        ({"kind": "last_k", "every": 2, "last": 4}, "only 3 of the run's 6 steps count"),
        ({"kind": "last_k", "every": 2, "start": 3, "last": 3}, "only 2 of the run's 6 steps count"),
        ({"every": 7}, "no weights count, the first would be those after step 7 of 6"),
        ({"every": 4, "start": 5}, "the first would be those after step 8 of 6"),
    ],
)
def test_settings_that_contradict_are_refused_early(values, average, said):
    with pytest.raises(ConfigError, match=said):
        check_settings(build(merged(values, average=average, max_steps=6)), RLP, ranks=1)


def test_a_backend_without_parts_is_refused(values):
    config = build(merged(values, average="ema", policy__backend="tests.test_average:NoParts"))
    with pytest.raises(ConfigError, match="has no method `parts`"):
        check_settings(config, RLP, ranks=1)


class NoParts:
    """A backend of an earlier version."""


@pytest.mark.parametrize("settings", [SHARDS, WHOLE])
def test_under_zero_3_it_is_that_of_one_process(values, tmp_path, settings):
    run = merged(values, **LONG, average=KINDS["ema"])
    trained(run, output_dir=str(tmp_path / "one"))
    trained(run, output_dir=str(tmp_path / "zero"), **settings)
    assert same(weights(tmp_path / "zero" / "averaged"), weights(tmp_path / "one" / "averaged"), within=2e-5)
