"""Byte-exact prefixes and predictions between delimiters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.matching import last_between, prefix_match


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=5),
    st.binary(max_size=6),
    st.integers(0, 5),
)
def test_a_match_is_a_whole_number_of_tokens(tokens: list[bytes], other: bytes, count: int) -> None:
    truth, ends = b"".join(tokens), [len(b"".join(tokens[: k + 1])) for k in range(len(tokens))]
    wanted = [b"".join(tokens[: k + 1]) for k in range(len(tokens))]
    assert prefix_match(other, truth, ends) == (other in wanted)
    kept = b"".join(tokens[:count])
    assert prefix_match(kept, truth, ends) == (count > 0)
    assert not prefix_match(truth + b"x", truth, ends)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{4}", "4"),
        ("\\boxed{ the} and \\boxed{ cat}", " cat"),
        ("\\boxed{x^{2}}", "x^{2}"),
        ("\\boxed{}", ""),
        ("\\boxed{\\frac{1}{2}} }", "\\frac{1}{2}"),
        ("\\boxed{open", None),
        ("no box", None),
        ("\\boxed{a{b}", None),
        ("}\\boxed{", None),
    ],
)
def test_the_last_box(text: str, found: str | None) -> None:
    assert last_between(text, "\\boxed{", "}") == found


def test_other_delimiters_do_not_nest() -> None:
    assert last_between("<p> a <p> b </p> c", "<p>", "</p>") == " b "
    assert last_between("<p> a </p> <p> b", "<p>", "</p>") is None
    assert last_between("say: {x", "say:", "\n") is None and last_between("say: {x\n", "say:", "\n") == " {x"
