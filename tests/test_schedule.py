"""The learning rate of every optimizer step: all schedules, both backends, inner epochs, and runs resumed
for longer.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpretrain.config.io import build
from rlpretrain.training.loop import train
from rlpretrain.training.schedules import make_schedule
from rlpretrain.training.run import Run
from tests.builders.runs import merged

FLAT = {"optim__lr": 1e-3, "optim__warmup_steps": 0}
BACKENDS = ("torch", "deepspeed")


def rates(values: dict[str, Any], resume: Any = None, **changes: Any) -> list[float]:
    """The rate that the optimizer had at each of a run's updates."""
    run = Run(build(merged(values, **changes)), resume)
    seen: list[float] = []
    optimizer = getattr(run.policy, "optimizer", None) or run.policy.engine.optimizer
    step = run.policy.step

    def spy() -> Any:
        info = step()
        used = {group["lr"] for group in optimizer.param_groups}
        assert used == {info.lr} and info.applied
        seen.append(info.lr)
        return info

    run.policy.step = spy
    train(run)
    run.end()
    run.close()
    return seen


def wanted(kind: str, n: int, warm: int, total: int, floor: float = 0.0) -> float:
    """Update `n` of `total`, by the definition."""
    if n < warm:
        return (n + 1) / warm
    done = (n - warm) / (total - warm)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]
    return floor + (1 - floor) * shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_schedule_spans_all_inner_epochs(values, kind, backend):
    """Issue 15.1: with two updates a step, cosine had reached 0 when half of the run was done."""
    found = rates(
        values,
        policy__backend=backend,
        max_steps=5,
        loss__inner_epochs=3,
        optim__schedule=kind,
        optim__lr=1e-3,
        optim__warmup_steps=2,
        optim__min_lr_ratio=0.1,
    )
    assert found == pytest.approx([1e-3 * wanted(kind, n, 6, 15, 0.1) for n in range(15)], rel=1e-9)
    assert found[5] == pytest.approx(1e-3)  # two steps of warm-up are six updates


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warm", "inner"), [(0, 1), (0, 4), (3, 1), (3, 2), (20, 2)])
def test_a_factor_depends_on_the_update_alone(kind, warm, inner):
    optim = build({"model": "m", "data": "d", "optim": {"schedule": kind, "warmup_steps": warm}}).optim
    factor, total = make_schedule(optim, 20, inner), 20 * inner
    found = [factor(n) for n in range(total)]
    assert found[::-1] == [factor(n) for n in reversed(range(total))]
    assert min(found) > 0  # no update of the run is wasted
    if warm < 20:
        assert found == pytest.approx([wanted(kind, n, warm * inner, total) for n in range(total)])
    every = [make_schedule(optim, 20)(n) for n in range(20)]
    assert found[inner - 1 :: inner][:warm] == pytest.approx(
        every[:warm]
    )  # a step's last update ends where the step does


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "inner"), [("linear", 1), ("linear", 2), ("cosine", 1)])
def test_a_decaying_rate_is_resumed_for_more_steps(values, backend, kind, inner):
    """Issue 15.1: linear over 4 steps, resumed to 8: the fifth step's rate was 0; half of the peak is due."""
    settings = FLAT | {
        "policy__backend": backend,
        "optim__schedule": kind,
        "checkpoint__every": 4,
        "loss__inner_epochs": inner,
    }
    first = rates(values, max_steps=4, **settings)
    assert first == pytest.approx([1e-3 * wanted(kind, n, 0, 4 * inner) for n in range(4 * inner)])
    more = rates(values, resume="auto", max_steps=8, **settings)
    assert more == pytest.approx([1e-3 * wanted(kind, n, 0, 8 * inner) for n in range(4 * inner, 8 * inner)])
    assert more[0] == pytest.approx(5e-4)


def test_a_checkpoint_with_the_state_of_a_scheduler_is_resumed(values):
    """Until now the torch policy kept a LambdaLR's state in place of its number of updates."""
    settings = FLAT | {"optim__schedule": "linear", "checkpoint__every": 4}
    rates(values, max_steps=4, **settings)
    file = Path(values["output_dir"]) / "checkpoint-4" / "policy.pt"
    state = torch.load(file, weights_only=True)
    kept = {"base_lrs": [1e-3] * 2, "last_epoch": state.pop("steps"), "_step_count": 5, "_last_lr": [0.0] * 2}
    torch.save(state | {"scheduler": kept}, file)
    about = json.loads((file.parent / "state.json").read_text())
    about["files"]["policy.pt"] = file.stat().st_size
    (file.parent / "state.json").write_text(json.dumps(about))
    assert rates(values, resume="auto", max_steps=8, **settings) == pytest.approx(
        [5e-4, 3.75e-4, 2.5e-4, 1.25e-4]
    )


def test_the_logged_loss_is_one_epochs(values):
    """Inner epochs were added up: two of them doubled `loss` and `policy_loss`."""

    def logged(inner: int) -> dict[str, float]:
        run = Run(
            build(
                merged(
                    values,
                    max_steps=1,
                    loss__inner_epochs=inner,
                    optim__lr=0.0,
                    objective__target_length=2,
                    output_dir=f"{values['output_dir']}{inner}",
                )
            ),
            None,
        )
        train(run)
        run.close()
        return run.last

    once, thrice = logged(1), logged(3)
    for name in ("loss", "policy_loss", "ntp/loss", "reader/loss", "learning_rate"):
        assert thrice[name] == pytest.approx(once[name], rel=1e-5, abs=1e-6), name
