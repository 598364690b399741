"""What `benchmarks.gpu` measures on: the model's shape, its inputs, and the operations that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.step_inputs import Shape  # imports transformers, which takes seconds

QWEN3_0_6B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
}
"""The published configuration of Qwen/Qwen3-0.6B."""
TINY: dict[str, Any] = QWEN3_0_6B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

PEAKS: tuple[tuple[str, float | None], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", None),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("B200", 2250e12),
)
"""Operations a second in dense bfloat16, by a part of the card's name; the first that matches counts."""


def peak_of(name: str) -> float | None:
    """The peak of a card; None if it is not known."""
    return next((peak for part, peak in PEAKS if part in name), None)


@dataclass(frozen=True)
class Settings:
    """What a part is measured with."""

    device: str = "cuda"
    tiny: bool = False
    token_budget: int = 22528
    peak: float | None = None
    seconds: float = 480.0
    """The part's time limit."""

    @property
    def model(self) -> dict[str, Any]:
        """The configuration of the model."""
        return TINY if self.tiny else QWEN3_0_6B

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Documents and thoughts, the most important first."""
        from benchmarks.step_inputs import Shape

        sizes = ((64, 8), (128, 8)) if self.tiny else ((2048, 256), (16384, 256), (2048, 1024), (16384, 1024))
        positions, thoughts, target = (2, 3, 4) if self.tiny else (4, 16, 16)
        return tuple(
            Shape(
                document=document,
                positions=positions,
                thoughts=thoughts,
                thought=thought,
                target=target,
                vocabulary=self.model["vocab_size"],
            )
            for document, thought in sizes
        )

    @property
    def backend(self) -> str:
        """What compiles layers; on a CPU their graphs run as they are."""
        return "inductor" if self.device.startswith("cuda") else "aot_eager"

    @property
    def recomputed_budget(self) -> int:
        """Tokens of a micro-batch where activations are recomputed."""
        return 4 * self.token_budget

    def is_long(self, shape: Shape) -> bool:
        """Whether the activations of a step on this document are recomputed."""
        return shape.document > (100 if self.tiny else 4096)

    @property
    def repeats(self) -> int:
        """Measurements after the first, which warms up."""
        return 1 if self.tiny else 3


def make_model(
    settings: Settings, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", **changes: Any
) -> Any:
    """A random model on the device; `changes` replace fields of its configuration, `kind` what it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = settings.model | {"max_position_embeddings": 40960, "pad_token_id": 0} | changes
    fields |= {"bos_token_id": 1, "eos_token_id": 1}
    config = AutoConfig.for_model(fields.pop("kind", "qwen3"), **fields)
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


@dataclass(frozen=True)
class Needed:
    """What a training step needs: each shared token once, each pair on a path once, nothing recomputed."""

    tokens: float
    pairs: float
    """Pairs of tokens of which one attends to the other."""
    rows: float
    """States that reach the head."""

    def operations(self, config: dict[str, Any]) -> float:
        """6 for each weight and token (of the head: and row), 12 for attention's width and pair."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * config["intermediate_size"]
        head = hidden * config["vocab_size"]
        return 6 * (layers * layer * self.tokens + head * self.rows) + 12 * layers * queries * self.pairs


def needed_by(micros: Any) -> Needed:
    """What micro-batches of trees or padded rows need; padding needs nothing."""
    tokens = pairs = rows = 0.0
    for micro in micros:
        if micro.tree is not None:
            tokens += micro.tree.size
            pairs += float((micro.tree.positions + 1).sum())
        else:
            lengths = micro.attention_mask.sum(1).double()
            tokens += float(lengths.sum())
            pairs += float((lengths * (lengths + 1) / 2).sum())
        targets = micro.target_mask[:, None, :] & micro.counted[:, :, None]
        rows += float(micro.thought_mask.sum() + targets.sum() + len(micro.trunk_labels))
    return Needed(tokens, pairs, rows)


@dataclass
class Cell:
    """One measurement; `values` are its numbers, `error` the reason why it has none."""

    name: str
    status: str = "ok"
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


Report = Callable[[Cell], None]
"""Called with each cell when it is done."""
Part = Callable[[Settings, Report], None]


@contextmanager
def measuring(cell: Cell) -> Iterator[None]:
    """Turn an error into the cell's; the next cell can go on with the memory that is then free."""
    try:
        yield
    except torch.OutOfMemoryError:
        cell.status, cell.error = "out of memory", "out of memory"
    except Exception as error:
        cell.status, cell.error = "failed", f"{type(error).__name__}: {error}"[:2000]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(settings: Settings) -> None:
    """Wait until the device has done all that was asked."""
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_gib(settings: Settings, reset: bool = False) -> float | None:
    """The most memory that tensors took since the last reset, in GiB; None on a CPU."""
    if not settings.device.startswith("cuda"):
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak


def resolve_peak(settings: Settings) -> float | None:
    """The peak that was given, or the card's; None if it is not known."""
    if settings.peak or not settings.device.startswith("cuda"):
        return settings.peak
    return peak_of(torch.cuda.get_device_name(settings.device))
