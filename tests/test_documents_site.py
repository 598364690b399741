"""The pages of the site: all are in its navigation, links become links between pages, tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rlpretrain.tracking.health import RULES

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def pages_in(entry) -> list[str]:
    """The pages of a part of `nav`."""
    if isinstance(entry, str):
        return [entry]
    parts = entry if isinstance(entry, list) else entry.values()
    return [page for part in parts for page in pages_in(part)]


@pytest.fixture(scope="module")
def site():
    pytest.importorskip("mkdocs", reason="needs the extra docs: make env LOCK=test-cpu")
    from scripts import site_pages

    return site_pages


@pytest.fixture(scope="module")
def settings() -> dict:
    text = (ROOT / "mkdocs.yml").read_text()
    return yaml.safe_load(re.sub(r"!(?:!python/\S+|ENV) ", "", text))


def test_every_page_is_in_the_navigation_once(site, settings):
    listed = pages_in(settings["nav"])
    added = [*site.OUTSIDE.values(), *(f"api/{name}.md" for name in site.API)]
    assert sorted(listed) == sorted([*PAGES, *added])


def test_nothing_is_loaded_from_elsewhere(settings):
    assert settings["theme"]["font"] is False
    assert not any(key in settings for key in ("extra_javascript", "repo_url"))


def test_documents_and_modules_of_the_site_exist(site):
    assert all((ROOT / document).exists() for document in site.OUTSIDE)
    names = [f"{package}.{module}" for _, package, modules in site.API.values() for module in modules]
    files = [ROOT / (name.replace(".", "/") + ".py") for name in names]
    assert all(file.exists() for file in files)
    assert {"rlp", "rpt", "ntp", "sip"} <= set(site.METHODS)


@pytest.mark.parametrize(
    ("page", "markdown", "expected"),
    [
        ("gpu.md", "[a](../benchmarks/results/gpu.json)", "[a](files/benchmarks/results/gpu.json)"),
        ("gpu.md", "[a](../README.md#with-trl)", "[a](readme.md#with-trl)"),
        ("readme.md", "[a](docs/gpu.md#kernels) [b](#here)", "[a](gpu.md#kernels) [b](#here)"),
        ("benchmarks.md", "![a](results/step.svg)", "![a](files/benchmarks/results/step.svg)"),
        ("cluster.md", "[a](../../docs/rollout.md)", "[a](rollout.md)"),
        ("faq.md", "[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("faq.md", "```\n[a](../NOTES.md)\n```", "```\n[a](../NOTES.md)\n```"),
        ("first_thought.md", "[a](../docs/faq.md)", "[a](faq.md)"),
    ],
)
def test_links_to_files_become_links_between_pages(site, page, markdown, expected):
    from types import SimpleNamespace

    class Page:
        file = SimpleNamespace(src_uri=page)

    assert site.on_page_markdown(markdown, Page()) == expected


def test_broken_links_and_other_hosts_in_a_built_site_are_found(site, tmp_path):
    (tmp_path / "index.html").write_text(
        '<link rel="canonical" href="https://a.b/"><script src="https://cdn.example/x.js"></script>'
        '<a href="b.html#there">x</a><a href="b.html#not">x</a><a href="c.html">x</a>'
        '<a href="#me" id="me">x</a><a href="https://arxiv.org">x</a>'
    )
    (tmp_path / "b.html").write_text('<h2 id="there">x</h2>')
    (tmp_path / "x.css").write_text("@import 'https://fonts.example/f.css'; a { background: url(a.png) }")
    assert site.site_problems(tmp_path) == [
        "index.html loads https://cdn.example/x.js",
        "index.html links to b.html#not, which has no such anchor",
        "index.html links to c.html, which is not there",
        "x.css loads https://fonts.example/f.css",
    ]


def test_markers_have_tables_and_tables_have_their_page(site):
    markers = [m for page in PAGES for m in re.findall(r"<!-- (\w+) -->", (ROOT / "docs" / page).read_text())]
    assert sorted(markers) == sorted(site.TABLES)
    assert "| `ig/frozen` |" in site.metrics_table()
    fields = site.settings_table()
    assert "## optim" in fields and "`objective.clip`" in fields and "## objective: sip" in fields


def test_examples_in_docstrings_become_code(site):
    from scripts.site_docstrings import fence_examples

    given = "Adds.\n\n>>> 1 + 1\n2\n>>> 3\n3\n\nMore."
    assert fence_examples(given) == "Adds.\n\n```pycon\n>>> 1 + 1\n2\n>>> 3\n3\n```\n\nMore."


def test_troubleshooting_quotes_what_the_program_says():
    """Each quotation of the page is part of one text of the program, between its variables."""
    quotations = re.findall(r'"([^"]+)"', (ROOT / "docs" / "troubleshooting.md").read_text())
    sources = [
        path.read_text()
        for name in ("rlpretrain", "rollout", "rewards")
        for path in (ROOT / name).rglob("*.py")
    ]
    said = " ".join(re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)
    assert len(quotations) > 35
    missing = [text for text in quotations if text not in said and text != "="]
    assert not missing


def test_troubleshooting_has_every_warning():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    warnings = page.split("## A run stops")[0]
    quotations = re.findall(r'^\| "([^"]+)"', warnings, re.M)
    for rule in RULES:
        assert any(text in rule.text for text in quotations), f"no row for the warning: {rule.text}"
