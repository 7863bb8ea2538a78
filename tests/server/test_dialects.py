"""Each client gets the fields that it expects, and the scores that the same model gives offline."""

import math

import pytest

from qpeft.types import UNREADABLE
from tiny_server import DOCUMENTS, QUERY

OBJECTS = [{"text": text} for text in DOCUMENTS]


def post(client, route, **body):
    response = client.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def expected(offline, documents=DOCUMENTS, raw=False):
    """Return (index, score) best first."""
    scores = offline(QUERY, documents)
    pairs = [(i, score if raw else math.exp(score)) for i, score in enumerate(scores)]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def assert_ranked(results, wanted, field="relevance_score"):
    assert [result["index"] for result in results] == [index for index, _ in wanted]
    for result, (_, score) in zip(results, wanted, strict=True):
        assert result[field] == pytest.approx(score, rel=1e-4)


def test_cohere_v2(client, offline):
    found = post(client, "/v2/rerank", model="tiny-qwen3", query=QUERY, documents=DOCUMENTS, top_n=3)
    assert set(found) == {"id", "model", "results", "meta", "usage"}
    assert_ranked(found["results"], expected(offline)[:3])
    assert all(set(result) == {"index", "relevance_score"} for result in found["results"])
    assert found["meta"]["api_version"] == {"version": "2", "is_experimental": False}
    assert found["meta"]["billed_units"] == {"search_units": 1}
    assert found["meta"]["tokens"] == {"input_tokens": found["usage"]["prompt_tokens"], "output_tokens": 0}


def test_cohere_v1_with_objects_and_rank_fields(client, offline):
    found = post(client, "/v1/rerank", query=QUERY, documents=OBJECTS, return_documents=True)
    assert_ranked(found["results"], expected(offline))
    assert all(result["document"] == OBJECTS[result["index"]] for result in found["results"])
    assert found["meta"]["api_version"]["version"] == "1"
    fields = [{"kind": "sea", "note": text, "n": 3, "tags": ["a", 1], "text": None} for text in DOCUMENTS]
    found = post(client, "/v1/rerank", query=QUERY, documents=fields, rank_fields=["note", "n", "tags", "none"])
    assert_ranked(found["results"], expected(offline, [f"{text} 3 a 1" for text in DOCUMENTS]))
    assert all(result["document"] == fields[result["index"]] for result in found["results"])
    titled = [{"title": "Sea", "text": text, "url": "u"} for text in DOCUMENTS]
    found = post(client, "/v1/rerank", query=QUERY, documents=titled, rank_fields=["text"])
    assert_ranked(found["results"], expected(offline))
    assert all(result["document"] == titled[result["index"]] for result in found["results"])


def test_jina(client, offline):
    body = {"model": "tiny-qwen3", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}
    found = client.post("/v1/rerank", json=body, headers={"Authorization": "Bearer any"}).json()
    assert found["model"] == "tiny-qwen3"
    assert_ranked(found["results"], expected(offline)[:2])
    assert all(result["document"] == {"text": DOCUMENTS[result["index"]]} for result in found["results"])
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 0
    bare = post(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS, return_documents=False)
    assert all("document" not in result for result in bare["results"])


def test_vllm_rerank(client, offline):
    found = post(client, "/rerank", query=QUERY, documents=DOCUMENTS, top_n=0)
    assert {"id", "model", "usage", "results"} <= set(found)
    assert_ranked(found["results"], expected(offline))
    assert all(result["document"] == {"text": DOCUMENTS[result["index"]]} for result in found["results"])
    raw = post(client, "/rerank", query=QUERY, documents=DOCUMENTS, use_activation=False)
    assert_ranked(raw["results"], expected(offline, raw=True))


def test_infinity(client, offline):
    body = {"query": QUERY, "documents": DOCUMENTS, "model": "default/not-specified", "raw_scores": False}
    found = post(client, "/rerank", **body, return_documents=True, top_n=2)
    assert set(found) == {"object", "id", "created", "model", "results", "usage"}
    assert (found["object"], type(found["created"])) == ("rerank", int)
    assert_ranked(found["results"], expected(offline)[:2])
    assert all(result["document"] == DOCUMENTS[result["index"]] for result in found["results"])
    assert all("document" not in result for result in post(client, "/rerank", **body)["results"])
    raw = post(client, "/rerank", **{**body, "raw_scores": True})
    assert_ranked(raw["results"], expected(offline, raw=True))


def test_tei(client, offline):
    found = post(client, "/rerank", query=QUERY, texts=DOCUMENTS)
    assert all(set(result) == {"index", "score"} for result in found)
    assert_ranked(found, expected(offline), "score")
    found = post(client, "/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True, return_text=True, truncate=True)
    assert_ranked(found, expected(offline, raw=True), "score")
    assert all(result["text"] == DOCUMENTS[result["index"]] for result in found)


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items")])
def test_vllm_score(client, offline, names):
    one, many = names
    found = post(client, "/score", **{one: QUERY, many: DOCUMENTS})
    assert set(found) == {"id", "object", "created", "model", "data", "usage"}
    assert set(found["usage"]) == {"prompt_tokens", "total_tokens", "completion_tokens"}
    wanted = dict(expected(offline))
    assert [(each["index"], each["object"]) for each in found["data"]] == [(i, "score") for i in range(5)]
    assert [each["score"] for each in found["data"]] == pytest.approx([wanted[i] for i in range(5)], rel=1e-4)
    queries = ["who is the king", QUERY]
    pairs = post(client, "/score", **{one: queries, many: DOCUMENTS[:2], "raw_scores": True})
    alone = [offline(query, [document])[0] for query, document in zip(queries, DOCUMENTS[:2], strict=True)]
    assert [each["score"] for each in pairs["data"]] == pytest.approx(alone, abs=1e-4)


def test_batch(client, offline):
    queries = [{"query": QUERY, "documents": DOCUMENTS}, {"query": "the old king", "documents": OBJECTS, "top_n": 1}]
    found = post(client, "/v1/rerank/batch", queries=queries, top_n=3, return_documents=True)
    assert set(found) == {"id", "model", "rankings", "usage"}
    first, second = found["rankings"]
    assert_ranked(first["results"], expected(offline)[:3])
    assert (first["index"], second["index"], len(second["results"])) == (0, 1, 1)
    assert first["results"][0]["document"] == {"text": DOCUMENTS[first["results"][0]["index"]]}
    both = sum(post(client, "/v2/rerank", **query)["usage"]["total_tokens"] for query in queries)
    assert found["usage"]["total_tokens"] == both


def test_null_is_what_was_not_given(client):
    nulls = dict.fromkeys(("model", "top_n", "max_tokens_per_doc", "return_documents", "raw_scores", "explain"))
    documents = [{"text": "the sea", "title": None}, "the sky"]
    for route in ("/v1/rerank", "/v2/rerank", "/rerank"):
        given = post(client, route, query=QUERY, documents=documents)
        with_nulls = post(client, route, query=QUERY, documents=documents, **nulls, use_activation=None)
        assert with_nulls["results"] == given["results"]
    nulls = dict.fromkeys(("model", "raw_scores", "return_text", "truncate"))
    texts = ["the sea", "the sky"]
    assert post(client, "/rerank", query=QUERY, texts=texts, **nulls) == post(
        client, "/rerank", query=QUERY, texts=texts
    )


def test_usage_is_what_the_model_read(client, lm):
    lm.forget()
    found = post(client, "/v2/rerank", query=QUERY, documents=DOCUMENTS)
    rows = [row for batch, _ in lm.batches for row in batch]
    assert found["usage"] == {"prompt_tokens": sum(map(len, rows)), "total_tokens": sum(map(len, rows))}


def test_equal_scores_keep_the_order_given(client):
    found = post(client, "/v2/rerank", query=QUERY, documents=["the sea", "the sky", "the sea", "the sky", "the sea"])
    order = [result["index"] for result in found["results"]]
    assert order in ([0, 2, 4, 1, 3], [1, 3, 0, 2, 4])


def test_a_title_counts(client):
    documents = [{"title": "the sky", "text": "is blue"}, "the sky is blue", "the sea"]
    found = post(client, "/v1/rerank", query=QUERY, documents=documents)
    scores = {result["index"]: result["relevance_score"] for result in found["results"]}
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    (titled,) = [result["document"] for result in found["results"] if result["index"] == 0]
    assert titled == documents[0]


def test_documents_without_tokens_come_last_with_probability_0(client):
    found = post(client, "/v2/rerank", query=QUERY, documents=["", "the sea", " \n", "the sky"])
    assert [result["index"] for result in found["results"]][2:] == [0, 2]
    assert [result["relevance_score"] for result in found["results"]][2:] == [0, 0]
    raw = post(client, "/v2/rerank", query=QUERY, documents=["", "the sea", "the sky"], raw_scores=True)["results"]
    assert raw[-1]["relevance_score"] == UNREADABLE < raw[-2]["relevance_score"]
    alone = post(client, "/v2/rerank", query=QUERY, documents=[""])
    assert alone["results"] == [{"index": 0, "relevance_score": 0}]
    assert alone["usage"]["total_tokens"] == 0


def test_max_tokens_per_doc_cuts_and_says_so(client, offline):
    body = {"query": QUERY, "documents": DOCUMENTS, "max_tokens_per_doc": 3}
    found = post(client, "/v2/rerank", **body, raw_scores=True)
    scores = {result["index"]: result["relevance_score"] for result in found["results"]}
    wanted = offline(QUERY, DOCUMENTS, max_passage_tokens=3)
    assert [scores[i] for i in range(5)] == pytest.approx(wanted, abs=1e-4)
    assert found["meta"]["warnings"] == ["documents that were cut to fit: 5"]
    assert "warnings" not in post(client, "/v2/rerank", query=QUERY, documents=DOCUMENTS)["meta"]
    whole = post(client, "/v2/rerank", **(body | {"max_tokens_per_doc": 0}), raw_scores=True)  # vLLM's default
    assert_ranked(whole["results"], expected(offline, raw=True))


def test_explanations_are_those_of_the_command(client, lm):
    from qpeft.analysis.explain import as_record, explain
    from qpeft.methods.query_likelihood import Config, build_scorer
    from qpeft.types import Passage, Query

    body = {"query": QUERY, "documents": ["the sea", "", "the sky is blue"], "explain": True}
    for route in ("/v1/rerank", "/v2/rerank"):
        found = {result["index"]: result for result in post(client, route, **body)["results"]}
        assert "explanation" not in found[1]
        passages = [Passage("0", "the sea"), Passage("2", "the sky is blue")]
        for index, each in zip((0, 2), explain(build_scorer(Config(), lm), Query("q", QUERY), passages), strict=True):
            wanted = as_record(each)
            assert found[index]["explanation"]["rank"] == wanted["rank"]
            assert found[index]["explanation"].keys() == wanted.keys()
            tokens = found[index]["explanation"]["query_tokens"]
            assert [token["text"] for token in tokens] == [token["text"] for token in wanted["query_tokens"]]
            mean = sum(token["log_prob"] for token in tokens) / len(tokens)
            assert found[index]["relevance_score"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_a_calibration_gives_the_probabilities(client, offline):
    model = client.app.state.service.models.find(None)
    seen = []
    model.calibration = lambda scores: seen.append(len(scores)) or [1 / (1 + math.exp(-score - 6)) for score in scores]
    try:
        found = post(client, "/v2/rerank", query=QUERY, documents=[*DOCUMENTS, ""])
        post(client, "/v2/rerank", query=QUERY, documents=[*DOCUMENTS, ""], top_n=1)
        raw = post(client, "/v2/rerank", query=QUERY, documents=[*DOCUMENTS, ""], raw_scores=True)
    finally:
        model.calibration = None
    wanted = [(i, 1 / (1 + math.exp(-score - 6))) for i, score in expected(offline, raw=True)]
    assert_ranked(found["results"], [*wanted, (5, 0.0)])
    assert seen == [5, 5]  # all that can be read, whatever comes back
    assert_ranked(raw["results"][:5], expected(offline, raw=True))


def test_info_and_models(client):
    info = client.get("/info").json()
    assert (info["model_id"], info["model_dtype"], info["max_input_length"]) == ("tiny-qwen3", "float32", 128)
    assert "reranker" in info["model_type"]
    assert info["max_client_batch_size"] == 1000
    assert info["version"]
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["root"], card["parent"]) == ("tiny-qwen3", "model", "tiny-qwen3", None)
