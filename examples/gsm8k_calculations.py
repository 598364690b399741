"""Documents for RLP on real text: sentences of GSM8K's solutions with a calculation of several operations.

Each row of `examples/gsm8k_lines` (MIT licence) has the number of a problem and a line of its solution:

    In total, he has earned $20 + $2.5 + $7.5 = $<<20+2.5+7.5=30>>30.

GSM8K's annotation between `<<` and `>>` is taken out for the document. From it follows the thought that would
help: what is left of the calculation after each operation, here `22.5+7.5=30`.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

LINES = Path(__file__).parent / "gsm8k_lines" / "lines.jsonl"
ANNOTATION = re.compile(r"(\s*\$?)<<([^<>=]*)=([^<>]*)>>")
"""What stands before a result, the calculation, and its result."""
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LONGEST_SENTENCE, LONGEST_THOUGHT = 160, 18
"""Characters; longer ones are left out."""


@dataclass(frozen=True, slots=True)
class Calculation:
    """A sentence with one calculation."""

    problem: int
    before: str
    """Up to the equals sign."""
    thought: str
    after: str
    """From what stands before the result on."""

    @property
    def document(self) -> dict[str, str]:
        """The sentence as a row of a file.

        >>> Calculation(0, "2+3+4 =", "5+4=9", " 9.").document
        {'text': '2+3+4 = 9.'}
        """
        return {"text": self.before + self.after}

    @property
    def trace(self) -> dict[str, str]:
        """The sentence with the thought, in the two columns that `sft_mixed` takes.

        >>> Calculation(0, "2+3+4 =", "5+4=9", " 9.").trace
        {'question': '2+3+4 =', 'answer': '<<5+4=9>> 9.'}
        """
        return {"question": self.before, "answer": f"<<{self.thought}>>{self.after}"}


def read_calculations(file: Path) -> list[Calculation]:
    """The calculations of a JSON Lines file.

    Its rows have `problem` and `line`, or `answer` as GSM8K itself; then the problem is the row's number.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [
        (row.get("problem", number), line)
        for number, row in enumerate(rows)
        for line in (row["line"] if "line" in row else row["answer"]).splitlines()
    ]
    return [found for problem, line in lines for found in calculations_of(problem, line)]


def calculations_of(problem: int, line: str) -> Iterator[Calculation]:
    """The calculation of a line, if it has a single one, of two or more operations, and after an equals sign.

    >>> [found.thought for found in calculations_of(0, "It is 2+3*4 = <<2+3*4=14>>14.")]
    ['2+12=14']
    >>> list(calculations_of(0, "It is 2+3 = <<2+3=5>>5."))
    []
    """
    matches = list(ANNOTATION.finditer(line))
    if len(matches) != 1:
        return
    (match,) = matches
    before, after = line[: match.start()], match.group(1) + line[match.end() :]
    if not before.endswith("=") or (before + after).count("=") != 1 or len(before) > LONGEST_SENTENCE:
        return
    steps = reductions(match.group(2))
    is_percent = ".01" in match.group(2)  # the sentence has a percent sign there, and not this factor
    if is_percent or not steps or steps[-1] != match.group(3).strip():
        return
    thought = "=".join(steps)
    if len(thought) <= LONGEST_THOUGHT:
        yield Calculation(problem, before, thought, after)


def reductions(expression: str) -> list[str]:
    """What is left of an expression after each operation; empty unless it is flat and has two or more.

    Products and quotients come first, then from left to right. Empty too if a number on the way is negative
    or has more than three decimal places.

    >>> reductions("30-2*5+1")
    ['30-10+1', '20+1', '21']
    >>> reductions("1/3*9"), reductions("7"), reductions("3+4")
    ([], [], [])
    """
    parts = re.findall(r"\d*\.?\d+|[-+*/]", expression)
    is_flat = len(parts) % 2 == 1 and all(part in OPERATIONS for part in parts[1::2])
    if not is_flat or "".join(parts) != expression.replace(" ", "") or len(parts) < 5:
        return []
    if any(part in OPERATIONS for part in parts[::2]):
        return []
    left: list[Fraction | str] = [part if place % 2 else Fraction(part) for place, part in enumerate(parts)]
    steps = []
    while len(left) > 1:
        place = next((i for i in range(1, len(left), 2) if left[i] in ("*", "/")), 1)
        first, sign, second = left[place - 1 : place + 2]
        if sign == "/" and second == 0:
            return []
        left[place - 1 : place + 2] = [OPERATIONS[str(sign)](first, second)]
        written = [part if isinstance(part, str) else decimal(part) for part in left]
        if "" in written:
            return []
        steps.append("".join(written))
    return steps


def decimal(number: Fraction) -> str:
    """A number as a decimal fraction; empty if it is negative or needs more than three places.

    >>> decimal(Fraction(5, 2)), decimal(Fraction(4)), decimal(Fraction(1, 3))
    ('2.5', '4', '')
    """
    thousandths = number * 1000
    if number < 0 or thousandths.denominator != 1:
        return ""
    return f"{thousandths.numerator / 1000:.3f}".rstrip("0").rstrip(".")


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """A JSON Lines file, written under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.tmp")
    work.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work.replace(path)
