"""Weights that travel as changes: exact, checked by their reader, and never applied to other weights."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.changes import BASE, FOLLOWED, apply_changes, changes_between, once
from rollout.received import Received
from rollout.weights import complete, notes_of, parameters_of, write_weights
from tests.builders.sampling import ask, prompts_of, sample, tokens, weights_of, worst
from tests.builders.tiny import tiny_model

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits_of(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def move_few(model, share: float = 0.02) -> None:
    """Change few of the numbers, as steps of training do in half precision."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (torch.rand_like(parameter) < share) * torch.randn_like(parameter)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(TYPES), st.sampled_from([0.0, 0.01, 0.3, 1.0]))
def test_changes_make_the_new_weights_bit_by_bit(seed, dtype, share):
    generator = torch.Generator().manual_seed(seed)
    before = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in SHAPES.items()}
    after = copied(before)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-30]).to(dtype)
    for tensor in after.values():
        changed = torch.rand(tensor.shape, generator=generator) < share
        picked = special[torch.randint(5, tensor.shape, generator=generator)]
        tensor[changed] = picked[changed]
    changes = changes_between(before, after)
    assert sum(t.nbytes for t in changes.values()) <= sum(t.nbytes for t in after.values())
    assert changes or share < 1
    apply_changes(before, changes)
    assert all(bits_of(before[name]) == bits_of(after[name]) for name in after)


SHAPES = {"matrix": (13, 7), "vector": (50,), "one": (1,), "scalar": ()}


def test_what_did_not_change_does_not_travel_and_what_all_changed_travels_whole():
    before = {"still": torch.ones(8), "few": torch.ones(100), "all": torch.ones(8)}
    after = {"still": torch.ones(8), "few": torch.ones(100), "all": torch.zeros(8)}
    after["few"][[3, 97]] = 2.0
    changes = changes_between(before, after)
    assert set(changes) == {"few@places", "few@values", "all"}
    assert changes["few@places"].tolist() == [3, 97] and changes["few@values"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": torch.ones(4)}, "the weights have no b"),
        ({"a": torch.ones(5)}, r"a is \(5,\), and the weights \(4,\)"),
        ({"a@places": torch.tensor([1])}, "a have not one value for each place"),
        ({"a@values": torch.ones(1)}, "a have not one value for each place"),
        ({"a@places": torch.tensor([1, 2]), "a@values": torch.ones(1)}, "not one value for each place"),
        ({"a@places": torch.tensor([4]), "a@values": torch.ones(1)}, "places that it does not have"),
        ({"a@places": torch.tensor([-1]), "a@values": torch.ones(1)}, "places that it does not have"),
        ({"a@places": torch.tensor([1.0]), "a@values": torch.ones(1)}, "and the weights torch.float32"),
        ({"a@places": torch.tensor([1]), "a@values": torch.ones(1).half()}, "are torch.float16, and"),
    ],
)
def test_changes_that_do_not_fit_are_refused_before_any_is_written(changes, message):
    state = {"first": torch.zeros(4), "a": torch.zeros(4)}
    fits = {"first@places": torch.tensor([0]), "first@values": torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        apply_changes(state, fits | changes)
    assert not any(tensor.any() for tensor in state.values())


def test_a_reader_takes_changes_of_the_weights_it_has_and_of_no_others(tmp_path):
    model = tiny_model("qwen3", 40, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    parameters = parameters_of(tmp_path / "model")
    first = complete(dict(model.state_dict()), parameters)
    whole, few = tmp_path / "whole", tmp_path / "few"
    before = copied(once(first, parameters))
    move_few(model)
    after = complete(dict(model.state_dict()), parameters)
    write_weights(few, changes_between(before, once(after, parameters)), {BASE: "mark of the first"})
    assert notes_of(few)[BASE] == "mark of the first"
    reader = Received(parameters)
    refusal = "changes of weights that this service does not have"
    write_weights(whole, before)
    reader.read(whole, None)  # nothing said that changes would come
    with pytest.raises(ValueError, match=refusal):
        reader.read(few, "mark of the first")
    write_weights(whole, before, {FOLLOWED: "true"})
    reader.read(whole, None)
    with pytest.raises(ValueError, match=refusal):
        reader.read(few, "another mark")
    state = reader.read(few, "mark of the first")
    assert state.keys() == after.keys() and "lm_head.weight" in state
    assert all(torch.equal(state[name], after[name]) for name in after)
    reader.read(few, "mark of the first")  # a second time changes nothing: values, not differences
    assert torch.equal(reader.kept["model.embed_tokens.weight"], after["lm_head.weight"])


# with `rlpretrain serve`

pytest.importorskip("fastapi", reason="needs fastapi: make env LOCK=test-cpu")
from benchmarks.bad_input import TOKEN, VOCABULARY  # noqa: E402
from rollout.probe import Probe  # noqa: E402
from rollout.vllm_server import VLLMServerEngine  # noqa: E402
from tests.builders.serving import Serving  # noqa: E402


def engine_of(services, **settings) -> VLLMServerEngine:
    first = services[0]
    return VLLMServerEngine(
        [service.url for service in services],
        model=first.model,
        weights_dir=first.weights / "run",
        token=TOKEN,
        deadline=30.0,
        patience=0.2,
        transfer="changes",
        **settings,
    )


def folders(engine: VLLMServerEngine) -> set[str]:
    return {path.name for path in engine.weights_dir.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_a_service_samples_from_the_changed_weights(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    if kind == "vllm":
        pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
    service = Serving(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(service.model).eval()
    engine, prompts = engine_of([service]), prompts_of([12, 3, 70])
    try:
        engine.sync(weights_of(model), 0)
        assert folders(engine) == {"version-0"}  # the first time all of them
        whole, seen = engine.timings["perf/weight_sync_mib"], []
        probe = Probe(VOCABULARY, engine.block_size, engine.max_model_len)
        for version in (1, 2, 3):
            move_few(model)
            assert worst(model, prompts, sample(engine, prompts)) > 1e-2
            engine.sync(weights_of(model), version)
            assert worst(model, prompts, sample(engine, prompts)) <= 1e-4
            assert ask(probe, model, engine, version) <= 1e-4
            assert folders(engine) == {f"version-{version}-changes"}
            seen.append(engine.timings["perf/weight_sync_mib"])
        assert all(0 < size < whole / 10 for size in seen)
        engine.sync(weights_of(model), 4)  # after a step that was skipped
        assert engine.timings["perf/weight_sync_mib"] == 0 and ask(probe, model, engine, 4) <= 1e-4
        weights = engine.weights_dir
    finally:
        engine.close()
        service.close()
    assert not list(weights.iterdir())


@pytest.mark.slow
def test_a_service_that_was_restarted_gets_whole_weights_and_then_changes_again(tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first = Serving(tmp_path / "a", "hf")
    second = Serving(tmp_path / "b", "hf", "--weights-dir", str(first.weights))
    model = AutoModelForCausalLM.from_pretrained(first.model).eval()
    engine, prompts = engine_of([first, second]), prompts_of([12, 3, 20, 9])
    try:
        for version in (0, 1):
            engine.sync(weights_of(model), version)
            move_few(model)
        engine.sync(weights_of(model), 2)
        expected = tokens(sample(engine, prompts))
        second.process.kill()
        second.process.wait(10)
        assert tokens(sample(engine, prompts)) == expected  # by the other one
        move_few(model)
        engine.sync(weights_of(model), 3)
        assert folders(engine) == {"version-3-changes"}
        second.process = second.start(second.command)
        end = time.monotonic() + 60
        while not all(server["alive"] for server in engine.health()["servers"]):
            assert time.monotonic() < end, engine.health()
            time.sleep(0.1)
        assert folders(engine) == {"version-3-changes", "version-3"}  # whole ones for it alone
        assert worst(model, prompts, sample(engine, prompts)) <= 1e-4
        move_few(model)
        engine.sync(weights_of(model), 4)
        assert folders(engine) == {"version-4-changes"}
        for service in (first, second):
            alone = engine_of([service], frozen=True)
            assert worst(model, prompts, sample(alone, prompts)) <= 1e-4
            alone.close()
    finally:
        engine.close()
        first.close()
        second.close()


@pytest.mark.slow
def test_weights_are_sent_in_the_precision_of_the_engine(tmp_path):
    """A step of training changes every float32 number, and few of them in bfloat16."""
    from transformers import AutoModelForCausalLM

    service = Serving(tmp_path, "hf", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(service.model).eval()
    engine = engine_of([service], dtype="bfloat16")
    try:
        engine.sync(weights_of(model), 0)
        whole = engine.timings["perf/weight_sync_mib"]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 1e-5 * torch.randn_like(parameter)
        engine.sync(weights_of(model), 1)
        assert 0 < engine.timings["perf/weight_sync_mib"] < whole / 10
        rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        model.to(torch.bfloat16).load_state_dict(rounded)
        prompts = prompts_of([12, 3])
        assert worst(model, prompts, sample(engine, prompts)) <= 0.2
    finally:
        engine.close()
        service.close()
