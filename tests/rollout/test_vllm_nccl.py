"""Weights over NCCL: what can be checked without a GPU is that vLLM's own reader takes our source, and the
words without CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.training.pretrainer import Pretrainer
from tests.builders.runs import merged
from tests.builders.tiny import tiny_model

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
from rollout.vllm_nccl import NCCLTransfer, make_source  # noqa: E402

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")


def test_vllms_trainer_side_reads_our_source():
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine as Trainer

    state = {n: p.detach() for n, p in tiny_model("qwen3").named_parameters(remove_duplicate=False)}
    source = make_source(state, torch.device("cpu"))

    def described() -> Any:
        metadata = source.metadata  # a method below 0.33
        return metadata() if callable(metadata) else metadata

    for _ in range(2):  # it is read anew for every sync
        read = dict(Trainer._checked_iter(source, described()))
        assert read.keys() == state.keys() and all(torch.equal(read[n], state[n]) for n in state)
    meta = described()
    source.state = dict(list(state.items())[1:])
    with pytest.raises(ValueError, match="disagrees with iteration"):
        list(Trainer._checked_iter(source, meta))


@without_cuda
def test_without_cuda_it_says_so(values):
    with pytest.raises(RuntimeError, match="needs CUDA in the trainer"):
        NCCLTransfer("http://127.0.0.1:1", 1)
    engine = {"name": "vllm_server", "urls": ["http://127.0.0.1:1"], "transfer": "nccl"}
    with pytest.raises(
        ConfigError, match="engine.transfer: nccl needs CUDA in the trainer; engine.transfer: file needs none"
    ):
        Pretrainer(build(merged(values, engine=engine))).train()
