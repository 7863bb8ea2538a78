"""Whether a passage holds an answer: the rule of DPR, by which open-domain retrieval is judged.

Text and answer are normalised to NFD and cut into tokens: runs of letters, digits and marks, or single characters
that are neither blank nor control. The passage has the answer if the answer's tokens stand in it in a row, whatever
their case. Titles do not count. Unlike DPR's, an answer without any token matches nothing.
"""

from __future__ import annotations

import itertools
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache

from qpeft.errors import InputError


def has_answer(text: str, answers: Sequence[str], *, regex: bool = False) -> bool:
    """Whether one of the answers stands in the text.

    Args:
        text: the passage, without its title.
        answers: accepted answers.
        regex: answers are regular expressions, searched regardless of case (CuratedTREC); one that matches only the
            empty string matches nothing.

    Raises:
        TypeError: `answers` is a string, which would be taken for a list of characters.
        InputError: an answer is not a regular expression.
    """
    if isinstance(answers, str):
        raise TypeError("answers must be a sequence of strings, not one string")
    if regex:
        normalised = unicodedata.normalize("NFD", text)
        return any(match.group() for answer in answers for match in _expression(answer).finditer(normalised))
    haystack = _joined(text)
    needles = map(_joined, answers)
    return any(len(needle) > 1 and needle in haystack for needle in needles)


def _joined(text: str) -> str:
    """Return the lower-case tokens, each between two NULs, which no token can hold."""
    tokens = _token_pattern().findall(unicodedata.normalize("NFD", text))
    return "\0" + "".join(f"{token.lower()}\0" for token in tokens)


@cache
def _token_pattern() -> re.Pattern[str]:
    r"""Return DPR's `[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]`, spelled out because `re` does not know `\p`."""
    return re.compile(f"[{_class('LNM')}]+|[^{_class('ZC')}]")


def _expression(answer: str) -> re.Pattern[str]:
    try:
        return re.compile(unicodedata.normalize("NFD", answer), re.IGNORECASE | re.MULTILINE)
    except re.error as error:
        raise InputError(f"answer {answer!r} is not a regular expression: {error}") from error


def _class(kinds: str) -> str:
    """Return the ranges of all characters whose general category begins with one of the letters."""
    ranges = []
    codes = range(sys.maxunicode + 1)
    for inside, group in itertools.groupby(codes, lambda code: unicodedata.category(chr(code))[0] in kinds):
        if inside:
            members = list(group)
            ranges.append(f"\\U{members[0]:08x}-\\U{members[-1]:08x}")
    return "".join(ranges)
