import asyncio

import pytest
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode

from qpeft.errors import InputError
from qpeft.integrations.llama_index import QpeftRerank


@pytest.fixture
def nodes(candidates):
    """Return the passages of the first query as retrieved nodes."""
    return [
        NodeWithScore(node=TextNode(text=passage.text, id_=passage.id), score=score)
        for passage, score in zip(candidates[0].passages, candidates[0].scores, strict=True)
    ]


def test_scores_and_order_are_the_offline_ones(tiny, candidates, nodes, offline, order):
    query = candidates[0].query
    found = QpeftRerank(tiny).postprocess_nodes(nodes, query_str=query.text)
    assert [node.node.node_id for node in found] == order(query.id)
    assert {node.node.node_id: node.score for node in found} == pytest.approx(offline[query.id])
    assert [node.score for node in nodes] == list(candidates[0].scores), "the nodes given keep their scores"


def test_top_n_and_async(tiny, candidates, nodes, order):
    query = candidates[0].query
    reranker = QpeftRerank(tiny, top_n=3)
    found = asyncio.run(reranker.apostprocess_nodes(nodes, query_bundle=QueryBundle(query.text)))
    assert [node.node.node_id for node in found] == order(query.id)[:3]


@pytest.mark.parametrize("mode", list(MetadataMode))
def test_metadata_mode(tiny, mode):
    node = TextNode(
        text="Salt stays behind.",
        metadata={"title": "The sea", "author": "A. Sailor"},
        excluded_embed_metadata_keys=["author"],
        excluded_llm_metadata_keys=["title"],
    )
    query = "what makes sea water salty"
    (found,) = QpeftRerank(tiny, metadata_mode=mode).postprocess_nodes([NodeWithScore(node=node)], query_str=query)
    (entry,) = tiny.rank(query, [node.get_content(metadata_mode=mode)])
    assert found.score == pytest.approx(entry["score"])
    scores = {tiny.rank(query, [node.get_content(metadata_mode=each)])[0]["score"] for each in MetadataMode}
    assert len(scores) == len(MetadataMode), "otherwise the test could not fail"


def test_without_mode_excluded_metadata_is_not_read(tiny):
    public, private = (
        TextNode(text="Salt.", metadata={"key": value}, excluded_embed_metadata_keys=["key"]) for value in ("a", "b c")
    )
    found = QpeftRerank(tiny).postprocess_nodes(
        [NodeWithScore(node=public), NodeWithScore(node=private)], query_str="why"
    )
    assert found[0].score == found[1].score


def test_works_in_a_query_engine(tiny, candidates, nodes, order):
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine

    class FirstStage(BaseRetriever):
        def _retrieve(self, query_bundle):
            return nodes

    engine = RetrieverQueryEngine.from_args(
        FirstStage(), llm=MockLLM(), node_postprocessors=[QpeftRerank(tiny, top_n=2)]
    )
    query = candidates[0].query
    assert [node.node.node_id for node in engine.query(query.text).source_nodes] == order(query.id)[:2]


def test_a_saved_form_without_the_model_is_not_opened_with_another_one(tiny):
    with pytest.raises(TypeError, match="model"):
        QpeftRerank.from_dict(QpeftRerank(tiny, top_n=2).to_dict())


def test_no_nodes_and_no_query(tiny, nodes):
    assert QpeftRerank(tiny).postprocess_nodes([], query_str="why") == []
    with pytest.raises(InputError, match="needs a query"):
        QpeftRerank(tiny).postprocess_nodes(nodes)
