"""One set of weights: frozen is the trained model with its adapters off; DoRA, trained delimiters, rounded
weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rlpretrain.compat import keep_differentiable
from rlpretrain.config import ConfigError, LoraConfig
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.models import load_model
from rlpretrain.models.adapters import add_lora, copy_adapter, off, pieces
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.scoring.references import Frozen
from rlpretrain.scoring.scorer import NoGradScorer, Scorer
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import Batch
from tests.builders.engines import SHAPE, rows_of
from tests.builders.policies import SHARDED
from tests.builders.runs import launch, merged, one_step, same, trained, weights
from tests.builders.tiny import tiny_model, word_tokenizer

peft = pytest.importorskip("peft", reason="needs PEFT: make env LOCK=test-cpu")
LORA = {"r": 4, "alpha": 16, "target_modules": ("q_proj", "v_proj", "down_proj")}
IDS = torch.arange(3, 20)[None]
TAGS = [18, 19]


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters that do something."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2) if "magnitude" not in name else p.mul_(1.3)
    return model


def adapted(family: str, new_tokens=(), **settings) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with adapters that do something, and the one it was."""
    plain = tiny_model(family, 40, initializer_range=0.3)
    torch.manual_seed(1)
    return stirred(add_lora(copy.deepcopy(plain), LoraConfig(r=4, **settings), new_tokens)), plain


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"new_tokens": TAGS}, {"use_dora": True, "new_tokens": TAGS}],
    ids=str,
)
def test_merged_is_what_is_computed_and_off_is_what_was_there(family, settings):
    if family == "qwen3_moe" and "use_dora" in settings:  # its experts are one parameter
        with pytest.raises(ConfigError, match="does not work with use_dora"):
            adapted(family, **settings)
        return
    model, plain = adapted(family, **settings)
    before = plain(IDS).logits
    now = model(IDS).logits
    assert (now - before).abs().max() > 0.1
    with off(model):
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
        ours, theirs = (Scorer(m).hidden(IDS, torch.ones_like(IDS)) for m in (model, plain))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model(IDS).logits, now)
    found = {piece.name: piece.make() for piece in pieces(model)}
    assert found.keys() == dict(plain.named_parameters(remove_duplicate=False)).keys()
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(IDS).logits, now, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_head_that_scores_has_the_trained_rows(family):
    model, _ = adapted(family, TAGS)
    rows, labels = torch.arange(IDS.shape[1] - 1), IDS[0, 1:]
    gold = model(IDS).logits[0, :-1].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    ours, _ = Scorer(model)(IDS, torch.ones_like(IDS), None, rows, labels)
    torch.testing.assert_close(ours, gold, atol=1e-5, rtol=1e-5)
    ours.sum().backward()
    trained_rows = [p for n, p in model.named_parameters() if "trainable_tokens" in n]
    assert trained_rows and all(p.grad.abs().sum() > 0 for p in trained_rows)
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith("base_layer.weight"))


def test_off_between_forward_and_backward_changes_no_gradient():
    gradients = []
    for look in (False, True):
        model, _ = adapted("qwen3", TAGS, use_dora=True)
        loss = model(IDS).logits.square().mean()
        if look:
            NoGradScorer(model, adapters_off=True)(
                IDS, torch.ones_like(IDS), None, torch.arange(4), IDS[0, 1:5]
            )
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert same(*gradients)


def test_adapters_copied_to_another_base():
    model, plain = adapted("qwen3", TAGS, use_dora=True)
    from rlpretrain.models.adapters import adapter_pieces

    twin = add_lora(copy.deepcopy(plain), LoraConfig(r=4, use_dora=True), TAGS)
    copy_adapter(twin, {p.name: p.make() for p in adapter_pieces(model)})
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_off_leaves_adapters_off_that_were_off():
    model = stirred(peft.get_peft_model(tiny_model("qwen3", 40, initializer_range=0.3), peft.LoraConfig(r=4)))
    with model.disable_adapter():
        before = model(IDS).logits
        with off(model):
            pass
        assert torch.equal(model(IDS).logits, before)
    assert (model(IDS).logits - before).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"use_dora": True}], ids=str
)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_merged_weights_of_somebody_elses_adapters(family, settings):
    """A PEFT model as TRL's users have it: another name than ours, an adapter that is not in use, whole
    modules saved.
    """
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(tiny_model(family, 40, initializer_range=0.3), lora, adapter_name="policy")
    model.add_adapter("default", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    stirred(model)
    found = {piece.name: piece.make() for piece in pieces(model.get_base_model())}
    plain = tiny_model(family, 40)
    if (
        family == "qwen3" and "modules_to_save" in settings
    ):  # PEFT trains a copy of either: they are tied no more
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (peft.LoraConfig(lora_bias=True, target_modules=["q_proj"]), "lora_bias cannot be merged"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "not LoRA"),
        (
            peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            "which the checkpoint ties",
        ),
    ],
    ids=["bias", "IA3", "tied"],
)
def test_adapters_that_no_checkpoint_can_hold(settings, said):
    model = peft.get_peft_model(tiny_model("qwen2", 40, attention_bias=True), settings)
    with pytest.raises(ConfigError, match=said):
        list(pieces(model.get_base_model()))


def test_a_mixture_of_experts_is_saved_with_its_adapters(values, tmp_path):
    tiny_model("qwen3_moe", len(dial.WORDS), initializer_range=0.3).save_pretrained(tmp_path / "base")
    dial.tokenizer().save_pretrained(tmp_path / "base")
    after = trained(
        merged(
            values,
            model=str(tmp_path / "base"),
            policy={"backend": "torch", "lora": {"r": 4}},
            optim__lr=3e-2,
        )
    )
    assert any("experts" in name for name in after) and not any("base_layer" in name for name in after)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = base(IDS).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    ours, found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (ours(IDS).logits - before).abs().max() > 1e-2


def test_a_start_has_the_buffers_of_the_checkpoint(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from rlpretrain.models import save_start

    config = DeepseekV3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    model = DeepseekV3ForCausalLM(config)
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    assert biases
    for b in biases:
        b.fill_(0.7)
    save_start(model, word_tokenizer(["a"]), tmp_path / "start")
    found = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "start")
    assert all((b == 0.7).all() for n, b in found.named_buffers() if n.endswith("e_score_correction_bias"))


# in a run


def storages(*modules) -> int:
    """Bytes of all parameters, shared ones once."""
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()
    }
    return sum(held.values())


@pytest.mark.parametrize(
    "policy", [{"backend": "torch"}, *({"backend": "deepspeed", "zero_stage": s} for s in (0, 2, 3))], ids=str
)
def test_a_frozen_baseline_is_the_trained_model_without_its_adapters(values, corpus, policy):
    """Gains of several steps are those against a copy made before training, and there is no copy."""
    base = AutoModelForCausalLM.from_pretrained(corpus / "base")
    seen = []

    def compare(run):
        assert run.frozen is run.baseline and run.frozen.model is run.policy.model
        if policy.get("zero_stage") != 3:
            assert storages(run.frozen.model, run.policy.model, run.engine.model) == storages(
                run.policy.model
            )
        twin, whole = Frozen(base), run.observe

        def observe(inputs, *others):
            scores = inputs.scores
            seen.append((scores.baseline_logps, twin.logps(inputs.micro), scores.target_mask))
            return whole(inputs, *others)

        run.observe = observe

    one_step(
        values,
        compare,
        policy=policy | {"lora": LORA},
        max_steps=3,
        optim__lr=0.1,
        sampling__cut="force_close",
        baseline={"name": "frozen", "frozen_every": 1, "cache_tokens": 0},
    )
    assert len(seen) == 3 and seen[0][2].any()
    for ours, theirs, mask in seen:
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [{"backend": "torch"}, {"backend": "deepspeed", "zero_stage": 3}], ids=str)
def test_evaluation_against_the_same_weights(values, corpus, tmp_path, policy):
    """As the evaluation of the saved model against the base, in files of their own."""
    from rlpretrain.data.stream import read_all
    from rlpretrain.evaluation.evaluate import evaluate
    from rlpretrain.objectives import load_objective

    run = merged(
        values,
        policy=policy | {"lora": LORA},
        max_steps=2,
        optim__lr=0.1,
        eval={"data": str(corpus / "held_out.jsonl"), "every": 2, "documents": 8, "thoughts": 2},
    )
    trained(run)
    row = rows_of(tmp_path / "run")[-1]
    config = build(run)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    model, base = (
        AutoModelForCausalLM.from_pretrained(p).eval() for p in (tmp_path / "run" / "model", corpus / "base")
    )
    data = config.data.__class__(path=str(corpus / "held_out.jsonl"), max_length=64)
    documents = read_all(data, tokenizer, limit=8, seed=0)
    found = evaluate(
        model, load_objective(config, tokenizer), documents, frozen=base, thoughts=2, seed=config.seed
    ).summary()
    assert row["eval/gain_frozen"] == pytest.approx(found["gain_frozen"], abs=1e-3)
    assert abs(row["eval/gain_frozen"] - row["eval/gain"]) > 1e-3


def test_log_probs_of_documents_that_come_again_are_read_once(values, corpus):
    """With eight documents that come four times the frozen model is run for each once, and says the same
    as without memory.
    """
    short = corpus / "eight.jsonl"
    short.write_text("".join((corpus / "train.jsonl").read_text().splitlines(keepends=True)[:8]))
    means, forwards = [], []
    for keep in (0, 10_000):
        calls = []

        def count_rows(run, calls=calls, keep=keep):
            assert bool(run.frozen.keep) == bool(keep)
            inner = run.frozen.scorer.forward
            run.frozen.scorer.forward = lambda ids, *others: calls.append(len(ids)) or inner(ids, *others)

        changes = {
            "data__path": str(short),
            "max_steps": 8,
            "positions_per_step": 4,
            "objective__positions": "random",
            "objective__target_length": 3,
            "baseline": {"name": "frozen", "cache_tokens": keep, "frozen_every": 0},
            "output_dir": f"{values['output_dir']}{keep}",
            "policy": {"backend": "torch", "lora": LORA},
        }
        changes["objective"] = {"name": "rlp", "positions": "random", "target_length": 3}
        run, _ = one_step(
            values, count_rows, **{k: v for k, v in changes.items() if not k.startswith("objective__")}
        )
        means.append([row["ig/mean"] for row in rows_of(Path(run.folder))])
        forwards.append(sum(calls))
    assert forwards == [32, 8]
    assert means[0] == pytest.approx(means[1], abs=1e-5)


def test_memory_keeps_what_was_used_last(corpus):
    model = tiny_model("qwen3", 40)
    frozen = Frozen(copy.deepcopy(model), keep=20)
    for size in (8, 7, 8, 9):
        frozen.cache.add(str(size), torch.zeros(size))
    assert list(frozen.cache.known) == ["8", "9"] and frozen.cache.kept == 17


def test_no_think_rows_of_a_template_are_remembered_too(values):
    """Arms that are not the document's own row: what is looked up is what a forward gives."""
    run = Run(
        build(
            merged(
                values,
                objective={
                    "name": "rlp",
                    "positions": "after",
                    "marker": "shows",
                    "target_length": 2,
                    "template": "given {context}",
                    "no_think": "template",
                },
            )
        ),
        None,
    )
    batch = run.next_batch()
    arms = {g.id: run.objective.no_think(g.position) for g in batch.groups}
    layouts = (Layout(4096, "force_close", whole_arms=whole, no_think_ids=arms) for whole in (False, True))
    plain, whole = (
        next(pack(Batch(batch.groups, batch.documents), layout, count(batch))) for layout in layouts
    )
    keeper = Frozen(copy.deepcopy(run.policy.model), keep=10_000)
    want = Frozen(copy.deepcopy(run.policy.model)).logps(plain)
    torch.testing.assert_close(keeper.logps(whole), want, atol=1e-5, rtol=1e-5)
    keeper.scorer.forward = None  # all is known
    torch.testing.assert_close(keeper.logps(whole), want, atol=1e-5, rtol=1e-5)
    run.close()


@pytest.mark.slow
def test_two_ranks_of_zero_3_read_the_frozen_model_together(values, corpus, tmp_path):
    """With documents that come again, and ranks that miss different ones."""
    short = corpus / "eight_.jsonl"
    short.write_text("".join((corpus / "train.jsonl").read_text().splitlines(keepends=True)[:8]))
    run = merged(
        values,
        data__path=str(short),
        max_steps=4,
        optim__lr=1e-3,
        token_budget=128,
        packing="padded",
        baseline={"name": "frozen", "frozen_every": 1},
        policy={"lora": LORA, "backend": "deepspeed"},
        eval={"data": str(corpus / "held_out.jsonl"), "every": 4, "documents": 4, "thoughts": 2},
    )
    one = trained(run, output_dir=str(tmp_path / "one"), policy={"lora": LORA, "backend": "torch"})
    launch(
        [{"config": merged(run, policy__deepspeed_config=SHARDED, output_dir=str(tmp_path / "two"))}],
        tmp_path,
    )
    two = weights(tmp_path / "two" / "model")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert b["ig/mean"] == pytest.approx(a["ig/mean"], abs=1e-4) and b["ig/frozen"] == pytest.approx(
            a["ig/frozen"], abs=1e-4
        )


# delimiters that the tokenizer lacked


@pytest.fixture(params=["qwen3", "llama"])
def without_tags(request, values, corpus, tmp_path):
    """A checkpoint with a tied or an untied head whose tokenizer has no tags, and a run on it."""
    words = [w for w in dial.WORDS if w not in ("<think>", "</think>", "<pad>", "<eos>", "<unk>")]
    tokenizer = word_tokenizer(words)
    tiny_model(request.param, len(tokenizer), seed=3, **SHAPE).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    return merged(
        values, model=str(tmp_path / "bare"), optim__lr=1e-2, policy={"backend": "torch", "lora": LORA}
    )


def test_new_delimiters_are_trained_and_nothing_else_of_the_tables(without_tags, tmp_path):
    run = without_tags
    trained(run)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    start = Run(build(merged(run, output_dir=str(tmp_path / "again"))), None)
    before = {p.name: p.make() for p in pieces(start.policy.model)}
    start.close()
    after = weights(tmp_path / "run" / "model")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in after:
            moved = (after[name] - before[name]).abs().amax(1) > 1e-4
            assert moved.nonzero().flatten().tolist() == sorted(tags)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    bare.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "run" / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([[5, 6, tags[0], 7, tags[1], 8]])
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def test_without_new_tokens_the_tables_stay(without_tags, tmp_path):
    trained(without_tags, policy__lora=LORA | {"new_tokens": False}, max_steps=2)
    told = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert not told["trainable_token_indices"] and told["base_model_name_or_path"] == without_tags["model"]


def test_resume_with_trained_delimiters_is_bit_identical(without_tags, tmp_path):
    run = merged(without_tags, checkpoint={"every": 2}, policy__lora=LORA | {"use_dora": True})
    whole = trained(run, max_steps=4, output_dir=str(tmp_path / "whole"))
    trained(run, max_steps=2)
    assert same(trained(run, resume="auto", max_steps=4), whole)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"backend": "torch"}, {"backend": "deepspeed", "zero_stage": 3}], ids=str)
def test_vllm_gets_trained_delimiters_and_dora_merged(without_tags, tmp_path, policy):
    pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
    trained(
        without_tags,
        policy=policy | {"lora": LORA | {"use_dora": True}},
        max_steps=3,
        engine={"name": "vllm_local", "kv_cache_gib": 0.05, "batch_size": 32},
    )
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3 and all(row["sampling/probe_difference"] <= 1e-4 for row in rows)
    assert all(row["sampling/abs_log_ratio_max"] <= 1e-4 for row in rows)


# rounded weights


@pytest.fixture
def rounded(values, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make env LOCK=test-cpu")
    tiny_model("qwen3", len(dial.WORDS), seed=3, **SHAPE).save_pretrained(tmp_path / "base")
    dial.tokenizer().save_pretrained(tmp_path / "base")
    return merged(
        values,
        model=str(tmp_path / "base"),
        optim__lr=1e-2,
        baseline={"name": "frozen", "frozen_every": 1},
        policy={"backend": "torch", "lora": LORA},
    )


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_on_rounded_weights(rounded, tmp_path, bits):
    """The saved model is in full precision and computes what was trained: the rounded base and the
    adapters on it.
    """
    run = merged(rounded, model={"path": rounded["model"], "quantization": bits})
    after = trained(run)
    assert all(p.dtype == torch.float32 for p in after.values())
    form = {
        "4bit": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
    }[bits]
    base = AutoModelForCausalLM.from_pretrained(
        rounded["model"], quantization_config=form, dtype=torch.float32
    )
    keep_differentiable(base)  # and in float32 everywhere
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    apart = 1e-4 if bits == "4bit" else 5e-2  # eight bits round the activations of the matrix product too
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=apart, rtol=apart)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(rounded["model"]).parameters())
    adapters = sum(p.numel() for n, p in theirs.named_parameters() if ".lora_" in n)
    assert record["parameters"] == whole + adapters


@pytest.mark.parametrize("late", [None, "by hand", "by TRL"])
def test_rounded_weights_have_gradients_on_every_cpu(rounded, monkeypatch, late):
    """bitsandbytes gives CPUs with AVX512-BF16 a form without gradients as soon as a model that is
    evaluated reads something.
    """

    def gradients(say: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: say)
        config = build(merged(rounded, model={"path": rounded["model"], "quantization": "4bit"})).model
        if late:
            monkeypatch.setattr("rlpretrain.models.loading.keep_differentiable", lambda _: None)
        torch.manual_seed(2)
        model = stirred(add_lora(load_model(config), LoraConfig(r=4)))
        with torch.no_grad():
            model(IDS)
        turned = [
            m
            for m in model.modules()
            if getattr(getattr(m, "quant_state", None), "packing_format_for_cpu", False)
        ]
        assert bool(turned) == (say and late is not None)  # else there is nothing to keep it from
        if late == "by hand":
            keep_differentiable(model)
        elif late == "by TRL":
            pytest.importorskip("trl", reason="needs TRL: make env LOCK=test-cpu")
            from rlpretrain.trl import InformationGainReward

            InformationGainReward(model, dial.tokenizer(), positions="after", marker="shows").watch(model)
        model(IDS).logits.log_softmax(-1)[0, :-1].gather(1, IDS[0, 1:, None]).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return found, {piece.name: piece.make() for piece in pieces(model)}

    for theirs, ours, rounding in zip(gradients(False), gradients(True), (5e-2, 5e-3), strict=True):
        for name in theirs:  # of layers that turned, the scales have been through bfloat16
            atol = float(theirs[name].abs().max()) * (rounding if late else 1e-6)
            torch.testing.assert_close(
                ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
def test_vllm_samples_from_the_rounded_weights(rounded, tmp_path):
    pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
    trained(
        rounded,
        model={"path": rounded["model"], "quantization": "4bit"},
        max_steps=2,
        engine={"name": "vllm_local", "kv_cache_gib": 0.05, "batch_size": 32},
    )
    assert all(row["sampling/probe_difference"] <= 1e-3 for row in rows_of(tmp_path / "run"))


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_resume_on_rounded_weights_is_bit_identical(rounded, tmp_path, bits, backend):
    run = merged(
        rounded,
        model={"path": rounded["model"], "quantization": bits},
        checkpoint={"every": 2},
        policy={"backend": backend, "lora": LORA},
    )
    whole = trained(run, max_steps=4, output_dir=str(tmp_path / "whole"))
    trained(run, max_steps=2)
    kept = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoint-2").rglob("*") if f.is_file())
    assert kept < 250_000  # without the base
    assert same(trained(run, resume="auto", max_steps=4), whole)


def test_pieces_leave_eight_bits_as_they_were(rounded):
    form = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(
        rounded["model"], quantization_config=form, dtype=torch.float32
    )
    model = stirred(add_lora(base, LoraConfig(r=4)))
    before = model(IDS).logits
    found = {piece.name: piece.make() for piece in pieces(model)}
    torch.testing.assert_close(model(IDS).logits, before)
    plain = AutoModelForCausalLM.from_pretrained(rounded["model"])
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(IDS).logits, before, atol=0.1, rtol=0.1)  # activations are rounded too


def test_a_saved_rounded_model_keeps_how_generations_end(rounded, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(rounded["model"])
    base.generation_config.eos_token_id, base.generation_config.max_length = [1, 5], 77
    base.save_pretrained(rounded["model"])
    trained(rounded, model={"path": rounded["model"], "quantization": "4bit"}, max_steps=1)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").generation_config
    assert found.eos_token_id == [1, 5] and found.max_length == 77


def test_a_trained_model_is_not_rounded_again(rounded, tmp_path):
    """By those who load it with the settings of its run: the report, and a comparison (whose own lines are
    the same).
    """
    from rlpretrain.reporting.thoughts import load_model

    run = merged(rounded, model={"path": rounded["model"], "quantization": "4bit"})
    trained(run)
    config = build(run)
    assert not getattr(load_model(config, str(tmp_path / "run" / "model"))[0], "is_quantized", False)
    assert load_model(config, config.model.path)[0].is_quantized


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"quantization": "4bit"}}, "set policy.lora"),
        ({"model": {"quantization": "4bit"}, "policy": {"lora": {}, "zero_stage": 3}}, "ZeRO 3 cannot shard"),
        (
            {"model": {"quantization": "4bit"}, "policy": {"lora": {}}, "baseline": {"name": "ema"}},
            "does not move",
        ),
        (
            {"model": {"quantization": "8bit"}, "policy": {"lora": {}}, "engine": {"max_staleness": 1}},
            "max_staleness 0",
        ),
        (
            {"model": {"quantization": "8bit"}, "policy": {"lora": {}}, "engine": {"name": "vllm_local"}},
            "use 4bit, or engine hf",
        ),
        ({"policy": {"lora": {"target_modules": ["embed_tokens", "q_proj"]}}}, "the embedding it is tied to"),
        (
            {"policy": {"lora": {"sync": "adapter", "use_dora": True}}, "engine": {"name": "vllm_local"}},
            "use_dora: use merged",
        ),
        ({"policy": {"lora": {"target_modules": ["lm_head"]}}}, "output head"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(values, corpus, changes, said):
    if "model" in changes:
        changes = changes | {"model": changes["model"] | {"path": str(corpus / "base")}}
    with pytest.raises(ConfigError, match=said):
        train(Run(build(merged(values, **changes)), None))


def test_a_missing_library_is_named_with_its_install_line(values, corpus, monkeypatch):
    run = merged(values, model={"path": str(corpus / "base"), "quantization": "4bit"}, policy={"lora": {}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *others: None)
    with pytest.raises(ImportError, match=r'bitsandbytes: pip install "rlpretrain\[qlora\]"'):
        Run(build(run), None)
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r'needs PEFT: pip install "rlpretrain\[peft\]"'):
        Run(build(merged(values, policy={"lora": {}}, output_dir=values["output_dir"] + "2")), None)


def test_adapter_sync_cannot_hand_over_new_delimiters(without_tags):
    with pytest.raises(ConfigError, match="new_tokens: false"):
        Run(
            build(merged(without_tags, policy={"lora": {"sync": "adapter"}}, engine={"name": "vllm_local"})),
            None,
        )
