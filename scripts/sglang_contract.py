"""Records SGLang's HTTP interface, as far as this library uses it, from the source of the package.

    pip download --no-deps sglang==0.5.23 && python -m scripts.sglang_contract sglang-0.5.23-*.whl

Nothing is imported or run: fields and their types are read from the syntax trees of `sglang.api.v1.api_types`
(the schema that SGLang's servers decode requests with), `io_struct`, `http_server`, the groups of server
arguments and `scheduler`. The result is tests/data/sglang_contract.json.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "sglang_contract.json"
STRUCTS = (
    "SamplingParams",
    "GenerateRequest",
    "LogprobEntry",
    "FinishStop",
    "FinishLength",
    "FinishAbort",
    "WeightVersionSpan",
    "GenerateMetaInfo",
    "GenerateResponse",
)
ROUTES = ("/health", "/server_info", "/model_info", "/generate", "/update_weights_from_disk", "/flush_cache")
SERVER_ARGS = ("served_model_name", "page_size", "enable_deterministic_inference")


def record(wheel: Path) -> dict[str, Any]:
    """The contract of a wheel of SGLang."""
    with zipfile.ZipFile(wheel) as files:

        def tree(name: str) -> ast.Module:
            return ast.parse(files.read(f"sglang/{name}"))

        types, server = tree("api/v1/api_types.py"), tree("srt/entrypoints/http_server.py")
        control = tree("srt/managers/io_struct.py")
        arguments = {}
        for name in files.namelist():
            if name.startswith("sglang/srt/arg_groups/fields/") and name.endswith(".py"):
                groups = [node for node in tree(name[7:]).body if isinstance(node, ast.ClassDef)]
                arguments |= {field: kind for group in groups for field, kind in _fields(group).items()}
        scheduler = _keys_of_dict(_function(tree("srt/managers/scheduler.py"), "get_init_info"))
    server_info = _keys_of_dict(_function(server, "server_info"))
    assert {"version"} <= set(server_info) and "max_req_input_len" in scheduler
    return {
        "package": wheel.name.split("-")[0],
        "version": wheel.name.split("-")[1],
        "recorded": "from the package's source by scripts/sglang_contract.py; no server ran",
        "routes": {route: _methods(server, route) for route in ROUTES},
        "aliases": _aliases(types),
        "structs": {name: _fields(_class(types, name)) for name in STRUCTS},
        "refuses_unknown": sorted(name for name in STRUCTS if _refuses(types, name)),
        "update_weights_from_disk": {
            "request": _fields(_class(control, "UpdateWeightFromDiskReqInput")),
            "answer": _keys_of_dict(_function(server, "update_weights_from_disk")),
        },
        "server_info": {name: arguments[name] for name in SERVER_ARGS}
        | {"version": "str", "max_req_input_len": "int"},
        "model_info": _keys_of_dict(_function(server, "model_info")),
    }


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _function(tree: ast.Module, name: str) -> ast.AST:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name)


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Field name to the text of its type; of Annotated, the type itself."""
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            kind = field.annotation
            if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) in ("A", "Annotated"):
                kind = kind.slice.elts[0] if isinstance(kind.slice, ast.Tuple) else kind.slice
            found[field.target.id] = ast.unparse(kind)
    return found


def _keys_of_dict(node: ast.AST) -> list[str]:
    """Keys of the dictionaries that a function writes out."""
    dictionaries = [part for part in ast.walk(node) if isinstance(part, ast.Dict)]
    keys = [key for part in dictionaries for key in part.keys if isinstance(key, ast.Constant)]
    return sorted({str(key.value) for key in keys})


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Names of types that are no structs."""
    return {
        node.targets[0].id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id[0].isupper()
    }


def _refuses(tree: ast.Module, name: str) -> bool:
    """Whether the schema refuses unknown keys of a struct."""
    return f"fields=_FIELDS_{name})" in ast.unparse(tree)


def _methods(tree: ast.Module, route: str) -> list[str]:
    """The HTTP methods of a route."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.AsyncFunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and call.args and ast.unparse(call.args[0]) == repr(route):
                named = [word.value for word in call.keywords if word.arg == "methods"]
                kind = ast.unparse(call.func).split(".")[-1].upper()
                found |= set(ast.literal_eval(named[0])) if named else {kind}
    assert found, f"no route {route}"
    return sorted(found)


if __name__ == "__main__":
    OUT.write_text(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n")
