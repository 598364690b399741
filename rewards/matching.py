"""Whether what a model says is what the text goes on with: exact prefixes in bytes, and predictions found
between delimiters.
"""

from collections.abc import Sequence
from typing import AnyStr

BRACKETS = {("{", "}"), ("[", "]"), ("(", ")"), (b"{", b"}"), (b"[", b"]"), (b"(", b")")}


def prefix_match(prediction: bytes, truth: bytes, ends: Sequence[int]) -> bool:
    """Whether a prediction is an exact prefix of the true continuation and ends where one of its tokens does.

    `ends` are the byte lengths of the continuation's first 1, 2, ... tokens. So a prediction may cover
    several tokens, but no part of one; an empty one never matches, nor one longer than `truth`, whose rest is
    unknown.

    Source: RPT, arXiv 2506.08007, §3 (the prefix matching reward).

    >>> prefix_match(b" the", b" the cat", [4, 8]), prefix_match(b" th", b" the cat", [4, 8])
    (True, False)
    """
    return bool(prediction) and truth.startswith(prediction) and len(prediction) in ends


def last_between(text: AnyStr, opening: AnyStr, closing: AnyStr) -> AnyStr | None:
    """What stands between the last `opening` and the `closing` that belongs to it; None where there is no
    such pair.

    All three are texts, or all are bytes (what tokens hold exactly, where a character may be cut). Where the
    two are brackets (`\\boxed{` and `}`), brackets inside count: `\\boxed{x^{2}}` holds `x^{2}`.

    >>> last_between("so \\boxed{4} no \\boxed{x^{2}} !", "\\boxed{", "}")
    'x^{2}'
    >>> last_between(b"so {4}", b"{", b"}")
    b'4'
    """
    start = text.rfind(opening)
    if start < 0:
        return None
    start += len(opening)
    bracket = opening[-1:]
    nested = (bracket, closing) in BRACKETS
    depth, at = 0, start
    while at < len(text):
        if text.startswith(closing, at):
            if not depth:
                return text[start:at]
            depth -= 1
        elif nested and text[at : at + 1] == bracket:
            depth += 1
        at += 1
    return None
