"""The learning rate of every optimizer step: all schedules, both backends, inner epochs, and runs resumed
for longer.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpretrain.config import ConfigError, OptimConfig, ScheduleConfig
from rlpretrain.config.io import apply_overrides, build, to_dict
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.training.same_settings import check_same
from rlpretrain.training.schedules import make_schedule
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


def configured(total: int = 1, **optim: Any) -> Any:
    """The settings `optim` as a run has them."""
    return build({"model": "m", "data": "d", "max_steps": total, "optim": optim}).optim


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


# wsd, infinite and inverse_sqrt

SCHEDULES: dict[str, dict[str, Any]] = {
    "wsd": {"schedule": {"name": "wsd", "decay": 0.25}, "min_lr_ratio": 0.1},
    "wsd_sqrt": {"schedule": {"name": "wsd", "decay": 0.25, "shape": "sqrt"}, "min_lr_ratio": 0.1},
    "infinite": {
        "schedule": {"name": "infinite", "cooldown_steps": 20, "constant_ratio": 0.5, "anneal_from": 84},
        "min_lr_ratio": 0.05,
    },
    "inverse_sqrt": {"schedule": "inverse_sqrt"},
}
"""Of 104 steps, 4 of them warm-up."""
TABLES: dict[str, dict[int, float]] = {
    # warm-up ends at 4, the decay begins at 79 and has 25 steps
    "wsd": {0: 0.25, 3: 1, 4: 1, 79: 1, 84: 0.82, 94: 0.46, 99: 0.28, 104: 0.1},
    # 1 - sqrt(1/25), 1 - sqrt(4/25), 1 - sqrt(9/25), 1 - sqrt(16/25)
    "wsd_sqrt": {79: 1, 80: 0.82, 83: 0.64, 88: 0.46, 95: 0.28, 104: 0.1},
    # half a cosine over 4..24, .5 up to 84, then by a factor of 10 in 20 steps
    "infinite": {3: 1, 4: 1, 14: 0.75, 24: 0.5, 50: 0.5, 84: 0.5, 94: 0.5 / 10**0.5, 104: 0.05},
    # sqrt(4 / n) after n steps
    "inverse_sqrt": {0: 0.25, 3: 1, 4: 1, 16: 0.5, 36: 1 / 3, 100: 0.2},
}


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_factors_are_those_of_the_closed_form(kind, inner):
    factor = make_schedule(configured(warmup_steps=4, **SCHEDULES[kind]), 104, inner)
    table = TABLES[kind] if inner == 1 else {n: f for n, f in TABLES[kind].items() if n >= 4}
    assert {n: factor(n * inner) for n in table} == pytest.approx(table)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_is_continuous(kind):
    """With a thousand times as many steps no two neighbours differ by more than the steepest slope."""
    optim = configured(warmup_steps=4, **SCHEDULES[kind])
    factor = make_schedule(optim, 104, 1000)
    found = [factor(n) for n in range(104_000)]
    # 1 - sqrt begins with an infinite slope: sqrt(1 / 25,000)
    steepest = 0.9 / 25_000**0.5 if kind == "wsd_sqrt" else 1 / 4000
    assert max(abs(a - b) for a, b in itertools.pairwise(found)) <= steepest * 1.001


def test_reductions():
    def factors(total: int = 60, **optim: Any) -> list[float]:
        factor = make_schedule(configured(warmup_steps=4, **optim), total)
        return [factor(n) for n in range(total)]

    constant = factors(schedule="constant")
    assert factors(schedule={"name": "wsd", "decay": 0}) == constant
    assert factors(schedule={"name": "wsd", "decay": 1}) == pytest.approx(factors(schedule="linear"))
    flat = {"name": "infinite", "cooldown_steps": 0, "constant_ratio": 1}
    assert factors(schedule=flat) == constant
    annealed = factors(schedule=flat | {"anneal_from": 40}, min_lr_ratio=0.01)
    assert annealed[:41] == constant[:41]
    assert annealed[40:] == pytest.approx([0.01 ** ((n - 40) / 20) for n in range(40, 60)])
    # nothing before its decay depends on the length of the run
    assert factors(schedule=flat | {"cooldown_steps": 30, "constant_ratio": 0.3}) == pytest.approx(
        factors(900, schedule=flat | {"cooldown_steps": 30, "constant_ratio": 0.3})[:60]
    )


PHASES = {"name": "infinite", "cooldown_steps": 3, "constant_ratio": 0.5, "anneal_from": 7}


def test_a_run_resumed_in_any_phase_has_the_same_rates(values, tmp_path):
    settings: dict[str, Any] = {
        "optim__schedule": PHASES,
        "optim__min_lr_ratio": 0.1,
        "max_steps": 10,
        "checkpoint__every": 1,
        "checkpoint__keep": 10,
        "objective": "ntp",
    }
    whole = rates(values, **settings)
    for step in (1, 4, 6, 8):
        checkpoint = Path(values["output_dir"]) / f"checkpoint-{step}"
        branch = str(tmp_path / f"from{step}")
        assert rates(values, resume=str(checkpoint), output_dir=branch, **settings) == whole[step:]


def test_a_decay_starts_from_any_checkpoint_of_the_constant_phase(values, tmp_path):
    settings = {
        "objective": "ntp",
        "optim__lr": 1e-3,
        "optim__min_lr_ratio": 0.01,
        "checkpoint__every": 2,
        "checkpoint__keep": 9,
    }
    schedule = PHASES | {"anneal_from": None}
    rates(values, max_steps=8, optim__schedule=schedule, **settings)
    checkpoint = str(Path(values["output_dir"]) / "checkpoint-6")

    def branch(name: str, begin: int) -> list[float]:
        decay = schedule | {"anneal_from": begin}
        where = str(tmp_path / name)
        return rates(
            values, resume=checkpoint, output_dir=where, max_steps=10, optim__schedule=decay, **settings
        )

    assert branch("six", 6) == pytest.approx([0.5e-3 * 0.02 ** (n / 4) for n in range(4)])
    assert branch("eight", 8) == pytest.approx([0.5e-3, 0.5e-3, 0.5e-3, 0.5e-3 * 0.02**0.5])
    with pytest.raises(ConfigError, match="anneal_from was None, is 5; only a decay that begins at step 6"):
        branch("five", 5)


def test_wsd_decays_from_a_checkpoint_where_the_run_is_made_shorter(values, tmp_path):
    settings = FLAT | {"objective": "ntp", "optim__schedule": {"name": "wsd", "decay": 0.25}}
    long = rates(values, max_steps=16, stop__input_tokens=1, checkpoint__every=6, **settings)
    assert long == [1e-3]  # the budget ended it
    rates(values, max_steps=16, output_dir=str(tmp_path / "long"), checkpoint__every=6, **settings)
    checkpoint = str(tmp_path / "long" / "checkpoint-6")
    short = rates(values, resume=checkpoint, output_dir=str(tmp_path / "short"), max_steps=8, **settings)
    assert short == pytest.approx([1e-3, 0.5e-3])


def test_a_name_alone_is_a_schedule_and_older_checkpoints_have_one():
    optim = configured(schedule="wsd")
    assert optim.schedule == ScheduleConfig(name="wsd") == OptimConfig(schedule="wsd").schedule
    now = json.loads(json.dumps(to_dict(build({"model": "m", "data": "d", "optim": {"schedule": "linear"}}))))
    before = now | {"optim": now["optim"] | {"schedule": "linear"}}
    del before["average"], before["optim"]["options"]
    check_same(before, now, Path("there"))
    with pytest.raises(ConfigError, match=r"optim.schedule.name was 'cosine', is 'linear'"):
        check_same(before | {"optim": before["optim"] | {"schedule": "cosine"}}, now, Path("there"))
    line = apply_overrides({"optim": {"schedule": "wsd"}}, ["--optim.schedule.decay", "0.5"])
    assert build({"model": "m", "data": "d"} | line).optim.schedule == ScheduleConfig(name="wsd", decay=0.5)


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"schedule": "wds"}, "no 'wds'; did you mean 'wsd'"),
        ({"schedule": {"name": "wsd", "decay": 1.5}}, "optim.schedule.decay.*less than or equal to 1"),
        ({"schedule": {"name": "wsd", "decai": 0.5}}, "unknown key .*did you mean 'decay'"),
        ({"schedule": {"name": "wsd", "shape": "cosine"}}, "optim.schedule.shape.*'linear' or 'sqrt'"),
        (
            {"schedule": {"name": "cosine", "decay": 0.5}},
            "decay is a setting of schedule wsd, not of schedule cosine",
        ),
        ({"schedule": {"decay": 0.5}}, "not of schedule constant"),
        (
            {"schedule": {"name": "infinite", "anneal_from": 50}},
            "min_lr_ratio must lie between them and is 0",
        ),
        (
            {"schedule": {"name": "infinite", "anneal_from": 50, "constant_ratio": 0.1}, "min_lr_ratio": 0.2},
            "starts at constant_ratio 0.1",
        ),
        ({"schedule": {"name": "infinite", "anneal_from": 5}, "min_lr_ratio": 0.1}, "lies in the warm-up"),
        ({"schedule": {"name": "infinite", "constant_ratio": 0}}, "greater than 0"),
    ],
)
def test_mistakes_in_a_schedule_are_named(optim, said):
    with pytest.raises(ConfigError, match=said):
        make_schedule(configured(**optim), 100)


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
