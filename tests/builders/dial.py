"""The dial corpus computed by hand."""

from __future__ import annotations

from hypothesis import strategies as st

from rlpretrain.corpora import dial

PROBLEMS = st.builds(
    dial.Problem,
    st.integers(0, len(dial.NAMES) - 1),
    st.integers(0, 9),
    st.lists(st.sampled_from(sorted(dial.OPERATIONS)), min_size=1, max_size=8).map(tuple),
)
SIGN = {"up": lambda d, k: d + k, "down": lambda d, k: d - k, "times": lambda d, k: d * k}


def compute(words: list[str]) -> int:
    """The answer of `ann has 6 bob up3 ...`, worked out from the words alone."""
    value = int(words[2])
    for op in words[4::2]:
        value = SIGN[op[:-1]](value, int(op[-1])) % 10
    return value
