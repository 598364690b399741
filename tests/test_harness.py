"""Benchmarks through lm-eval: direct numbers are its own; those after a thought are recomputed."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from dataclasses import replace
from functools import partial

import lm_eval
import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from lm_eval.evaluator import evaluate
from rich.console import Console

from rlpretrain import Pretrainer, models
from rlpretrain.cli import main
from rlpretrain.commands.evaluation_settings import initial_model
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.evaluation.harness import _task_manager, load_tasks, run_tasks
from rlpretrain.evaluation.thinking_lm import ThinkingLM
from rlpretrain.experiments.jobs import all_jobs, evaluation_to_do, run_job
from rlpretrain.experiments.loading import build_experiment
from rlpretrain.experiments.results import collect, write_csv
from rlpretrain.experiments.tables import tasks as task_table
from rlpretrain.objectives import load_objective
from rlpretrain.objectives.rlp import RLP
from rlpretrain.ranks import Ranks
from rlpretrain.reporting.curves import draw_curves
from rollout.types import FinishReason
from tests.builders.harness import EXAMPLES, WORDS, Ready, greedy, make_ready, objective
from tests.builders.processes import ranks
from tests.builders.tiny import tiny_model, word_tokenizer

TASKS = ("pick", "say")


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Ready:
    return make_ready(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def tasks(ready):
    return load_tasks(["pick", str(ready.tasks / "say.yaml")], str(ready.tasks))


class Recorded(RLP):
    """RLP with ids between thought and target, which keeps the groups that it sampled."""

    def prompt(self, position):
        return replace(super().prompt(position), join_ids=(self.tokenizer.convert_tokens_to_ids("shows"),))

    async def sample_thoughts(self, *args, **kwargs):
        groups = await super().sample_thoughts(*args, **kwargs)
        self.config.groups += groups
        return groups


@pytest.fixture
def recorded(ready):
    made = objective(ready.tokenizer)
    made.__class__ = Recorded
    made.config.groups = []
    return made


def thinking_lm(ready, made, batch_size=5, seed=3) -> ThinkingLM:
    return ThinkingLM(ready.model, ready.tokenizer, batch_size, Ranks(), objective=made, seed=seed)


def ids_with_thought(group) -> tuple[int, ...]:
    (thought,) = group.thoughts
    close = () if thought.finish_reason is FinishReason.CLOSE else group.prompt.close_ids
    return (*group.prompt.token_ids, *thought.token_ids, *close, *group.prompt.join_ids)


def test_direct_numbers_are_those_of_lm_eval_itself(ready, tasks):
    ours = run_tasks(ready.model, ready.tokenizer, tasks, batch_size=4)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(ready.folder), "dtype": "float32"},
        tasks=list(TASKS),
        batch_size=4,
        device="cpu",
        task_manager=lm_eval.tasks.TaskManager(include_path=str(ready.tasks), include_defaults=False),
    )
    assert theirs is not None and ours.thinking == {} and ours.thoughts == {}
    assert set(ours.direct) == {"pick/acc", "pick/acc_norm", "say/exact_match"}
    for name, number in ours.direct.items():
        task, metric = name.split("/")
        assert number.value == theirs["results"][task][f"{metric},none"]
        assert number.stderr == theirs["results"][task][f"{metric}_stderr,none"]
        assert number.examples is not None
        assert number.examples.tolist() == [sample[metric] for sample in theirs["samples"][task]]
    assert 0 < ours.direct["pick/acc"].value < 1 and ours.direct["say/exact_match"].value >= 1 / 3


def test_choices_are_scored_after_one_thought_per_question(ready, tasks, recorded):
    lm = thinking_lm(ready, recorded)
    samples = evaluate(lm, tasks.loaded)["samples"]["pick"]
    groups = recorded.config.groups
    contexts = {ready.tokenizer.decode(g.position.context_ids): g for g in reversed(groups)}
    assert len(contexts) == EXAMPLES  # `say` has the same contexts, and the same thoughts
    reasons = {group.thoughts[0].finish_reason for group in groups}
    assert {FinishReason.CLOSE, FinishReason.LENGTH} <= reasons
    for sample in samples:
        before = ids_with_thought(contexts[sample["arguments"][0][0]])
        for (_, choice), [(logp, is_greedy)] in zip(sample["arguments"], sample["resps"], strict=True):
            target = ready.tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = ready.model(input_ids=torch.tensor([[*before, *target]])).logits[0].double()
            rows = torch.arange(len(before) - 1, len(before) + len(target) - 1)
            expected = logits.log_softmax(-1)[rows, torch.tensor(target)].sum()
            assert logp == pytest.approx(float(expected), abs=1e-4)
            assert is_greedy == (logits[rows].argmax(-1).tolist() == target)
    assert lm.counts.thoughts == len(groups) == 2 * EXAMPLES
    assert lm.counts.tokens == sum(len(group.thoughts[0].token_ids) for group in groups)
    assert lm.counts.unclosed == sum(g.thoughts[0].finish_reason is not FinishReason.CLOSE for g in groups)


def test_generation_continues_context_and_thought(ready, recorded, tmp_path):
    """With `repeats` each repetition has a thought of its own."""
    task = yaml.safe_load((ready.tasks / "say.yaml").read_text())
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(task | {"task": "twice", "repeats": 2}))
    twice = load_tasks([str(tmp_path / "twice.yaml")])
    samples = evaluate(thinking_lm(ready, recorded), twice.loaded)["samples"]["twice"]
    said: dict[str, list[str]] = {}
    for group in recorded.config.groups:
        context = ready.tokenizer.decode(group.position.context_ids)
        text = greedy(ready.model, ready.tokenizer, ids_with_thought(group), 3)
        said.setdefault(context, []).append(text)
    for sample in samples:
        ((context, _),), (answers,) = sample["arguments"], sample["resps"]
        assert len(answers) == 2 and sorted(answers) == sorted(said[context])
    assert any(len({*answers}) == 2 for answers in said.values())


def test_thoughts_depend_on_context_and_seed_alone(ready, tasks):
    made = objective(ready.tokenizer)
    run = partial(run_tasks, ready.model, ready.tokenizer, tasks, objective=made, ways=("thinking",))
    whole, part, other = run(batch_size=4), run(examples=5, batch_size=1), run(seed=1)
    for name, number in whole.thinking.items():
        assert number.examples[:5].tolist() == part.thinking[name].examples.tolist()
    assert whole.direct == {} and whole.thoughts["number"] == 2 * EXAMPLES
    assert whole.thoughts["length"] != other.thoughts["length"]


def test_differences_are_paired_over_examples(ready, tasks):
    results = run_tasks(ready.model, ready.tokenizer, tasks, objective=objective(ready.tokenizer))
    row = results.as_dict(results)["tasks"]["pick/acc"]
    mean, low, high = row["thinking - direct"]
    direct, thinking = results.direct["pick/acc"], results.thinking["pick/acc"]
    assert mean == pytest.approx(thinking.value - direct.value) and low <= mean <= high
    assert row["direct - base"] == row["thinking - base"] == [0, 0, 0]
    # independent intervals would be wider
    assert high - low < np.hypot(np.diff(direct.interval), np.diff(thinking.interval))[0]


def test_nothing_of_a_training_run_changes(ready, tasks):
    ready.model.train()
    parameters = [id(parameter) for parameter in ready.model.parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    pad = ready.tokenizer.pad_token
    run_tasks(ready.model, ready.tokenizer, tasks, objective=objective(ready.tokenizer), examples=2)
    assert all(module.training for module in ready.model.modules())
    ready.model.eval()
    assert [id(parameter) for parameter in ready.model.parameters()] == parameters
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert ready.tokenizer.pad_token == pad


def test_a_task_that_scores_whole_texts_is_answered_directly_only(ready, tmp_path):
    task = yaml.safe_load((ready.tasks / "say.yaml").read_text())
    task |= {
        "task": "read",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
    }
    task["metric_list"] = [{"metric": "word_perplexity"}]
    (tmp_path / "read.yaml").write_text(yaml.safe_dump(task))
    results = run_tasks(
        ready.model,
        ready.tokenizer,
        load_tasks([str(tmp_path / "read.yaml")]),
        objective=objective(ready.tokenizer),
    )
    assert set(results.direct) == {"read/word_perplexity"} and results.thinking == {}


def test_long_contexts_lose_their_beginning_and_are_counted(ready, tasks):
    made = objective(ready.tokenizer, thought_tokens=240)  # of 256 positions
    results = run_tasks(ready.model, ready.tokenizer, tasks, objective=made, examples=1, ways=("thinking",))
    assert results.thoughts["cut_contexts"] == 0
    made = objective(ready.tokenizer, thought_tokens=246)
    results = run_tasks(ready.model, ready.tokenizer, tasks, objective=made, examples=1, ways=("thinking",))
    assert results.thoughts["cut_contexts"] == 2
    made = objective(ready.tokenizer, thought_tokens=255)
    with pytest.raises(ConfigError, match="256 tokens: thoughts of up to 255 and answers of up to 3"):
        run_tasks(ready.model, ready.tokenizer, tasks, objective=made, examples=1, ways=("thinking",))


@pytest.fixture
def no_defaults(monkeypatch):
    """Leaves out lm-eval's 14,000 tasks, which take a quarter of a minute to read."""
    own = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path=None, **_: own(None, include_path, False)
    )


def test_errors_name_the_task_and_the_remedy(ready, tmp_path, monkeypatch, no_defaults):
    remote = {
        "task": "remote",
        "dataset_path": "no/where",
        "output_type": "multiple_choice",
        "test_split": "test",
    }
    remote |= {"doc_to_text": "a", "doc_to_target": "b", "doc_to_choice": ["b"]}
    (tmp_path / "remote.yaml").write_text(yaml.safe_dump(remote))
    with pytest.raises(ConfigError, match="no task 'pik': did you mean pick"):
        load_tasks(["pik"], str(ready.tasks))
    with pytest.raises(ConfigError, match="task 'remote' cannot be loaded: .*no/where.*local files"):
        load_tasks(["remote"], str(tmp_path))
    with pytest.raises(ConfigError, match="pick is asked for twice"):
        load_tasks(["pick", str(ready.tasks / "pick.yaml")], str(ready.tasks))
    with pytest.raises(ConfigError, match="no folder 'gone' with tasks"):
        load_tasks(["pick"], "gone")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'not installed: pip install "rlpretrain\[eval\]"'):
        load_tasks(["pick"], str(ready.tasks))


def test_the_command_shows_the_untouched_base_beside(ready, tmp_path, capsys):
    """Directly, a model answers as it was saved: without delimiters that it lacks."""
    tokenizer = word_tokenizer(WORDS)
    tiny_model("llama", vocab_size=len(tokenizer), seed=9).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["eval", str(ready.folder), "--tasks", "pick,say", "--include-path", str(ready.tasks)]
    words += ["--frozen", str(tmp_path / "base"), "--max-thought-tokens", "8", "--task-examples", "9"]
    assert main([*words, "--json", str(tmp_path / "out.json"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "base: after a thought" in printed and "say/exact_match" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "base"), "dtype": "float32"},
        tasks=list(TASKS),
        batch_size=16,
        device="cpu",
        limit=9,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(ready.tasks), include_defaults=False),
    )
    row = found["tasks"]["pick/acc"]
    assert row["base direct"]["value"] == theirs["results"]["pick"]["acc,none"]
    assert row["direct - base"][0] == pytest.approx(row["direct"]["value"] - row["base direct"]["value"])
    assert found["thoughts"]["number"] == 18


def test_the_base_is_that_of_the_run(tmp_path, capsys, monkeypatch):
    """Its revision and tokenizer too; a base that is not on this machine is named."""
    model = tmp_path / "run" / "checkpoint-2" / "model"
    config = build({"model": str(model), "data": "x"})
    other = initial_model("other", config.model)
    assert initial_model(None, config.model) is None and other is not None and other.path == "other"
    section = {"path": "org/base", "revision": "v1", "tokenizer": None, "from_scratch": False}
    for changes, expected in (({}, "org/base"), ({"from_scratch": True}, None), ({"path": "/gone"}, None)):
        model.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"model": section | changes}}))
        base = initial_model(None, config.model)
        assert (base and base.path) == expected and (base is None or base.revision == "v1")
    assert "/gone, is not here: give --frozen" in capsys.readouterr().out
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"model": section}}))
    monkeypatch.chdir(tmp_path / "run")  # a hub id does not belong to the run in whose folder the user is
    assert initial_model(None, build({"model": "org/trained", "data": "x"}).model) is None


def test_tasks_are_read_from_few_folders():
    """All of lm-eval's list is read only for groups and tags, whose members may be in any folder."""
    manager = _task_manager(["arc_easy", "gsm8k"], None)
    assert len(manager.all_tasks) < 5000
    files = {name: manager.task_index[name].yaml_path for name in ("arc_easy", "gsm8k")}
    assert [file.parent.name for file in files.values()] == ["arc", "gsm8k"]


# during a run, and in a comparison


def run_values(ready, folder) -> dict:
    lines = [
        json.dumps({"text": f"the dial moves up {n % 10} down {n % 9} shows {n % 7} end"}) for n in range(30)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return {
        "model": str(ready.folder),
        "data": {"path": str(folder / "text.jsonl"), "max_length": 64},
        "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
        "sampling": {"thoughts": 4, "max_thought_tokens": 6, "cut": "force_close"},
        "positions_per_step": 4,
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "policy": {"backend": "torch"},
        "max_steps": 4,
        "checkpoint": {"every": 2},
        "stop": {"collapse": False},
        "baseline": {"name": "self", "frozen_every": 0},
        "eval": {"every": 2, "tasks": ["pick", "say"], "include_path": str(ready.tasks), "task_examples": 8},
        "console": False,
        "output_dir": str(folder / "run"),
        "device": "cpu",
    }


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_the_tasks_of_policy_and_base(ready, tasks, tmp_path):
    values = run_values(ready, tmp_path)
    Pretrainer(build(values)).train()
    Pretrainer(build(values | {"eval": {}, "output_dir": str(tmp_path / "plain")})).train()
    rows = logged(tmp_path / "run")
    assert ["eval/tasks/pick/acc/direct" in row for row in rows] == [False, True, False, True]
    for row, plain in zip(rows, logged(tmp_path / "plain"), strict=True):
        assert row["loss"] == plain["loss"]  # training is what it is without tasks
    config = build(values)
    objective = load_objective(config, ready.tokenizer)
    ask = partial(run_tasks, tasks=tasks, objective=objective, examples=8, batch_size=16)
    model, tokenizer, _ = models.load_with_tokenizer(
        replace(config.model, path=str(tmp_path / "run/model")), None
    )
    for prefix, results in (("", ask(model, tokenizer)), ("base_", ask(ready.model, ready.tokenizer))):
        for way in ("direct", "thinking"):
            for name, number in getattr(results, way).items():
                assert rows[-1][f"eval/tasks/{name}/{prefix}{way}"] == pytest.approx(number.value), (
                    name,
                    way,
                )
    panels = [panel.title for panel in draw_curves(rows)]
    assert {"pick/acc", "pick/acc_norm", "say/exact_match"} <= set(panels)
    # a resumed run keeps the base's numbers
    for checkpoint in (tmp_path / "run").glob("checkpoint-4"):
        shutil.rmtree(checkpoint)
    Pretrainer(build(values)).train(resume="auto")
    assert {k: v for k, v in logged(tmp_path / "run")[-1].items() if k.startswith("eval/tasks")} == {
        k: v for k, v in rows[-1].items() if k.startswith("eval/tasks")
    }


def test_a_run_with_an_unknown_task_does_not_start(ready, tmp_path, no_defaults):
    values = run_values(ready, tmp_path)
    values["eval"]["tasks"] = "sey"
    with pytest.raises(ConfigError, match="no task 'sey': did you mean say"):
        Pretrainer(build(values)).train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_comparison_has_the_tasks_of_every_model(ready, tasks, tmp_path):
    values = run_values(ready, tmp_path)
    (tmp_path / "rlp.yaml").write_text(yaml.safe_dump(values | {"eval": {}, "max_steps": 1, "threads": 1}))
    experiment = {
        "methods": {
            "rlp": {"config": "rlp.yaml"},
            "ntp": {"config": "rlp.yaml", "set": {"objective": "ntp"}},
        },
        "evaluation": values["eval"]
        | {"data": values["data"], "objective": values["objective"], "own": False},
        "seeds": [0],
        "output_dir": str(tmp_path / "compared"),
    }
    del experiment["evaluation"]["every"]
    experiment["evaluation"] |= {"documents": 4, "thoughts": 2, "max_thought_tokens": 6}
    made = build_experiment(experiment, tmp_path)
    for job in all_jobs(made, tmp_path):
        run_job(job)
        assert evaluation_to_do(job) is None
    results = collect(made)["tasks"]
    write_csv(tmp_path / "results.csv", collect(made))
    assert list(results) == ["base", "rlp", "ntp", "rlp - base", "ntp - base", "ntp - rlp"]
    base = run_tasks(ready.model, ready.tokenizer, tasks, examples=8)
    assert results["base"]["pick/acc, direct"][0] == pytest.approx(base.direct["pick/acc"].value)
    for number, (mean, low, high) in results["ntp - rlp"].items():
        assert mean == pytest.approx(results["ntp"][number][0] - results["rlp"][number][0])
        assert low <= mean <= high
    shown = io.StringIO()
    Console(file=shown, width=400).print(task_table({"tasks": results}))
    assert "pick/acc, thinking" in shown.getvalue() and "rlp - base" in shown.getvalue()
    assert 'rlp - base,"say/exact_match, direct"' in (tmp_path / "results.csv").read_text()


RANKS = """
import json, sys
from pathlib import Path
from rlpretrain.evaluation.harness import load_tasks, run_tasks
from rlpretrain import models
from rlpretrain.config import ModelConfig
from rlpretrain.ranks import join
from tests.builders.harness import objective
ranks = join("cpu")
folder, tasks, out = sys.argv[1:]
model, tokenizer, _ = models.load_with_tokenizer(ModelConfig(path=folder), None)
loaded = load_tasks(["pick", "say"], tasks)
for examples in (7, 1):
    settings = dict(objective=objective(tokenizer), examples=examples, ranks=ranks, quiet=True)
    results = run_tasks(model, tokenizer, loaded, **settings)
    per_example = {name: number.examples.tolist() for name, number in results.thinking.items()}
    Path(out, f"{examples}-{ranks.rank}").write_text(json.dumps([results.metrics(), per_example]))
"""


def test_two_ranks_share_the_examples(ready, tasks, tmp_path):
    """Seven examples are shared; a single one is answered by the first rank."""
    done = ranks(2, "-c", RANKS, str(ready.folder), str(ready.tasks), str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = objective(ready.tokenizer)
    for examples in (7, 1):
        whole = run_tasks(ready.model, ready.tokenizer, tasks, objective=made, examples=examples)
        expected = {name: number.examples.tolist() for name, number in whole.thinking.items()}
        for rank in (0, 1):
            metrics, per_example = json.loads((tmp_path / f"{examples}-{rank}").read_text())
            assert metrics == pytest.approx(whole.metrics()) and per_example == expected
