"""The pages of the site that are not files of docs/, and links between pages: a hook of mkdocs (mkdocs.yml).

- Documents elsewhere in the repository (README, NOTES, ...) and the notebook become pages (`OUTSIDE`).
- Pages of the API come from `API`; each objective is in them as soon as it is a file.
- Tables that the library knows stand for their markers: `<!-- metrics -->`, `<!-- settings -->`.
- Links are written as on GitHub, by files of the repository. Here they become links between pages; other
  files that a page links to (results, recipes) are copied to `files/`.
- After the build every link within the site must lead somewhere, and nothing may come from another host.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "NOTES.md": "notes.md",
    "AGENTS.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/gpu.md": "gpu_tables.md",
    "examples/cluster/README.md": "cluster.md",
    "examples/first_thought.ipynb": "first_thought.md",
}
"""Documents outside docs/, and the page that each becomes."""
PAGES = {page: document for document, page in OUTSIDE.items()}
METHODS = sorted(
    path.stem
    for path in (ROOT / "rlpretrain" / "objectives").glob("*.py")
    if re.search(r"^OBJECTIVE = ", path.read_text(), re.M)
)
API = {
    "rlpretrain": ("A run", "rlpretrain", ["training.pretrainer", "config.schema"]),
    "objectives": ("Objectives", "rlpretrain.objectives", ["base", *METHODS]),
    "rewards": (
        "Rewards",
        "rewards",
        [
            "information_gain",
            "advantages",
            "likelihood",
            "probability",
            "candidates",
            "importance",
            "controls",
            "matching",
        ],
    ),
    "rollout": (
        "Engines",
        "rollout",
        ["types", "engine", "hf", "vllm_local", "server_engine", "vllm_server", "sglang_server", "store"],
    ),
    "evaluation": (
        "Evaluation",
        "rlpretrain",
        ["evaluation.evaluate", "evaluation.intervals", "reporting.report"],
    ),
    "trl": ("TRL", "rlpretrain.trl", ["reward", "trainer", "rollout", "async_rollout"]),
    "extending": (
        "Parts of your own",
        "rlpretrain",
        [
            "training.losses",
            "training.schedules",
            "training.backends.base",
            "data.document_source",
            "verdict",
        ],
    ),
}
"""Page under api/: its title, a package, and modules of it."""
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"^[ ]*```.*?^[ ]*```[ ]*$", re.M | re.S)
EXTERNAL = re.compile(r"(?:[a-z]+:|//|#)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the linked files that docs/ does not have."""
    for document, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=_text_of(ROOT / document)))
    for name, (title, package, modules) in API.items():
        body = "".join(f"\n::: {package}.{module}\n" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=f"# {title}\n{body}"))
    sources = {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked = {target for page, text in sources.items() for target in _repository_links(page, text)}
    for target in sorted(linked):
        if _place(target).startswith("files/"):
            if not (ROOT / target).is_file():
                raise PluginError(f"a page links to {target}, which is not a file")
            files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the markers, and turn links to files of the repository into links between pages."""
    here = page.file.src_uri
    for name, table in TABLES.items():
        marker = f"<!-- {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, table())

    def replaced(match: re.Match[str]) -> str:
        target, anchor = _split(here, match[0])
        if target is None:
            return match[0]
        return posixpath.relpath(_place(target), posixpath.dirname(here) or ".") + anchor

    return _outside_fences(markdown, lambda text: LINK.sub(replaced, text))


def on_post_build(config: Any) -> None:
    """Fail if a link within the site leads nowhere, or if a page loads anything from another host."""
    problems = site_problems(Path(config.site_dir))
    if problems:
        raise PluginError("the built site:\n  " + "\n  ".join(problems))


# Links


def _place(target: str) -> str:
    """Where a file of the repository is in the site."""
    if target in OUTSIDE:
        return OUTSIDE[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"


def _split(page: str, link: str) -> tuple[str | None, str]:
    """The file of the repository that a link of a page names, and the anchor; None for any other link."""
    path, mark, anchor = link.partition("#")
    if not path or EXTERNAL.match(link):
        return None, ""
    document = PAGES.get(page, f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
    return ("AGENTS.md" if target == "CONTRIBUTING.md" else target), mark + anchor


def _repository_links(page: str, text: str) -> Iterator[str]:
    """The files of the repository that a page links to."""
    for link in LINK.findall(FENCE.sub("", text)):
        target, _ = _split(page, link)
        if target is not None:
            yield target


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """The text with everything but its code blocks changed."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


# Contents


def _text_of(document: Path) -> str:
    """A document as Markdown; of a notebook its cells and their text output."""
    if document.suffix != ".ipynb":
        return document.read_text()
    blocks = []
    for cell in json.loads(document.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        outputs = ["".join(output.get("text", "")) for output in cell["outputs"]]
        if any(outputs):
            blocks.append("```text\n" + "".join(outputs).rstrip() + "\n```")
    return "\n\n".join(blocks) + "\n"


def metrics_table() -> str:
    """The metrics of `rlpretrain metrics`."""
    from rlpretrain.tracking.metrics import METRICS

    rows = [(f"`{name}`", metric.meaning, metric.healthy) for name, metric in METRICS.items()]
    return _table(("metric", "meaning", "healthy"), rows)


def settings_table() -> str:
    """The fields of `rlpretrain train --fields`, a table for each section."""
    from rlpretrain.config import PretrainConfig
    from rlpretrain.config.io import describe
    from rlpretrain.objectives import find

    sections: dict[str, list[tuple[str, ...]]] = {"of a run": []}
    for name, default, text in describe(PretrainConfig):
        section = name.split(".")[0] if "." in name else "of a run"
        sections.setdefault(section, []).append((_code(name), _code(default), text))
    for method in METHODS:
        rows = describe(find(method).Config)
        sections[f"objective: {method}"] = [(_code(f"objective.{n}"), _code(d), text) for n, d, text in rows]
    head = ("field", "default", "meaning")
    return "\n".join(f"## {section}\n\n{_table(head, rows)}" for section, rows in sections.items())


def _code(text: str) -> str:
    """A text as code, unless it is empty."""
    return f"`{text}`" if text else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    cells = [[re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


TABLES: dict[str, Callable[[], str]] = {"metrics": metrics_table, "settings": settings_table}
"""What stands for the marker `<!-- NAME -->` of a page."""


# The built site


TAG = re.compile(r"<(a|link|script|img|iframe|source)\b([^>]*)>")
ATTRIBUTE = re.compile(r"\b(href|src|rel)=(?:\"([^\"]*)\"|([^\s\">]+))")
ANCHOR = re.compile(r"<[a-z][^>]*?\s(?:id|name)=\"?([^\s\">]+)")


class _Page:
    """Links of a page, its anchors, and what it loads."""

    def __init__(self, html: str) -> None:
        self.anchors = {unescape(name) for name in ANCHOR.findall(html)}
        self.links: list[str] = []
        self.loads: list[str] = []
        for tag, rest in TAG.findall(html):
            values = {name: unescape(quoted or bare) for name, quoted, bare in ATTRIBUTE.findall(rest)}
            if tag == "a" and "href" in values:
                self.links.append(values["href"])
            elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
                self.loads.append(values["href"])
            elif "src" in values:
                self.loads.append(values["src"])


def site_problems(site: Path) -> list[str]:
    """Links and loaded files of a built site that are not in it, and loads from other hosts."""
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        where = path.relative_to(site)
        problems += [f"{where} loads {url}" for url in page.loads if re.match(r"(https?:)?//", url)]
        for url in [*page.links, *page.loads]:
            if re.match(r"[a-z]+:|//", url) or (path.name == "404.html" and url.startswith("/")):
                continue
            target, _, anchor = url.partition("#")
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file():
                problems.append(f"{where} links to {url}, which is not there")
            elif anchor and file in pages and anchor not in pages[file].anchors:
                problems.append(f"{where} links to {url}, which has no such anchor")
    for style in site.rglob("*.css"):
        hosts = re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", style.read_text())
        problems += [f"{style.relative_to(site)} loads {url}" for url in hosts]
    return problems
