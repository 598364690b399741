"""Matches between a prediction and the true continuation: byte prefixes, and text between delimiters."""

from collections.abc import Sequence
from typing import AnyStr

BRACKETS = {("{", "}"), ("[", "]"), ("(", ")"), (b"{", b"}"), (b"[", b"]"), (b"(", b")")}


def prefix_match(prediction: bytes, truth: bytes, ends: Sequence[int]) -> bool:
    """Return whether a prediction is an exact prefix of the true continuation, in whole tokens.

    `ends` are the byte lengths of the continuation's first 1, 2, ... tokens. A prediction may cover several
    tokens, but must end where a token ends. An empty prediction does not match. A prediction longer than
    `truth` does not match either, since the text after `truth` is unknown.

    Source: RPT, arXiv 2506.08007, §3 (the prefix matching reward).

    >>> prefix_match(b" the", b" the cat", [4, 8]), prefix_match(b" th", b" the cat", [4, 8])
    (True, False)
    """
    return bool(prediction) and truth.startswith(prediction) and len(prediction) in ends


def last_between(text: AnyStr, opening: AnyStr, closing: AnyStr) -> AnyStr | None:
    """Return the text between the last `opening` and its matching `closing`; None if there is no such pair.

    All three are str, or all are bytes (tokens are exact in bytes, where a character may be cut). If the two
    are brackets (`\\boxed{` and `}`), nested brackets are counted: `\\boxed{x^{2}}` holds `x^{2}`.

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
    depth = 0
    for index in range(start, len(text)):
        if text.startswith(closing, index):
            if not depth:
                return text[start:index]
            depth -= 1
        elif nested and text[index : index + 1] == bracket:
            depth += 1
    return None


def final_answer(text: str, opening: str = "", closing: str = "") -> str | None:
    """Return the answer in a text, without white space around it; None if there is none.

    It begins after the last `opening`, or with the text if `opening` is empty. It ends before the next
    `closing`, or with the text. Brackets (`\\boxed{` and `}`) have to be closed; nested ones are counted.

    >>> final_answer(" 6 * 7 = 42\\n#### 42 ", "####"), final_answer("so \\boxed{x^{2}}.", "\\boxed{", "}")
    ('42', 'x^{2}')
    >>> final_answer("42\\nQ: next", closing="\\n"), final_answer("42", "####"), final_answer("{4", "{", "}")
    ('42', None, None)
    """
    if opening not in text:
        return None
    if (opening[-1:], closing) in BRACKETS:
        answer = last_between(text, opening, closing)
    else:
        answer = text[text.rfind(opening) + len(opening) :] if opening else text
        answer = answer.partition(closing)[0] if closing else answer
    return None if answer is None else answer.strip()
