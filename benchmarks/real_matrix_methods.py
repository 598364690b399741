"""Settings of the methods of `benchmarks.real_matrix`, which fills in {checkpoint} and {labelled}."""

from __future__ import annotations

from typing import Any

WHERE: dict[str, Any] = {"positions": "after", "marker": "=", "target_length": 3}
TAGS = {"open": "<<", "close": ">>"}
WRITTEN = {"target_length": 8, "max_prediction_tokens": 16}
ALL = {"dynamic_sampling": False}
"""Train on groups without a difference too: this base hits next to nothing, so all would be left out."""
JUDGE = "benchmarks.real_matrix:judge"
ORACLE = "rlpretrain.corpora.dial_judge:chance"
FEEDBACK: dict[str, Any] = {
    "feedback": {
        "path": "{labelled}",
        "column": "question",
        "answer_column": "answer",
        "max_length": 128,
        "long": "truncate",
    },
    "feedback_documents": 2,
    "every": 1,
    "burn_in": 0.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "rlp": {"name": "rlp"} | WHERE | TAGS,
    "rlpt, information gain": {"name": "rlpt", "target_length": 8, "reward": "information_gain"} | TAGS,
    "rlpt, match": {"name": "rlpt", "reward": "match"} | WRITTEN | TAGS,
    "rlpt, judge": {"name": "rlpt", "reward": "judge", "judge_function": JUDGE} | WRITTEN | TAGS,
    "rpt": {"name": "rpt", "max_prediction_tokens": 6} | ALL | WHERE | TAGS,
    "rmt": {"name": "rmt"} | ALL | TAGS,
    "pretrain_zero": {"name": "pretrain_zero", "max_span_tokens": 2, "max_answer_tokens": 6} | ALL | TAGS,
    "likelihood, log_prob": {"name": "likelihood", "score": "log_prob", "direct": 1.0} | WHERE | TAGS,
    "likelihood, mean_prob": {"name": "likelihood", "score": "mean_prob"} | WHERE | TAGS,
    "likelihood, jepo": {"name": "likelihood", "score": "jepo", "direct": 1.0} | WHERE | TAGS,
    "likelihood, perplexity_gain": {"name": "likelihood", "score": "perplexity_gain"} | WHERE | TAGS,
    "quiet_star": {"name": "quiet_star", "every": 4} | TAGS,
    "latro": {"name": "latro"} | WHERE | TAGS,
    "nover": {"name": "nover"} | WHERE | TAGS,
    "bow": {"name": "bow"} | WHERE | TAGS,
    "sip, dpo": {"name": "sip", "target_length": 8, "judge_function": ORACLE},
    "sip, rf_nll": {"name": "sip", "target_length": 8, "judge_function": ORACLE, "loss": "rf_nll"},
    "ntp": {"name": "ntp"},
    "remit": {"name": "remit"},
    "v_pretrain, designer": {"name": "v_pretrain"} | FEEDBACK,
    "v_pretrain, none": {"name": "v_pretrain", "designer": "none"} | FEEDBACK,
    "distill, salt": {"name": "distill"},
    "distill, self": {"name": "distill", "kind": "self"},
    "preference, rwr": {"name": "preference", "loss": "rwr"},
    "preference, conditional": {"name": "preference", "loss": "conditional", "threshold": 0.5},
}
ONE_ENGINE = ("quiet_star", "latro", "nover", "bow", "sip", "ntp", "remit", "distill")
ONE_ENGINE += ("preference", "v_pretrain")
"""Methods that only read, so that no engine samples, and those that use engines as `rlp` does."""
BESIDE: dict[str, dict[str, Any]] = {
    "nover": {"baseline": {"name": "ema"}},
    "bow": {"baseline": {"name": "frozen"}},
    "remit": {"reference": {"path": "{checkpoint}"}},
    "distill, salt": {"reference": {"path": "{checkpoint}"}},
    "preference, rwr": {"data": {"score_column": "score"}},
    "preference, conditional": {"data": {"score_column": "score"}},
}
"""Settings that methods need beside the objective."""
LORA = {"policy": {"lora": {"r": 8, "alpha": 16}}, "optim": {"lr": 2e-4}}
ENGINES = {"hf": {}, "vllm": {"engine": {"name": "vllm_local"}}}
WEIGHTS = {"all": {}, "lora": LORA}
