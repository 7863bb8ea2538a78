"""A collection of three passages, for these tests."""

import json

from qpeft.types import Passage, Query

PASSAGES = (
    Passage("p1", "The cat sat on the mat.", "Cats"),
    Passage("p2", "Café culture began in Vienna — or did it?"),
    Passage("p3", "", "Only a title"),
)
QUERIES = (
    Query("q2", "where is the cat", ("mat", "the mat")),
    Query("q1", "who drinks coffee"),
    Query("q3", "unjudged"),
)
QRELS = {"test": {"q1": {"p2": 1, "gone": 1}, "q2": {"p1": 2, "p2": 0}}, "dev": {"q1": {"p2": 1}}}


def jsonl(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)
