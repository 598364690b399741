"""Lengths: what a document can make is known at the start, and what does not fit a model is refused there
(issue 15.5).
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.models.lengths import Names, check_engine, check_rows, limit_of
from rlpretrain.objectives import Setting, load_objective, parse_section
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.rollouts.engines import longest as longest_of_engine
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.types import Batch, Document
from rollout.types import FinishReason, Group, Position, Prompt, SamplingParams, Thought
from tests.builders.runs import merged
from tests.builders.tiny import bpe_tokenizer, tiny_model

LINE = (
    "The cat sat on the mat and it saw a dog. Then it ran away from the dog. It came back later with two "
    "more cats. "
)
TOKENIZER = bpe_tokenizer([LINE], 330)
ensure_delimiters(TOKENIZER)


class LongestThoughts:
    """An engine whose thoughts are as long as they may be: those that may close do so at the very end,
    answers never end.
    """

    version, shares_weights = 0, True

    def __init__(self) -> None:
        self.most = 0

    async def sample(
        self, prompts: list[Prompt], params: SamplingParams, n: int, seeds: list[int]
    ) -> list[list[Thought]]:
        size = params.max_thought_tokens
        self.most = max(self.most, *(len(p.token_ids) + size for p in prompts))
        found = []
        for p, seed in zip(prompts, seeds, strict=True):
            ids = (*[5] * (size - 1), *(p.stop_ids or (5,)))
            reason = FinishReason.CLOSE if p.stop_ids else FinishReason.LENGTH
            open_ended = Thought((5,) * size, (-1.0,) * size, FinishReason.LENGTH, 0, seed)
            found.append([Thought(ids, (-1.0,) * size, reason, 0, seed)] + [open_ended] * (n - 1))
        return found


OBJECTIVES: list[dict[str, Any]] = [
    {"name": "rlp"},
    {"name": "rlp", "template": "rlp", "target_length": 5, "no_think": "empty_thought"},
    {"name": "rlp", "positions": "answer", "target_length": 4},
    {"name": "likelihood", "target_length": 3},
    {"name": "rpt"},
    {"name": "rpt", "match": "dense", "target_length": 3},
    {"name": "rmt", "min_entropy": 0.0, "curriculum_to": 0, "curriculum_from": 0},
    {"name": "rlpt"},
    {"name": "rlpt", "reward": "match"},
    {"name": "rlpt", "msr_weight": 0},
    {"name": "pretrain_zero"},
]


@pytest.mark.parametrize("section", OBJECTIVES, ids=lambda s: "-".join(map(str, s.values())))
def test_no_row_is_longer_than_the_window_says(section: dict[str, Any]):
    """Over all objectives: the longest rows that worst-case thoughts make, and the longest requests to an
    engine.
    """
    owner, config = parse_section({"positions_per_document": 1000, **section})
    objective = owner(config, TOKENIZER)
    objective.setting = Setting(SamplingParams(max_thought_tokens=7), 2, 0.0)
    ids = tuple(TOKENIZER(LINE)["input_ids"])
    answer_at = len(ids) - 3 if section.get("positions") == "answer" else None
    document = Document("d", ids, "here", answer_at=answer_at)
    positions = objective.positions(document, np.random.default_rng(0), torch.ones(len(ids)))
    engine = LongestThoughts()
    if section["name"] == "pretrain_zero":  # its rounds depend on what is said: the two prompts, as they are
        finder = objective.predictor(replace(positions[0], context_ids=objective.hidden(LINE.strip(), "dog")))
        prompts = [objective.prompt(positions[0]), finder]
        made = asyncio.run(
            engine.sample(prompts, replace(objective.setting.params, max_thought_tokens=7 + 48), 2, [0, 1])
        )
        groups = [
            Group(str(i), positions[0], p, tuple(t), 0)
            for i, (p, t) in enumerate(zip(prompts, made, strict=True))
        ]
    else:
        groups = asyncio.run(objective.rollout(engine, positions, list(range(len(positions)))))
    arms = {g.id: a for g in groups if (a := objective.no_think(g.position)) is not None}
    layout = Layout(1 << 20, cut="force_close", target="target" in objective.needs, no_think_ids=arms)
    batch = Batch(tuple(groups), (document,))
    (micro,) = pack(batch, layout, count(batch, layout.cut))
    window = objective.window(len(ids))
    assert micro.input_ids.shape[1] <= window.row and engine.most <= window.sampled
    assert max(len(g.prompt.token_ids) for g in groups) <= window.prompt
    if section == {"name": "rlp"}:  # and it is no longer than it must be
        assert (micro.input_ids.shape[1], engine.most) == (window.row, window.sampled)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """Checkpoints of 64 positions: rotary, and learned ones, whose table ends there."""
    for name, fields in {"llama": {"max_position_embeddings": 64}, "gpt2": {"n_positions": 64}}.items():
        tiny_model(name, vocab_size=len(dial.WORDS), seed=3, **fields).save_pretrained(tmp_path / name)
        dial.tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Documents of up to 48 tokens and one of 100, end of text included."""
    word = dial.WORDS[5]
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"text": f"{word} " * n}) + "\n" for n in (20, 47, 99))
    )
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": f"{word} " * n}) + "\n" for n in (20, 47, 47, 30))
    )
    return tmp_path


def started(values: dict[str, Any], **changes: Any) -> None:
    Pretrainer(build(merged(values, **changes))).train()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_whose_rows_do_not_fit_is_refused_before_the_first_step(values, short, lines, name):
    """48 tokens, an open tag, 14 of thought, a close tag: 64, one more than 64 positions with thoughts of
    15.
    """
    fields = {
        "model": str(short / name),
        "data__path": str(lines / "docs.jsonl"),
        "objective": "rlp",
        "max_steps": 2,
    }
    with pytest.raises(
        ConfigError, match=r"rows of up to 65.*data.max_length to at most 47.*sampling.max_thought_tokens"
    ):
        started(values, **fields, sampling__max_thought_tokens=15)
    assert not (Path(values["output_dir"]) / "metrics.jsonl").exists()
    started(
        values,
        **fields,
        sampling__max_thought_tokens=15,
        data__max_length=47,
        output_dir=str(lines / "as_told"),
    )
    started(values, **fields, sampling__max_thought_tokens=14, output_dir=str(lines / "fits"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_documents_longer_than_the_model_are_refused_at_the_start(values, short, lines, name):
    """Plain next-token prediction, the second stream, the held-out documents, and a stream, of which only
    the bound is known.
    """
    values = merged(
        values,
        model=str(short / name),
        data__max_length=128,
        objective="ntp",
        data__path=str(lines / "docs.jsonl"),
    )
    with pytest.raises(
        ConfigError, match="document of data with 100 tokens is longer: set data.max_length to at most 64"
    ):
        started(values, data__path=str(lines / "long.jsonl"))
    with pytest.raises(ConfigError, match="document of ntp_data has 100 tokens: set ntp_data.max_length"):
        started(values, ntp_data={"path": str(lines / "long.jsonl"), "max_length": 128})
    with pytest.raises(ConfigError, match="document of eval.data with 100 tokens"):
        started(values, eval={"data": str(lines / "long.jsonl")})
    with pytest.raises(ConfigError, match="document of data with 128 tokens is longer"):
        started(values, data__streaming=True)


def test_evaluation_refuses_what_does_not_fit(values, short, lines):
    """As `rlpretrain eval` and `compare` call it: with documents and a model, and no run before it."""
    model, tokenizer = tiny_model("llama", len(dial.WORDS) + 2, max_position_embeddings=64), dial.tokenizer()
    ensure_delimiters(tokenizer)
    config = build(merged(values, objective="rlp"))
    documents = [Document("a", (5,) * 40), Document("b", (6,) * 58)]
    with pytest.raises(ConfigError, match="58 tokens makes rows of up to 66"):
        evaluate(model, load_objective(config, tokenizer), documents)
    assert evaluate(
        model, load_objective(config, tokenizer), [documents[0], Document("b", (6,) * 40)]
    ).values["gain"].shape == (2,)


def test_an_engines_length_holds_answers_too(values):
    """What vLLM is given by default, and what a server is asked to take."""
    section = {"name": "rpt", "template": "raw", "max_prediction_tokens": 300}
    config = build(merged(values, objective=section, data__max_length=300, sampling__max_thought_tokens=40))
    tokenizer = dial.tokenizer()
    ensure_delimiters(tokenizer)
    objective = load_objective(config, tokenizer)
    assert objective.window(300).sampled == 300 - 8 + 1 + 40 + 300
    assert (
        longest_of_engine(config, objective, None) == 633 and longest_of_engine(config, objective, 600) == 600
    )
    check_engine(objective, 300, 633)
    with pytest.raises(ConfigError, match="takes 632 tokens.*reach 633 with their thoughts"):
        check_engine(objective, 300, 632)


def test_scoring_refuses_rows_that_nobody_announced():
    """Stored rollouts of another model: a rotary model would score them without a word."""
    model = tiny_model("llama", max_position_embeddings=64)
    position = Position("d", 60, (5,) * 60, (6,))
    group = Group(
        "g",
        position,
        Prompt((5,) * 61, (1,), (1,)),
        (Thought((7, 8, 1), (-1.0,) * 3, FinishReason.CLOSE, 0, 0),),
        0,
    )
    batch = Batch((group,), (Document("d", (*(5,) * 60, 6)),))
    (micro,) = pack(batch, Layout(1000), count(batch))
    with pytest.raises(
        ValueError, match="a row of 65 tokens is to be scored, but the model has 64 positions"
    ):
        score(Scorer(model), micro)


def test_limits_of_models_by_their_configuration():
    assert limit_of(tiny_model("gpt2", n_positions=77)).tokens == 77
    assert limit_of(tiny_model("mamba")) is None
    names = Names("the dataset", "max_length", "max_completion_length")
    objective = parse_section({"name": "rlp"})[0](parse_section({"name": "rlp"})[1], TOKENIZER)
    with pytest.raises(ConfigError, match="set max_length to at most 54, or lower max_completion_length"):
        check_rows(
            objective, 60, limit_of(tiny_model("llama", max_position_embeddings=64)), names, thought_tokens=8
        )
    with pytest.raises(ConfigError, match="lower max_completion_length: it leaves no room for a document"):
        check_rows(
            objective, 60, limit_of(tiny_model("llama", max_position_embeddings=64)), names, thought_tokens=80
        )


# longrope: two sets of rotary factors, chosen for a whole batch by its longest row

ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 5.0, 9.0, 17.0],
}


def phi3(**changes: Any) -> Any:
    """A tiny Phi-3 with its switch at 24 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 96,
        "original_max_position_embeddings": 24,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    rope = {**ROPE, "original_max_position_embeddings": 24, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("phi3", **fields, rope_parameters=rope)
        return AutoModelForCausalLM.from_config(config).eval()


def by_row(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """log p of the tokens of one row, read by itself."""
    rows = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=rows).logits[0, :-1].log_softmax(-1).gather(-1, rows[0, 1:, None])[:, 0]


def trunks(model: Any, documents: list[Document], tree: bool) -> dict[str, torch.Tensor]:
    """Our log-probs of documents in one micro-batch."""
    from rlpretrain.scoring import attention

    if tree:
        assert attention.install(model) is None
    batch = Batch((), tuple(documents))
    (micro,) = pack(batch, Layout(1 << 20, tree=tree), count(batch))
    with torch.no_grad():
        parts = score(Scorer(model), micro).trunk_logps.split([len(d.token_ids) - 1 for d in micro.documents])
    return {d.id: part for d, part in zip(micro.documents, parts, strict=True)}


@pytest.mark.parametrize("tree", [False, True])
def test_longrope_rows_within_the_original_length_are_scored_as_by_themselves(tree):
    generator = np.random.default_rng(0)
    documents = [Document(str(n), tuple(generator.integers(2, 64, n).tolist())) for n in (5, 24, 17)]
    model = phi3()
    ours = trunks(model, documents, tree)
    for d in documents:
        torch.testing.assert_close(ours[d.id], by_row(phi3(), d.token_ids), rtol=0, atol=1e-5)


def test_longrope_beyond_the_original_length_is_refused(values, tmp_path):
    """A batch that mixes rows on both sides scores the short ones with the long factors: refused where it
    is known.
    """
    generator = np.random.default_rng(0)
    short, long = (Document(str(n), tuple(generator.integers(2, 64, n).tolist())) for n in (12, 40))
    both = torch.zeros(2, 40, dtype=torch.long)
    both[0, :12], both[1] = torch.tensor(short.token_ids), torch.tensor(long.token_ids)
    with torch.no_grad():
        mixed = phi3()(input_ids=both, attention_mask=(both > 0).long()).logits[0, :11].log_softmax(-1)
    mixed = mixed.gather(-1, torch.tensor(short.token_ids)[1:, None])[:, 0]
    assert (
        float((mixed - by_row(phi3(), short.token_ids)).abs().max()) > 0.01
    )  # the fault itself, in transformers
    for tree in (False, True):
        with pytest.raises(ValueError, match="rotary factors for rows over 24 tokens"):
            trunks(phi3(), [short, long], tree)
    assert limit_of(phi3()).tokens == 24
    phi3().save_pretrained(tmp_path / "phi3")
    dial.tokenizer().save_pretrained(tmp_path / "phi3")
    with pytest.raises(ConfigError, match=r"rows over 24 tokens \(longrope\).*data.max_length to at most"):
        started(values, model=str(tmp_path / "phi3"), sampling__max_thought_tokens=12)


def test_longrope_with_one_set_of_factors_reaches_all_positions():
    model = phi3(long_factor=ROPE["short_factor"])
    assert limit_of(model).tokens == 96
    documents = [
        Document(str(n), tuple(np.random.default_rng(n).integers(2, 64, n).tolist())) for n in (12, 40)
    ]
    ours = trunks(model, documents, False)
    for d in documents:
        torch.testing.assert_close(ours[d.id], by_row(model, d.token_ids), rtol=0, atol=1e-5)
