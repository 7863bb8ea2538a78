import asyncio

import pytest
from langchain_core.documents import Document

from qpeft.errors import OptionError, QueryError
from qpeft.integrations.langchain import QpeftRerank


@pytest.fixture
def documents(candidates):
    """Return the passages of the first query as LangChain documents."""
    return [Document(p.text, metadata={"source": f"{p.id}.txt", "nested": {}}, id=p.id) for p in candidates[0].passages]


def test_scores_and_order_are_the_offline_ones(tiny, candidates, documents, offline, order):
    query = candidates[0].query
    found = QpeftRerank(tiny).compress_documents(documents, query.text)
    assert [document.id for document in found] == order(query.id)
    assert {document.id: document.metadata["relevance_score"] for document in found} == pytest.approx(offline[query.id])
    by_id = {document.id: document for document in documents}
    for document in found:
        given = by_id[document.id]
        assert document.page_content == given.page_content
        assert document.metadata == {**given.metadata, "relevance_score": document.metadata["relevance_score"]}
        assert "relevance_score" not in given.metadata


def test_top_n(tiny, candidates, documents, order):
    query = candidates[0].query
    found = QpeftRerank(tiny, top_n=2).compress_documents(documents, query.text)
    assert [document.id for document in found] == order(query.id)[:2]
    with pytest.raises(OptionError, match="top_k is 0"):
        QpeftRerank(tiny, top_n=0).compress_documents(documents, query.text)


def test_concurrent_calls_do_not_disturb_each_other(tiny, candidates, offline):
    compressor = QpeftRerank(tiny)

    async def all_at_once():
        return await asyncio.gather(
            *(
                compressor.acompress_documents([Document(p.text, id=p.id) for p in item.passages], item.query.text)
                for item in candidates
            )
        )

    for item, found in zip(candidates, asyncio.run(all_at_once()), strict=True):
        scores = {document.id: document.metadata["relevance_score"] for document in found}
        assert scores == pytest.approx(offline[item.query.id])


def test_works_as_the_compressor_of_a_retriever(tiny, candidates, order):
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnableLambda

    query = candidates[0].query

    class FirstStage(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return [Document(passage.text, id=passage.id) for passage in candidates[0].passages]

    compressor = QpeftRerank(tiny)
    chain = RunnableLambda(lambda text: compressor.compress_documents(FirstStage().invoke(text), text))
    assert [document.id for document in chain.invoke(query.text)] == order(query.id)


def test_the_model_can_be_named(saved_model, documents):
    found = QpeftRerank(str(saved_model), top_n=1, dtype="float32").compress_documents(documents, "why is the sky blue")
    assert len(found) == 1


def test_nothing_in_nothing_out_but_no_query_is_an_error(tiny, documents):
    assert QpeftRerank(tiny).compress_documents([], "why") == []
    with pytest.raises(QueryError):
        QpeftRerank(tiny).compress_documents(documents, " ")
