"""`rlpretrain augment`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpretrain.commands.arguments import count, objective_section, path, seed
from rlpretrain.config import ConfigError, PretrainConfig

if TYPE_CHECKING:
    from rlpretrain.corpora.augment_summary import Summary

BY_PLACE: Mapping[str, Mapping[str, Any]] = {
    "after": {"thoughts": 1, "temperature": 0.6, "top_p": 0.9},
    "before": {"thoughts": 1, "temperature": 0.6, "top_p": 0.9},
    "inferable": {"thoughts": 8, "temperature": 1.0, "top_p": 1.0},
}
"""Defaults that depend on --where. .6 and .9 are those of TPT (arXiv 2509.20186), the others our choice."""
TARGET_LENGTH, MAX_LEAK, LEAK_N, MAX_THOUGHT_TOKENS = 16, 0.5, 4, 512
WHOLE_ANSWER = 4096
"""Target tokens after a place before an answer, at most: the answer is the target."""
SECTIONS = ("model", "data", "objective", "sampling", "engine", "reference")
"""Sections of a run's configuration that the command line takes as --section.field."""


def register(commands: Any) -> None:
    """Add `augment` to the command line."""
    p = commands.add_parser(
        "augment",
        help="documents with generated thoughts in them, for next-token training (TPT, REER-PT)",
        allow_abbrev=False,
        description="One row out for each row in. An interrupted command goes on where it stopped. Fields of "
        f"{', '.join(SECTIONS)} are set as in train: --section.field value, after the file.",
    )
    p.add_argument("data", type=path, help="documents: what data.path of a run takes")
    p.add_argument("--model", type=path, required=True, help="the generator: hub id or folder")
    p.add_argument("--out", type=path, required=True, help="JSONL file to write")
    p.add_argument(
        "--where",
        choices=list(BY_PLACE),
        required=True,
        help="after: behind each document. before: before the answer, or where --objective says. inferable: "
        "at places that are hard to predict, where a thought helps",
    )
    p.add_argument(
        "--engine",
        help="what samples: hf (default), vllm_local, vllm_server, sglang_server, ray, MODULE:CLASS",
    )
    p.add_argument(
        "--objective",
        help="where to think and with what prompt: the objective section, or a YAML file that has it",
    )
    p.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    p.add_argument("--column", help="column with the text or prompt (default: text)")
    p.add_argument("--answer-column", help="column with the answer to the prompt of --column")
    p.add_argument("--answer-join", help="text between prompt and answer; a line break by default")
    p.add_argument(
        "--max-length",
        type=count,
        help="longest piece of a document (default: 2048, or what the model takes)",
    )
    p.add_argument("--thoughts", type=count, help="thoughts sampled at a place (default: 1; inferable: 8)")
    p.add_argument("--temperature", type=float, help="of sampling (default: 0.6; inferable: 1)")
    p.add_argument("--top-p", type=float, help="of sampling (default: 0.9; inferable: 1)")
    p.add_argument("--max-thought-tokens", type=count, default=MAX_THOUGHT_TOKENS, help="longest thought")
    p.add_argument(
        "--unfinished",
        choices=["drop", "keep"],
        default="drop",
        help="thoughts without a close tag: leave them out, or close them (default: drop)",
    )
    p.add_argument("--longest", type=count, help="most tokens of a thought that is kept")
    p.add_argument("--scorer", type=path, help="inferable: the frozen model that scores (default: --model)")
    p.add_argument("--min-gain", type=float, help="inferable: gain in nats that a thought must exceed (0)")
    p.add_argument(
        "--max-leak",
        type=float,
        help="largest share of the target's n-grams that a thought repeats (default: 1; inferable: 0.5)",
    )
    p.add_argument("--leak-n", type=count, default=LEAK_N, help=f"n of these (default: {LEAK_N})")
    p.add_argument("--batch", type=count, help="rows to sample and write at a time")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--trust-remote-code", action="store_true", help="run code of the model's repository")
    p.set_defaults(command=augment, takes_fields=True)


def augment(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain augment DATA.jsonl --model M --out OUT.jsonl --where after|before|inferable`."""
    from rlpretrain.corpora.augment import augment as run
    from rlpretrain.corpora.row_file import check_out, folder_of
    from rlpretrain.corpora.thought_texts import Limits
    from rlpretrain.tracking.progress import bar
    from rlpretrain.tracking.tables import show

    out, scores = Path(args.out), args.where == "inferable"
    check_out(out)
    _check_options(args)
    config, fit_length = _configuration(args, rest, str(folder_of(out)))
    limits = Limits(
        unfinished=args.unfinished == "keep",
        longest=args.longest,
        max_leak=args.max_leak if args.max_leak is not None else MAX_LEAK if scores else 1.0,
        leak_n=args.leak_n,
        min_gain=(args.min_gain if args.min_gain is not None else 0.0) if scores else None,
    )
    try:
        with bar("rows with thoughts") as progress:
            summary = run(
                config,
                out,
                args.where,
                limits,
                thoughts=_default(args, "thoughts"),
                batch=args.batch,
                chat=args.chat,
                fit_length=fit_length,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what is done is kept, the same command goes on there") from None
    show(table(summary))
    print(f"{out}: train on it with objective ntp")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Options that another --where takes are refused, and so are limits that nothing could meet."""
    for name in ("scorer", "min_gain"):
        if args.where != "inferable" and getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for --where inferable, which scores thoughts")
    if args.where == "after" and args.max_leak is not None:
        raise ConfigError("--max-leak is for thoughts before a target; with --where after there is none")
    if args.max_leak is not None and not 0 <= args.max_leak <= 1:
        raise ConfigError(f"--max-leak is a share from 0 to 1, got {args.max_leak}")
    if args.min_gain is not None and math.isnan(args.min_gain):
        raise ConfigError("--min-gain is a number of nats (inf: keep no thought), got nan")


def _configuration(args: argparse.Namespace, rest: Sequence[str], folder: str) -> tuple[PretrainConfig, bool]:
    """The configuration that the options and fields name, and whether `max_length` may be lowered."""
    from rlpretrain.config.io import apply_overrides, build
    from rlpretrain.objectives import config_of

    values: dict[str, Any] = {
        "model": {"path": args.model, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code},
        "data": {"path": args.data} | _given(args, "column", "answer_column", "answer_join", "max_length"),
        "objective": _objective(args),
        "sampling": {
            "thoughts": max(2, _default(args, "thoughts")),  # a run needs two to compare; one is enough here
            "temperature": _default(args, "temperature"),
            "top_p": _default(args, "top_p"),
            "max_thought_tokens": args.max_thought_tokens,
        },
        "engine": {"name": args.engine or "hf"},
        "reference": {"path": args.scorer} if args.scorer else {},
        "output_dir": folder,
        "device": args.device,
        "seed": args.seed,
    }
    values = apply_overrides(values, rest)
    given = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
    for name in sorted(given):
        if name.partition(".")[0] not in SECTIONS:
            raise ConfigError(f"unknown option --{name}: augment takes fields of {', '.join(SECTIONS)}")
    if "sampling.thoughts" in given:
        raise ConfigError("--sampling.thoughts: here it is --thoughts")
    fit_length = "max_length" not in values["data"]
    config = build(values, config_of)
    if config.objective.get("positions") == "answer" and config.data.answer_column is None:
        raise ConfigError(
            f"--where {args.where}: name the answers (--answer-column COLUMN), or other places, as "
            "--objective '{positions: before, marker: TEXT}'"
        )
    return config, fit_length


def _objective(args: argparse.Namespace) -> dict[str, Any]:
    """The objective section: what was given, and the places that --where means."""
    given = objective_section(args.objective) if args.objective else {}
    section: dict[str, Any] = {"name": "rlp"}
    if args.where != "after":
        section["positions"] = "answer" if args.where == "before" else "entropy"
    section |= given
    if "target_length" not in given:
        if section.get("positions") == "answer":
            section["target_length"] = WHOLE_ANSWER
        elif args.where == "inferable":
            section["target_length"] = TARGET_LENGTH
    return section


def _default(args: argparse.Namespace, name: str) -> Any:
    given = getattr(args, name)
    return BY_PLACE[args.where][name] if given is None else given


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def table(summary: Summary) -> Any:
    """Rows, thoughts, tokens, and why thoughts are not kept."""
    from rich.table import Table

    from rlpretrain.corpora.thought_texts import REASONS

    shown = Table("", "number", "", show_header=False)
    shown.add_row("rows", f"{summary.rows:,}", f"{summary.rows_with_thoughts:,} with a thought")
    without = f"{summary.rows_without_places:,} rows have none" if summary.rows_without_places else ""
    shown.add_row("places", f"{summary.places:,}", without)
    shown.add_row("thoughts sampled", f"{summary.sampled:,}", "")
    kept = f"{summary.unfinished_kept:,} of them closed for it" if summary.unfinished_kept else ""
    shown.add_row("thoughts kept", f"{summary.kept:,}", kept)
    for reason, meaning in REASONS.items():
        if reason in summary.dropped:
            shown.add_row(f"dropped: {reason}", f"{summary.dropped[reason]:,}", meaning)
    shown.add_row("tokens of documents", f"{summary.document_tokens:,}", "")
    share = f"{summary.thought_share:.1%} of all tokens, tags included"
    shown.add_row("tokens of thoughts", f"{summary.thought_tokens:,}", share)
    if summary.gains:
        mean = summary.gain_sum / summary.gains
        shown.add_row("mean gain", f"{mean:.3f}", "nats, of kept thoughts (chosen for it: no estimate)")
    if summary.leaks:
        shown.add_row("mean leak", f"{summary.leak_sum / summary.leaks:.3f}", "of kept thoughts")
    return shown
