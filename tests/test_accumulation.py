"""A step in many micro-batches has the gradient of one: sums in float32 do not drift."""

from __future__ import annotations

import pytest
import torch

from tests.builders.runs import one_step


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_seventy_micro_batches_have_the_gradient_of_one(values, tmp_path, packing):
    gradients = []
    for budget in (1_000_000, 64):
        changes = {"positions_per_step": 72, "token_budget": budget, "packing": packing}
        run, gradient = one_step(
            values,
            output_dir=str(tmp_path / str(budget)),
            loss__reader_coef=0.5,
            loss__ntp_coef=0.7,
            **changes,
        )
        gradients.append(gradient)
    assert run.last["batch/micro_batches"] >= 64
    whole, parts = gradients
    for name, expected in whole.items():
        apart = float((parts[name] - expected).abs().max() / expected.abs().max())
        assert apart < 1e-4, name
    flat = [torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients]
    assert float((flat[1] - flat[0]).norm() / flat[0].norm()) < 1e-5
