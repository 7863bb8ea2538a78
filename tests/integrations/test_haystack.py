import pytest
from haystack import Document, Pipeline

from qpeft.errors import ModelError, OptionError
from qpeft.integrations.haystack import QpeftRanker


@pytest.fixture
def documents(candidates):
    """Return the passages of the first query as Haystack documents."""
    return [
        Document(id=passage.id, content=passage.text, meta={"n": n}, score=score)
        for n, (passage, score) in enumerate(zip(candidates[0].passages, candidates[0].scores, strict=True))
    ]


def test_scores_and_order_are_the_offline_ones(tiny, candidates, documents, offline, order):
    query = candidates[0].query
    found = QpeftRanker(tiny).run(query=query.text, documents=documents)["documents"]
    assert [document.id for document in found] == order(query.id)
    assert {document.id: document.score for document in found} == pytest.approx(offline[query.id])
    by_id = {document.id: document for document in documents}
    for document in found:
        assert (document.content, document.meta) == (by_id[document.id].content, by_id[document.id].meta)
    assert [document.score for document in documents] == list(candidates[0].scores), "those given keep their scores"


def test_top_k_and_threshold(tiny, candidates, documents, offline, order):
    query = candidates[0].query
    ranked = order(query.id)
    third = offline[query.id][ranked[2]]
    ranker = QpeftRanker(tiny, top_k=4, score_threshold=third)

    def ids(**options):
        return [document.id for document in ranker.run(query.text, documents, **options)["documents"]]

    assert ids() == ranked[:3]
    assert ids(top_k=2) == ranked[:2]
    assert ids(score_threshold=-1000.0) == ranked[:4]
    assert ids(score_threshold=0.0) == []


def test_the_model_is_opened_by_warm_up_alone(tmp_path, saved_model, documents):
    QpeftRanker("no/such/model/anywhere")
    with pytest.raises(ModelError, match="does not exist"):
        QpeftRanker("no/such/model/anywhere").warm_up()
    ranker = QpeftRanker(str(saved_model), dtype="float32")
    ranker.warm_up()
    opened = ranker._reranker
    ranker.run("why", documents)
    assert ranker._reranker is opened


def test_a_saved_pipeline_ranks_as_before(saved_model, documents):
    pipeline = Pipeline()
    ranker = QpeftRanker(str(saved_model), top_k=3, score_threshold=-50.0, dtype="float32", template="upr")
    pipeline.add_component("ranker", ranker)
    loaded = Pipeline.loads(pipeline.dumps(), allowed_modules=["qpeft.integrations.haystack"])
    again = loaded.get_component("ranker")
    assert again.to_dict() == ranker.to_dict()
    data = {"ranker": {"query": "why is the sky blue", "documents": documents}}
    found, wanted = loaded.run(data)["ranker"]["documents"], pipeline.run(data)["ranker"]["documents"]
    assert [(d.id, d.score) for d in found] == [(d.id, d.score) for d in wanted]
    assert len(found) == 3
    assert again._reranker.facts["template"]["name"] == "upr"


def test_a_ready_reranker_cannot_be_saved(tiny):
    with pytest.raises(OptionError, match="ready reranker cannot be saved"):
        QpeftRanker(tiny).to_dict()


def test_documents_without_text_come_last(tiny, documents):
    blank = Document(id="blank", content=None, meta={"kind": "image"})
    found = QpeftRanker(tiny).run("why", [blank, *documents])["documents"]
    assert found[-1].id == "blank"
    assert QpeftRanker(tiny).run("why", [])["documents"] == []
