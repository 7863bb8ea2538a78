"""Candidates from the embedded collection, for tests of what reranks them through other libraries."""

import functools

from qpeft import Candidates, Passage
from qpeft.data.collection import open_collection
from qpeft.retrieval.bm25 import BM25


@functools.cache
def mini_candidates(queries=5, depth=6, *, titles=False):
    """Return BM25's first passages for those test queries of mini for which it finds something relevant."""
    mini = open_collection("mini")
    asked = list(mini.queries("test").values())
    qrels = mini.qrels("test")
    found = []
    for query, ranking in zip(asked, BM25(mini.passages.values()).retrieve(asked, depth), strict=True):
        passages = [mini.passages[hit.passage_id] for hit in ranking.hits]
        if not any(qrels[query.id].get(passage.id, 0) for passage in passages):
            continue
        if not titles:
            passages = [Passage(passage.id, passage.text) for passage in passages]
        found.append(Candidates(query, tuple(passages), tuple(hit.score for hit in ranking.hits)))
    return found[:queries]


def mini_qrels():
    """Return the test judgements of mini."""
    return open_collection("mini").qrels("test")
