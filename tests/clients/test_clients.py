"""Clients of other people's rerank APIs, pointed at `qpeft serve`: what they get, and what they raise."""

import math

import cohere
import httpx
import pytest
import rerankers
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaCohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

# cohere leaves its connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def by_cohere_v1(url, key, model, query, documents, top_n):
    client = cohere.Client(key, base_url=url)
    found = client.rerank(model=model, query=query, documents=documents, top_n=top_n, return_documents=True).results
    assert [each.document.text for each in found] == [documents[each.index] for each in found]
    return [(each.index, each.relevance_score) for each in found]


def by_cohere_v2(url, key, model, query, documents, top_n):
    found = cohere.ClientV2(key, base_url=url).rerank(model=model, query=query, documents=documents, top_n=top_n)
    assert found.meta.api_version.version == "2"
    return [(each.index, each.relevance_score) for each in found.results]


def by_langchain_cohere(url, key, model, query, documents, top_n):
    compressor = CohereRerank(model=model, cohere_api_key=key, base_url=url, top_n=top_n)
    given = [Document(text, metadata={"index": index}) for index, text in enumerate(documents)]
    found = compressor.compress_documents(given, query)
    return [(each.metadata["index"], each.metadata["relevance_score"]) for each in found]


def through_llama_index(postprocessor, query, documents):
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(index))) for index, text in enumerate(documents)]
    found = postprocessor.postprocess_nodes(nodes, query_str=query)
    return [(int(each.node.node_id), each.score) for each in found]


def by_llama_index_cohere(url, key, model, query, documents, top_n):
    return through_llama_index(LlamaCohereRerank(model=model, api_key=key, base_url=url, top_n=top_n), query, documents)


def by_llama_index_jina(url, key, model, query, documents, top_n):
    reranker = JinaRerank(model=model, api_key=key, base_url=f"{url}/v1", top_n=top_n)
    return through_llama_index(reranker, query, documents)


def by_llama_index_tei(url, key, model, query, documents, top_n):
    reranker = TextEmbeddingInference(base_url=url, auth_token=f"Bearer {key}", top_n=top_n)
    return through_llama_index(reranker, query, documents)


def by_rerankers(provider, path):
    def rerank(url, key, model, query, documents, top_n):
        ranker = rerankers.Reranker(model, model_type=provider, api_key=key, url=url + path, verbose=0)
        found = ranker.rank(query, documents).top_k(top_n)
        return [(each.document.doc_id, each.score) for each in found]

    return rerank


def by_httpx(url, key, model, query, documents, top_n):
    response = httpx.post(
        f"{url}/v1/rerank",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": model, "query": query, "documents": documents, "top_n": top_n, "raw_scores": True},
    )
    results = response.raise_for_status().json()["results"]
    return [(each["index"], math.exp(each["relevance_score"])) for each in results]


CLIENTS = {
    "cohere v1": by_cohere_v1,
    "cohere v2": by_cohere_v2,
    "langchain-cohere": by_langchain_cohere,
    "llama-index cohere": by_llama_index_cohere,
    "llama-index jina": by_llama_index_jina,
    "llama-index tei": by_llama_index_tei,
    "rerankers cohere": by_rerankers("cohere", "/v1/rerank"),
    "rerankers jina": by_rerankers("jina", "/v1/rerank"),
    "rerankers tei": by_rerankers("text-embeddings-inference", "/rerank"),
    "httpx": by_httpx,
}
WITHOUT_MODEL = {"llama-index tei"}
ASKED = [(client, None) for client in CLIENTS]
ASKED += [(client, "tiny-lm-qpeft-a") for client in CLIENTS if client not in WITHOUT_MODEL]


@pytest.mark.parametrize(("client", "adapter"), ASKED)
def test_clients_get_the_offline_ranking(client, adapter, url, key, asked, offline):
    ranked = offline(adapter)
    model = "tiny-lm" if adapter is None else f"tiny-lm:{adapter}"
    for top_n in (len(ranked), 2):
        found = CLIENTS[client](url, key, model, *asked, top_n)
        assert [index for index, _ in found] == [index for index, _ in ranked][:top_n]
        assert [score for _, score in found] == pytest.approx([score for _, score in ranked][:top_n], rel=1e-4)


def test_the_adapter_makes_a_difference(offline):
    assert dict(offline("tiny-lm-qpeft-a")) != pytest.approx(dict(offline(None)), rel=1e-3)


COHERE = ("cohere v1", "cohere v2", "langchain-cohere", "llama-index cohere")
WRONG_KEY = {
    **dict.fromkeys(COHERE, cohere.UnauthorizedError),
    "llama-index jina": RuntimeError,  # what it raises for what Jina's API refuses
    "httpx": httpx.HTTPStatusError,
}
UNKNOWN_MODEL = {**WRONG_KEY, **dict.fromkeys(COHERE, cohere.NotFoundError)}


@pytest.mark.parametrize("client", sorted(WRONG_KEY))
def test_a_wrong_key_is_the_clients_own_error(client, url, asked):
    with pytest.raises(WRONG_KEY[client], match=r"key|401"):
        CLIENTS[client](url, "wrong", "tiny-lm", *asked, 2)


@pytest.mark.parametrize("client", sorted(UNKNOWN_MODEL))
def test_an_unknown_model_is_the_clients_own_error(client, url, key, asked):
    with pytest.raises(UNKNOWN_MODEL[client], match=r"no model 'tiny-ml'|404"):
        CLIENTS[client](url, key, "tiny-ml", *asked, 2)


@pytest.mark.parametrize("client", ["llama-index tei", "rerankers jina", "rerankers tei"])
def test_clients_that_do_not_look_at_the_status_fail_all_the_same(client, url, asked):
    with pytest.raises((KeyError, TypeError, AssertionError)):
        CLIENTS[client](url, "wrong", "tiny-lm", *asked, 2)


def test_documents_with_fields(url, key):
    documents = [{"title": "Sea", "text": "Salt stays."}, {"title": "Bread", "text": "Yeast."}]
    client = cohere.Client(key, base_url=url)
    both = client.rerank(model="tiny-lm", query="why salt", documents=documents, rank_fields=["title", "text"])
    texts = ["Sea Salt stays.", "Bread Yeast."]
    plain = client.rerank(model="tiny-lm", query="why salt", documents=texts)
    assert [each.relevance_score for each in both.results] == [each.relevance_score for each in plain.results]


def test_huggingface_hub_asks_for_health_and_facts(url, key):
    client = InferenceClient(url, provider="hf-inference", token=key)
    assert client.health_check()
    facts = client.get_endpoint_info()
    assert facts["model_id"] == "tiny-lm"
    assert facts["max_client_batch_size"] == 1000
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(url, provider="hf-inference", token="wrong").get_endpoint_info()
