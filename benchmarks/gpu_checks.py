"""The parts of `benchmarks.gpu` that check FlexAttention: its numbers and its compilations."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from benchmarks.gpu_shapes import Cell, Report, Settings, make_model, measuring, peak_gib, wait_for
from benchmarks.step_inputs import Shape, make_batch


@contextmanager
def using_flex(settings: Settings) -> Iterator[None]:
    """FlexAttention on the device; on a CPU with the check of the device taken out, and without kernels."""
    with ExitStack() as stack:
        if settings.device == "cpu":
            from tests.builders.flex import flex_on_cpu, models_use_flex

            stack.enter_context(flex_on_cpu())
            stack.enter_context(models_use_flex())
        yield


PARITY_MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"kind": "qwen3", "head_dim": 128},
    "gemma2": {
        "kind": "gemma2",
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 96,
        "attn_logit_softcapping": 20.0,
    },
}
"""Grouped heads; windows in every other layer and soft caps."""
LIMIT = 1e-3
"""Largest difference in float32 of log-probs in nats, and of gradients over the largest entry of their
parameter.
"""
ROUNDING = 1.5
"""In bfloat16 it may be this many times that of eager attention on padded rows in bfloat16."""


def measure_parity(settings: Settings, report: Report) -> None:
    """Log-probs and gradients of trees on FlexAttention against padded rows on eager attention in float32."""
    shape = Shape(document=512, positions=4, thoughts=8, thought=64, target=16, vocabulary=512)
    if settings.tiny:
        shape = Shape(document=96, positions=2, thoughts=3, thought=48, target=8, vocabulary=512)
    models = {"gemma2": PARITY_MODELS["gemma2"]} if settings.tiny else PARITY_MODELS
    for name, changes in models.items():
        fields = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        fields |= {"num_attention_heads": 8, "num_key_value_heads": 4, **changes}
        if settings.tiny:
            fields |= {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = make_model(settings, torch.float32, "eager", **fields, initializer_range=0.1)
        exact = _numbers(settings, model, shape, tree=False)
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            cell = Cell(f"{name} {kind}")
            with measuring(cell):
                model.to(dtype)
                with using_flex(settings):
                    flex = _numbers(settings, model, shape, tree=True)
                nats, gradient = _apart(flex, exact)
                eager_nats, eager_gradient = _apart(_numbers(settings, model, shape, tree=False), exact)
                cell.values = {
                    "nats": nats,
                    "gradient": gradient,
                    "eager_nats": eager_nats,
                    "eager_gradient": eager_gradient,
                }
                limits = (max(LIMIT, ROUNDING * eager_nats), max(LIMIT, ROUNDING * eager_gradient))
                if not (nats <= limits[0] and gradient <= limits[1]):
                    raise ValueError(
                        f"FlexAttention differs from eager padded rows by {nats:.2e} nats, {gradient:.2e}; "
                        f"eager padded rows in {kind} by {eager_nats:.2e}, {eager_gradient:.2e}"
                    )
            report(cell)


Numbers = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _numbers(settings: Settings, model: Any, shape: Shape, tree: bool) -> Numbers:
    """(log-probs, gradients) of a loss in which every log-prob has a random weight."""
    from rlpretrain.scoring import attention
    from rlpretrain.scoring.packing import Layout, count, pack
    from rlpretrain.scoring.scorer import Scorer, score
    from rlpretrain.types import Batch, Document

    ids, groups = make_batch(shape, 0)
    batch = Batch(tuple(groups), (Document("d0", ids),))
    (micro,) = pack(batch, Layout(10**9, tree=tree), count(batch))
    assert [group.id for group in micro.groups] == [group.id for group in groups]
    with attention.installed(model) as reason:
        assert reason is None, reason
        scores = score(Scorer(model), micro.to(settings.device))
        parts = (scores.thought_logps, scores.target_logps, scores.trunk_logps)
        logps = torch.cat([part.flatten().float() for part in parts])
        weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
        (logps * weights.to(logps.device)).sum().backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logps.detach().cpu(), gradients


def _apart(ours: Numbers, theirs: Numbers) -> tuple[float, float]:
    """(nats, gradient relative to the largest entry of its parameter)."""
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    relative = (
        float((ours[1][name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-2 * largest)
        for name, gradient in theirs[1].items()
    )
    return float((ours[0] - theirs[0]).abs().max()), max(relative)


def measure_compilation(settings: Settings, report: Report) -> None:
    """Attention of the model's shape over trees of many sizes: compilations, their seconds, the mask's."""
    from torch._dynamo.utils import counters

    from rlpretrain.scoring.attention.flex import flex, mask_of, padded_size
    from rlpretrain.tree import grow

    config, rng = settings.model, random.Random(0)
    width, heads = config["head_dim"], (config["num_attention_heads"], config["num_key_value_heads"])
    sizes = (200, 128, 300) if settings.tiny else (20000, 300, 4096, 8192, 12345, 33000, 65536)

    def attend(tree: Any, gradient: bool) -> float:
        made = [
            torch.randn(
                1, n, tree.size, width, dtype=torch.bfloat16, device=settings.device, requires_grad=gradient
            )
            for n in (heads[0], heads[1], heads[1])
        ]
        wait_for(settings)
        begin = time.perf_counter()
        out = flex(*made, tree, width**-0.5, None, None)
        if gradient:
            out.float().sum().backward()
        wait_for(settings)
        return time.perf_counter() - begin

    device = torch.empty(0, device=settings.device).device  # with its index, as tensors have it
    with using_flex(settings):
        counters.clear()
        for size in sizes:
            cell = Cell(f"{size} tokens")
            with measuring(cell):
                trunk = [rng.randrange(1000) for _ in range(size // 8)]
                branches = [
                    [*trunk[: size // 16], *(rng.randrange(1000) for _ in range(size // 8))] for _ in range(7)
                ]
                tree = grow([trunk, *branches]).tree
                begin = time.perf_counter()
                mask_of(tree, padded_size(tree.size), None, device)
                wait_for(settings)
                peak_gib(settings, reset=True)
                cell.values = {
                    "tokens": tree.size,
                    "mask_s": time.perf_counter() - begin,
                    "first_training_s": attend(tree, True),
                    "first_scoring_s": attend(tree, False),
                    "training_s": attend(tree, True),
                    "scoring_s": attend(tree, False),
                    "compilations": counters["stats"]["unique_graphs"],
                    "memory_gib": peak_gib(settings),
                }
                if cell.values["compilations"] > 2:
                    raise ValueError(
                        f"{cell.values['compilations']} compilations, not 2: with and without gradient"
                    )
            report(cell)
