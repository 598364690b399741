"""Every number that is logged: its name, meaning and healthy range; how it is gathered; where it goes.

TRL's names where TRL has one; ours are ig/*, thought/*, baseline/*, ntp/*, reader/*, perf/*, run/*.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rewards.controls import repetition, target_leakage
from rlpretrain.data.token_text import TokenReader
from rlpretrain.files import dumps, writing
from rlpretrain.ranks import Ranks
from rlpretrain.tracking.console import shown
from rlpretrain.types import MicroBatch, Scores
from rollout.types import Group

METRICS: dict[str, tuple[str, str]] = {
    "loss": ("the whole loss of the step", "falls slowly; jumps mean trouble"),
    "policy_loss": ("clipped surrogate; 0 on-policy with leave-one-out but for length weights", "around 0"),
    "reward": ("mean reward of counted thoughts", "rises"),
    "reward_std": ("mean standard deviation of rewards within a group", "above 0"),
    "frac_reward_zero_std": ("groups whose thoughts all earn the same", "below .9; near 1 nothing is learned"),
    "ig/mean": ("information gain in nats against the baseline", "rises above 0"),
    "ig/std": ("deviation of the gain over all thoughts", "finite"),
    "ig/positive_frac": ("thoughts with a gain above 0", "rises above .5"),
    "ig/per_token": ("gain per target token", "rises above 0"),
    "ig/self": (
        "gain against the current model without a thought; flatters itself when that degrades",
        "near ig/frozen",
    ),
    "ig/frozen": ("gain against the initial model without a thought: the honest one", "rises above 0"),
    "ig/empty": ("the same for a thought without content: what the tags alone are worth", "well below ig/frozen"),
    "thought/closed_frac": ("thoughts that closed themselves", "above .9"),
    "thought/eos_frac": ("thoughts that ended the document instead", "near 0"),
    "thought/uncounted_frac": ("thoughts that count nowhere (cut off, aborted)", "below .1"),
    "thought/leakage": ("overlap of thought and target n-grams", "no sudden rise"),
    "thought/repetition": ("repeated 4-grams within a thought", "below .3"),
    "completions/mean_length": ("tokens per thought", "no drift to 0 or to the limit"),
    "completions/max_length": ("longest thought", "below the limit"),
    "completions/clipped_ratio": ("thoughts cut off at the limit", "below .1"),
    "baseline/logp": ("mean log p(target) of the baseline", "steady"),
    "baseline/self": ("mean log p(target) of the current model without a thought", "not falling"),
    "ntp/loss": ("next-token loss of the trunk, nats per token", "not above its start"),
    "reader/loss": ("mean -log p(target | context, thought)", "falls"),
    "sampling/*": (
        "importance ratios and log-prob differences of sampler and trainer, raw and truncated",
        "ratio near 1",
    ),
    "clip_ratio/region_mean": ("thought tokens whose ratio was clipped", "below .2"),
    "grad_norm": ("gradient norm before clipping", "no jumps"),
    "learning_rate": ("as scheduled", ""),
    "num_input_tokens": ("tokens of the documents of all steps so far: what papers count", ""),
    "num_tokens": ("tokens that models read so far, in every pass: sampled, scored and trained ones", ""),
    "num_flops": ("6 N per trained token, 2 N per token that is only read, and attention, so far", ""),
    "step_time": ("seconds per step", "steady"),
    "perf/rollout_s": ("of it, sampling thoughts", ""),
    "perf/train_s": ("of it, scoring and updating", ""),
    "perf/sync_s": ("of it, handing weights to the engine", "near 0 embedded"),
    "sample/staleness_mean": ("steps between sampling thoughts and training on them", "0 synchronous, else up to max_staleness"),
    "sample/staleness_max": ("the oldest of them", "at most max_staleness"),
    "perf/weight_sync_*": ("of the sync, with engines elsewhere: gather, write, drain, load", "small beside the step"),
    "perf/probe_s": ("seconds of the probe after the sync, where the engine has weights of its own", "below 2% of the step"),
    "sampling/probe_difference": ("largest difference in nats between engine and trainer on the probe", "below the tolerance"),
    "batch/padding_frac": ("padding in the micro-batches", "below .5"),
    "batch/packing_ratio": ("tokens of all rows over those put through the model, where shared ones are one", "above 1"),
    "batch/dropped_frac": ("groups that the objective left out of training; `reward` and the like count them", "below .9"),
    "batch/micro_batches": ("micro-batches in the step", ""),
    "objective/*": ("numbers of the objective's own; rlpt: asked of the judge, known already, share not judged", "failed near 0"),
    "run/epoch": ("passes over the data so far", ""),
    "run/skipped_steps": ("steps skipped for NaN or inf", "0"),
    "run/documents_without_position": ("documents drawn in which there was no place to think", ""),
    "eval/*": (
        "the same on held-out documents; see `rlpretrain eval`",
        "eval/gain_frozen rises, eval/no_think_loss does not",
    ),
}


def staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How many steps ago the thoughts of a batch were sampled."""
    ages = [version - t.policy_version for g in groups for t in g.thoughts]
    return {"sample/staleness_mean": sum(ages) / len(ages), "sample/staleness_max": max(ages)} if ages else {}


class StepMetrics:
    """Sums over the micro-batches of one step, averaged over all ranks at its end."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.totals: dict[str, float] = defaultdict(float)
        self.longest = 0.0
        self.rewards: dict[tuple[str, int], float] = {}  # of each thought, by its group and place there

    def total(self, name: str, value: Any) -> None:
        """Add to a number that is summed, not averaged (the loss, whose terms are divided by global counts already)."""
        self.totals[name] += float(value)

    def add(self, name: str, values: Any, weight: float | None = None) -> None:
        """Add a tensor's elements, or a mean with its weight; what is not finite is not added."""
        if isinstance(values, torch.Tensor):
            values = values[torch.isfinite(values)].double()
            total, n = float(values.sum()), float(values.numel())
        else:
            n = (1.0 if weight is None else weight) * math.isfinite(values)
            total = float(values) * n if n else 0.0
        self.sums[name][0] += total
        self.sums[name][1] += n

    @torch.no_grad()
    def observe(self, micro: MicroBatch, scores: Scores, reward: torch.Tensor, self_logps: torch.Tensor) -> None:
        """What one micro-batch shows; `self_logps` [B, T] are the current model's without a thought."""
        self.add("batch/padding_frac", 1 - float(micro.attention_mask.float().mean()), micro.attention_mask.numel())
        self.add("batch/packing_ratio", micro.row_tokens / micro.input_ids.numel(), micro.input_ids.numel())
        if scores.trunk_logps.numel():
            self.add("ntp/loss", -scores.trunk_logps.detach())
        if not micro.groups:
            return
        counted = scores.counted
        if scores.target_mask.any():
            self._gains(scores, self_logps)
        self.add("reward", reward[counted])
        spread = torch.stack(
            [r[c].std(correction=0) if c.any() else r.new_tensor(torch.nan) for r, c in zip(reward, counted, strict=True)]
        )
        self.add("reward_std", spread)
        self.add("frac_reward_zero_std", (spread[torch.isfinite(spread)] == 0).float())
        self.add("thought/uncounted_frac", (~counted).float())
        for group, first, given in zip(micro.groups, micro.offsets, reward.tolist(), strict=True):
            self.rewards.update({(group.id, first + k): given[k] for k in range(len(group.thoughts))})
            self._thoughts(group)

    def observe_dropped(self, group: Group, counted: Sequence[bool], rewards: Sequence[float]) -> None:
        """A group that is left out of training: it counts in what is said of thoughts and their rewards all the same."""
        self._thoughts(group)
        self.add("thought/uncounted_frac", 1.0 - torch.tensor(counted, dtype=torch.float64))
        known = torch.tensor([r for r in rewards if math.isfinite(r)], dtype=torch.float64)
        self.add("reward", known)
        if len(known):
            self.add("reward_std", known.std(correction=0))
            self.add("frac_reward_zero_std", float(known.max() == known.min()))

    def _thoughts(self, group: Group) -> None:
        for t in group.thoughts:
            n = len(t.token_ids)
            self.longest = max(self.longest, n)
            self.add("completions/mean_length", n)
            self.add("completions/clipped_ratio", t.finish_reason == "length")
            self.add("thought/closed_frac", t.finish_reason == "close")
            self.add("thought/eos_frac", t.finish_reason == "eos")
        t = group.thoughts[0]  # one a group is enough for a trend
        self.add("thought/leakage", target_leakage(t.token_ids, group.position.target_ids))
        self.add("thought/repetition", repetition(t.token_ids))

    def _gains(self, scores: Scores, self_logps: torch.Tensor) -> None:
        counted, mask = scores.counted, scores.target_mask
        target = (scores.target_logps.detach() * mask[:, None]).sum(-1)
        base, own = (scores.baseline_logps * mask).sum(-1), (self_logps * mask).sum(-1)
        gain = (target - base[:, None])[counted]
        self.add("ig/mean", gain)
        self.add("ig/square", gain**2)
        self.add("ig/positive_frac", (gain > 0).float())
        self.add("ig/per_token", (target - base[:, None])[counted] / mask.sum(-1, keepdim=True).expand_as(counted)[counted])
        self.add("ig/self", (target - own[:, None])[counted])
        self.add("reader/loss", -target[counted])
        self.add("baseline/logp", base)
        self.add("baseline/self", own)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Name → mean over all ranks. Every rank must call it with the same names."""
        names = sorted(set().union(*ranks.gather(sorted(self.sums))))
        flat = ranks.sum([x for n in names for x in self.sums[n]])
        out = {n: flat[2 * i] / flat[2 * i + 1] for i, n in enumerate(names) if flat[2 * i + 1]}
        totals = sorted(set().union(*ranks.gather(sorted(self.totals))))
        out |= dict(zip(totals, ranks.sum([self.totals[n] for n in totals]), strict=True))
        if "ig/square" in out:
            out["ig/std"] = max(0.0, out.pop("ig/square") - out["ig/mean"] ** 2) ** 0.5
        if "completions/mean_length" in out:
            out["completions/max_length"] = ranks.max([self.longest])[0]
        return out


class Trackers:
    """metrics.jsonl always; TensorBoard, wandb and trackio when asked for and installed. Only the first rank writes."""

    def __init__(self, folder: Path, report_to: tuple[str, ...], config: dict[str, Any], run_name: str, keep_until: int = 0,
                 every: int = 1):  # fmt: skip
        self.file = folder / "metrics.jsonl"
        if self.file.exists():  # a resumed run: what came after its checkpoint will come again
            kept = [line for line in self.file.read_text().splitlines() if _step(line) <= keep_until]
            work = self.file.with_suffix(".tmp")
            with writing(self.file):
                work.write_text("".join(line + "\n" for line in kept))
                work.replace(self.file)
        self.every = every
        self.closers: list[Any] = []
        self.sinks: list[Callable[[dict[str, float], int, list[tuple[Any, ...]]], None]] = []
        if "tensorboard" in report_to:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError('report_to names tensorboard: pip install "rlpretrain[tensorboard]"') from error
            board = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1 if keep_until else None)
            self.sinks.append(partial(_to_board, board))
            self.closers.append(board.close)
        for name in ("wandb", "trackio"):
            if name in report_to:
                try:
                    module = importlib.import_module(name)  # the two share one interface
                except ImportError as error:
                    raise ImportError(f"report_to names {name}, which is not installed: pip install {name}") from error
                module.init(project="rlpretrain", name=run_name, config=config)
                self.sinks.append(partial(_to_tracker, module))
                self.closers.append(module.finish)

    def write(self, step: int, row: dict[str, float], groups: Sequence[Group] = (), tokenizer: Any = None,
              rewards: Mapping[tuple[str, int], float] | None = None) -> None:  # fmt: skip
        """One line of metrics.jsonl, and the same to every tracker; now and then the thoughts of some positions too.

        What is not a finite number is null in the file, and left out for trackers, which would draw it.
        """
        with writing(self.file), self.file.open("a") as f:
            f.write(dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
        now = groups and self.sinks and (step == 1 or step % self.every == 0)
        thoughts = thought_rows(groups, tokenizer, rewards) if now else []
        known = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        for sink in self.sinks:
            sink(known, step, thoughts)

    def close(self) -> None:
        for close in self.closers:
            close()


def _to_board(board: Any, row: dict[str, float], step: int, thoughts: list[tuple[Any, ...]]) -> None:
    for name, value in row.items():
        board.add_scalar(name, value, step)
    if thoughts:
        board.add_text("thoughts", markdown(thoughts), step)


def _to_tracker(module: Any, row: dict[str, float], step: int, thoughts: list[tuple[Any, ...]]) -> None:
    """One call for all of a step: what wandb and trackio are given later they may count as another."""
    if thoughts:
        import pandas  # brought by datasets

        # as objects, so that a missing reward stays one: old trackios read nothing but a data frame
        frame = pandas.DataFrame(thoughts, columns=list(COLUMNS), dtype=object)
        module.log({**row, "thoughts": module.Table(dataframe=frame)}, step=step)
    else:
        module.log(row, step=step)


COLUMNS = ("position", "context", "target", "thought", "tokens", "ended by", "reward")


def thought_rows(groups: Sequence[Group], tokenizer: Any, rewards: Mapping[tuple[str, int], float] | None = None,
                 positions: int = 4, thoughts: int = 4) -> list[tuple[Any, ...]]:  # fmt: skip
    """Some thoughts of a step as rows of `COLUMNS`, control characters made visible. The reward is that of `rewards`, by group
    and place in it, or the one stored on the group; None where there is none, and where the thought counts nowhere."""
    known, reader = rewards or {}, TokenReader(tokenizer)
    out: list[tuple[Any, ...]] = []
    for group in groups[:positions]:
        at, prompt = group.position, group.prompt.token_ids
        where = f"{at.document_id}@{at.index}"
        context = shown(reader.text(at.context_ids[-48:], after=at.context_ids[:-48]))
        target = shown(reader.spelled(at.target_ids, after=at.context_ids))
        for k, thought in enumerate(group.thoughts[:thoughts]):
            ids, text = thought.token_ids, shown(reader.text(thought.token_ids, after=prompt))
            found = known.get((group.id, k), math.nan if group.rewards is None else group.rewards[k])
            reward = None if math.isnan(found) else found
            out.append((where, context, target, text, len(ids), str(thought.finish_reason), reward))
    return out


def markdown(rows: Sequence[tuple[Any, ...]]) -> str:
    """A table for TensorBoard, which renders markdown: every cell is code, so that nothing in a thought is."""

    def cell(value: Any) -> str:
        return "" if value is None else "`" + str(value).replace("`", "'").replace("|", "¦").replace("\n", " ⏎ ") + "`"

    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(map(cell, row)) for row in rows)])


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # half a line: drop it


def table() -> Any:
    """The metrics as a rich table: what `rlpretrain metrics` prints."""
    from rich.table import Table

    out = Table("metric", "meaning", "healthy", title="What rlpretrain logs")
    for name, (meaning, healthy) in METRICS.items():
        out.add_row(name, meaning, healthy)
    return out
