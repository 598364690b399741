"""The transformers engine: right for every kind of cache, and the same thoughts whatever shares the batch."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from rollout import FinishReason, HFEngine, Prompt, SamplingParams
from rollout.rows import sampling_mode
from tests.builders.sampling import VOCABULARY, logps_of, prompts_of, sample, tokens
from tests.builders.tiny import bpe_tokenizer, tiny_model, word_tokenizer

WINDOW = {"sliding_window": 5}  # shorter than most contexts below
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "padded"),
    "qwen3": ({}, "padded"),
    "gpt2": ({}, "padded"),
    "gpt_neox": ({}, "padded"),
    "mistral": (WINDOW, "padded"),
    "gemma2": (WINDOW, "padded"),
    "mamba": ({}, "equal_length"),
}


class Table(PreTrainedModel):
    """A model that is a table of logits given the last token, in code that transformers does not know."""

    config_class = PreTrainedConfig

    def __init__(self, table: Tensor) -> None:
        config = PreTrainedConfig()
        config.vocab_size = len(table)
        super().__init__(config)
        self.table = nn.Parameter(table)
        self.post_init()

    def forward(self, input_ids: Tensor, **ignored: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table[input_ids])  # type: ignore[arg-type]


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    return tiny_model(family, VOCABULARY, **({"initializer_range": 0.3} | FAMILIES[family][0] | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_behaviour_logps_equal_a_full_forward(family: str) -> None:
    model, prompts = model_of(family), prompts_of([12, 1, 7, 7, 16])
    engine = HFEngine(model)
    groups = sample(engine, prompts)
    assert engine.health()["path"] == FAMILIES[family][1]
    assert {len(thought.token_ids) for group in groups for thought in group} != {
        9
    }  # some ended before the others
    for prompt, group in zip(prompts, groups, strict=True):
        for thought in group:
            expected = logps_of(model, prompt.token_ids, thought.token_ids)
            torch.testing.assert_close(torch.tensor(thought.behaviour_logps), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_do_not_depend_on_what_shares_the_batch(family: str) -> None:
    model, prompts = model_of(family), prompts_of([12, 3, 7, 7, 16])
    together = tokens(sample(HFEngine(model), prompts, seeds=[5, 6, 7, 8, 9]))
    assert len({thought for group in together for thought in group}) > 10
    alone = [
        tokens(sample(HFEngine(model), [p], seeds=[s]))[0] for p, s in zip(prompts, range(5, 10), strict=True)
    ]
    assert alone == together
    assert tokens(sample(HFEngine(model, batch_size=2), prompts, seeds=[5, 6, 7, 8, 9])) == together
    assert tokens(sample(HFEngine(model), prompts[::-1], seeds=[9, 8, 7, 6, 5])) == together[::-1]


def test_the_number_of_thoughts_does_not_change_them() -> None:
    engine, prompts = HFEngine(model_of("qwen3")), prompts_of([4, 9])
    most = sample(engine, prompts, n=6)
    for n in (1, 2, 5):
        assert tokens(sample(engine, prompts, n=n)) == [group[:n] for group in tokens(most)]
    replayed = sample(engine, prompts[1:], n=1, seeds=[most[1][4].seed])
    assert replayed[0][0].token_ids == most[1][4].token_ids and replayed[0][0].seed == most[1][4].seed


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mistral", "mamba"])
def test_dropping_rows_changes_nothing(family: str) -> None:
    engine, lengths = HFEngine(model_of(family)), [6, 11, 6]
    stops = tuple(range(0, VOCABULARY, 4))
    ended = sample(engine, prompts_of(lengths, stop_ids=stops), n=8)
    for group, endless in zip(ended, sample(engine, prompts_of(lengths, stop_ids=()), n=8), strict=True):
        for thought, whole in zip(group, endless, strict=True):
            length = next((t + 1 for t, token in enumerate(whole.token_ids) if token in stops), 9)
            assert thought.token_ids == whole.token_ids[:length]
            torch.testing.assert_close(
                thought.behaviour_logps, whole.behaviour_logps[:length], atol=1e-5, rtol=0
            )


def test_each_context_is_read_once_and_ended_rows_leave() -> None:
    model = model_of("qwen3")
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    engine, prompts = HFEngine(model), prompts_of([6, 6, 8], stop_ids=tuple(range(0, VOCABULARY, 4)))
    sample(engine, prompts, n=8)
    shapes.clear()
    sample(engine, prompts, n=8)
    rows = [shape[0] for shape in shapes[1:]]
    assert shapes[0] == (3, 8) and rows[0] <= 24 and rows == sorted(rows, reverse=True) and rows[-1] <= 6


class Forgetful(Qwen3ForCausalLM):
    """Its cache can be forked, but the model reads nothing of it."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is None:
            return super().forward(*args, **kwargs)
        out = super().forward(*args, **kwargs | {"use_cache": False, "attention_mask": None})
        out.past_key_values = past_key_values
        return out


def test_a_cache_that_changes_the_model_is_not_used() -> None:
    torch.manual_seed(0)
    model = Forgetful(model_of("qwen3").config).eval()
    engine = HFEngine(model)
    (group,) = sample(engine, prompts_of([7]), SamplingParams(max_thought_tokens=4), n=2)
    assert engine.health()["path"] == "recompute"
    for thought in group:
        ids = torch.tensor([[*prompts_of([7])[0].token_ids, *thought.token_ids]])
        new = len(thought.token_ids)
        logps = model(input_ids=ids).logits[0, -new - 1 : -1].log_softmax(-1)
        own = logps.gather(-1, ids[0, -new:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(thought.behaviour_logps), own.detach(), rtol=0, atol=1e-5)


def test_frequencies_of_thoughts_follow_the_model() -> None:
    table = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.0, 0.6, 0.4]]).log()
    engine = HFEngine(Table(table), batch_size=1000)
    [group] = sample(engine, [Prompt((0,), stop_ids=())], SamplingParams(max_thought_tokens=2), n=4000)
    assert engine.health()["path"] == "recompute"
    counts = torch.zeros(3, 3)
    for thought in group:
        counts[thought.token_ids] += 1
        first, second = thought.token_ids
        expected = (table[0, first].item(), table[first, second].item())
        assert thought.behaviour_logps == pytest.approx(expected, abs=1e-6)
    joint = 4000 * table[0].exp()[:, None] * table.exp()
    assert counts[2, 0] == 0
    assert ((counts - joint) ** 2 / joint)[joint > 0].sum() < 27  # 7 degrees of freedom: p < 0.001


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "mamba"])
def test_greedy_is_the_argmax(family: str) -> None:
    model, prompts = model_of(family), prompts_of([5, 9], stop_ids=())
    groups = sample(
        HFEngine(model), prompts, SamplingParams(max_thought_tokens=6, temperature=0.0, top_k=1), n=2
    )
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt.token_ids])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        expected = tuple(ids[0, len(prompt.token_ids) :].tolist())
        assert [thought.token_ids for thought in group] == [expected, expected]
        logps = torch.tensor(group[0].behaviour_logps)
        torch.testing.assert_close(logps, logps_of(model, prompt.token_ids, expected), atol=1e-5, rtol=0)


def chain(size: int) -> HFEngine:
    """An engine that counts: after token i comes i + 1, always."""
    table = torch.full((size, size), -torch.inf)
    table[torch.arange(size), (torch.arange(size) + 1) % size] = 0.0
    return HFEngine(Table(table), tokenizer=word_tokenizer(f"w{i}" for i in range(size - 3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_thought_beside_the_sampled_ones(family: str) -> None:
    """The sampled ones are those of a call without it; it is that of temperature 0."""
    model, prompts = model_of(family), prompts_of([12, 1, 7, 7, 16])
    params, seeds = SamplingParams(9, eos_ids=(3,), top_k=20), list(range(5))
    engine = HFEngine(model)
    both = asyncio.run(engine.sample(prompts, params, 3, seeds, greedy=True))
    alone = asyncio.run(engine.sample(prompts, params, 3, seeds))
    greedy = asyncio.run(engine.sample(prompts, replace(params, temperature=0.0), 1, seeds))
    assert [[t.token_ids for t in group[:3]] for group in both] == [
        [t.token_ids for t in group] for group in alone
    ]
    for group, (expected,) in zip(both, greedy, strict=True):
        assert group[3].token_ids == expected.token_ids and group[3].finish_reason is expected.finish_reason
        torch.testing.assert_close(group[3].behaviour_logps, expected.behaviour_logps, atol=1e-4, rtol=0)
    assert engine.health()["thoughts"] == 5 * 4 + 5 * 3 + 5


def test_how_thoughts_end() -> None:
    params = SamplingParams(max_thought_tokens=5, eos_ids=(7, 9))
    stops = {"close": (6,), "eos": (), "both": (7,), "length": (), "exact": (15,)}
    starts = {"close": 3, "eos": 4, "both": 4, "length": 10, "exact": 10}
    prompts = [Prompt((starts[name],), stop_ids=stops[name]) for name in stops]
    got = [group[0] for group in sample(chain(20), prompts, params, n=1)]
    to_the_end = (11, 12, 13, 14, 15)
    assert [t.token_ids for t in got] == [(4, 5, 6), (5, 6, 7), (5, 6, 7), to_the_end, to_the_end]
    assert [str(thought.finish_reason) for thought in got] == ["close", "eos", "close", "length", "close"]


def test_stop_strings_end_a_thought_where_their_text_is_complete() -> None:
    engine = chain(30)  # id i is the word w(i - 3)
    strings = {"w7 w8": (), "never": (), "w9": (9,)}
    prompts = [Prompt((5,), stops, stop_strings=(string, "not this")) for string, stops in strings.items()]
    groups = sample(engine, prompts, SamplingParams(max_thought_tokens=8), n=2)
    assert tokens(groups) == [[tuple(range(6, 12))] * 2, [tuple(range(6, 14))] * 2, [(6, 7, 8, 9)] * 2]
    assert [group[0].finish_reason.value for group in groups] == ["close", "length", "close"]
    last = sample(
        engine, [Prompt((5,), (), stop_strings=("w6",))], SamplingParams(max_thought_tokens=4), n=1
    )[0][0]
    assert (last.token_ids, last.finish_reason) == ((6, 7, 8, 9), FinishReason.CLOSE)


def test_stop_strings_across_byte_tokens() -> None:
    tokenizer = bpe_tokenizer(["a b"], vocab_size=258)  # bytes only, each of them once
    ids = tokenizer.encode("so: é</T>z")
    table = torch.full((len(tokenizer),) * 2, -torch.inf)
    for a, b in zip(ids, ids[1:], strict=False):
        table[a, b] = 0.0
    engine = HFEngine(Table(table), tokenizer=tokenizer)
    prompt = Prompt(tuple(ids[:3]), (), stop_strings=("é</T>",))
    [[thought]] = sample(engine, [prompt], SamplingParams(max_thought_tokens=12), n=1)
    assert tokenizer.decode(thought.token_ids) == " é</T>" and thought.finish_reason == FinishReason.CLOSE


def test_the_trainers_module_is_left_as_it_was() -> None:
    model = model_of("llama", attention_dropout=0.5)
    prompts = prompts_of([5, 8])
    expected = tokens(sample(HFEngine(model), prompts))
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert (
        tokens(sample(HFEngine(model), prompts)) == expected
    )  # no dropout, and checkpointing left the cache alone
    assert modes == {name: module.training for name, module in model.named_modules()}
    model(
        input_ids=torch.tensor([prompts[0].token_ids]), labels=torch.tensor([prompts[0].token_ids])
    ).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_a_model_rebuilds_while_sampling_can_be_trained_with() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope |= {"original_max_position_embeddings": 8, "factor": 4.0}
    model = model_of("llama", rope_parameters=rope)
    sample(HFEngine(model), prompts_of([12]))
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    ids = torch.tensor([prompts_of([12])[0].token_ids])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.to(torch.float64)  # moves every buffer in place


@pytest.mark.parametrize("cudnn", [True, False])
def test_sampling_takes_cudnn_alone_from_the_kernels_that_the_caller_allows(cudnn: bool) -> None:
    """cuDNN plans for each length; a caller that allows one kernel alone keeps to it."""

    def allowed() -> tuple[bool, ...]:
        return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    kernels = [SDPBackend.MATH, *([SDPBackend.CUDNN_ATTENTION] if cudnn else [])]
    with sdpa_kernel(kernels):
        with pytest.raises(KeyError), sampling_mode(model_of("qwen3")):
            assert allowed() == (False, False)
            raise KeyError
        assert allowed() == (cudnn, False)


def test_sync_copies_weights_and_stamps_the_version() -> None:
    own, other = model_of("qwen3"), model_of("qwen3", seed=1)
    prompts, engine = prompts_of([5]), HFEngine(own, shares_weights=False)
    assert {thought.policy_version for thought in sample(engine, prompts)[0]} == {0}
    engine.sync(lambda: other.named_parameters(remove_duplicate=False), version=4)
    assert sample(engine, prompts) == sample(HFEngine(other, version=4), prompts)
    tied_once = [(n, p) for n, p in own.named_parameters(remove_duplicate=False) if n != "lm_head.weight"]
    engine.sync(lambda: tied_once, version=5)
    assert engine.health()["version"] == 5
    shared = HFEngine(own)
    shared.sync(lambda: pytest.fail("shared weights need no source"), version=6)
    assert sample(shared, prompts)[0][0].policy_version == 6


def test_sync_names_what_does_not_fit() -> None:
    engine = HFEngine(model_of("qwen3"), shares_weights=False)
    weights = dict(model_of("qwen3").named_parameters())
    odd = {
        "other.weight" if name == "model.norm.weight" else name: tensor for name, tensor in weights.items()
    }
    with pytest.raises(ValueError, match=r"unknown: other\.weight; missing: model\.norm\.weight"):
        engine.sync(lambda: odd.items(), version=1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: got shape \(3,\), the engine has \(32,\)"):
        engine.sync(lambda: [("model.norm.weight", torch.zeros(3))], version=1)
    assert engine.version == 0


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        (Prompt((), ()), {}, "prompt 0 is empty"),
        (Prompt((1, 40), ()), {}, "prompt 0: id 40 is outside the model's vocabulary of 40"),
        (Prompt((1, -1), ()), {}, "prompt 0: id -1"),
        (Prompt((1,), (99,)), {}, "stop id 99"),
        (Prompt((1,) * 250, ()), {}, "250 tokens, and with 9 of thought.* 256 positions"),
        (Prompt((1,), (), stop_strings=("a",)), {}, "needs a tokenizer"),
        (Prompt((1,), ()), {"n": 0}, "n must be at least 1"),
        (Prompt((1,), ()), {"seeds": [1, 2]}, "1 prompts and 2 seeds"),
    ],
)
def test_what_cannot_be_sampled_is_refused(prompt: Prompt, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(HFEngine(model_of("gpt2")), [prompt], **changes)


def test_nan_weights_are_said() -> None:
    model = model_of("qwen3")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN or infinite .*version 0"):
        sample(HFEngine(model), prompts_of([5]))


def test_health_counts_and_closing() -> None:
    engine = HFEngine(model_of("qwen3"))
    assert sample(engine, []) == [] and engine.health()["path"] is None
    groups = sample(engine, prompts_of([5, 6]), n=4)
    health = engine.health()
    assert (health["kind"], health["device"], health["prompts"], health["thoughts"]) == ("hf", "cpu", 2, 8)
    assert health["tokens"] == sum(len(thought.token_ids) for group in groups for thought in group)
    engine.close()
    engine.close()
    assert engine.health()["closed"]
    with pytest.raises(RuntimeError, match="closed"):
        sample(engine, prompts_of([5]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_thoughts_are_the_same_on_an_accelerator(family: str) -> None:
    prompts = prompts_of([12, 3, 7, 7])
    expected = tokens(sample(HFEngine(model_of(family)), prompts))
    assert tokens(sample(HFEngine(model_of(family).cuda()), prompts)) == expected


def test_banned_ids_are_never_sampled() -> None:
    """Ids that would be: among them a likely one, and that of the greedy choice."""
    engine, prompts = HFEngine(model_of("qwen3")), prompts_of([5, 9], stop_ids=())
    greedy = SamplingParams(max_thought_tokens=6, temperature=0.0)
    for params in (SamplingParams(max_thought_tokens=6), greedy):
        free = {i for group in sample(engine, prompts, params, n=20) for t in group for i in t.token_ids}
        banned = tuple(sorted(free)[::2])
        groups = sample(engine, prompts, replace(params, banned_ids=banned), n=20)
        assert free & set(banned) and not any(set(t.token_ids) & set(banned) for g in groups for t in g)
    with pytest.raises(ValueError, match="banned id 40 is outside the model's vocabulary of 40"):
        sample(engine, prompts, replace(greedy, banned_ids=(40,)))
    with pytest.raises(ValueError, match="all 40 ids of the vocabulary are banned"):
        sample(engine, prompts, replace(greedy, banned_ids=tuple(range(40))))
