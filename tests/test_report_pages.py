"""The top of a report, its curves, runs side by side, and the page of a run that trains."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlpretrain.cli import main
from rlpretrain.config import ConfigError
from rlpretrain.reporting.curves import _merge_equal, _smooth, draw_curves
from rlpretrain.reporting.headline import Change, make_headline
from rlpretrain.reporting.html import _counted
from rlpretrain.reporting.report import report
from rlpretrain.reporting.watch import HOST, make_server
from tests.builders.html import Seen


def written(folder: Path, rows: list[dict[str, float]], **record: Any) -> Path:
    """A run folder without a model."""
    folder.mkdir()
    config = {
        "model": {"path": "base"},
        "data": {"path": f"{folder.name}.jsonl"},
        "objective": {"name": "rlp"},
    }
    (folder / "run.json").write_text(json.dumps({"status": "done", "step": 9, "config": config} | record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def climbing(slope: float, steps: int = 40) -> list[dict[str, float]]:
    return [
        {"step": k, "reward": slope * k, "ig/mean": 1.0 * k, "ig/self": 1.0 * k} for k in range(1, steps + 1)
    ]


def test_the_headline_is_of_held_out_documents_where_there_are_some():
    rows = climbing(1.0)
    rows[0] |= {"eval/gain_frozen": 0.1, "eval/empty": 0.05}
    rows[29] |= {"eval/gain_frozen": 0.9, "eval/empty": 0.06, "eval/no_think_loss": 2.0}
    found = make_headline({"config": {"model": {"path": "m"}, "data": {"sources": {"a": 1, "b": 2}}}}, rows)
    assert found.subjects == {"model": "m", "data": "a, b"}
    assert found.changes == [
        Change("gain of thoughts", 0.1, 0.9),
        Change("gain of an empty thought", 0.05, 0.06),
        Change("loss without a thought, per token", None, 2.0),
    ]
    assert "held-out documents, at step 1 and step 30" in found.measured


def test_without_them_it_is_of_the_first_and_last_tenth_of_the_training_documents():
    rows = climbing(1.0) + [
        {"step": 41, "ig/frozen": 0.5},
        {"step": 42, "ntp/loss": 3.0, "ntp/trained_loss": 1.0},
    ]
    found = make_headline({}, rows)
    assert found.changes == [
        Change("gain of thoughts", None, 0.5),
        Change("reward", 2.5, 38.5),
        Change("loss of the trained tokens", None, 1.0),
        Change("loss without a thought, per token", None, 3.0),
    ]
    assert make_headline({}, []).changes == []


def test_no_curve_hides_another():
    run = {"a": [(1.0, 1.0), (2.0, 3.0)], "b": [(1.0, 1.0), (2.0, 3.001)], "c": [(1.0, 1.0), (2.0, 2.0)]}
    assert _merge_equal([run]) == {"a": "a = b", "c": "c"}
    other = run | {"b": [(1.0, 0.0), (2.0, 0.0)]}
    assert _merge_equal([run, other]) == {"a": "a", "b": "b", "c": "c"}
    assert _merge_equal([{"a": [(1.0, 1.0)], "b": [(2.0, 1.0)]}]) == {"a": "a", "b": "b"}
    pytest.importorskip("matplotlib")
    (gains,) = [panel for panel in draw_curves(climbing(1.0)) if "information gain" in panel.title]
    assert "ig/mean = ig/self" in gains.svg


def test_smoothed_values_are_means_of_those_around():
    values = np.random.default_rng(0).normal(size=90)
    smooth = _smooth(values)
    wanted = [values[max(0, k - 2) : k + 3].mean() for k in range(90)]
    np.testing.assert_allclose(smooth, wanted, atol=1e-12)
    assert _smooth(values[:39]) is not None and (_smooth(values[:39]) == values[:39]).all()


def test_equal_thoughts_are_one_row():
    a, b = {"text": "x", "gain": 1.0}, {"text": "x", "gain": 2.0}
    assert _counted([a, b, a, a]) == [a | {"count": 3}, b | {"count": 1}]


def test_two_runs_on_one_page(tmp_path):
    pytest.importorskip("matplotlib")
    one, other = written(tmp_path / "one", climbing(1.0)), written(tmp_path / "other", climbing(3.0))
    page = report(one, tmp_path / "page.html", against=other).read_text()
    text = Seen(page).text
    assert "From first to last: one" in text and "From first to last: other" in text
    assert "other.jsonl" in text and "reward (other)" in page and "other: reward from 3 to 120" in page
    twin = written(tmp_path / "deeper", []).rename(tmp_path / "one_")
    (tmp_path / "x").mkdir()
    twin = twin.rename(tmp_path / "x" / "one")
    page = report(one, tmp_path / "page.html", against=twin).read_text()
    assert f"{twin}: metrics.jsonl" in Seen(page).text
    with pytest.raises(ConfigError, match="is no run folder"):
        report(one, against=tmp_path)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    run = written(tmp_path / "run", climbing(1.0), status="running")
    with make_server(run, every=7) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield run, server.server_port
        server.shutdown()


def asked(port: int, path: str = "/", host: str = HOST) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_run_is_watched_while_it_trains(served):
    run, port = served
    status, page = asked(port)
    assert status == 200 and "running, step 9" in page and 'http-equiv="refresh" content="7"' in page
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 41, "reward": 1000.0}) + "\n")
        log.write('{"step": 42, "rew')  # as a run that is about to write leaves it
    again = asked(port, host=f"localhost:{port}")[1]
    assert again != page and re.search(r"reward from 1 to 1e\+03", again)


@pytest.mark.parametrize(("path", "host", "status"), [("/", "evil.example", 403), ("/run.json", HOST, 404)])
def test_nothing_else_is_served(served, path, host, status):
    assert asked(served[1], path, host)[0] == status


def test_bad_input_of_watch(served, tmp_path, capsys):
    run, port = served
    with pytest.raises(ConfigError, match=f"--port {port}: .*in use"):
        make_server(run, port)
    with pytest.raises(ConfigError, match="is no run folder"):
        make_server(tmp_path)
    assert main(["report", str(run), "--watch", "--out", "x.html"]) == 2
    assert "leave out --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(run), "--watch", "--port", "70000"])
    assert "a port is a whole number" in capsys.readouterr().err
