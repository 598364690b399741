"""Commands of the documents parse; a test executes each, or it says why not (tests/data/commands.yaml)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from rlpretrain import cli
from rlpretrain.config import PretrainConfig
from rlpretrain.config.names import dotted

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
DOCUMENTS += ["benchmarks/README.md", "examples/cluster/README.md"]
PROGRAMS = r"(?:rlpretrain|make|pip|python3?|pytest|trl|vllm|VLLM_\w+=\S+|curl|torchrun|ray|mkdir)"
KNOWN = yaml.safe_load((ROOT / "tests" / "data" / "commands.yaml").read_text())


def commands(document: str, prose: bool = False) -> list[str]:
    """The commands in the code blocks of a document, or those in its sentences."""
    text = (ROOT / document).read_text()
    found = []
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.S | re.M):
        if language in ("", "console", "bash", "sh"):
            lines = re.sub(r" *\\\n *", " ", block).splitlines()
            found += [re.sub(r"^\$ ", "", line.strip()) for line in lines]
    if prose:
        sentences = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
        found = re.findall(r"`((?:rlpretrain|make|python3? -m|torchrun)\s[^`]*)`", sentences)
        found = [re.sub(r"\s+", " ", command) for command in found]
    return [command for command in found if re.match(rf"{PROGRAMS} \S", command)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_executed_or_says_why_not(document):
    printed = commands(document) + commands(document, prose=True)
    unknown = [command for command in printed if not any(command.startswith(start) for start in KNOWN)]
    assert not unknown, f"tests/data/commands.yaml lacks: {unknown}"


def test_every_entry_is_of_a_command_and_names_a_test_that_exists():
    printed = [c for document in DOCUMENTS for c in commands(document) + commands(document, prose=True)]
    assert len(printed) > 80
    problems = []
    for start, entry in KNOWN.items():
        if not any(max((s for s in KNOWN if c.startswith(s)), key=len, default="") == start for c in printed):
            problems.append(f"no document has: {start}")
        if set(entry) == {"test"}:
            file, _, name = entry["test"].partition("::")
            if not (ROOT / file).exists() or (name and f"def {name}(" not in (ROOT / file).read_text()):
                problems.append(f"{start}: there is no {entry['test']}")
        elif set(entry) == {"never"}:
            named = re.findall(r"(?:tests|examples)/[\w/.]+\.(?:py|sh)", entry["never"])
            problems += [f"{start}: there is no {file}" for file in named if not (ROOT / file).exists()]
        else:
            problems.append(f"{start}: `test` or `never`")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_rlpretrain_parse(document):
    """With the parser of the command line; further words are fields of the configuration."""
    settings = set(dotted(PretrainConfig))
    for command in commands(document):
        if not command.startswith("rlpretrain "):
            continue
        _, *words = shlex.split(command, comments=True)
        args, rest = cli.make_parser().parse_known_args(words)
        assert args.takes_fields or not rest, f"{command}: {rest}"
        fields = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
        unknown = [field for field in fields if field not in settings and not field.startswith("objective.")]
        assert not unknown, f"{command}: no fields {unknown}"


@pytest.mark.slow
def test_the_quick_start_works_as_printed(corpus, tmp_path, monkeypatch, capsys):
    """Its commands, with a small model in place of MODEL, and small steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs.jsonl").symlink_to(corpus / "train.jsonl")
    (tmp_path / "held_out.jsonl").symlink_to(corpus / "held_out.jsonl")
    small = "--max_steps 1 --positions_per_step 2 --sampling.thoughts 2 --sampling.max_thought_tokens 4"
    small += " --eval.documents 4 --eval.thoughts 2 --checkpoint.every 0"
    own = [
        command for command in commands("docs/quick_start.md") if re.search(r"MODEL|rlp\.yaml|first", command)
    ]
    for command in own[:5]:
        _, *words = shlex.split(command.replace("MODEL", str(corpus / "base")), comments=True)
        words += shlex.split(small) if words[0] == "train" else []
        words += ["--documents", "4"] if words[0] in ("eval", "report") else []
        words += ["--device", "cpu"] if words[0] == "init" else []
        assert cli.main(words) == 0, f"{command}: {capsys.readouterr().err}"
    said = " ".join(own[:5])
    assert all(f"rlpretrain {name} " in said for name in ("init", "train", "report", "eval"))
    assert (tmp_path / "runs" / "first" / "report.html").exists()
    assert "gain_frozen" in capsys.readouterr().out


def test_the_model_is_used_as_after_training_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "rlp").mkdir(parents=True)
    (tmp_path / "runs" / "rlp" / "model").symlink_to(ROOT / "tests" / "data" / "dial_base")
    page = (ROOT / "docs" / "after_training.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    exec(compile(code, "after_training.md", "exec"), {})
    assert "→" in capsys.readouterr().out
