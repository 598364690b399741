"""The next-token loss in TRL's trainers: equal to that of whole logits, which it never holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from rlpretrain.corpora import dial
from rlpretrain.trl.next_token import add_next_token_logps, next_token_loss
from tests.builders.architectures import SHAPE
from tests.builders.next_token import DOCUMENTS, TIMES, gradients, loss_of_logits
from tests.builders.processes import alone, ranks
from tests.builders.tiny import tiny_model
from tests.builders.trl import AFTER, settings

trl = pytest.importorskip("trl")
from rlpretrain.trl import RLPConfig, RLPTrainer  # noqa: E402

CPU = torch.device("cpu")
VOCABULARY = 64


def made(name: str) -> Any:
    """A tiny model with logits large enough for a cap or a scale to show."""
    if name in ("cohere2", "granite"):
        scale = {"logit_scale": 0.25} if name == "cohere2" else {"logits_scaling": 8.0}
        config = AutoConfig.for_model(name, **SHAPE | {"vocab_size": VOCABULARY, **scale})
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cap = {"final_logit_softcapping": 2.0} if name == "gemma2" else {}
    return tiny_model(name, VOCABULARY, initializer_range=0.2, **cap)


def check_equal(model: torch.nn.Module, called: Any = None) -> None:
    """Loss and gradients of `called`, which wraps `model`, against those of the model's own logits."""
    expected = loss_of_logits(model)
    expected_gradients = gradients(model, expected)
    loss = next_token_loss(called if called is not None else model, DOCUMENTS, TIMES, CPU)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found = gradients(model, loss)
    assert found.keys() == expected_gradients.keys() and found
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert float((found[name] - gradient).abs().max() / scale) < 1e-5, name


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "cohere2", "granite"])
def test_loss_and_gradients_are_those_of_whole_logits(name, checkpointed):
    """Tied and untied heads, Gemma's soft cap, Cohere's and Granite's scales, gradient checkpointing."""
    model = made(name)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_next_token_logps(model.train())
    check_equal(model)


def test_the_forward_is_otherwise_the_models_own():
    model = tiny_model("qwen3", VOCABULARY)
    ids = torch.tensor([DOCUMENTS[0]])
    before = model(input_ids=ids).logits
    generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    add_next_token_logps(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("new_tokens", [None, [3, 4]])
def test_adapters(new_tokens):
    """Only the adapters get a gradient; rows of the table that PEFT trains are part of the head."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=new_tokens
    )
    model = peft.get_peft_model(tiny_model("qwen3", VOCABULARY, initializer_range=0.2), lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    add_next_token_logps(model)
    check_equal(model)


@contextmanager
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    mine = not dist.is_initialized()  # DeepSpeed's, of a test before this one
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()


def test_under_ddp():
    with process_group():
        model = tiny_model("qwen3", VOCABULARY, initializer_range=0.2)
        add_next_token_logps(model)
        check_equal(model, DistributedDataParallel(model))


def test_under_fsdp():
    """The head is a DTensor outside the wrapped forward, and whole inside it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    with process_group():
        model = tiny_model("llama", VOCABULARY, initializer_range=0.2)
        expected = loss_of_logits(model)
        expected_gradients = gradients(model, expected)
        add_next_token_logps(model)
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.lm_head.weight, DTensor)
        loss = next_token_loss(model, DOCUMENTS, TIMES, CPU)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        loss.backward()
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad.full_tensor(), expected_gradients[name], atol=1e-4), name


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *sizes])
        return out


def test_no_tensor_of_tokens_by_vocabulary(corpus, tmp_path, monkeypatch):
    """The trainer's next-token loss and its backward, with a vocabulary larger than a tile of the head."""
    vocabulary, documents, times = 6000, [tuple(range(3, 203)), tuple(range(3, 103))], [2, 1]
    tokens = sum(len(document) - 1 for document in documents)
    model = tiny_model("qwen3", vocabulary)
    with Largest() as whole:
        expected = loss_of_logits(model, documents, times)
        expected_gradients = gradients(model, expected)
    assert whole.entries >= tokens * vocabulary
    trainer = RLPTrainer(
        model,
        args=settings(tmp_path, RLPConfig, ntp_coef=0.5, **AFTER),
        train_dataset=Dataset.from_json(str(corpus / "train.jsonl")),
        processing_class=dial.tokenizer(),
    )
    trainer.model.eval()
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda *_: torch.zeros(()))
    predicted = torch.tensor(
        sum(n * (len(document) - 1) for n, document in zip(times, documents, strict=True))
    )
    inputs = {"documents": [documents[0], *documents], "num_document_tokens": predicted}
    with Largest() as chunked:
        found = gradients(model, trainer._compute_loss(trainer.model, inputs) * float(predicted) / 0.5)
    assert chunked.entries < tokens * vocabulary / 2
    assert trainer._metrics["eval"]["ntp/loss"] == [
        pytest.approx(float(expected.detach() / predicted), rel=1e-6)
    ]
    assert max(float((found[n] - g).abs().max()) for n, g in expected_gradients.items()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapters"), [("llama", False), ("gemma2", True)])
def test_under_zero3(name, adapters):
    """Weights are partitioned, the head's too: loss and gradients are those of the whole model."""
    words = ["-m", "tests.scripts.trl_next_token_zero3", name, "adapters" if adapters else "weights"]
    environment = alone() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = ranks(1, *words, environment=environment)
    assert done.returncode == 0, done.stderr[-6000:]
