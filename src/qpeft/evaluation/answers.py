"""Whether a passage holds an answer: the rule of DPR, by which open-domain retrieval is judged.

Text and answer are normalised to NFD and cut into tokens: runs of letters, digits and marks, or single characters
that are neither blank nor control. The passage has the answer if the answer's tokens stand in it in a row, whatever
their case. Titles do not count. Unlike DPR's, an answer without any token matches nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
"""DPR's own pattern."""


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the accepted answers stands in the text of a passage, without its title.

    Raises:
        TypeError: `answers` is a string, which would be taken for a list of characters.
    """
    if isinstance(answers, str):
        raise TypeError("answers must be a sequence of strings, not one string")
    haystack = _joined(text)
    needles = map(_joined, answers)
    return any(len(needle) > 1 and needle in haystack for needle in needles)


def _joined(text: str) -> str:
    """Return the lower-case tokens, each between two NULs, which no token can hold."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFD", text))
    return "\0" + "".join(f"{token.lower()}\0" for token in tokens)
