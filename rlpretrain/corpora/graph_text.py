"""The two surfaces of the graphs corpus.

`words` has one token a word and one way to say a thing:

    owls is 0 . goats is 2 . newts is owls plus goats . ask newts
    <think> owls = 0 ; goats = 2 ; newts = owls 0 plus goats 2 = 2 ; </think> 2 .

`sentences` is ordinary English for tokenizers that exist already, with several templates for each clause.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from rlpretrain.corpora.graph_problems import Graph
from rlpretrain.corpora.graph_templates import Surface, Template

WORDS_SURFACE = Surface(
    statements=(
        Template("{name} is {constant}"),
        Template("{name} is {left} {op} {constant}"),
        Template("{name} is {left} {op} {right}"),
    ),
    steps=(
        Template("{name} = {value}"),
        Template("{name} = {left} {a} {op} {constant} = {value}"),
        Template("{name} = {left} {a} {op} {right} {b} = {value}"),
    ),
    operations={"plus": "plus", "minus": "minus", "times": "times"},
    preface="",
    ask="ask {name}",
    statement_end=" .",
    step_end=" ;",
    answer="{answer} .",
    worked="so {trace} {answer}",
)
SENTENCES_SURFACE = Surface(
    statements=(
        Template("There are {constant} {name}"),
        Template("The number of {name} is {constant}"),
        Template("We counted {constant} {name}"),
        Template("There are {constant} more {name} than {left}", "plus"),
        Template("The number of {name} is {constant} more than the number of {left}", "plus"),
        Template("Add {constant} to the number of {left} to get the number of {name}", "plus"),
        Template("There are {constant} fewer {name} than {left}", "minus"),
        Template("The number of {name} is {constant} less than the number of {left}", "minus"),
        Template("Take {constant} from the number of {left} to get the number of {name}", "minus"),
        Template("There are {constant} times as many {name} as {left}", "times"),
        Template("The number of {name} is {constant} times the number of {left}", "times"),
        Template("There are as many {name} as {left} and {right} together", "plus"),
        Template("The number of {name} is the number of {left} plus the number of {right}", "plus"),
        Template("The number of {name} is the number of {left} minus the number of {right}", "minus"),
        Template("Take the number of {right} from that of {left} to get the number of {name}", "minus"),
        Template("The number of {name} is the number of {left} times the number of {right}", "times"),
        Template("Multiply the numbers of {left} and {right} to get the number of {name}", "times"),
    ),
    steps=(
        Template("{name} = {value}"),
        Template("{name} = {left} {op} {constant} = {a} {op} {constant} = {value}"),
        Template("{name} = {left} {op} {right} = {a} {op} {b} = {value}"),
        Template("There are {value} {name}"),
        Template("{left} {op} {constant} is {a} {op} {constant}, so {name} = {value}"),
        Template("{left} {op} {right} is {a} {op} {b}, so {name} = {value}"),
    ),
    operations={"plus": "+", "minus": "-", "times": "*"},
    preface="Only the last digit of a number counts here, so 8 + 5 is 3 and 2 - 6 is 6.",
    ask="How many {name} are there?",
    statement_end=".",
    step_end=".",
    answer="{answer}.",
    worked="Let us see. {trace} So it is {answer}",
)
SURFACES: Mapping[str, Surface] = {"words": WORDS_SURFACE, "sentences": SENTENCES_SURFACE}


def surface_of(question: str) -> Surface:
    """The surface in which a question is written: one in sentences ends with a question mark."""
    return SENTENCES_SURFACE if question.rstrip().endswith("?") else WORDS_SURFACE


@lru_cache(maxsize=256)
def parse(question: str) -> Graph:
    """The graph of a question in either surface; GraphError for a text that is none.

    The last ones are kept, since all thoughts of a group are about one question.
    """
    return surface_of(question).parse(question)
