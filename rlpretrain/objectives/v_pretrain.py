"""V-Pretraining: targets that a small labelled set asks for (arXiv 2601.22108).

A document token x_t is trained on the mixture

    q_t = (1 − α_t) δ(x_t) + α_t p_t,    p_t on the learner's K likeliest tokens and x_t.

Its value is V = g_down · g_pre, the product of the gradients of the feedback's loss and of the pretraining
loss; a step along g_pre lowers the feedback's loss by about η V. V is linear in q, and needs no second
derivative:

    V = (1/M) Σ_t Σ_j q_tj a_tj,
    a_tj = −g_down · ∇ log p_θ(j) = [log p_{θ−εg}(j) − log p_{θ+εg}(j)] / 2ε + O(ε²).

The advice a costs a gradient on the feedback and two forwards with shifted weights, which are copied back.
`designer` says what p is:

- `transformer`, the paper's: a small network gives p and the gate, α_t = α · σ(gate). AdamW raises V.
- `none`: p = softmax over the K of log p_θ + a/τ, which is the largest V at a bounded KL divergence.
- `self`: τ = ∞, distillation from the learner's own K tokens; a control, 57.6 of the paper's 59.0.
- `uniform`: label smoothing on the K; a control.

`direction: random` is the control with a random g_down of the same norm. α = 0 is `ntp`, bit by bit. Over
the whole vocabulary `self` has no gradient, since E_p ∇log p = 0: all of its effect comes from K.

The paper leaves open K, α, the cadence and the burn-in. Our choices too: x_t is always a candidate; `prior`;
the designer learns during the burn-in, when the learner does not follow it; `advice`; no weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlpretrain.config import Amount, ConfigError, Count, DataConfig, PretrainConfig, TextConfig, headed
from rlpretrain.data.document_source import DocumentSource, cursor_of, take_documents
from rlpretrain.objectives.advice import (
    Advice,
    Candidates,
    Mixture,
    answer_weights,
    describe,
    deviation,
    find_candidates,
    mix,
    open_labelled,
    take_advice,
)
from rlpretrain.objectives.base import ReadLikeliest
from rlpretrain.objectives.designer import Designer, take_step
from rlpretrain.objectives.learner import Learner
from rlpretrain.objectives.ntp import NTP
from rlpretrain.types import MicroBatch, SoftTargets

NEEDS_FEEDBACK = ("transformer", "none")


@dataclass(kw_only=True)
class Config:
    """The feedback, the targets, and the designer."""

    feedback: Annotated[TextConfig | None, headed("path")] = None
    """Labelled documents, with the fields of `data`; a loss on the answers alone if `answer_column` is set.
    Required by `designer` transformer and none; with the controls it only adds to the log.
    """
    held_out: Annotated[TextConfig | None, headed("path")] = None
    """Other labelled documents, whose loss is logged beside that of the feedback, and never used."""
    feedback_documents: Count = 16
    """Feedback documents of a gradient, over all ranks. Our choice."""
    designer: Literal["transformer", "none", "self", "uniform"] = "transformer"
    """transformer: the paper's network. none: the advice itself. self: control, the learner's own K tokens.
    uniform: control, label smoothing on the K.
    """
    direction: Literal["feedback", "random"] = "feedback"
    """random: control, a random direction with the norm of the feedback's gradient."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.3
    """α, the part of p in the targets; its largest with a designer, which learns a gate. Our choice."""
    top_k: Count = 16
    """K, the learner's likeliest tokens; its whole vocabulary if that is smaller. Our choice."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """τ of `designer: none`: an advice of τ (deviations) raises a log-prob by one nat. Our choice."""
    advice: Literal["deviation", "gradient"] = "deviation"
    """The unit of a. deviation: its standard deviation over a step's candidates, under the learner's
    probabilities. gradient: none, so it is proportional to ‖g_down‖. Our choice.
    """
    every: Count | None = None
    """Steps from one feedback batch to the next; by default 1 for `designer: none`, else 5. Our choice."""
    burn_in: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the run at whose beginning the loss is the next-token loss. Our choice."""
    shift: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """ε ‖g_down‖ / ‖θ‖, the length of the shift over that of the weights. Errors grow with its square, and
    below 1e-5 or so with float32's rounding (docs/objectives.md). Our choice.
    """
    subset: Annotated[str, Field(pattern=r"^(all|head|last:[1-9]\d*)$")] = "all"
    """Parameters of g_down: all trained ones (under LoRA the adapters), head, or last:n blocks."""
    prior: Literal["learner", "uniform"] = "learner"
    """What the designer's scores are added to: the learner's log-probs, or nothing. Our choice."""
    layers: Count = 6
    """Layers of the designer."""
    width: Count = 256
    """Width of the designer."""
    heads: Count = 4
    """Heads of the designer."""
    designer_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the designer. Our choice."""
    gate_penalty: Amount = 0.0
    """Weight of the mean of σ(gate) in the designer's loss, against a gate that stays open. Our choice."""


class VPretrain(NTP):
    """Continue pretraining on targets that lower the loss on the feedback."""

    Config = Config
    needs = frozenset({"learner"})

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        _check(config)
        self.every = config.every or (1 if config.designer == "none" else 5)
        named = {"feedback": config.feedback, "held_out": config.held_out}
        self.own_data = {name: _texts(given) for name, given in named.items() if given is not None}
        self.sources: dict[str, DocumentSource] = {}
        self.steps = 0
        self.made: list[SoftTargets] = []
        """The soft targets of the step's micro-batches that were not asked for yet."""
        self.optimizer: Any = None

    def check_run(self, run: PretrainConfig) -> None:
        """Refuse a run without the feedback that the targets come from."""
        if self.config.designer in NEEDS_FEEDBACK and self.config.feedback is None:
            raise ConfigError(
                f"objective.feedback: designer {self.config.designer} needs labelled documents: set its "
                "path, and answer_column where only answers count"
            )

    def own_parameters(self, vocabulary: int) -> int:
        """Parameters of the designer."""
        if self.config.designer != "transformer":
            return 0
        with torch.device("meta"):
            return sum(p.numel() for p in self._make_designer(vocabulary).parameters())

    def start(self, learner: Learner) -> None:
        """Open the feedback and make the designer, the same on all ranks."""
        config, ranks = self.config, learner.ranks
        if (number := config.feedback_documents) % ranks.size:
            raise ConfigError(
                f"objective.feedback_documents {number} does not divide over {ranks.size} ranks"
            )
        learner.parameters(config.subset)
        for name, data in self.own_data.items():
            self.sources[name] = open_labelled(learner, f"objective.{name}", data, self.tokenizer)
        if config.designer == "transformer":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(learner.seed)
                self.proxy = self._make_designer(learner.vocabulary)
            self.proxy.to(ranks.device)
            self.optimizer = torch.optim.AdamW(
                self.proxy.parameters(), lr=config.designer_lr, betas=(0.9, 0.95), weight_decay=0.0
            )

    def _make_designer(self, vocabulary: int) -> Designer:
        return Designer(vocabulary, self.config.width, self.config.layers, self.config.heads)

    # a step

    @property
    def is_followed(self) -> bool:
        """Whether the learner of the present batch is trained on q."""
        return self.config.alpha > 0 and self.progress >= self.config.burn_in

    def before_step(self, learner: Learner, micros: Sequence[MicroBatch]) -> Mapping[str, float]:
        """Take the advice and train the designer where they are due, and make the step's targets."""
        step, self.steps, self.made = self.steps, self.steps + 1, []
        is_due = "feedback" in self.sources and step % self.every == 0
        if not is_due and not self.is_followed:
            return {}
        candidates = [find_candidates(learner, micro, self.config.top_k) for micro in micros]
        advice, numbers, asked = None, {}, [None] * len(micros)
        if is_due:
            advice, numbers = self._ask(learner, micros, candidates, step)
        if advice is not None:
            in_deviations = self.config.advice == "deviation"
            unit = deviation(learner, candidates, advice) if in_deviations else 1.0
            asked = [values / (unit or 1.0) for values in advice.values]
            if self.proxy is not None and advice.norm:
                numbers |= self._train_designer(learner, micros, candidates, asked)
        elif self.config.designer == "none":
            return numbers  # no finite gradient: the loss of this step is the next-token loss
        with torch.no_grad():
            mixtures = [self._mix(*parts) for parts in zip(micros, candidates, asked, strict=True)]
            numbers |= describe(learner, mixtures, advice)
        if advice is not None and advice.norm and self.config.subset == "all":
            value = numbers["feedback/value" if self.is_followed else "feedback/value_ntp"]
            numbers["feedback/slope"] = value / advice.norm
        if self.is_followed:
            self.made = [SoftTargets(c.ids, m.q) for c, m in zip(candidates, mixtures, strict=True)]
        return numbers

    def soft_targets(self, micro: MicroBatch, teacher: ReadLikeliest | None) -> SoftTargets | None:
        """The candidates [M, C] with the probabilities q; None where the loss is the next-token loss."""
        return self.made.pop(0) if self.made else None

    def _ask(
        self, learner: Learner, micros: Sequence[MicroBatch], candidates: Sequence[Candidates], step: int
    ) -> tuple[Advice | None, dict[str, float]]:
        """The advice of the next feedback documents, None without a finite gradient; numbers for the log."""
        config, numbers = self.config, {}
        parameters = learner.parameters(config.subset)
        number = config.feedback_documents // learner.ranks.size
        taken = {name: take_documents(source, number, self.progress) for name, source in self.sources.items()}
        gradient = learner.gradient(taken["feedback"], answer_weights, parameters)
        numbers["feedback/loss"] = gradient.loss
        if "held_out" in taken:
            numbers["feedback/held_out_loss"] = learner.loss(taken["held_out"], answer_weights)
        generator = None
        if config.direction == "random":
            generator = torch.Generator().manual_seed(1_000_003 * learner.seed + step)
        advice, more = take_advice(learner, micros, candidates, gradient, parameters, config.shift, generator)
        return advice, numbers | more

    def _mix(self, micro: MicroBatch, found: Candidates, asked: Tensor | None) -> Mixture:
        """The targets of a micro-batch; `asked` [M, C] is the advice in its unit, for `designer: none`."""
        scores, gate = found.logps, found.logps.new_ones(len(found.ids))
        if self.proxy is not None:
            documents = [document.token_ids for document in micro.documents]
            scores, logits = self.proxy(documents, found.ids.clamp(min=0))
            gate = logits.sigmoid()
            if self.config.prior == "learner":
                scores = found.logps + scores
        elif self.config.designer == "uniform":
            scores = torch.zeros_like(scores)
        elif self.config.designer == "none":
            assert asked is not None, "it is taken in every step"
            scores = scores + asked / self.config.tau
        return mix(found.softmax(scores), self.config.alpha * gate, gate)

    def _train_designer(
        self,
        learner: Learner,
        micros: Sequence[MicroBatch],
        candidates: Sequence[Candidates],
        asked: Sequence[Tensor],
    ) -> dict[str, float]:
        """One step of the designer on −Σ q a / M, plus the penalty of the gate."""
        (tokens,) = learner.ranks.sum([float(sum(len(found.ids) for found in candidates))])
        with torch.enable_grad():
            for micro, found, values in zip(micros, candidates, asked, strict=True):
                mixture = self._mix(micro, found, None)
                loss = self.config.gate_penalty * mixture.gate.sum() - (mixture.q * values).sum()
                (loss / max(tokens, 1)).backward()
        return {"designer/gradient_norm": take_step(self.proxy, self.optimizer, learner)}

    # the checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The cursors of this rank, the designer and its optimizer."""
        state: dict[str, Any] = {"steps": self.steps}
        state["sources"] = {name: cursor_of(source) for name, source in self.sources.items()}
        if self.proxy is not None:
            state |= {"designer": self.proxy.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self.steps = state["steps"]
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        if self.proxy is not None:
            self.proxy.load_state_dict(state["designer"])
            self.optimizer.load_state_dict(state["optimizer"])


def _texts(given: TextConfig) -> DataConfig:
    """The section as a source of documents takes it."""
    return DataConfig(**{field.name: getattr(given, field.name) for field in fields(TextConfig)})


def _check(config: Config) -> None:
    """Raise ConfigError for settings that do not fit each other."""
    if config.designer == "none" and config.every not in (None, 1):
        raise ConfigError(
            f"objective.every {config.every}: designer none needs the advice about the tokens of each step; "
            "leave it out, or set 1"
        )
    if config.designer not in NEEDS_FEEDBACK and config.direction == "random":
        raise ConfigError(f"objective.direction random changes nothing with designer {config.designer}")
    if config.held_out is not None and config.feedback is None:
        raise ConfigError("objective.held_out is logged beside objective.feedback, which is not set")
    if config.width % (2 * config.heads):
        raise ConfigError(
            f"objective.width {config.width}: no multiple of twice objective.heads {config.heads}"
        )


OBJECTIVE = VPretrain
