"""Online mixing in a run: the losses of each source, the updates of the shares, and their state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.data.document_source import DocumentSource
from rlpretrain.data.mixing import check_shares, check_state, make_hook, raise_to_floor
from rlpretrain.data.mixture import Mixture
from rlpretrain.objectives import Objective
from rlpretrain.ranks import Ranks


def uses_held_out(config: PretrainConfig) -> bool:
    """Whether shares follow held-out losses; otherwise those of training."""
    mixing = config.data.mixing
    assert mixing is not None
    return mixing.losses == "held_out" or (mixing.losses == "auto" and isinstance(config.eval.data, dict))


def held_out_loss(row: Mapping[str, float], name: str) -> float:
    """The loss of a source in the row of an evaluation: of prompts with answers that of the answers.

    NaN if the row has none, or if some documents have no finite loss: the means leave those out.
    """
    if row.get(f"eval/{name}/not_finite"):
        return math.nan
    return row.get(f"eval/{name}/answer_loss", row.get(f"eval/{name}/no_think_loss", math.nan))


def check_mixing(config: PretrainConfig, owner: type[Objective]) -> None:
    """Check `data.mixing` without a model. Raises ConfigError that names the setting."""
    mixing, sources = config.data.mixing, config.data.sources
    if mixing is None:
        return
    if config.replay is not None:
        raise ConfigError("data.mixing: a replay draws no documents, so it has nothing to mix: leave it out")
    make_hook(config.data)
    if uses_held_out(config):
        files = config.eval.data if isinstance(config.eval.data, dict) else {}
        if missing := [name for name in sources if name not in files]:
            raise ConfigError(
                f"data.mixing follows held-out losses, but eval.data has no file for {', '.join(missing)}: "
                "give {source: file} for every source, or set data.mixing.losses to training"
            )
        if not config.eval.every or mixing.every % config.eval.every:
            raise ConfigError(
                f"data.mixing.every {mixing.every} is not a multiple of eval.every {config.eval.every}, so "
                "its updates would have no new held-out losses"
            )
    elif unread := [name for name, source in sources.items() if not source.next_token]:
        raise ConfigError(
            f"data.mixing follows training losses, but data.sources.{unread[0]} has next_token: false and so "
            "none: give eval.data a file for every source"
        )
    elif unread := [name for name, source in sources.items() if source.is_off]:
        raise ConfigError(
            f"data.mixing follows training losses, but data.sources.{unread[0]} has weight 0 and so never "
            "one, and no share would ever change: give it a weight, or eval.data a file for every source"
        )
    if mixing.every >= (config.max_steps or math.inf):
        raise ConfigError(
            f"data.mixing.every {mixing.every}: a run of {config.max_steps} steps never changes its shares"
        )


def make_mixing(
    config: PretrainConfig, source: DocumentSource | None, total_steps: int
) -> OnlineMixing | None:
    """The online mixing of a run, None where its weights are fixed."""
    if config.data.mixing is None or not isinstance(source, Mixture):
        return None
    return OnlineMixing(config, source, total_steps)


class OnlineMixing:
    """Gives a mixture new weights after every `data.mixing.every` steps.

    All ranks call `observe` with the same rows, whose losses are those of all ranks, and draw by what rank 0
    decides.
    """

    def __init__(self, config: PretrainConfig, mixture: Mixture, total_steps: int):
        assert config.data.mixing is not None
        self.settings, self.mixture, self.total_steps = config.data.mixing, mixture, total_steps
        self.names = sorted(config.data.sources)
        self.hook = make_hook(config.data)
        self.held_out = uses_held_out(config)
        # A resumed run may have another evaluation; the losses in the state belong to this one.
        self.measured = [config.eval.data, config.eval.documents] if self.held_out else None
        # Of each source: the sum and number of its training losses since the last update, and the last mean.
        self.sums = {name: [0.0, 0.0] for name in self.names}
        self.newest: dict[str, float] = {}
        check_state(self.hook, f"data.mixing: '{self.settings.name}'")

    def observe(self, step: int, row: Mapping[str, float], ranks: Ranks) -> str | None:
        """Take the losses of a step; after every `every`-th, set new weights. Returns a line about it."""
        for name in self.names:
            loss = row.get(f"source/{name}/loss", math.nan)
            if math.isfinite(loss):
                self.sums[name][0] += loss
                self.sums[name][1] += 1
        if step % self.settings.every:
            return None
        losses = self._held_out_losses(row) if self.held_out else self._training_losses()
        if missing := [name for name in self.names if name not in losses]:
            return f"step {step}: the shares stay: no finite loss of {', '.join(missing)} is known"
        shares = self._decide(step, losses, ranks)
        self.mixture.replace_weights(shares)
        said = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        return f"step {step}: shares from here on: {said}"

    def state_dict(self) -> dict[str, Any]:
        """What the next updates depend on, as plain values; the mixture keeps the shares."""
        state = getattr(self.hook, "state_dict", dict)()
        return {"sums": self.sums, "newest": self.newest, "hook": state, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ConfigError if its losses were measured in another way."""
        if state["measured"] != self.measured:
            raise ConfigError(
                "data.mixing follows the held-out losses, but eval.data or eval.documents differ from those "
                "of the checkpoint: restore them"
            )
        self.sums, self.newest = state["sums"], state["newest"]
        getattr(self.hook, "load_state_dict", lambda state: None)(state["hook"])

    def _held_out_losses(self, row: Mapping[str, float]) -> dict[str, float]:
        """The finite losses of the evaluation of this step."""
        losses = {name: held_out_loss(row, name) for name in self.names}
        return {name: loss for name, loss in losses.items() if math.isfinite(loss)}

    def _training_losses(self) -> dict[str, float]:
        """The mean of each source since the last update; of one without documents the last that is known."""
        self.newest |= {name: total / steps for name, (total, steps) in self.sums.items() if steps}
        self.sums = {name: [0.0, 0.0] for name in self.names}
        return dict(self.newest)

    def _decide(self, step: int, losses: dict[str, float], ranks: Ranks) -> dict[str, float]:
        """The shares by the hook, none below the floor."""
        where = f"data.mixing: '{self.settings.name}' at step {step}"
        try:
            given = self.hook(step / self.total_steps, dict(losses))  # on every rank, as it may have a state
        except Exception as error:
            error.add_note(f"{where} raised this")
            raise
        check_state(self.hook, where)  # its next values may be of another kind than the first
        shares = check_shares(ranks.gather(given)[0], self.names, where)
        shares = raise_to_floor(shares, self.settings.floor)
        if not any(shares[name] > 0 for name in self.mixture.order.required):
            raise ConfigError(f"{where} left no share for the sources with use: think")
        return shares
