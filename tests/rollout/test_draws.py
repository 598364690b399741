"""The generator, the truncated distributions and the draw itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout import SamplingParams
from rollout.draws import draw, thought_seed, truncated_logps, uniforms

PROBS = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02, 0.0])


def params(**changes: float) -> SamplingParams:
    return SamplingParams(max_thought_tokens=1, **changes)  # type: ignore[arg-type]


def test_uniforms_are_splitmix64() -> None:
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the published stream of seed 0
    expected = [((word >> 11) + 0.5) * 2.0**-53 for word in words]
    assert uniforms([0], 3)[0].tolist() == expected


def test_uniforms_are_uniform_and_rows_unrelated() -> None:
    numbers = uniforms(range(400), 100)
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 45  # chi-square, 19 degrees of freedom: p < 0.001
    correlations = torch.corrcoef(numbers) - torch.eye(400, dtype=torch.float64)
    assert correlations.abs().max() < 0.5 and torch.equal(numbers[7:8], uniforms([7], 100))


@given(seed=st.integers(-(2**70), 2**70), index=st.integers(0, 10_000))
def test_a_thought_seed_draws_its_thought_again(seed: int, index: int) -> None:
    own = thought_seed(seed, index)
    assert 0 <= own < 2**63 and thought_seed(own, 0) == own


def test_thought_seeds_of_neighbouring_prompts_differ() -> None:
    seeds = {thought_seed(seed, index) for seed in range(100) for index in range(100)}
    assert len(seeds) == 10_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, PROBS**2 / (PROBS**2).sum()),
        ({"top_k": 3}, torch.tensor([0.5, 0.3125, 0.1875, 0, 0, 0, 0, 0])),
        ({"top_k": 100}, PROBS),
        ({"top_p": 0.6}, torch.tensor([0.4, 0.25, 0, 0, 0, 0, 0, 0]) / 0.65),
        ({"top_p": 0.01}, torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])),
        ({"top_p": 0.5, "top_k": 3}, torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])),  # of the three, .5 is enough
        ({"temperature": 0.0, "top_k": 1}, PROBS),  # greedy: the distribution itself, untouched
    ],
)
def test_truncated_distributions_by_hand(changes: dict[str, float], expected: torch.Tensor) -> None:
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])  # not sorted, as logits are
    logps = truncated_logps(PROBS[order].log()[None], params(**changes))
    torch.testing.assert_close(logps[0].exp(), expected[order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_banned_ids_are_removed_before_all_else(changes: dict[str, float]) -> None:
    """The distribution is that of a model whose vocabulary lacks them."""
    kept = [1, 3, 4, 5, 6, 7]
    logps = truncated_logps(PROBS.log()[None], params(banned_ids=(0, 2), **changes))[0]  # type: ignore[arg-type]
    assert logps[[0, 2]].tolist() == [-torch.inf] * 2
    torch.testing.assert_close(logps[kept], truncated_logps(PROBS[kept].log()[None], params(**changes))[0])


def test_greedy_choices_are_not_banned_either() -> None:
    logits, uniform = PROBS.log().expand(2, -1), torch.full((2,), 0.01, dtype=torch.float64)
    banned: dict[str, tuple[int, ...]] = {"banned_ids": (0,)}
    for tokens, logps in (
        draw(logits, uniform, params(temperature=0.0, **banned)),  # type: ignore[arg-type]
        draw(logits, uniform, params(**banned), torch.tensor([True, True])),  # type: ignore[arg-type]
    ):
        assert tokens.tolist() == [1, 1]
        torch.testing.assert_close(logps.exp(), torch.tensor([0.25 / 0.6] * 2))


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2.0}]
)
def test_frequencies_and_log_probabilities_of_draws(changes: dict[str, float]) -> None:
    count = 20_000
    logits = PROBS.log().expand(count, -1)
    tokens, logps = draw(logits, uniforms(range(count), 1)[:, 0], params(**changes))
    expected = truncated_logps(logits[:1], params(**changes))[0].exp()
    counts = torch.bincount(tokens, minlength=8).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - count * expected) ** 2 / (count * expected))[possible].sum()
    assert chi_square < 25  # at most 6 degrees of freedom: p < 0.001
    torch.testing.assert_close(logps, expected[tokens].log())


def test_the_ends_of_the_unit_interval_give_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    tokens, _ = draw(logits, torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64), params())
    assert tokens.tolist() == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_uniforms_have_the_same_bits_on_an_accelerator() -> None:
    assert torch.equal(uniforms(range(64), 50, "cuda").cpu(), uniforms(range(64), 50))
