"""BEIR needs no module of its own: its `Rerank` calls `predict` of a CrossEncoder."""

import pytest

pytest.importorskip("beir", reason="needs qpeft[mteb]")
from beir.reranking import Rerank

from qpeft.integrations.sentence_transformers import CrossEncoder


def test_scores_are_the_offline_ones(tiny, candidates, offline):
    corpus = {p.id: {"title": p.title, "text": p.text} for item in candidates for p in item.passages}
    queries = {item.query.id: item.query.text for item in candidates}
    first_stage = {
        item.query.id: dict(zip((p.id for p in item.passages), item.scores, strict=True)) for item in candidates
    }
    found = Rerank(CrossEncoder(tiny), batch_size=4).rerank(corpus, queries, first_stage, top_k=4)
    assert found.keys() == offline.keys()
    for query_id, scores in found.items():
        assert len(scores) == 4
        assert scores == pytest.approx({passage_id: offline[query_id][passage_id] for passage_id in scores})
