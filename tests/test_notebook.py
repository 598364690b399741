"""The notebook of examples/ runs from its first cell to its last, as a reader runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_thought.ipynb"


def test_what_is_committed_has_outputs_and_no_places_of_a_machine():
    text = NOTEBOOK.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    kinds = {(output["output_type"], output["name"]) for cell in cells for output in cell["outputs"]}
    assert kinds == {("stream", "stdout")}  # no error and no warning
    check_numbers(cells)
    assert not re.search(r"(/home|/root|/Users|/tmp|/work|[A-Z]:\\\\)", text)


def check_numbers(cells: list) -> None:
    """Thoughts got better, for their content, and nothing was unlearnt."""
    said = "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))
    rows = dict(re.findall(r"^(\w+) +(before .*)$", said, re.M))
    numbers = {name: [float(n) for n in re.findall(r"(-?[\d.]+) \[", row)] for name, row in rows.items()}
    for name, least in {"think_sampled": 0.2, "gain_frozen": 0.5}.items():
        before, after = numbers[name]
        assert after > before + least, (name, before, after)
    assert all(numbers["gain_frozen"][1] > numbers[name][1] + 0.5 for name in ("empty", "shuffled", "other"))
    assert numbers["no_think_loss"][1] < numbers["no_think_loss"][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_shows_what_it_says(tmp_path):
    """In a folder with links to what it reads. Processors differ in digits, so only the order counts."""
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs: make env LOCK=test-cpu")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs: make env LOCK=test-cpu")
    pytest.importorskip("ipykernel", reason="needs the extra docs: make env LOCK=test-cpu")
    (tmp_path / "rlpretrain").symlink_to(ROOT / "rlpretrain")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "data").symlink_to(ROOT / "tests" / "data")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    check_numbers(notebook.cells)
    assert (tmp_path / "runs" / "first_thought" / "rlp" / "report.html").exists()
