"""A model attends by a kernel that computes it, or is refused: against transformers' eager attention
(issue 15.3).
"""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlpretrain.compat import attention_of
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.models import load_model
from rlpretrain.models.kernels import check_kernel, choose_kernel
from rlpretrain.ranks import Ranks
from rlpretrain.scoring import attention
from rlpretrain.scoring.checks import _difference, check_tree
from rlpretrain.scoring.groups import BatchScores
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.scoring.scorer import Scorer, score
from rollout.hf import HFEngine
from rollout.types import Prompt, SamplingParams
from tests.builders.architectures import MORE, SHAPE
from tests.builders.batches import VOCABULARY, logps_of, random_batch
from tests.builders.tiny import ARCHITECTURES, tiny_model

CAP = {"sliding_window": 7, "attn_logit_softcapping": 0.5, "initializer_range": 0.3}
GEMMA = {**SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, **CAP}
CAPPED: dict[str, dict[str, Any]] = {"gemma2": GEMMA, "vaultgemma": GEMMA}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 8, "sliding_window": 7},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7},
    "cohere2": {"sliding_window": 7},
    "olmo3": {"sliding_window": 7},
    "exaone4": {"sliding_window": 7},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 7,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
}
"""Sliding windows, local attention and ALiBi, beside MORE (soft caps are CAPPED, sinks gpt_oss)."""
ALL = {n: f for n, f in ARCHITECTURES.items() if n not in WINDOWS | CAPPED} | MORE | WINDOWS | CAPPED


def written(name: str, folder: Path) -> Path:
    """A checkpoint whose attention is far from uniform, so that what a kernel leaves out shows."""
    config = AutoConfig.for_model(name, **SHAPE | ALL[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in n:
                p.mul_(6)
            if n.endswith("sinks"):
                p.fill_(2.0)
    model.save_pretrained(folder)
    return folder


def eager(folder: Path) -> Any:
    """The same checkpoint as its authors wrote it down."""
    kernel = (
        "sdpa" if AutoConfig.from_pretrained(folder).model_type == "falcon" else "eager"
    )  # whose eager adds ALiBi twice
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=kernel, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("name", ALL)
def test_the_loaded_model_computes_what_eager_does(name, tmp_path):
    """Whatever kernel transformers would give it: scores of ragged padded rows, row by row."""
    folder = written(name, tmp_path)
    model, reference = load_model(ModelConfig(path=str(folder))), eager(folder)
    assert (attention_of(model) == "eager") or name not in CAPPED
    if hasattr(model, "set_attn_implementation"):
        check_kernel(model)
    batch = random_batch(random.Random(0), documents=2, positions=1)
    (micro,) = pack(batch, Layout(10_000, cut="force_close"), count(batch, "force_close"))
    with torch.no_grad():
        found = score(Scorer(model), micro).trunk_logps
        wanted = torch.cat([logps_of(reference, d.token_ids) for d in micro.documents])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", CAPPED)
def test_sdpa_drops_the_soft_cap_and_is_not_taken(name, tmp_path, caplog):
    folder = written(name, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    ids = list(range(3, 40))
    apart = float((logps_of(plain, ids) - logps_of(eager(folder), ids)).detach().abs().max())
    assert apart > 0.05  # transformers' default is another model
    with pytest.raises(ConfigError, match="computes another model than eager"):
        check_kernel(plain)
    with pytest.raises(ConfigError, match="would lose the soft cap on its attention scores.*use eager"):
        load_model(ModelConfig(path=str(folder), attn_implementation="sdpa"))
    with caplog.at_level("WARNING", "rlpretrain.models.loading"):
        model = load_model(ModelConfig(path=str(folder)))
    assert "uses eager attention" in caplog.text
    (thought,) = asyncio.run(HFEngine(model).sample([Prompt(tuple(ids), ())], SamplingParams(8), 1, [0]))[0]
    again = logps_of(eager(folder), [*ids, *thought.token_ids])[-8:]
    torch.testing.assert_close(torch.tensor(thought.behaviour_logps), again.detach(), rtol=0, atol=1e-4)


def test_trees_score_it_as_eager_does(tmp_path):
    folder = written("gemma2", tmp_path)
    model, reference = load_model(ModelConfig(path=str(folder))), eager(folder)
    assert attention.install(model) is None
    batch = random_batch(random.Random(0), documents=2, positions=2)
    (micro,) = pack(batch, Layout(10_000, cut="force_close", tree=True), count(batch, "force_close"))
    with torch.no_grad():
        found = score(Scorer(model), micro).trunk_logps
        wanted = torch.cat([logps_of(reference, d.token_ids) for d in micro.documents])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def policy_of(model: Any) -> Any:
    """What check_tree asks of a policy."""
    return SimpleNamespace(model=model, score=lambda micro: score(Scorer(model), micro))


def test_the_check_of_trees_names_the_side_that_is_wrong(tmp_path):
    """A kernel that leaves a part out is never answered with `packing: padded`, which would train and
    sample another model.
    """
    batch = random_batch(random.Random(0), documents=2, positions=2)
    totals = count(batch, "force_close")
    layout = Layout(10_000, cut="force_close", tree=True)
    (micro,) = pack(batch, layout, totals)
    ranks = Ranks(device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(
        written("gemma2", tmp_path), attn_implementation="sdpa"
    ).eval()
    attention.install(model)
    with pytest.raises(
        ValueError, match="attention sdpa differs from eager.*attn_implementation: eager"
    ) as caught:
        check_tree(policy_of(model), micro, layout, totals, ranks)
    assert "packing: padded" not in str(caught.value) and attention_of(model) == "tree_sdpa"

    class Neighbours(torch.nn.Module):
        """Tokens that meet outside attention: each gets a part of one far before it, where no probe looks."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.cat([torch.zeros_like(x[:, :14]), x[:, :-14]], 1)

    for half, how in ((False, "by up to"), (True, "on average by")):
        mixing = tiny_model("llama", VOCABULARY, seed=1, initializer_range=0.3 if half else 0.02)
        mixing.model.layers[0].mlp = torch.nn.Sequential(Neighbours(), mixing.model.layers[0].mlp)
        assert attention.install(mixing) is None
        with pytest.raises(ValueError, match=f"{how} .*tree packing does not support.*packing: padded"):
            check_tree(policy_of(mixing), micro, layout, totals, ranks, half)
    fine = tiny_model("llama", VOCABULARY, seed=1)
    attention.install(fine)
    assert check_tree(policy_of(fine), micro, layout, totals, ranks) < 1e-4


def test_in_half_precision_a_kind_of_tokens_is_not_hidden_by_the_others():
    """Rounding moves single tokens by more than .3 nats; what is wrong moves most of a kind."""

    def scores(**of_group: torch.Tensor) -> BatchScores:
        zeros = {name: torch.zeros(150) for name in ("thought_logps", "target_logps", "baseline_logps")}
        document = SimpleNamespace(logps=torch.zeros(4000))
        return SimpleNamespace(groups={"g": SimpleNamespace(**zeros | of_group)}, documents={"d": document})

    few, most = torch.zeros(150), torch.full((150,), 0.15)
    few[:5] = 0.7
    assert _difference(scores(thought_logps=few), scores(), half=True) < 0.03
    assert _difference(scores(thought_logps=few), scores(), half=False) == pytest.approx(0.7)
    assert _difference(scores(target_logps=most), scores(), half=True) == pytest.approx(0.15)
    lost = torch.tensor([float("nan")] * 150)
    for half in (True, False):
        assert _difference(scores(target_logps=lost), scores(), half) == math.inf
        assert _difference(scores(target_logps=few[:0]), scores(target_logps=few[:0]), half) == 0


def test_sinks_are_computed(tmp_path):
    """gpt-oss: transformers' sdpa knows no sinks; where that is named, or given by a wrapper, it is
    refused.
    """
    model = load_model(ModelConfig(path=str(written("gpt_oss", tmp_path))))
    assert choose_kernel(model) is None and attention_of(model) == "eager"


def test_a_kernel_that_is_wrong_in_its_own_way_is_found():
    """Not by name: a kernel of a user's that forgets the scale."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    def unscaled(*args: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, scaling=1.0, **kwargs)

    AttentionInterface.register("unscaled", unscaled)
    AttentionMaskInterface.register("unscaled", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model("llama", VOCABULARY, seed=1, initializer_range=0.3)
    assert check_kernel(model) < 1e-5
    model.set_attn_implementation("unscaled")
    with pytest.raises(ConfigError, match="the attention kernel unscaled computes another model than eager"):
        check_kernel(model)
    assert attention_of(model) == "unscaled" and not model.training
