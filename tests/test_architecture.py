"""The arrows between packages and modules, read from the source: who may import whom, and how long a file may
get.

A new folder of `rlpretrain` needs a line in FOLDERS, and a module beside the folders a word in BESIDE. A file
of `rollout` that needs one more library needs a line in SPECIAL.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from rlpretrain.config.io import parse_python

ROOT = Path(__file__).resolve().parents[1]
OURS = ("rewards", "rollout", "rlpretrain")

# What may be imported at all, beside the standard library and the package itself.
ALLOWED = {"rewards": {"torch", "jaxtyping"}, "rollout": {"torch", "transformers", "jaxtyping"}}
# The one file that needs a library, and the library. deepspeed and peft never: weights come from an iterator.
SPECIAL = {
    "rollout/vllm_local.py": {"vllm"},
    "rollout/vllm_requests.py": {"vllm"},
    "rollout/vllm_nccl.py": {"vllm"},
    "rollout/server_pool.py": {"httpx"},
    "rollout/weights.py": {"safetensors"},
    "rollout/service.py": {"fastapi", "starlette"},
    "rollout/service_routes.py": {"fastapi", "prometheus_client", "pydantic_core"},
    "rollout/service_state.py": {"fastapi", "prometheus_client"},
    "rollout/guard.py": {"starlette"},
    "rollout/wire.py": {"pydantic"},
    "rollout/ray_pool.py": {"ray"},
    "rollout/ray_actors.py": {"ray"},
    "rollout/ray_worker.py": {"ray"},
    "rollout/store.py": {"pyarrow"},
    "rollout/stored_rows.py": {"pyarrow"},
}
# Optional: imported inside the function that uses them, never at the top of a module.
EXTRAS = {"vllm", "deepspeed", "ray", "trl", "peft", "lm_eval"}
EXTRAS |= {"wandb", "trackio", "tensorboard", "torch.utils.tensorboard"}
SERVING = {"fastapi", "starlette", "uvicorn", "httpx", "aiohttp"}  # not in the core either

# Routes and subclasses are declared when a module is imported; so these may import what they stand on at the
# top, and nobody may import these at the top.
DECLARED = {
    "rollout/service.py": SERVING,
    "rollout/service_routes.py": SERVING,
    "rollout/service_state.py": SERVING,
    "rollout/guard.py": SERVING,
    "rlpretrain/trl/trainer.py": {"trl"},
    "rlpretrain/evaluation/thinking_lm.py": {"lm_eval"},
}
APPS = {"rollout.service", "rlpretrain.trl.trainer", "rlpretrain.evaluation.thinking_lm"}

# The folders of rlpretrain in the order in which they may import: each what stands above it, and itself,
# without cycles.
FOLDERS = [
    "config",  # what a user may set
    # the modules beside the folders (BESIDE): what flows, prompts, ranks, files, the names of other libraries
    "",
    "models",  # what the library knows of a Hugging Face model
    "data",  # text becomes documents becomes places to think
    "objectives",  # one method, one file
    "scoring",  # packing, trees, one forward, references
    "rollouts",  # positions become groups
    "evaluation",  # numbers on held-out text
    "tracking",  # what a run logs
    "training",  # log-probabilities become an update
    "experiments",  # methods × seeds
    "reporting",  # a run as a page
    "trl",  # reward functions and trainers for TRL
    "corpora",  # controlled corpora, documents with generated thoughts
    "tools",  # doctor, dry run, server
    "commands",  # the command line
]
BESIDE = {
    "compat",
    "files",
    "floors",
    "judge",
    "moved",
    "preferences",
    "prompts",
    "ranks",
    "tree",
    "types",
    "verdict",
}
LAST = {"cli", "__main__"}  # beside the folders too, and below them all


@dataclass(frozen=True)
class Import:
    """One import statement: the module named, where it stands, and whether it runs when the file is
    imported.
    """

    module: str
    where: str
    at_import: bool


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no Python files in {package}/"
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, whatever it is nested in. `from a import b` names a.b where that is a module
    of ours.
    """
    package = name_of(path).split(".")[: None if path.name == "__init__.py" else -1]

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, where, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(
                    full if base.split(".")[0] in OURS and is_module(full) else base, where, at_import
                )
        elif type_checking(node):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, ast.expr):
                    yield from visit(child, inside)

    return tuple(visit(parse_python(path.read_text(encoding="utf-8"), str(path)), True))


def among(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def layer(module: str) -> int | None:
    """The place of a module of rlpretrain in FOLDERS; None for a module without a place, or of another
    package.
    """
    package, _, inner = module.partition(".")
    folder = inner.partition(".")[0]
    if package != "rlpretrain":
        return None
    if inner in LAST:
        return len(FOLDERS)
    if inner in BESIDE:
        return FOLDERS.index("")
    return FOLDERS.index(folder) if folder and folder in FOLDERS else None


def fail_if(problems: list[str], rule: str) -> None:
    assert not problems, rule + "\n  " + "\n  ".join(problems)


@pytest.mark.parametrize("package", ["rewards", "rollout"])
def test_pure_packages_import_only_what_they_may(package):
    problems = []
    for path in files(package):
        allowed = {package} | ALLOWED[package] | SPECIAL.get(str(path.relative_to(ROOT)), set())
        for found in imports(path):
            top = found.module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in allowed:
                problems.append(f"{found.where} imports {found.module}")
    fail_if(problems, f"{package} may import {', '.join(sorted(ALLOWED[package]))} and the standard library:")


def test_special_libraries_never_include_the_trainer():
    assert not {"deepspeed", "peft", *OURS} & set().union(*SPECIAL.values())
    assert all(path.startswith("rollout/") for path in SPECIAL), "rewards has no exceptions"


@pytest.mark.parametrize("package", OURS)
def test_extras_are_imported_where_they_are_used(package):
    problems = [
        f"{found.where} imports {found.module}"
        for path in files(package)
        for found in imports(path)
        if found.at_import
        and among(found.module, (EXTRAS | SERVING | APPS) - DECLARED.get(str(path.relative_to(ROOT)), set()))
    ]
    fail_if(
        problems,
        "optional libraries are imported in the function that uses them, not at the top of a module:",
    )


def test_every_module_of_rlpretrain_has_a_place():
    problems = [
        f"{path.relative_to(ROOT)}: put it into a folder of FOLDERS, or its name into BESIDE, in this file"
        for path in files("rlpretrain")
        if name_of(path) != "rlpretrain" and layer(name_of(path)) is None
    ]
    fail_if(problems, "modules without a place in the house:")


def test_folders_import_what_stands_above_them():
    problems = []
    for path in files("rlpretrain"):
        here = name_of(path)
        if here == "rlpretrain":  # the lazy re-exports stand above every folder
            continue
        for found in imports(path):
            mine, other = layer(here), layer(found.module)
            if mine is not None and other is not None and other > mine:
                problems.append(f"{found.where}: {here} imports {found.module}, whose folder stands below")
    fail_if(problems, "imports against the order of the folders of rlpretrain:")


@pytest.mark.parametrize("package", OURS)
def test_no_import_cycles(package):
    graph = {
        name_of(path): {f.module for f in imports(path) if f.at_import and is_module(f.module)}
        - {name_of(path)}
        for path in files(package)
    }
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " → ".join([*trail[trail.index(module) :], module])
        if module in graph and module not in done:
            for other in sorted(graph[module]):
                walk(other, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def lines(path: str | Path) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_no_file_over_400_lines():
    counted = {str(path.relative_to(ROOT)): lines(path) for package in OURS for path in files(package)}
    fail_if([f"{path}: {n} lines" for path, n in counted.items() if n > 400], "files over 400 lines:")


def test_few_files_are_over_300_lines():
    counted = {str(path.relative_to(ROOT)): lines(path) for package in OURS for path in files(package)}
    long = [f"{path}: {n} lines" for path, n in counted.items() if n > 300]
    assert len(long) <= 5, "at most five files over 300 lines:\n  " + "\n  ".join(long)


def test_the_paper_reads_in_three_files():
    three = {
        p: lines(p)
        for p in (
            "rlpretrain/objectives/rlp.py",
            "rewards/information_gain.py",
            "rlpretrain/training/loop.py",
        )
    }
    assert sum(three.values()) <= 250, three
    assert three["rlpretrain/training/loop.py"] <= 100, three


def run(code: str, tmp_path: Path) -> str:
    """Run code in a fresh interpreter that sees this source tree, and nothing else that is special."""
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_the_extras(tmp_path):
    modules = [
        name_of(path)
        for package in OURS
        for path in files(package)
        if path.name != "__main__.py" and str(path.relative_to(ROOT)) not in DECLARED
    ]
    blocked = sorted(EXTRAS | {"fastapi", "starlette", "uvicorn", "prometheus_client"})
    run(
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({blocked}))\n"
        f"for name in {modules}: importlib.import_module(name)",
        tmp_path,
    )


def test_import_rlpretrain_is_light(tmp_path):
    assert (
        run("import sys, rlpretrain; print('torch' in sys.modules or 'pydantic' in sys.modules)", tmp_path)
        == "False\n"
    )


def test_the_rules_see_what_they_should(tmp_path, monkeypatch):
    """The reader of imports itself: nested, relative, conditional and type-only imports."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "rlpretrain" / "objectives").mkdir(parents=True)
    (tmp_path / "rlpretrain" / "types.py").touch()
    path = tmp_path / "rlpretrain" / "objectives" / "mine.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import vllm\n"
        "try:\n    import ray.util\nexcept ImportError:\n    pass\n"
        "from ..types import Batch\n"
        "from rlpretrain import types\n"
        "def f():\n    from trl import GRPOTrainer\n"
        "class C:\n    import peft\n"
    )
    assert [(f.module, f.where.rsplit(":")[-1], f.at_import) for f in imports(path)] == [
        ("typing", "1", True),
        ("vllm", "3", False),
        ("ray.util", "5", True),
        ("rlpretrain.types", "8", True),
        ("rlpretrain.types", "9", True),
        ("trl", "11", False),
        ("peft", "13", True),
    ]
    order = [layer(f"rlpretrain.{name}") for name in ("types", "data.stream", "objectives.mine", "cli")]
    assert order == sorted(set(order))
    assert layer("rlpretrain.nowhere") is None


def test_no_test_file_imports_another():
    problems = [
        found.where
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for found in imports(path)
        if found.module.startswith("tests.")
        and any(part.startswith("test_") for part in found.module.split("."))
    ]
    fail_if(problems, "what tests share stands in tests/builders:")
