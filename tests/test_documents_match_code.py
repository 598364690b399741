"""What the documents name exists: files, modules, commands, options, settings, metrics, links and anchors."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from rlpretrain.cli import make_parser
from rlpretrain.commands.augmenting import SECTIONS
from rlpretrain.config import PretrainConfig
from rlpretrain.config.io import parse_python
from rlpretrain.config.names import dotted
from rlpretrain.moved import MOVED
from rlpretrain.tracking.metrics import METRICS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("", "docs", "benchmarks", "examples/cluster")
    for path in (ROOT / folder).glob("*.md")
    if not path.is_symlink()
)
CURRENT = [name for name in DOCUMENTS if name != "NOTES.md"]  # the log names what existed on its dates
FOLDERS = "benchmarks|docs|examples|locks|rewards|rlpretrain|rollout|scripts|tests"
INVENTED = {"rlpretrain/objectives/mine.py"}
"""Files that a reader of the documents would write."""
METRICS_OF_TRL = {"perf/rollout_wait_s"}


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def fail_if(problems: list[str]) -> None:
    assert not problems, "\n  ".join(["the documents name what does not exist:", *problems])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    paths = re.findall(
        rf"\b((?:{FOLDERS})/[\w./-]*\.(?:py|md|yaml|json|txt|sh|html|svg))\b", text_of(document)
    )
    fail_if([path for path in paths if path not in INVENTED and not (ROOT / path).exists()])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_exist_under_their_present_names(document):
    """`rlpretrain.x.y`, `python -m x.y`: the start of the name is a module, the rest are its attributes."""
    names = set(re.findall(r"(?<![\w/.])((?:rlpretrain|rollout|benchmarks)(?:\.\w+)+)", text_of(document)))
    names |= set(re.findall(r"python -m ((?:examples|benchmarks)\.\w+)", text_of(document)))
    problems = []
    for name in sorted(names):
        package, *rest = name.split(".")
        if package == "rlpretrain" and rest[0] in MOVED:
            problems.append(f"{name} is rlpretrain.{MOVED[rest[0]]} now")
        elif rest not in (["yaml"], ["md"]) and not resolves(name):
            problems.append(name)
    fail_if(problems)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.removesuffix(".NAME_reward").split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if spec:
            value: object = importlib.import_module(module) if length < len(parts) else None
            for attribute in parts[length:]:
                if not hasattr(value, attribute):
                    return False
                value = getattr(value, attribute)
            return True
    return False


def commands() -> dict[str, set[str]]:
    """The options of every subcommand of `rlpretrain`."""
    (subcommands,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {
        name: {option for action in parser._actions for option in action.option_strings}
        for name, parser in subcommands.choices.items()
    }


SETTINGS = set(dotted(PretrainConfig))
TAKEN = {"augment": SECTIONS}
"""Sections whose fields a command takes beside its options; `train` takes all."""


@pytest.mark.parametrize("document", CURRENT)
def test_commands_and_options_exist(document):
    """In code: `rlpretrain NAME --option`, and settings as `--section.field`."""
    known, problems = commands(), []
    for line in code_of(document):
        called = re.search(r"(?:^|[`$ ])(?<!from )(?:rlpretrain|-m rlpretrain\.cli) (\w+)( .*)?$", line)
        if not called:
            continue
        name, rest = called[1], (called[2] or "").split(" #")[0]
        if name not in known:
            problems.append(f"rlpretrain {name}")
            continue
        for option in re.findall(r"(?<=\s)--([\w.-]+)", rest):
            is_setting = option in SETTINGS and (
                name == "train" or option.split(".")[0] in TAKEN.get(name, ())
            )
            if f"--{option}" not in known[name] and not is_setting:
                problems.append(f"rlpretrain {name} --{option}")
    fail_if(problems)


@pytest.mark.parametrize("document", CURRENT)
def test_settings_exist(document):
    """`section.field` in code, where `section` is one of the configuration."""
    sections = {name.split(".")[0] for name in SETTINGS if "." in name} - {"model"}
    names = re.findall(rf"`(?:--)?((?:{'|'.join(sorted(sections))})\.[a-z_.]+)(?=[`: ])", text_of(document))
    fail_if([name for name in names if name not in SETTINGS and not name.endswith((".py", ".yaml"))])


@pytest.mark.parametrize("document", CURRENT)
def test_metrics_exist(document):
    """`group/name`, also with a star, or with braces as a shell would expand them."""
    groups = sorted({name.split("/")[0] for name in METRICS if "/" in name})
    names = re.findall(rf"`((?:{'|'.join(groups)})/[\w*{{}},]+)`", text_of(document))
    single = [name for written in names for name in expand_braces(written)]
    fail_if([name for name in single if name not in METRICS_OF_TRL and not is_metric(name)])


def expand_braces(name: str) -> list[str]:
    """`a_{b,c}` names a_b and a_c."""
    start, braces, rest = name.partition("{")
    choices, _, end = rest.partition("}")
    return [start + choice + end for choice in choices.split(",")] if braces else [name]


def is_metric(name: str) -> bool:
    """Whether METRICS has the name, or a pattern with a star for it; a name may end in a star too."""
    for metric in METRICS:
        if metric.endswith("*") and name.startswith(metric[:-1]):
            return True
        if metric == name or (name.endswith("*") and metric.startswith(name[:-1])):
            return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_anchors_are_valid(document):
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            problems.append(target)
    fail_if(problems)


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub makes from the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(document: str) -> list[str]:
    """Lines of code blocks, continued lines joined, and code within sentences."""
    text = text_of(document)
    blocks = re.findall(r"^\s*```\w*\n(.*?)^\s*```", text, re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.S | re.M)
    return lines + [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]


def test_the_link_to_agents_md_is_a_link():
    assert (ROOT / "CONTRIBUTING.md").is_symlink(), "CONTRIBUTING.md is a symbolic link to AGENTS.md"


def test_agents_md_lists_the_folders_in_their_order():
    source = parse_python((ROOT / "tests" / "test_architecture.py").read_text())
    (order,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    )
    rows = re.findall(r"^\| (?:`(\w+)/`.*?|(beside the folders)) \|", text_of("AGENTS.md"), re.M)
    assert [folder for folder, _ in rows] == order
