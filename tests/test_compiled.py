"""Compiled code computes what plain code does: layers (`model.compile`) and tiles of logits.

On a CPU dynamo's graphs are run as they are; kernels of a GPU are made from the same graphs, and compared by
the tests marked `gpu`.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rewards import fused_tiles, logit_tiles, token_logps
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.models import compilation
from rlpretrain.models.compilation import compile_layers, is_compiled
from rlpretrain.models.randomness import checkpoint_layers
from rlpretrain.training import builder
from rlpretrain.training.backends import backend_of
from rollout import HFEngine
from rollout.types import Prompt, SamplingParams
from tests.builders.batches import CLOSE, OPEN, random_batch
from tests.builders.flex import Compilations
from tests.builders.runs import merged, trained
from tests.builders.tiny import tiny_model
from tests.builders.trees import laid, model_of, numbers


@pytest.fixture
def backend() -> Iterator[Compilations]:
    """Compilations from nothing, without the checks of shapes that tests/rewards puts around functions."""
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield Compilations()
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def close(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(
                mine[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@pytest.mark.parametrize("name, tree, recomputed", [("qwen3", True, True), ("gemma2", False, False)])
def test_compiled_layers_give_the_same_numbers(name, tree, recomputed, backend):
    plain, model = model_of(name), model_of(name)
    if recomputed:
        checkpoint_layers(model)
    compile_layers(model, backend=backend)
    counted = []
    for seed in (1, 2, 3):
        batch = random_batch(random.Random(seed), documents=3, positions=seed, thoughts=4, target=5)
        close(numbers(model, laid(batch, tree)), numbers(plain, laid(batch, tree)))
        counted.append(len(backend.graphs))
    assert 0 < counted[1] == counted[2], "a second size may be compiled, others are not"


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gpt_neox"])
def test_decoding_and_copies_are_not_compiled(name, backend):
    """The argument of the cache is past_key_values, has no name in GPT-2, and is layer_past in GPT-NeoX."""
    plain, model = tiny_model(name), tiny_model(name)
    compile_layers(model, backend=backend)
    prompts = [Prompt((7, 8, 9, OPEN), (CLOSE,), (CLOSE,))] * 2
    params = SamplingParams(6)
    drawn = [asyncio.run(HFEngine(m).sample(prompts, params, 3, [1, 2])) for m in (plain, model)]
    assert drawn[0] == drawn[1]
    assert not backend.graphs
    assert layers_of(model) and all(is_compiled(layer) for layer in layers_of(model))
    assert not any(is_compiled(layer) for layer in layers_of(copy.deepcopy(model)))


def test_a_run_with_compiled_layers_trains_the_same_weights(values, tmp_path, monkeypatch, backend):
    changes = {"policy__lora": {"r": 2}, "baseline__name": "frozen", "max_steps": 2}
    plain = trained(values, **changes, output_dir=str(tmp_path / "plain"))
    monkeypatch.setattr(builder, "compile_layers", partial(compile_layers, backend=backend))
    model = {"path": values["model"], "compile": True}
    ours = trained(values, **changes, model=model, output_dir=str(tmp_path / "compiled"))
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-5)
    assert backend.graphs


def test_what_cannot_be_compiled_is_refused(values):
    model = {"path": values["model"], "compile": True}
    config = build(merged(values, model=model, policy={"backend": "deepspeed"}))
    with pytest.raises(ConfigError, match=r"model\.compile needs policy\.backend torch"):
        compilation.check(config, backend_of(config.policy))
    automatic = build(merged(values, model=model, policy={"backend": "auto"}))
    compilation.check(automatic, "torch")  # what auto is where DeepSpeed is not installed
    with pytest.raises(ConfigError, match="has no layers of transformers' kind"):
        compile_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("softcap, heat, with_bias", [(None, 1.0, False), (2.0, "rows", True)])
def test_fused_tiles_give_the_numbers_of_plain_ones(softcap, heat, with_bias, monkeypatch, backend):
    """Several sizes of tiles: one compilation for sums and one for gradients."""
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda _: (8, 2048))
    monkeypatch.setattr(
        fused_tiles,
        "compiled",
        lru_cache(
            lambda f, *form: torch.compile(partial(f, *form), dynamic=True, fullgraph=True, backend=backend)
        ),
    )
    generator = torch.Generator().manual_seed(0)
    for rows, vocabulary, chunk in ((21, 50, 12), (10, 33, 7), (40, 31, 31)):
        hidden, weight, bias = (
            torch.randn(size, generator=generator, requires_grad=True)
            for size in ((rows, 6), (vocabulary, 6), (vocabulary,))
        )
        labels = torch.randint(vocabulary, (rows,), generator=generator)
        temperature = torch.linspace(0.5, 2.0, rows) if heat == "rows" else heat
        inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
        results = []
        for fused in (False, True):
            monkeypatch.setattr(fused_tiles, "can_fuse", lambda x, fused=fused: fused)
            form = {"bias": bias if with_bias else None, "softcap": softcap, "scale": 0.5}
            logps = token_logps(hidden, weight, labels, temperature=temperature, chunk_size=chunk, **form)
            results.append((logps, *torch.autograd.grad(logps @ torch.linspace(-1, 2, rows), inputs)))
        for ours, theirs in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(backend.graphs) == 2


def in_a_thread(function: Callable[[], Any]) -> Any:
    """The result of a function in a thread whose settings are torch's, as a GPU's backward pass has."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_many_forms_of_tiles_are_compiled_in_every_thread(monkeypatch, backend):
    """Dtypes, biases, temperatures and single rows are more forms than the eight that torch allows."""
    make = partial(torch.compile, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(fused_tiles, "compiled", lru_cache(lambda f, *form: make(partial(f, *form))))
    forms = itertools.product((torch.float32, torch.bfloat16), (1, 5), (False, True), (1.0, 2.0))

    def run() -> None:
        for dtype, rows, with_bias, temperature in forms:
            hidden, weight = torch.randn(rows, 4).to(dtype).requires_grad_(), torch.randn(9, 4).to(dtype)
            bias, labels = torch.randn(9) if with_bias else None, torch.arange(rows)
            results = []
            for fused in (False, True):
                monkeypatch.setattr(fused_tiles, "can_fuse", lambda x, fused=fused: fused)
                logps = token_logps(hidden, weight, labels, bias=bias, temperature=temperature)
                results.append((logps, *torch.autograd.grad(logps.sum(), hidden)))
            close([dict(enumerate(results[1]))], [dict(enumerate(results[0]))])

    in_a_thread(run)


class Scale(GradientCheckpointingLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_many_forms_of_layers_are_compiled_in_every_thread(backend):
    """Five data types with and without gradient: none of the ten forms is left to run as it is."""
    layer = Scale()
    compile_layers(nn.ModuleList([layer]), backend)

    def run() -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32):
            for is_trained in (True, False):
                with torch.set_grad_enabled(is_trained):
                    layer(torch.ones(2, 3, 4, dtype=dtype))

    in_a_thread(run)
    assert len(backend.graphs) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_of_a_gpu_give_the_numbers_of_a_cpu():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3000, 64, generator=generator), torch.randn(20000, 64, generator=generator)
    labels = torch.randint(20000, (3000,), generator=generator)
    heat, direction = torch.rand(3000, generator=generator) + 0.5, torch.randn(3000, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        made = [x.to(device).requires_grad_() for x in (hidden, weight)]
        logps = token_logps(*made, labels.to(device), temperature=heat.to(device))
        results.append((logps, *torch.autograd.grad(logps @ direction.to(device), made)))
    assert fused_tiles.can_fuse(made[0])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-3)
