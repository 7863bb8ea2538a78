"""Whether a passage holds an answer: the rule of DPR, by which open-domain retrieval is judged.

Text and answer are normalised to NFD and cut into tokens: runs of letters, digits and marks, or single characters
that are neither blank nor control. The passage has the answer if the answer's tokens stand in it in a row, whatever
their case. Titles do not count. Unlike DPR's, an answer without any token matches nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

import regex

from qpeft.types import Qrels, Run

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


def judge(runs: Iterable[Run], label: Callable[[str, str], bool]) -> Qrels:
    """Label every ranked passage, as the open-domain QA protocols do, and return the labels as qrels.

    With `label` a test for the answer string (`has_answer`), this is the Q-PEFT protocol: hand the result to
    `evaluate` in place of the collection's qrels. A passage that several runs rank is labelled once.

    Args:
        runs: the first-stage run alone is enough where the others rerank its candidates.
        label: (query id, passage id) → whether the passage is relevant.

    Returns:
        Grade 1 or 0 for each candidate. A query that no run ranks is not in it, and would not be counted.
    """
    grades: dict[str, dict[str, int]] = {}
    for run in runs:
        for query_id, ranking in run.items():
            of_query = grades.setdefault(query_id, {})
            for hit in ranking.hits:
                if hit.passage_id not in of_query:
                    of_query[hit.passage_id] = int(label(query_id, hit.passage_id))
    return grades


def _joined(text: str) -> str:
    """Return the lower-case tokens, each between two NULs, which no token can hold."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFD", text))
    return "\0" + "".join(f"{token.lower()}\0" for token in tokens)
