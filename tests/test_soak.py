"""`benchmarks.soak`: it counts what it says, and would see memory that grows."""

from __future__ import annotations

import pytest

from benchmarks import soak

pytest.importorskip("fastapi", reason="needs fastapi: make env LOCK=test-cpu")


@pytest.mark.slow
def test_a_short_run_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "SECONDS", 0.1)
    monkeypatch.setattr(soak, "EVERY", 0.1)
    found = soak.soak(0.005, "hf", tmp_path / "soak.json")
    assert soak.fine(found) and found["steps"] == 3 and found["groups"] == 3 * soak.POSITIONS
    assert found["requests"]["route=/v1/completions,status=200"] >= found["groups"]
    assert set(found["memory"]) == {"trainer", "service a", "service b"}
    assert f"groups: {found['groups']} of {found['groups']}, 0 twice, 0 aborted" in soak.table(found)


def test_growth_is_seen_beside_noise_and_a_start():
    noise = [(-1.0) ** i for i in range(100)]
    flat = [(i / 100, 500 + noise[i] - 300 * (i < 10)) for i in range(100)]
    assert abs(soak.growth(flat)["mib_an_hour"]) < 1
    leaking = [(hours, size + 40 * hours) for hours, size in flat]
    found = soak.growth(leaking)
    assert found["mib_an_hour"] == pytest.approx(40, abs=1) and found["last_mib"] > found["first_mib"] + 25


def test_a_run_that_lost_a_group_is_not_fine():
    found = {"done": True, "groups": 48, "expected": 48, "twice": 0}
    assert soak.fine(found)
    for change in ({"groups": 47}, {"twice": 1}, {"done": False}):
        assert not soak.fine(found | change)
