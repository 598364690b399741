"""V-Pretraining: advice against double backward, what reduces to NTP, the designer, its state, controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.objectives.advice import Candidates, Mixture, describe, mix
from rlpretrain.objectives.designer import Designer
from rlpretrain.objectives.v_pretrain import Config, VPretrain
from rlpretrain.tools.dry_run import dry_run
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.runs import SGD, launch, merged, one_step, same, trained, weights

V = len(dial.WORDS)
SMALL = {"layers": 1, "width": 16, "heads": 2}


@pytest.fixture(scope="module")
def labelled(corpus: Path) -> dict[str, Any]:
    """Twenty-four problems with answers, which are no documents of the run."""
    lines = [json.loads(line) for line in (corpus / "held_out.jsonl").read_text().splitlines()]
    rows = []
    for line in lines[:24]:
        question, _, answer = line["text"].rpartition(" shows ")
        rows.append({"question": f"{question} shows", "answer": answer})
    file = corpus / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "path": str(file),
        "column": "question",
        "answer_column": "answer",
        "answer_join": " ",
        "max_length": 64,
    }


def asking(values: dict[str, Any], labelled: Any, **settings: Any) -> dict[str, Any]:
    """A run without burn-in; `settings` of the objective, and of the run with a prefix."""
    run = {name[4:]: settings.pop(name) for name in list(settings) if name.startswith("run_")}
    objective = {"name": "v_pretrain", "feedback": labelled, "burn_in": 0.0, "every": 1, **SMALL}
    objective |= {"feedback_documents": 4, "top_k": 5, "shift": 3e-4} | settings
    return merged(values, objective=objective, **run)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Kept:
    """What a run asks of its objective in its steps."""

    def __init__(self) -> None:
        self.micros: list[Any] = []
        self.candidates: list[Candidates] = []
        self.advice: Any = None
        self.gradient: Any = None
        self.feedback: list[Any] = []
        self.run: Any = None

    def __call__(self, run: Run) -> None:
        self.run, objective, ask = run, run.objective, run.objective._ask
        take = objective.sources["feedback"].take

        def asked(learner: Any, micros: Any, candidates: Any, step: int) -> Any:
            self.micros, self.candidates = list(micros), list(candidates)
            self.advice, numbers = ask(learner, micros, candidates, step)
            return self.advice, numbers

        def taken(*args: Any) -> Any:
            self.feedback = take(*args)
            return self.feedback

        objective._ask, objective.sources["feedback"].take = asked, taken


def answers(model: Any, documents: Any) -> torch.Tensor:
    """The mean loss on the tokens of the answers."""
    losses = []
    for document in documents:
        ids = torch.tensor([document.token_ids])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-logps[document.answer_at - 1 :])
    return torch.cat(losses).mean()


def logps_of(model: Any, micros: Any) -> torch.Tensor:
    """Log-probs [M, V] of every prediction, document by document."""
    documents = [document for micro in micros for document in micro.documents]
    return torch.cat([model(torch.tensor([d.token_ids])).logits[0, :-1].log_softmax(-1) for d in documents])


def exact_advice(path: str, kept: Kept) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(model, g_down · −∇ log p of every token [M, V] by double backward, log-probs [M, V])."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    parameters = list(model.parameters())
    down = torch.autograd.grad(answers(model, kept.feedback), parameters)
    logps = logps_of(model, kept.micros)
    q = torch.zeros_like(logps, requires_grad=True)
    pre = torch.autograd.grad(-(q * logps).sum(), parameters, create_graph=True)
    value = sum((g * p).sum() for g, p in zip(down, pre, strict=True))
    (advice,) = torch.autograd.grad(value, q)
    return model, advice, logps.detach()


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_advice_and_gradient_are_those_of_double_backward(values, labelled, tmp_path, packing):
    """The whole step of `designer: none`, worked with transformers' logits and second derivatives."""
    kept, tau, alpha = Kept(), 0.5, 0.4
    config = asking(values, labelled, designer="none", tau=tau, alpha=alpha, run_packing=packing)
    run, gradient = one_step(config, kept, output_dir=str(tmp_path / "run"))
    model, exact, logps = exact_advice(values["model"], kept)
    ids = torch.cat([found.ids for found in kept.candidates])
    found = torch.cat(list(kept.advice.values))
    wanted = exact.gather(1, ids.clamp(min=0)) * (ids >= 0)
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())

    own = torch.cat([micro.trunk_labels for micro in kept.micros])[:, None]
    inside = torch.zeros_like(logps, dtype=torch.bool).scatter_(1, torch.where(ids >= 0, ids, own), True)
    assert (inside.sum(1) >= 5).all() and (inside.sum(1) <= 6).all()
    learner = logps.masked_fill(~inside, -torch.inf).softmax(-1)
    centred = exact - (learner * exact).sum(1, keepdim=True)
    deviation = (learner * centred**2).sum(1).mean().sqrt()
    p = (logps + exact / deviation / tau).masked_fill(~inside, -torch.inf).softmax(-1)
    q = (alpha * p).scatter_add(1, own, torch.full(own.shape, 1 - alpha))
    loss = -(q * logps_of(model, kept.micros)).sum(1).mean()
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert same(gradient, theirs, within=2e-3 * largest)
    assert run.last["feedback/value"] == pytest.approx(float((q * exact).sum(1).mean()), rel=1e-2)
    down = torch.autograd.grad(answers(model, kept.feedback), list(model.parameters()))
    norms = [torch.cat([g.flatten() for g in part]).norm() for part in (down, list(theirs.values()))]
    cosine = run.last["feedback/value"] / float(norms[0] * norms[1])
    assert run.last["feedback/cosine"] == pytest.approx(cosine, rel=1e-3) and abs(cosine) <= 1
    assert run.last["feedback/shift"] == pytest.approx(3e-4, rel=1e-3)


def test_a_step_on_the_best_candidate_helps_and_one_on_the_worst_hurts(values, labelled, tmp_path):
    """The sign: learner steps with all mass on the largest, or the smallest, advice of each place."""
    after = {}
    for name, sign in (("best", 1.0), ("worst", -1.0)):
        kept = Kept()

        def choose(run: Run, kept: Kept = kept, sign: float = sign) -> None:
            kept(run)

            def only(micro: Any, found: Candidates, asked: Any) -> Mixture:
                scores = (sign * asked).masked_fill(~found.mask, -torch.inf)
                probs = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[1]).float()
                one = torch.ones(len(probs))
                return mix(probs, one, one)

            run.objective._mix = only

        settings = {
            "designer": "none",
            "top_k": V,
            "run_optim": {"name": "sgd", "lr": 0.002, "warmup_steps": 0},
        }
        run, _ = one_step(asking(values, labelled, **settings), choose, output_dir=str(tmp_path / name))
        model = AutoModelForCausalLM.from_pretrained(values["model"])
        before = float(answers(model, kept.feedback))
        model.load_state_dict({n: p.detach() for n, p in run.policy.weights()}, strict=False)
        after[name] = float(answers(model, kept.feedback)) - before
        assert run.last["feedback/loss"] == pytest.approx(before, abs=1e-5)
        predicted = -0.002 * run.last["feedback/value"]
        assert after[name] == pytest.approx(predicted, rel=0.2)
    assert after["best"] < -1e-4 < 1e-4 < after["worst"]


@pytest.mark.parametrize(
    ("packing", "settings"),
    [
        ("tree", {"alpha": 0.0}),
        ("tree", {"burn_in": 1.0}),
        ("padded", {"burn_in": 1.0}),
        ("tree", {"burn_in": 1.0, "designer": "none"}),
    ],
)
def test_without_alpha_or_in_the_burn_in_it_is_ntp_bit_by_bit(values, labelled, tmp_path, settings, packing):
    """The designer, the feedback and the shifts leave no trace in the learner."""
    plain = trained(merged(values, objective="ntp", packing=packing), output_dir=str(tmp_path / "ntp"))
    config = asking(values, labelled, run_packing=packing, **settings)
    run = Run(build(config | {"output_dir": str(tmp_path / "run")}), None)
    start = (
        {n: p.detach().clone() for n, p in run.objective.proxy.named_parameters()}
        if run.objective.proxy
        else {}
    )
    labelled_ids = {document.token_ids for document in run.objective.sources["feedback"].one_pass()}
    take, drawn = run.next_batch, []
    run.next_batch = lambda: drawn.append(take()) or drawn[-1]
    train(run)
    assert same(plain, {n: p.detach() for n, p in run.policy.model.named_parameters()})
    run.close()
    read = {document.token_ids for batch in drawn for document in batch.documents}
    assert len(read) >= 10 and not read & labelled_ids
    logged = rows(tmp_path / "run")
    assert all(row["feedback/loss"] > 0 and row["ntp/soft_frac"] == 0 for row in logged)
    assert all(row["feedback/cosine"] != 0 for row in logged)
    if start:
        now = {n: p.detach() for n, p in run.objective.proxy.named_parameters()}
        assert same(start, now) == (settings.get("alpha") == 0.0)  # no mass, no gradient


def test_a_feedback_without_gradient_leaves_the_designer_as_it_is(values, labelled):
    def nothing(run: Run) -> None:
        gradient = run.learner.gradient

        def zero(*args: Any) -> Any:
            found = gradient(*args)
            return type(found)(found.loss, {name: 0 * value for name, value in found.values.items()})

        run.learner.gradient = zero
        run.start = {n: p.detach().clone() for n, p in run.objective.proxy.named_parameters()}

    run, _ = one_step(asking(values, labelled), nothing)
    assert same(run.start, {n: p.detach() for n, p in run.objective.proxy.named_parameters()})
    assert run.last["feedback/value"] == 0 == run.last["feedback/gradient_norm"]
    assert "feedback/cosine" not in run.last and "designer/gradient_norm" not in run.last


@pytest.mark.parametrize("designer", ["none", "transformer"])
def test_a_feedback_that_is_not_finite_is_left_out_and_logged(values, labelled, designer):
    def broken(run: Run) -> None:
        gradient = run.learner.gradient

        def nan(*args: Any) -> Any:
            found = gradient(*args)
            return type(found)(found.loss, {name: value * torch.nan for name, value in found.values.items()})

        run.learner.gradient = nan

    run, _ = one_step(asking(values, labelled, designer=designer), broken)
    assert run.last["feedback/skipped_frac"] == 1 and "feedback/value" not in run.last
    assert run.last["ntp/soft_frac"] == (designer == "transformer")  # without advice: the next-token loss


def test_all_mass_on_the_document_token_is_the_next_token_loss(values, labelled, tmp_path):
    def own(run: Run) -> None:
        def only(micro: Any, found: Candidates, asked: Any) -> Mixture:
            probs = torch.zeros(found.ids.shape).index_fill(1, torch.tensor([0]), 1.0)
            return mix(probs, torch.full((len(probs),), 0.7), torch.ones(len(probs)))

        run.objective._mix = only

    _, ours = one_step(asking(values, labelled, designer="none"), own, output_dir=str(tmp_path / "run"))
    _, plain = one_step(merged(values, objective="ntp"), output_dir=str(tmp_path / "ntp"))
    assert same(ours, plain, within=1e-6)


def test_the_learners_own_prediction_teaches_by_its_truncation_alone(values, tmp_path):
    """E_p ∇ log p = 0: over the whole vocabulary α = 1 has no gradient, and α = ½ halves the step."""
    _, plain = one_step(merged(values, objective="ntp"), output_dir=str(tmp_path / "ntp"))
    found = {}
    for name, alpha, top_k in (("whole", 1.0, V), ("half", 0.5, V), ("few", 1.0, 4)):
        config = asking(values, None, designer="self", alpha=alpha, top_k=top_k)
        _, found[name] = one_step(config, output_dir=str(tmp_path / name))
    largest = {name: max(float(g.abs().max()) for g in gradient.values()) for name, gradient in found.items()}
    assert largest["whole"] < 1e-6 < 1e-3 < largest["few"]
    assert same(found["half"], {name: g / 2 for name, g in plain.items()}, within=1e-6)


def test_an_infinite_tau_is_self_distillation_bit_by_bit(values, labelled, tmp_path):
    ends = []
    for name, given in (("none", {"designer": "none", "tau": 1e30}), ("self", {"designer": "self"})):
        ends.append(trained(asking(values, labelled, **given), output_dir=str(tmp_path / name)))
    alone = asking(values, None, designer="self")
    assert same(*ends) and same(ends[0], trained(alone, output_dir=str(tmp_path / "alone")))
    uniform = trained(asking(values, None, designer="uniform"), output_dir=str(tmp_path / "uniform"))
    assert not same(ends[0], uniform, within=1e-4)


@pytest.mark.parametrize("top_k", [1, 3, V])
@pytest.mark.parametrize("designer", ["transformer", "none", "self", "uniform"])
def test_targets_are_probabilities_and_hold_the_document_token(values, labelled, top_k, designer):
    micros: list[Any] = []

    def keep(run: Run) -> None:
        pack = run.pack
        run.pack = lambda *args: micros.extend(pack(*args)) or micros

    one_step(asking(values, labelled, top_k=top_k, designer=designer, alpha=0.8), keep)
    assert micros
    for micro in micros:
        ids, probs = micro.soft_ids, micro.soft_probs
        assert ids.shape == (len(micro.trunk_labels), 1 + top_k) and torch.equal(
            ids[:, 0], micro.trunk_labels
        )
        assert (
            torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-6)
            and (probs[:, 0] >= 0.2 - 1e-6).all()
        )
        for row, used in zip(ids.tolist(), (probs > 0).tolist(), strict=True):
            tokens = [token for token, is_used in zip(row, used, strict=True) if is_used]
            assert len(set(tokens)) == len(tokens) and min(tokens) >= 0
        if designer == "uniform":
            wanted = (0.8 / (ids >= 0).sum(1, keepdim=True)).expand(ids.shape)
            assert torch.allclose(probs[:, 1:], torch.where(ids[:, 1:] >= 0, wanted[:, 1:], 0.0), atol=1e-6)


def test_a_random_direction_has_the_norm_of_the_feedback_and_other_advice(values, labelled, tmp_path):
    found, norms, shifts = [], [], []
    for seed, direction in ((0, "feedback"), (0, "random"), (0, "random"), (1, "random")):
        kept = Kept()
        config = asking(values, labelled, designer="none", direction=direction, run_seed=seed)
        config["data"] = config["data"] | {"shuffle": False}
        config["objective"]["feedback"] = labelled | {"shuffle": False}
        run, _ = one_step(config, kept, output_dir=str(tmp_path / str(len(found))))
        found.append(torch.cat(list(kept.advice.values)))
        norms.append(run.last["feedback/gradient_norm"])
        shifts.append(run.last["feedback/shift"])
    assert norms == [norms[0]] * 4 and shifts == pytest.approx([3e-4] * 4, rel=1e-3)
    assert torch.equal(found[1], found[2]) and not torch.equal(found[1], found[3])
    both = torch.stack([found[0].flatten(), found[1].flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.9


def test_the_designer_reads_no_token_before_its_time():
    """A place sees the document up to its own token, and no document sees another."""
    torch.manual_seed(0)
    designer = Designer(20, 16, 2, 2)
    for layer in (designer.query, designer.gate):
        torch.nn.init.normal_(layer.weight)
    documents = [(1, 2, 3, 4, 5), (6, 7, 8)]
    ids = torch.randint(0, 20, (6, 3))
    scores, gates = designer(documents, ids)
    changed, changed_gates = designer([(1, 2, 3, 9, 5), (6, 7, 8)], ids)
    same_places = [0, 1, 4, 5]
    assert torch.allclose(scores[same_places], changed[same_places], atol=1e-5)
    assert (scores[[2, 3]] - changed[[2, 3]]).abs().max(1).values.min() > 1e-3
    assert not torch.allclose(gates[[2, 3]], changed_gates[[2, 3]], atol=1e-4)
    alone, _ = designer([(6, 7, 8)], ids[4:])
    assert torch.allclose(alone, scores[4:], atol=1e-5)
    none, no_gates = designer([], ids[:0])
    assert none.shape == (0, 3) and no_gates.shape == (0,)


def test_the_designer_comes_to_raise_the_value(values, labelled, tmp_path):
    """The learner and its eight documents stay the same, so what rises is what the designer has learnt."""
    lines = Path(values["data"]["path"]).read_text().splitlines(keepends=True)
    (tmp_path / "eight.jsonl").write_text("".join(lines[:8]))
    gains, gates = {}, {}
    for name, settings in (("free", {}), ("penalty", {"gate_penalty": 50.0})):
        config = asking(values, labelled, alpha=0.8, designer_lr=1e-2, feedback_documents=24, **settings)
        config = merged(config, max_steps=12, optim={"lr": 1e-12}, positions_per_step=8)
        trained(merged(config, data__path=str(tmp_path / "eight.jsonl")), output_dir=str(tmp_path / name))
        logged = rows(tmp_path / name)
        gains[name] = [row["feedback/value"] - row["feedback/value_ntp"] for row in logged]
        gates[name] = [row["targets/alpha"] for row in logged]
        assert all(0 < row["targets/off_mass"] <= 0.8 and row["targets/entropy"] > 0 for row in logged)
        assert all(0 <= row["targets/open_frac"] <= 1 for row in logged)
    assert gates["free"][0] == pytest.approx(0.4, abs=0.05)  # the gate starts halfway
    assert gains["free"][-1] > gains["free"][0] + 0.01 and gains["free"][-1] > gains["free"][5]
    assert gates["penalty"][-1] < 0.2 < gates["free"][-1]


def test_a_resumed_run_ends_with_the_same_weights_and_the_same_designer(values, labelled, tmp_path):
    held_out = labelled | {"append_eos": False}
    config = asking(values, labelled, every=2, held_out=held_out, feedback_documents=5, run_max_steps=6)
    config = merged(config, checkpoint={"every": 3, "keep": 3}, output_dir=str(tmp_path / "run"))
    whole = trained(config)
    before = torch.load(tmp_path / "run/checkpoint-6/rank-0.pt", weights_only=True)["objective"]
    half = torch.load(tmp_path / "run/checkpoint-3/rank-0.pt", weights_only=True)["objective"]
    assert half["steps"] == 3 and set(half["sources"]) == {"feedback", "held_out"}
    first = rows(tmp_path / "run")
    assert same(whole, trained(config, resume=str(tmp_path / "run/checkpoint-3")))
    after = torch.load(tmp_path / "run/checkpoint-6/rank-0.pt", weights_only=True)["objective"]
    assert same(before["designer"], after["designer"]) and before["sources"] == after["sources"]
    assert not same(half["designer"], after["designer"])
    for name in ("exp_avg", "exp_avg_sq"):
        for k, state in before["optimizer"]["state"].items():
            assert torch.equal(state[name], after["optimizer"]["state"][k][name])
    again = rows(tmp_path / "run")
    for old, new in zip(first, again, strict=True):
        assert {k: v for k, v in old.items() if k.startswith(("feedback/", "targets/", "designer/"))} == {
            k: v for k, v in new.items() if k.startswith(("feedback/", "targets/", "designer/"))
        }
    asked = [("feedback/loss" in row, "feedback/held_out_loss" in row) for row in again]
    assert asked == [(True, True), (False, False)] * 3


def test_packing_and_micro_batches_do_not_change_the_gradient(values, labelled, tmp_path):
    gradients = []
    for packing, budget in (("tree", 16384), ("tree", 64), ("padded", 16384), ("padded", 64)):
        config = asking(values, labelled, designer="none", run_packing=packing, run_token_budget=budget)
        gradients.append(one_step(config, output_dir=str(tmp_path / f"{packing}-{budget}"))[1])
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    assert all(same(gradients[0], gradient, within=2e-3 * largest) for gradient in gradients[1:])


def test_two_ranks_train_as_one_does(values, labelled, tmp_path):
    """The learner, the designer, the advice and the log; the feedback is divided over the ranks."""
    pairs = {}
    for name in ("transformer", "none"):
        settings = {"designer": name, "run_optim": SGD}
        config = asking(values, labelled, run_checkpoint={"every": 3, "keep": 1}, **settings)
        pairs[name] = [config | {"output_dir": str(tmp_path / f"{name}-{n}")} for n in (1, 2)]
    ones = {name: trained(pair[0]) for name, pair in pairs.items()}
    launch([{"config": pair[1]} for pair in pairs.values()], tmp_path)
    for name in pairs:
        assert same(ones[name], weights(tmp_path / f"{name}-2" / "model"), within=1e-5)
        logged = [rows(tmp_path / f"{name}-{n}") for n in (1, 2)]
        for one, two in zip(*logged, strict=True):
            for key in ("feedback/loss", "feedback/value", "targets/off_mass", "feedback/cosine"):
                assert one[key] == pytest.approx(two[key], rel=2e-2, abs=1e-4), key
    states = [
        torch.load(tmp_path / f"transformer-2/checkpoint-3/rank-{r}.pt", weights_only=True)["objective"]
        for r in (0, 1)
    ]
    assert same(states[0]["designer"], states[1]["designer"])


@pytest.mark.parametrize("subset", ["head", "last:1"])
def test_a_subset_of_the_weights_gives_other_advice(values, labelled, tmp_path, subset):
    found = []
    for chosen in ("all", subset):
        kept = Kept()
        config = asking(values, labelled, designer="none", subset=chosen)
        run, _ = one_step(config, kept, output_dir=str(tmp_path / chosen.replace(":", "")))
        found.append(torch.cat(list(kept.advice.values)))
        assert ("feedback/cosine" in run.last) == (chosen == "all")
    assert not torch.allclose(*found, rtol=1e-2)


@pytest.mark.parametrize("designer", ["transformer", "none"])
def test_with_lora(values, labelled, tmp_path, designer):
    """The direction is that of the adapters; the base stays as it is."""
    lora = {"backend": "torch", "lora": {"r": 4}}
    config = asking(values, labelled, designer=designer, run_policy=lora)
    base = dict(AutoModelForCausalLM.from_pretrained(values["model"]).named_parameters())
    assert not same(base, trained(config, output_dir=str(tmp_path / "run")))
    assert all(row["feedback/value"] != 0 for row in rows(tmp_path / "run"))


def test_what_is_read_counts_as_compute(values, labelled, tmp_path):
    """A step reads more than that of ntp, by the feedback, two shifts, the candidates and the designer."""
    reads = {}
    for name, config in (
        ("ntp", merged(values, objective="ntp")),
        ("self", asking(values, None, designer="self")),
        ("none", asking(values, labelled, designer="none")),
        ("transformer", asking(values, labelled)),
    ):
        run, _ = one_step(config, output_dir=str(tmp_path / name))
        reads[name] = run.last["num_tokens"]
    plain = reads["ntp"]
    assert reads["self"] == pytest.approx(2 * plain)
    assert 4 * plain < reads["none"] < reads["transformer"]


def test_bad_settings_are_refused(values, labelled, tmp_path):
    for match, feedback, settings in (
        ("objective.feedback: designer transformer needs labelled documents", None, {}),
        ("objective.feedback: designer none needs labelled documents", None, {"designer": "none"}),
        ("objective.every 3: designer none needs", labelled, {"designer": "none", "every": 3}),
        ("objective.direction random changes nothing", None, {"designer": "self", "direction": "random"}),
        ("objective.held_out is logged beside", None, {"designer": "self", "held_out": labelled}),
        ("objective.width 12: no multiple", labelled, {"width": 12, "heads": 4}),
        ("objective.subset", labelled, {"subset": "first:2"}),
        ("objective.alpha", labelled, {"alpha": 1.5}),
        ("objective.tau", labelled, {"tau": 0}),
        ("objective.shift", labelled, {"shift": 0}),
        ("objective.top_k", labelled, {"top_k": 0}),
        ("objective.feedback.sources", {"sources": {"a": "b"}}, {}),
        ("no such|cannot be|does not exist|nothing.jsonl", {"path": str(tmp_path / "nothing.jsonl")}, {}),
        (
            "policy.zero_stage 2: objective VPretrain",
            labelled,
            {"run_policy": {"backend": "deepspeed", "zero_stage": 2}},
        ),
        ("model.dtype bfloat16", labelled, {"run_model": {"path": values["model"], "dtype": "bfloat16"}}),
    ):
        for start in (lambda config: Run(config, None), lambda config: dry_run(config, tmp_path)):
            if "nothing" in match and start.__code__.co_names[0] == "dry_run":
                continue  # what is no file here may be on the hub
            with pytest.raises(ConfigError, match=match):
                start(build(asking(values, feedback, **settings)))


def test_documents_longer_than_the_model_are_refused(values, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"text": "ann has 3 . " * 200}) + "\n")
    config = asking(values, {"path": str(file), "max_length": 900})
    with pytest.raises(ConfigError, match=r"objective.feedback has documents of .* positions: lower"):
        Run(build(config), None)


def test_the_dry_run_counts_the_designer(values, labelled, tmp_path, capsys):
    owner: Any = VPretrain(Config(**SMALL), dial.tokenizer())
    assert owner.own_parameters(V) == sum(p.numel() for p in Designer(V, 16, 1, 2).parameters())
    assert VPretrain(Config(designer="none"), dial.tokenizer()).own_parameters(V) == 0
    dry_run(build(asking(values, labelled)), tmp_path)
    shown = capsys.readouterr().out
    assert "shift of the weights, at most" in shown and "model of the objective, with AdamW" in shown


def test_numbers_of_the_targets_are_those_of_the_formula():
    class Alone:
        class ranks:  # noqa: N801
            sum = staticmethod(list)

    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    mixture = mix(probs, torch.tensor([0.5, 1.0]), torch.tensor([0.5, 1.0]))
    assert torch.allclose(mixture.q, torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]))
    learner: Any = Alone
    numbers = describe(learner, [mixture], None)
    assert numbers["targets/alpha"] == 0.75 and numbers["targets/off_mass"] == 0.125
    assert numbers["targets/open_frac"] == 0.5 and numbers["targets/entropy"] == pytest.approx(
        0.2812, abs=1e-4
    )
